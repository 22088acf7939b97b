"""Measure a learned response against differentiated steps: dropout and decay of a small network.

Run: `python -m benchmarks.self_tuning [--quick] [--seeds N] [--methods NAME ...]` (two
minutes of one core).

digits-200 (`examples/digits200.py`): three L2 coefficients and two dropout rates, learning rate and
momentum fixed. Every method is one run of 500 steps with an outer step (Adam, .04) each 10, from
L2 1e-6 and no dropout; then what it found is frozen, and fresh networks trained under them.
`evaluations`: gradient evaluations of the tuned run. `its own`: the test loss of the run's own
network; `frozen`: the test loss of 3 fresh networks; both the median and the worst over seeds.
Target: `SelfTuning` at or below `Unrolled` at the same cost.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from examples import digits200 as task

RATE = {"learning_rate": 1e-2, "momentum": 0.9}
WINDOW = 10
START = {"l2": np.full(3, 1e-6, np.float32), "dropout": np.full(2, 0.05, np.float32)}
SPACE = hg.Space({"l2": hg.Float(1e-6, 1.0, scale="log"), "dropout": hg.Float(0.0, 0.8)})
PROBLEM = task.PROBLEM._replace(
    init=lambda hyper, key: task.PROBLEM.init(hyper | RATE, key),
    step=lambda inner, hyper, batch, key: task.PROBLEM.step(inner, hyper | RATE, batch, key),
)
# What runs, and its gradient evaluations per update.
METHODS: dict[str, tuple[hg.Estimator, int]] = {
    "Unrolled(window=1)": (hg.Unrolled(window=1), WINDOW + 2),
    "Unrolled()": (hg.Unrolled(), 3 * WINDOW),
    'SelfTuning("full")': (hg.SelfTuning(optax.adam(3e-3)), 3 * WINDOW + 5),
    'SelfTuning("units")': (hg.SelfTuning(optax.adam(3e-3), form="units"), 3 * WINDOW + 5),
    "F2SA": (hg.F2SA(0.03, 30.0), 3 * WINDOW + 2),
}


def frozen_loss(hyper: Any, data: task.Data) -> float:
    """The mean test loss of fresh networks trained under constant values."""
    return task.fresh_test_loss(task.constant(hyper | RATE), data, seeds=3)


def tuned(estimator: hg.Estimator, data: task.Data, seed: int, steps: int) -> tuple[float, Any]:
    """The test loss of one tuned run's own network, and what it found."""
    tuner = hg.alternating(PROBLEM, SPACE, estimator, optax.adam(0.04, 0.5, 0.95))
    state = tuner.init(START, jax.random.key(seed))
    train = hg.Minibatches(data.train, task.BATCH, WINDOW)

    @jax.jit
    def run(state: Any) -> Any:
        step = lambda state, _: (tuner.update(state, train, data.valid)[0], None)  # noqa: E731
        return jax.lax.scan(step, state, length=steps // WINDOW)[0]

    state = run(state)
    params = state.inner.params
    return float(task.valid_loss(params, None, data.test, jax.random.key(0))), tuner.best(state)


def main(quick: bool = False, seeds: int = 3, names: Any = None) -> dict[str, Any]:
    """Print the table; returns the frozen losses by method."""
    data, steps = task.load(), 50 if quick else task.STEPS
    seeds = 1 if quick else seeds
    print("| method | evaluations | its own | frozen | L2 per layer | dropout |")
    print("|---|---|---|---|---|---|")
    start = frozen_loss({k: jnp.asarray(v) for k, v in START.items()}, data)
    print(f"| where they start | 0 | | {start:.3f} | 1e-6 | .05 |")
    found = {}
    for name in names or METHODS:
        estimator, cost = METHODS[name]
        runs = [tuned(estimator, data, 10 + seed, steps) for seed in range(seeds)]
        own, found[name] = [loss for loss, _ in runs], [frozen_loss(h, data) for _, h in runs]
        cells = [f"{np.median(x):.3f} ({np.max(x):.3f})" for x in (own, found[name])]
        l2, dropout = (np.median([h[k] for _, h in runs], 0) for k in ("l2", "dropout"))
        values = " ".join(f"{x:.1g}" for x in l2), " ".join(f"{x:.2f}" for x in dropout)
        row = [name, str(cost * steps // WINDOW), *cells, *values]
        print("|", " | ".join(row), "|", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="all by default")
    options = parser.parse_args()
    main(options.quick, options.seeds, options.methods)
