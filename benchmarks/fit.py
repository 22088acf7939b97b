"""What `hypergrad.fit` costs over the bare loop, checkpoints every 100 updates included.

Run: `python -m benchmarks.fit` (about six minutes; `main(quick=True)` one).

Task: the digits-200 network of examples/digits200.py, `alternating`, K = 10 steps of 64 examples
drawn on the device by `Minibatches`. The bare loop is `update = jax.jit(tuner.update)` called 1000
times, then `jax.block_until_ready`. In every round each way is run once, in an order drawn anew,
and its ratio to that round's bare loop is taken. Columns: median seconds on the clock; the median
ratio of the processor time, all threads together, with its quartiles (what fit costs where no core
is idle); the median ratio on the clock, which other programs disturb. Target for the checkpointed
one: <= 1.03.

Rows: bare again (what noise alone does); fit; with checkpoints every 100 updates; with JSON lines
too; from an iterable of NumPy batches, against a bare loop that stacks them itself.
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


def ways(folder: Path, updates: int) -> dict[str, tuple[Callable[[], Any], str]]:
    """Each way to run, and the name of the one that it is compared with."""
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
        "bare loop": (bare, "bare loop"),
        "bare loop again": (bare, "bare loop"),
        "fit": (fit, "bare loop"),
        "fit, checkpoint every 100": (lambda: fit(every=100), "bare loop"),
        "the same, JSON lines": (lambda: fit(every=100, callbacks=[lines]), "bare loop"),
        "bare loop, stacking": (bare_stacking, "bare loop, stacking"),
        "fit, iterable": (lambda: fit(batches, steps_per_update=STEPS), "bare loop, stacking"),
    }


def main(quick: bool = False) -> dict[str, float]:
    """Print the table; returns the median ratio of processor time of each way."""
    logging.getLogger("hypergrad").setLevel(logging.WARNING)
    rounds, updates = (3, 100) if quick else (5, UPDATES)
    folder = Path(tempfile.mkdtemp())
    calls = ways(folder, updates)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for call, _ in calls.values():
        call()  # compiles
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(calls)):
            begin, used = time.perf_counter(), time.process_time()
            calls[name][0]()
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - used)
    shutil.rmtree(folder)
    print(f"{updates} updates of {STEPS} steps, {rounds} rounds")
    print(f"{'way':28}{'s':>7}{'x processor':>13}{'quartiles':>14}{'x clock':>9}")
    ratios = {}
    for name, (_, other) in calls.items():
        used = np.array(processor[name]) / np.array(processor[other])
        clock = np.median(np.array(seconds[name]) / np.array(seconds[other]))
        low, ratios[name], high = (float(q) for q in np.quantile(used, [0.25, 0.5, 0.75]))
        spread = f"{low:.3f}..{high:.3f}"
        median = np.median(seconds[name])
        print(f"{name:28}{median:7.2f}{ratios[name]:13.3f}{spread:>14}{clock:9.3f}", flush=True)
    return ratios


if __name__ == "__main__":
    main()
