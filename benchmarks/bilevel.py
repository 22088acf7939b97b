"""Measure single-loop methods on a stochastic bilevel quadratic with a known solution.

Run: `python -m benchmarks.bilevel [--quick] [--out FILE]` (a minute on one core; float64).

256 examples, 50 parameters and 50 hyperparameters, blocks of 8. Train: w'A_i w / 2 + w'B_i h +
c_i'w; valid: w'P_i w / 2 + e_i'w + h'Q_i h / 2 + f_i'h. A round is one training step, one
product (where there is one) and one outer step, all of constant size. Rows: rounds, the squared
norm of the exact hypergradient, gradient evaluations (products count 2), milliseconds per round.
Target for SABA: 2.6e-7 after 3,000 rounds and 4.9e-12 after 6,000, what benchmark_bilevel's reaches
on another quadratic of this size.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from benchmarks import command

EXAMPLES, DIM, SIZE = 256, 50, 8
BLOCKS = EXAMPLES // SIZE
# What runs, and its gradient evaluations per round.
METHODS: dict[str, tuple[hg.Estimator, int]] = {
    "SABA": (hg.SABA(0.1, BLOCKS, BLOCKS), 8),
    "SOBA": (hg.Implicit(hg.Richardson(1, 0.1), batches="last"), 8),
    "SOBA, decaying": (
        hg.Implicit(hg.Richardson(1, lambda t: 0.1 / jnp.sqrt(1 + t / 100)), batches="last"),
        8,
    ),
    "AmIGO": (hg.Implicit(hg.Richardson(10, 0.1), batches="fresh"), 36),
    "F2SA": (hg.F2SA(0.1, 10.0), 5),
}


def problem_of(rng: Any) -> tuple[hg.Problem, Any, Any, Any]:
    """Problem, train, valid, and the squared norm of the exact hypergradient."""

    def positive(scale: float, least: float) -> np.ndarray:
        root = rng.normal(size=(EXAMPLES, DIM, DIM)) / np.sqrt(DIM)
        return scale * np.einsum("nij,nkj->nik", root, root) + least * np.eye(DIM)

    a, p, q = positive(1.0, 0.5), positive(0.3, 0.3), positive(0.3, 0.3)
    b = rng.normal(size=(EXAMPLES, DIM, DIM)) / np.sqrt(DIM)
    c, e, f = rng.normal(size=(3, EXAMPLES, DIM))

    def bent(x: jax.Array, matrices: jax.Array) -> jax.Array:
        return 0.5 * jnp.einsum("i,nij,j->n", x, matrices, x)

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        a, b, c = batch
        return jnp.mean(bent(w, a) + jnp.einsum("i,nij,j->n", w, b, hyper["h"]) + c @ w)

    def valid_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        p, e, q, f = batch
        return jnp.mean(bent(w, p) + e @ w + bent(hyper["h"], q) + f @ hyper["h"])

    problem = hg.bilevel(
        lambda key: jnp.zeros(DIM), train_loss, valid_loss, lambda hyper: optax.sgd(0.1)
    )
    am, bm, cm, pm, em, qm, fm = (x.mean(0) for x in (a, b, c, p, e, q, f))

    def exact(h: np.ndarray) -> float:
        w = -np.linalg.solve(am, bm @ h + cm)
        return float(np.sum((qm @ h + fm - bm.T @ np.linalg.solve(am, pm @ w + em)) ** 2))

    train, valid = (tuple(map(jnp.asarray, x)) for x in ((a, b, c), (p, e, q, f)))
    return problem, hg.Minibatches(train, SIZE), hg.Minibatches(valid, SIZE), exact


def measure(name: str, rounds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of one method."""
    problem, train, valid, exact = problem_of(np.random.default_rng(0))
    (estimator, cost), key = METHODS[name], jax.random.key(0)
    hyper = {"h": jnp.ones(DIM)}
    inner = problem.init(hyper, key)
    memory = estimator.init(hg.Window(problem, inner, None, None, key), hyper)

    def round_(_: Any, carry: Any) -> Any:
        hyper, inner, memory = carry
        window = hg.Window(problem, inner, train, valid, key)
        estimate, memory = estimator.estimate(window, hyper, memory)
        hyper = jax.tree.map(lambda h, g: h - 0.05 * g, hyper, estimate.grad)
        return hyper, estimate.inner, memory

    run = jax.jit(lambda carry, n: jax.lax.fori_loop(0, n, round_, carry))
    carry = jax.block_until_ready(run((hyper, inner, memory), 0))
    rows, done = [], 0
    for target in rounds:
        begin = time.perf_counter()
        carry = jax.block_until_ready(run(carry, target - done))
        seconds = (time.perf_counter() - begin) / (target - done)
        done, square = target, exact(np.asarray(carry[0]["h"]))
        row = {"method": name, "rounds": done, "square": square, "evaluations": cost * done}
        rows.append({**row, "seconds": seconds})
        cells = f"{name} | {done} | {square:.1e} | {cost * done} | {1e3 * seconds:.2f}"
        print(f"| {cells} |", flush=True)
    return rows


def main(quick: bool = False, out: str | None = None) -> list[dict[str, Any]]:
    """Print the table; return its rows."""
    rounds = (300, 600) if quick else (1000, 3000, 6000)
    print("| method | rounds | squared norm | evaluations | ms per round |\n|---|---|---|---|---|")
    with jax.enable_x64(True):
        rows = [row for name in METHODS for row in measure(name, rounds)]
    if out:
        Path(out).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    command.run(main, __doc__)
