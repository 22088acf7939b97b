"""What `hypergrad.fit` costs over the bare loop, checkpoints every 100 updates included.

Run: `python -m benchmarks.fit` (about ten minutes; `main(quick=True)` one).

Task: the digits-200 network of examples/digits200.py, `alternating`, K = 10 steps of 64 examples
drawn on the device by `Minibatches`. The bare loop is `update = jax.jit(tuner.update)` called 1000
times, then `jax.block_until_ready`. Machines change their pace within minutes by more than what is
measured here, so every run of `fit` stands between two of the bare loop, and is divided by their
mean. Columns: median ratio on the clock; median ratio of the processor time, all threads together
(what fit costs where no core is idle), with mean and standard error. Target for the checkpointed
one: <= 1.03.

Rows: the bare loop over the one before it (what noise alone does); fit; with checkpoints every 100
updates; with JSON lines too; from an iterable of NumPy batches, against a bare loop that stacks
them itself.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hypergrad as hg

UPDATES, STEPS = 1000, 10


def _digits() -> Any:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import digits200

    return digits200


class Batches:
    """Shuffled batches of the training images, on the host."""

    def __init__(self, arrays: Any, size: int) -> None:
        self._arrays, self._size = [np.asarray(x) for x in arrays], size

    def __iter__(self) -> Iterator[Any]:
        random, (images, labels) = np.random.default_rng(0), self._arrays
        while True:
            chosen = random.permutation(len(images))[: self._size]
            yield images[chosen], labels[chosen]


def ways(folder: Path, updates: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Each way to run, and the loop that it is compared with."""
    digits = _digits()
    data = digits.load()
    tuner = hg.alternating(digits.PROBLEM, digits.SPACE)
    start = tuner.init(digits.STARTS["bad"], jax.random.key(0))
    train = hg.Minibatches(data.train, digits.BATCH, STEPS)
    batches = Batches(data.train, digits.BATCH)
    bare_update = jax.jit(tuner.update)

    def bare() -> Any:
        state = start
        for _ in range(updates):
            state, info = bare_update(state, train, data.valid)
        return jax.block_until_ready((state, info))

    def bare_stacking() -> Any:
        state, source = start, iter(batches)
        for _ in range(updates):
            group = [next(source) for _ in range(STEPS)]
            stacked = jax.tree.map(lambda *x: np.stack(x), *group)
            state, info = bare_update(state, stacked, data.valid)
        return jax.block_until_ready((state, info))

    def fit(train: Any = train, every: int | None = None, **more: Any) -> Any:
        shutil.rmtree(folder / "run", ignore_errors=True)
        if every is not None:
            more["checkpoint"] = hg.Checkpoint(folder / "run", every=every)
        return hg.fit(tuner, start, train, data.valid, updates, **more).state

    lines = hg.callbacks.JSONLines(folder / "history.jsonl")
    return {
        "fit": (fit, bare),
        "fit, checkpoint every 100": (lambda: fit(every=100), bare),
        "the same, JSON lines": (lambda: fit(every=100, callbacks=[lines]), bare),
        "fit, iterable": (lambda: fit(batches, steps_per_update=STEPS), bare_stacking),
    }


def _seconds(call: Callable[[], Any]) -> np.ndarray:
    """On the clock, and of the processor."""
    begin, used = time.perf_counter(), time.process_time()
    call()
    return np.array([time.perf_counter() - begin, time.process_time() - used])


def main(quick: bool = False) -> dict[str, float]:
    """Print the table; returns the median ratio of processor time of each way."""
    logging.getLogger("hypergrad").setLevel(logging.WARNING)
    rounds, updates = (3, 100) if quick else (5, UPDATES)
    folder = Path(tempfile.mkdtemp())
    calls = ways(folder, updates)
    ratios: dict[str, list[np.ndarray]] = {"bare loop again": [], **{name: [] for name in calls}}
    for pair in calls.values():
        for call in pair:
            call()  # compiles
    for _ in range(rounds):
        for name, (call, bare) in calls.items():
            before, own, after = _seconds(bare), _seconds(call), _seconds(bare)
            ratios["bare loop again"].append(after / before)
            ratios[name].append(2 * own / (before + after))
    shutil.rmtree(folder)
    print(f"{updates} updates of {STEPS} steps, {rounds} rounds")
    print(f"{'way':28}{'x clock':>9}{'x processor':>13}{'mean':>9}{'s.e.':>7}")
    for name, found in ratios.items():
        (clock, used), mean = np.median(found, axis=0), np.mean(found, axis=0)[1]
        error = np.std(found, axis=0)[1] / len(found) ** 0.5
        print(f"{name:28}{clock:9.3f}{used:13.3f}{mean:9.3f}{error:7.3f}", flush=True)
    return {name: float(np.median(found, axis=0)[1]) for name, found in ratios.items()}


if __name__ == "__main__":
    main()
