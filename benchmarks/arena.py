"""Tuning quality on digits-200 and its two variants, under the arena's rules.

What a method found is frozen and retrained on 10 fresh seeds; the mean test loss counts, the cost
is in gradient evaluations (a step 1, its way back 2, a gradient on the 200 validation images 3.1).
Median and worst over the method's own seeds. The test split is looked at by nothing else.

  python -m benchmarks.arena [--quick]      quick: 2 seeds and fewer rows; full: 10 seeds, an hour
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import compiling
import digits200 as task

WINDOW = 10
VARIANTS = {
    "digits-200": {"num_train": 200},
    "100 images": {"num_train": 100},
    "30% labels flipped": {"num_train": 200, "flipped": 0.3},
}
BUDGET = 15_000


def alternating(data: task.Data) -> Callable[[Any, jax.Array], Any]:
    """`(start, key) -> (test loss of the run itself, history [updates], best, losses)`."""
    tuner = hg.alternating(task.PROBLEM, task.SPACE)
    train = hg.Minibatches(data.train, task.BATCH, WINDOW)

    def run(start: Any, key: jax.Array) -> Any:
        state = tuner.init(start, key)
        state, infos = jax.lax.scan(
            lambda state, _: tuner.update(state, train, data.valid),
            state,
            None,
            length=task.STEPS // WINDOW,
        )
        own = task.valid_loss(state.inner.params, None, data.test, None)
        return own, infos.hyper, tuner.best(state), infos.loss

    return jax.jit(run, compiler_options=compiling.OPTIONS)


def restarting(data: task.Data) -> Callable[[Any, jax.Array, float], Any]:
    """`(start, key, spent) -> best` after as many whole runs as the budget allows."""
    tuner = hg.restarting(
        task.PROBLEM, task.SPACE, hg.Unrolled(validate_at=WINDOW), fresh_seeds=True
    )
    train = hg.Minibatches(data.train, task.BATCH, task.STEPS)
    update = jax.jit(
        lambda state: tuner.update(state, train, data.valid), compiler_options=compiling.OPTIONS
    )

    def run(start: Any, key: jax.Array, spent: float) -> Any:
        state = tuner.init(start, key)
        while True:
            # a shortened run costs the steps it takes
            steps = max(task.STEPS >> (2 * int(state.trust.shortened)), 1)
            spent += task.evaluations(steps, 1)
            if spent > BUDGET:
                return tuner.best(state)
            state, _ = update(state)

    return run


def standard_error_above(schedule: Any, start: Any, data: task.Data) -> float:
    """How many standard errors a result lies above its start, on the same 10 fresh seeds."""
    keys = jax.random.split(jax.random.key(2**20), 10)
    losses = [np.asarray(task.retrain(s, data, keys)[1], np.float64) for s in (schedule, start)]
    # a run that diverged counts as a network that knows nothing, or worse
    found, before = (np.where(np.isfinite(x), x, 20.0) for x in losses)
    gap = found - before
    return float(gap.mean() / max(gap.std(ddof=1) / np.sqrt(10), 1e-12))


def report(name: str, losses: list[float], cost: float, begin: float, note: str = "") -> None:
    """One row of the table."""
    print(
        f"{name:<62} {np.median(losses):.3f} / {np.max(losses):.3f}  {cost:>7,.0f}  "
        f"{time.perf_counter() - begin:>5.0f} s  {note}",
        flush=True,
    )


def tune(variant: str, start: str, seeds: range, whole_runs: bool) -> None:
    """The rows of one variant and start."""
    data = task.load(**VARIANTS[variant])  # type: ignore[arg-type]
    name, begin = f"{variant}, {start}: ", time.perf_counter()
    untuned = task.constant(task.STARTS[start])
    report(name + "untuned", [task.fresh_test_loss(untuned, data)], 0, begin)
    run = alternating(data)
    own, settled, replayed, best, found, alive = [], [], [], [], [], []
    for seed in seeds:
        loss, history, values, losses = run(task.STARTS[start], jax.random.key(seed))
        own.append(float(loss))
        updates = [jax.tree.map(lambda x, i=i: x[i], history) for i in range(len(losses))]
        schedule = hg.settled_schedule(task.SPACE, updates, WINDOW)
        settled.append(task.fresh_test_loss(schedule, data))
        schedule = hg.learned_schedule(updates, WINDOW)
        replayed.append(task.fresh_test_loss(schedule, data))
        best.append(task.fresh_test_loss(task.constant(values), data))
        found.append(values)
        alive.append(float(losses[-1]) < 0.8 * float(losses[0]))
    cost = task.evaluations(task.STEPS, task.STEPS // WINDOW)
    dead = sum(not ok for ok in alive)
    report(name + "one alternating run, the run itself", own, cost, begin, f"{dead} dead")
    report(name + "one alternating run, settled schedule replayed", settled, cost, begin)
    report(name + "one alternating run, schedule replayed as it ran", replayed, cost, begin)
    report(name + "one alternating run, `best` frozen", best, cost, begin)
    if not whole_runs:
        return
    begin, restart, final, above = time.perf_counter(), restarting(data), [], []
    for seed, values, ok in zip(seeds, found, alive, strict=True):
        # A run that died (by its own validation loss) found nothing to start from.
        values = restart(values if ok else task.STARTS[start], jax.random.key(1000 + seed), cost)
        final.append(task.fresh_test_loss(task.constant(values), data))
        above.append(standard_error_above(task.constant(values), untuned, data))
    worse = sum(z > 2 for z in above)
    report(name + "then restarting", final, BUDGET, begin, f"worse than its start: {worse}")


def black_box(variant: str, sampler: str, seeds: range, runs: int) -> None:
    """Random search or Optuna's TPE over the same box, the best trial by validation loss."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data, begin = task.load(**VARIANTS[variant]), time.perf_counter()  # type: ignore[arg-type]
    samplers = {"random": optuna.samplers.RandomSampler, "TPE": optuna.samplers.TPESampler}
    _, unravel = ravel_pytree(task.SPACE.to_unit(task.STARTS["def"]))

    def hyper_of(params: dict[str, float]) -> Any:
        return task.SPACE.from_unit(unravel(jnp.asarray(list(params.values()), jnp.float32)))

    results = []
    for seed in seeds:
        study = optuna.create_study(sampler=samplers[sampler](seed=seed))
        for number in range(runs):
            trial = study.ask()
            units = {f"u{i}": trial.suggest_float(f"u{i}", 0, 1) for i in range(task.num_hyper())}
            keys = jax.random.split(jax.random.key(10_000 * seed + number), 1)
            loss = float(task.retrain(task.constant(hyper_of(units)), data, keys)[0][0])
            study.tell(trial, min(loss, 20.0) if np.isfinite(loss) else 20.0)
        results.append(task.fresh_test_loss(task.constant(hyper_of(study.best_params)), data))
    report(f"{variant}: {sampler}, best of {runs} runs", results, runs * task.STEPS, begin)


def main(quick: bool = False, first_seed: int = 0, num_seeds: int = 10) -> None:
    """Print the table."""
    seeds = range(first_seed, first_seed + (2 if quick else num_seeds))
    print(f"test loss of 10 fresh retrains, median / worst over {len(seeds)} tuner seeds")
    print(f"{'':<62} {'median / worst':<14} {'evaluations':>8}")
    for variant in list(VARIANTS)[: 1 if quick else None]:
        starts = ["bad"] if quick else ["bad", "def"]
        for start in starts + (["div"] if variant == "digits-200" and not quick else []):
            tune(variant, start, seeds, whole_runs=variant == "digits-200")
        for sampler in ("random", "TPE"):
            black_box(variant, sampler, seeds, 20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    main(options.quick, options.first_seed, options.seeds)
