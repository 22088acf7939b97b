"""Draws the pictures of docs/failures.md into docs/pictures/.

Run: `python -m docs.pictures` from the repository's root (seconds of processor time). The figures
of the third are those of docs/experiments_data_cleaning.md, all others are computed here.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hypergrad as hg
from benchmarks.evolution import rippled
from benchmarks.horizon import NUM_STEPS, noisy_quadratic
from hypergrad.plotting.panels import PALETTE

FOLDER = Path(__file__).parent / "pictures"
BLUE, ORANGE, GREEN = PALETTE[0], PALETTE[1], PALETTE[2]


def two_panels() -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    return figure, figure.subplots(1, 2)


def save(figure: Figure, name: str) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, linewidth=0.5)
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=120)


def short_horizon() -> None:
    """The rate that one-step windows lead to, and what it costs beside the best constant rate."""
    problem, key = noisy_quadratic(), jax.random.key(0)
    train, valid = jnp.zeros((NUM_STEPS, 1)), jnp.zeros(1)
    rates = jnp.logspace(-4, 0, 401)

    def losses(rate: jax.Array) -> jax.Array:
        def step(inner: Any, _: Any) -> Any:
            inner = problem.step(inner, {"lr": rate}, None, key)
            return inner, problem.valid_loss(inner.params, None, None, key)

        return jax.lax.scan(step, problem.init({}, key), length=NUM_STEPS)[1]

    table = np.asarray(jax.jit(jax.vmap(losses))(rates))  # [rates, steps]
    best = int(table[:, -1].argmin())
    space = hg.Space({"lr": hg.Float(1e-5, 1.9, scale="log")})
    outer = optax.adam(0.03, 0.3, 0.9, 1e-30)
    tuner = hg.alternating(problem, space, hg.Unrolled(window=1), outer)

    def update(state: Any, _: Any) -> Any:
        state, info = tuner.update(state, train[:1], valid)
        return state, info.hyper["lr"]

    start = tuner.init({"lr": float(rates[best])}, key)
    greedy = np.asarray(jax.jit(lambda s: jax.lax.scan(update, s, length=NUM_STEPS))(start)[1])
    # What it ended with, as a constant: the mean over the outer optimiser's last swings.
    end = int(np.abs(np.asarray(rates) - np.exp(np.log(greedy[-100:]).mean())).argmin())
    steps = np.arange(1, NUM_STEPS + 1)
    figure, (left, right) = two_panels()
    left.plot(steps, greedy, color=ORANGE, linewidth=1, label="tuned on windows of one step")
    left.axhline(rates[best], color=BLUE, linestyle="--", label="best constant rate")
    left.set(yscale="log", xlabel="training step", ylabel="learning rate")
    right.plot(steps, table[end], color=ORANGE, label=f"constant {rates[end]:.3f}: where it ended")
    right.plot(steps, table[best], "--", color=BLUE, label=f"constant {rates[best]:.2f}: the best")
    right.set(yscale="log", xlabel="training step", ylabel="expected loss")
    for axis in (left, right):
        axis.legend(frameon=False)
    save(figure, "short_horizon")


def chaos() -> None:
    """Validation loss and hypergradient of 100 steps over the learning rate."""
    with jax.enable_x64(True):
        problem, key = rippled(), jax.random.key(0)
        train, valid = jnp.zeros((100, 1)), jnp.zeros(1)
        rates = jnp.logspace(-2, np.log10(1.5), 401)

        def run(rate: jax.Array) -> Any:
            hyper = {"log_rate": jnp.log(rate), "centre": jnp.asarray(0.0)}
            estimate = hg.hypergradient(problem, hyper, None, train, valid, key)
            norm = jnp.sqrt(sum(g**2 for g in jax.tree.leaves(estimate.grad)))
            return estimate.loss, norm, estimate.info["growth"]

        loss, norm, growth = (np.asarray(x) for x in jax.jit(lambda r: jax.lax.map(run, r))(rates))
    figure, (left, right) = two_panels()
    left.plot(rates, loss, color=BLUE, linewidth=1)
    left.set(xscale="log", xlabel="learning rate", ylabel="validation loss after 100 steps")
    right.plot(rates, norm, color=BLUE, linewidth=1, label="norm of the hypergradient")
    right.plot(rates, growth, "--", color=ORANGE, linewidth=1, label="growth of the adjoint")
    right.axhline(hg.Trust().max_growth, color=GREEN, linestyle=":", label="Trust.max_growth")
    right.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="norm, growth")
    right.set_yticks([10.0**power for power in range(0, 81, 20)])
    right.minorticks_off()
    right.legend(frameon=False)
    save(figure, "chaos")


def overfitting() -> None:
    """599 data weights tuned on ever fewer images, from docs/experiments_data_cleaning.md."""
    images = [25, 50, 100, 300, 599]
    gap, worst = [-0.235, 0.474, 0.844, 0.960, 0.988], [-0.487, 0.011, 0.697, 0.953, 0.954]
    loss = [0.034, 0.052, 0.096, 0.141, 0.161]
    figure, (left, right) = two_panels()
    left.plot(images, loss, "o-", color=ORANGE)
    left.set(ylabel="validation loss at the end", ylim=(0, 0.18))
    right.plot(images, gap, "o-", color=BLUE, label="median of 5 seeds")
    right.plot(images, worst, "v:", color=GREEN, label="worst")
    right.axhline(0, color="black", linewidth=0.8)
    right.annotate("no cleaning", (230, 0.04), fontsize=9)
    right.set(ylabel="share of the test gap closed", ylim=(-0.55, 1.1))
    right.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="validation images, for 599 hyperparameters")
        axis.set_xticks(images, [str(n) for n in images])
        axis.minorticks_off()
    save(figure, "overfitting")


def adams_square_root() -> None:
    """A learning rate's hypergradient through 30 Adam steps in float32, one input scaled to 0."""
    key, exponents = jax.random.key(0), np.arange(0, 31, 2)
    x = jax.random.normal(key, (64, 8))
    y = x[:, 1:] @ jnp.arange(1.0, 8.0)

    def loss(w: jax.Array, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def by_hand(eps_root: float) -> hg.Problem:
        """Adam as optax has it, without the floor that `bilevel` gives zero gradients."""

        def adam(hyper: Any) -> optax.GradientTransformation:
            return optax.adam(hyper["rate"], eps_root=eps_root)

        def init(hyper: Any, key: Any) -> hg.Inner:
            w = jnp.zeros(8)
            return hg.Inner(w, adam(hyper).init(w), jnp.int32(0), jnp.float32(0))

        def step(inner: hg.Inner, hyper: Any, batch: Any, key: Any) -> hg.Inner:
            value, grads = jax.value_and_grad(loss)(inner.params, hyper, batch, key)
            updates, opt_state = adam(hyper).update(grads, inner.opt_state)
            return hg.Inner(inner.params + updates, opt_state, inner.step + 1, value)

        return hg.Problem(init, step, loss, loss)

    def grads(problem: hg.Problem) -> np.ndarray:
        def grad(scale: jax.Array) -> jax.Array:
            inputs = x.at[:, 0].multiply(scale)
            train = jax.tree.map(
                lambda a: jnp.broadcast_to(a[:48], (30, *a[:48].shape)), (inputs, y)
            )
            valid = (inputs[48:], y[48:])
            return hg.hypergradient(problem, {"rate": 0.1}, None, train, valid, key).grad["rate"]

        scales = jnp.array([*(10.0**-exponents), 0.0], jnp.float32)
        return np.asarray(jax.jit(lambda s: jax.lax.map(grad, s))(scales))

    bilevel = hg.bilevel(lambda key: jnp.zeros(8), loss, loss, lambda h: optax.adam(h["rate"]))
    places = np.array([*exponents, 34])
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axis = figure.subplots()
    rows = {
        "optax.adam by hand": by_hand(0.0),
        "optax.adam by hand,\neps_root=1e-20": by_hand(1e-20),
        "optax.adam in bilevel": bilevel,
    }
    for height, (name, problem) in enumerate(rows.items()):
        finite = np.isfinite(grads(problem))
        print(name, dict(zip(places.tolist(), finite.tolist(), strict=True)))
        here = np.full(len(places), height)
        axis.plot(places[finite], here[finite], "o", color=BLUE, label="finite")
        axis.plot(places[~finite], here[~finite], "X", color=ORANGE, markersize=8, label="NaN")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside upper right", ncols=2, frameon=False)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xticks([0, 8, 16, 24, 30, 34], ["1", "1e-8", "1e-16", "1e-24", "1e-30", "0"])
    axis.set(ylim=(-0.5, len(rows) - 0.5), xlabel="scale of one of eight inputs")
    save(figure, "adams_square_root")


def main() -> None:
    """Draw all."""
    for draw in (short_horizon, chaos, overfitting, adams_square_root):
        draw()


if __name__ == "__main__":
    main()
