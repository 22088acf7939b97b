"""Measure temporary memory, from XLA's own analysis of the compiled programs; nothing is run.

Run: `python -m benchmarks.memory` (about two minutes on one core; `main(quick=True)` the same).

Task: `benchmarks/momentum_task.py`; its training state (weights and velocity) takes .2 MiB.
`reverse`: MiB of a whole-run hypergradient at T = 1000 for each `checkpoint`, beside naive reverse
and the hand-derived adjoint; target for "sqrt": <= 16 MiB.
`forward`: MiB of `Forward()` with `Minibatches` at T = 1e3 and 1e5, and their ratio; target: within
1% of each other.
"""

from collections.abc import Callable
from typing import Any

import jax

import hypergrad as hg
from benchmarks import momentum_task as task
from hypergrad.estimators.memory import compiled_for, temporary_bytes

NUM_STEPS, FORWARD_STEPS = 1000, (1_000, 100_000)
SQRT_TARGET, FORWARD_TARGET = 16.0, 0.01


def temporary(function: Callable[..., Any], *args: Any) -> float:
    """MiB that the compiled program needs beside its arguments and results."""
    return temporary_bytes(compiled_for(function, *args)) / 2**20


def reverse() -> list[tuple[str, float]]:
    """Rows (program, MiB) at T = 1000."""
    args = (task.HYPER, task.init(), task.indices(NUM_STEPS), *task.load())
    programs = {"naive reverse": task.naive_reverse, "hand-derived adjoint": task.adjoint}
    for checkpoint in ("none", "step", "sqrt"):
        estimator = hg.Unrolled(checkpoint=checkpoint)  # type: ignore[arg-type]
        programs[f'Unrolled(checkpoint="{checkpoint}")'] = task.through_hypergrad(estimator)
    rows = []
    for name, function in programs.items():
        rows.append((name, temporary(function, *args)))
        target = f"   target {SQRT_TARGET:.0f}" if "sqrt" in name else ""
        missed = "   MISSED" if target and rows[-1][1] > SQRT_TARGET else ""
        print("{:30}{:8.1f} MiB".format(*rows[-1]) + target + missed, flush=True)
    return rows


def forward() -> list[tuple[str, float]]:
    """Rows (T, MiB) of forward mode."""
    train, valid = task.load()
    inner = task.problem().init(task.HYPER, jax.random.key(0))
    rows = []
    for num_steps in FORWARD_STEPS:

        def gradient(hyper: Any, data: Any, valid: Any, num_steps: int = num_steps) -> Any:
            batches = hg.Minibatches(data, task.BATCH, num_steps)
            arguments = (hyper, inner, batches, valid, jax.random.key(0), hg.Forward())
            return hg.hypergradient(task.problem(), *arguments)

        rows.append((f"Forward(), T = {num_steps}", temporary(gradient, task.HYPER, train, valid)))
        print("{:30}{:8.3f} MiB".format(*rows[-1]), flush=True)
    ratio = rows[1][1] / rows[0][1]
    missed = "   MISSED" if abs(ratio - 1) > FORWARD_TARGET else ""
    print(f"{'ratio':30}{ratio:8.3f}       target 1 within {FORWARD_TARGET:.0%}{missed}")
    return rows


def main(quick: bool = False) -> dict[str, list[tuple[str, float]]]:
    """Print and return both tables; compiling is all the cost, so `quick` changes nothing."""
    print(f"Temporary memory: a whole-run hypergradient at T = {NUM_STEPS}, and forward mode")
    return {"reverse": reverse(), "forward": forward()}


if __name__ == "__main__":
    main()
