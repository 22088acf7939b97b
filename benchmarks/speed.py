"""Measure the time of a whole-run hypergradient beside what is written by hand.

Run: `python -m benchmarks.speed` (about four minutes on one core; `main(quick=True)` one).

Task: `benchmarks/momentum_task.py`, T = 10, 100 and 1000 steps. All programs are compiled first,
then called in turn, round after round; a ratio is taken within a round and its median printed, so
that a machine that slows down slows both sides. Prints milliseconds of processor time (median; on
one thread the time on the clock, less what other programs took), the ratios to plain training, to
the adjoint (target for `Unrolled()` <= 1.15 from T = 100 on, batches by index as in the adjoint)
and to `jax.grad` through steps under `jax.checkpoint` (target <= 1.05), the largest relative
difference of the hypergradient from the adjoint's, and compile seconds. hypergrad also computes
the loss and its `info` (growth of the adjoint, first step that is not finite).
Run on one core with one thread for steady figures:
`taskset -c 1 env OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m ...`
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import hypergrad as hg
from benchmarks import momentum_task as task
from hypergrad.testing.contract import relative_error

PROGRAMS = {
    "plain training": task.plain_training,
    "hand-derived adjoint": task.adjoint,
    "Unrolled()": task.through_hypergrad(hg.Unrolled()),
    "Unrolled(), Minibatches": task.through_hypergrad(hg.Unrolled(), "minibatches"),
    'Unrolled(checkpoint="step")': task.through_hypergrad(hg.Unrolled(checkpoint="step")),
    'Unrolled(checkpoint="sqrt")': task.through_hypergrad(hg.Unrolled(checkpoint="sqrt")),
    "Forward()": task.through_hypergrad(hg.Forward()),
    "naive reverse": task.naive_reverse,
    "jax.checkpoint in a scan": task.checkpointed_reverse,
}

BASES = ("plain training", "hand-derived adjoint", "jax.checkpoint in a scan")
IN_QUICK = (*BASES, "Unrolled()")


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], float]:
    """`function` compiled for `args`, and the seconds that took, tracing included."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args)), time.perf_counter() - begin


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per call, [rounds] each, every round calling each program once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            times[name].append(time.process_time() - begin)
    return {name: np.array(measured) for name, measured in times.items()}


def main(quick: bool = False) -> list[tuple[Any, ...]]:
    """Print and return rows (T, program, ms, over each of `BASES`, difference, compile)."""
    rows = []
    print(
        f"{'T':>5} {'program':28}{'ms':>9}{'x training':>11}{'x adjoint':>10}{'x checkpoint':>13}"
        f"{'error':>9} compile"
    )
    counts = (10, 10 if quick else 100), (100, 5 if quick else 40), (1000, 2 if quick else 12)
    for num_steps, rounds in counts:
        train, valid = task.load()
        args = (task.HYPER, task.init(), task.indices(num_steps), train, valid)
        names = IN_QUICK if quick else tuple(PROGRAMS)
        built = {name: compiled(PROGRAMS[name], *args) for name in names}
        times = interleaved({name: call for name, (call, _) in built.items()}, rounds)
        reference = built["hand-derived adjoint"][0]()
        for name, (call, compile_seconds) in built.items():
            is_same_task = name != "plain training" and "Minibatches" not in name
            out = call()
            grad = out[0] if isinstance(out, tuple) else out
            error = relative_error(grad, reference) if is_same_task else float("nan")
            ratios = [float(np.median(times[name] / times[other])) for other in BASES]
            row = (num_steps, name, 1e3 * float(np.median(times[name])), *ratios, error)
            rows.append((*row, compile_seconds))
            print(
                "{:5d} {:28}{:9.1f}{:11.2f}{:10.2f}{:13.2f}{:9.1e}{:7.1f} s".format(*rows[-1]),
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
