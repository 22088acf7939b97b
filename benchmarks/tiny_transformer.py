"""A character transformer on tiny Shakespeare: tuned while it trains, against random search.

The task is examples/tiny_transformer.py's: warm-up, peak, decay length, final share, weight decay
and dropout of a two-layer transformer, 300 steps of AdamW. Losses are per character, on all of the
validation split (5% of the text, tuned and selected on) and of the test split (5%, looked at by
nothing else); median / worst over the methods' own seeds. "frozen" is what a method found,
retrained on fresh seeds. Cost in gradient evaluations (a step 1, its way back 2, a validation
gradient the windows over 16); the runs that score candidates count, scoring does not.

  python -m benchmarks.tiny_transformer --data FOLDER [--quick]

FOLDER holds tinyshakespeare.txt. quick: 1 seed, 2 random configurations. In full it takes eight
minutes of processor time, four of them for random search.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import tiny_transformer as example

SEEDS, RANDOM, FRESH = (10, 11, 12), 20, 2


def report(name: str, losses: Any, cost: float) -> None:
    """One row of the table from (validation, test) losses [seeds, 2]."""
    middle, worst = np.median(losses, axis=0), np.max(losses, axis=0)
    each = " ".join(f"{loss:.3f}" for loss in np.asarray(losses)[:, 0])
    print(
        f"{name:<44} {middle[0]:.3f} / {worst[0]:.3f}   {middle[1]:.3f} / {worst[1]:.3f}   "
        f"{cost:>6,.0f}   [{each}]",
        flush=True,
    )


def random_search(task: example.Task, seed: int, count: int) -> tuple[hg.Schedule, Any]:
    """The best of `count` full runs by validation loss: its values, its own losses."""
    rng, tried = np.random.default_rng(seed), []
    for number in range(count):
        unit = {name: jnp.float32(rng.random()) for name in example.SPACE}
        schedule = example.constant(example.SPACE.from_unit(unit))
        key = jax.random.key(1000 * seed + number)
        tried.append((schedule, example.both(task, task.train(schedule, task.data.train, key))))
    # NaN is a run that diverged
    return min(tried, key=lambda run: float(np.nan_to_num(run[1][0], nan=np.inf)))


def untuned(task: example.Task, seeds: tuple[int, ...]) -> None:
    """The row of the default."""
    default = example.constant(example.DEFAULT)
    keys = [jax.random.key(seed) for seed in seeds]
    runs = [task.train(default, task.data.train, key) for key in keys]
    report("the default, untuned", [example.both(task, run) for run in runs], 0)


def by_random_search(task: example.Task, seeds: tuple[int, ...], count: int, fresh: int) -> None:
    """The rows of random search."""
    found = [random_search(task, seed, count) for seed in seeds]
    cost = count * example.STEPS
    report(f"random, best of {count}: the run itself", [losses for _, losses in found], cost)
    frozen = [example.fresh(task, schedule, fresh) for schedule, _ in found]
    report(f"random, best of {count}: frozen", frozen, cost)


def one_run(task: example.Task, update: example.Update, seeds: tuple[int, ...], fresh: int) -> None:
    """The rows of one alternating run."""
    runs = [example.tune(task, update, seed, example.DEFAULT) for seed in seeds]
    losses, cost = [example.both(task, run.params) for run in runs], runs[0].evaluations
    report("one alternating run: the run itself", losses, cost)
    for name in example.schedules(runs[0]):
        frozen = [example.fresh(task, example.schedules(run)[name], fresh) for run in runs]
        report(f"one alternating run: {name}", frozen, cost)


def six_runs(
    task: example.Task, update: example.Update, seeds: tuple[int, ...], fresh: int
) -> None:
    """The rows of an alternating run of 180 steps, one of 300 from there, and a plain run."""
    own, plain, better, found, cost = [], [], [], [], 0.0
    for seed in seeds:
        first = example.tune(task, update, seed, example.DEFAULT, steps=180)
        second = example.tune(task, update, 100 + seed, first.best, step=example.STEP / 3)
        own.append(example.both(task, second.params))
        values = example.constant(second.best)
        params = task.train(values, task.data.train, jax.random.key(200 + seed))
        plain.append(example.both(task, params))
        # the validation loss decides which network is kept
        better.append(min(own[-1], plain[-1]))
        found.append(values)
        cost = first.evaluations + second.evaluations
    report("two alternating runs: the second itself", own, cost)
    report("  and a plain run of its best values", plain, cost + example.STEPS)
    report("  the better of both", better, cost + example.STEPS)
    frozen = [example.fresh(task, values, fresh) for values in found]
    report("  its best values: frozen", frozen, cost)


def main(folder: str, quick: bool = False) -> None:
    """Print the table."""
    begin, seeds = time.perf_counter(), SEEDS[: 1 if quick else None]
    count, fresh = (2, 1) if quick else (RANDOM, FRESH)
    task = example.task(folder)
    print(f"{'':<44} {'validation':<13}   {'test':<13}   {'evals':>6}   validation per seed")
    untuned(task, seeds)
    by_random_search(task, seeds, count, fresh)
    update = example.compile_update(task)
    one_run(task, update, seeds, fresh)
    six_runs(task, update, seeds, fresh)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with tinyshakespeare.txt")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.data, options.quick)
