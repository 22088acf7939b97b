"""Measure what a short horizon does to a hypergradient: truncation bias, and Wu's noisy quadratic.

Run: `python -m benchmarks.horizon` (about a minute on one core; `main(quick=True)` the same).

`truncation`: a diagonal quadratic under gradient descent, hypergradient in its target; relative
error of a window of K steps against all steps. It falls as (1 - lr mu)^K, mu the smallest
curvature; the fitted slope over that of the law, target within 5%.
`wu`: the noisy quadratic of Wu et al. 2018: 100 dimensions of curvature 1/1000 to 1 under SGD whose
targets are noise of variance 0.01, in closed form for the mean and the variance of every weight, so
that the loss is the expected one. 1000 steps from 1. The learning rate is tuned online with a
window of one step (greedy) and by `hypergradient_descent` on drawn noise, both from the best
constant one, and over whole runs, from a thirtieth of it. Columns: the learning rate at the end,
that over the best constant one (found on a grid), and the loss after 1000 steps at that constant
rate. Targets: greedy at most a tenth of the best, whole runs within a factor of 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

RATE, CURVATURES = 0.1, (0.2, 0.5, 1.0)
NUM_STEPS, NOISE = 1000, 0.01
H = jnp.logspace(-3, 0, 100)


def truncation() -> list[tuple[int, float]]:
    """Rows (window, relative error), and the slope below them."""
    with jax.enable_x64(True):
        curvature = jnp.array(CURVATURES)
        problem = hg.bilevel(
            lambda key: jnp.zeros(3),
            lambda w, h, batch, key: 0.5 * jnp.sum(curvature * (w - h["target"]) ** 2),
            lambda w, h, batch, key: 0.5 * jnp.sum((w - 1) ** 2),
            lambda h: optax.sgd(RATE),
        )
        hyper, train = {"target": jnp.full(3, 2.0)}, jnp.zeros((2000, 1))
        arguments = (problem, hyper, None, train, jnp.zeros(1), jax.random.key(0))
        full = hg.hypergradient(*arguments).grad["target"]
        rows = []
        for window in (50, 100, 150, 200):
            grad = hg.hypergradient(*arguments, hg.Unrolled(window=window)).grad["target"]
            error = float(jnp.linalg.norm(grad - full) / jnp.linalg.norm(full))
            rows.append((window, error))
            print(f"window {window:4d}   relative error {error:.2e}")
    slope = np.polyfit([w for w, _ in rows[1:]], np.log([e for _, e in rows[1:]]), 1)[0]
    law = np.log(1 - RATE * min(CURVATURES))
    missed = "" if abs(slope / law - 1) <= 0.05 else "   MISSED"
    print(f"slope over that of (1 - lr mu)^K: {slope / law:.4f}, target within 5%{missed}")
    return rows


class Moments(NamedTuple):
    """The mean and the variance of every weight; judged by the expected loss."""

    params: Any
    step: jax.Array


def noisy_quadratic() -> hg.Problem:
    """SGD on 1/2 sum_i h_i (w_i - c_i)^2 with c_i ~ N(0, NOISE), in the moments of w."""

    def init(hyper: Any, key: jax.Array) -> Moments:
        return Moments({"mean": jnp.ones(100), "variance": jnp.zeros(100)}, jnp.int32(0))

    def step(inner: Moments, hyper: Any, batch: Any, key: jax.Array) -> Moments:
        keep, p = 1 - hyper["lr"] * H, inner.params
        variance = keep**2 * p["variance"] + (hyper["lr"] * H) ** 2 * NOISE
        return Moments({"mean": keep * p["mean"], "variance": variance}, inner.step + 1)

    def loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(H * (params["mean"] ** 2 + params["variance"]))

    return hg.Problem(init, step, loss, loss)


def baydin(start: float) -> float:
    """The rate that `hypergradient_descent` ends with, on the same quadratic with drawn noise."""
    optimizer = hg.hypergradient_descent(optax.sgd, start, 0.02, "multiplicative")

    def step(carry: Any, key: jax.Array) -> Any:
        w, state = carry
        target = jnp.sqrt(NOISE) * jax.random.normal(key, w.shape)
        updates, state = optimizer.update(H * (w - target), state, w)
        return (w + updates, state), None

    begun = (jnp.ones(100), optimizer.init(jnp.ones(100)))
    keys = jax.random.split(jax.random.key(1), NUM_STEPS)
    return float(jax.lax.scan(step, begun, keys)[0][1].learning_rate)


def wu() -> list[tuple[str, float, float, float]]:
    """Rows (method, learning rate, over the best, final loss at it)."""
    problem, key = noisy_quadratic(), jax.random.key(0)
    space = hg.Space({"lr": hg.Float(1e-5, 1.9, scale="log")})
    train, valid = jnp.zeros((NUM_STEPS, 1)), jnp.zeros(1)

    @jax.jit
    def final(lr: jax.Array) -> jax.Array:
        hyper = {"lr": lr}
        end = hg.rollout(problem, hyper, problem.init(hyper, key), train, key)
        return problem.valid_loss(end.params, hyper, None, key)

    grid = jnp.logspace(-4, 0, 401)
    best = float(grid[jnp.argmin(jax.vmap(final)(grid))])
    greedy = hg.alternating(
        problem, space, hg.Unrolled(window=1), optax.adam(0.03, 0.3, 0.9, 1e-30)
    )
    state, update = greedy.init({"lr": best}, key), jax.jit(greedy.update)
    for _ in range(NUM_STEPS):
        state, info = update(state, train[:1], valid)
    rows = [("best constant", best), ("window 1, online", float(info.hyper["lr"]))]
    rows += [("hypergradient descent", baydin(best))]
    whole = hg.restarting(problem, space, hg.Unrolled())
    state, update = whole.init({"lr": best / 30}, key), jax.jit(whole.update)
    for _ in range(30):
        state, info = update(state, train, valid)
    rows.append(("whole runs, from 1/30", float(whole.best(state)["lr"])))
    print(f"{'':24}{'lr':>10}{'/ best':>10}{'loss':>10}")
    table = [(name, lr, lr / best, float(final(jnp.float32(lr)))) for name, lr in rows]
    for row in table:
        print("{:24}{:10.4f}{:10.3f}{:10.4f}".format(*row))
    missed = [] if table[1][2] <= 0.1 else ["greedy above a tenth"]
    missed += [] if 0.5 <= table[3][2] <= 2 else ["whole runs off by more than 2"]
    print("MISSED: " + ", ".join(missed) if missed else "both targets met")
    return table


def main(quick: bool = False) -> dict[str, Any]:
    """Print and return both tables."""
    return {"truncation": truncation(), "wu": wu()}


if __name__ == "__main__":
    main()
