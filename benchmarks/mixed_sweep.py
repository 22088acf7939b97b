"""Sweeps of a mixed space: hybrid, black boxes by `hg.sweep`, and Optuna by itself.

On digits-200, or with `--task mnist1d` on 2,000 examples of mnist1d, validated on 500.

The space of examples/hybrid_sweep.py (optimizer, activation, width; learning rate, momentum, three
L2 coefficients, two dropout rates). Whatever a method found is frozen and retrained on 10 fresh
seeds; the mean test loss counts. Cost in gradient evaluations: a training step 1, its way back 2, a
validation gradient n_valid / batch. Columns: after so many evaluations, the trial with the best
score so far. At the end, beside it, the best three by score retrained under two seeds and judged on
validation, 3,000 evaluations more for every method; for the hybrid `result.best`, whose 4,500 its
quarter of the budget holds. Median (worst) over the methods' seeds, which were not used for
choosing them.

  python -m benchmarks.mixed_sweep [--quick] [--task mnist1d] [--seeds 5] [--methods NAME ...]
                                   [--out RESULTS.jsonl]

Each (method, seed) is appended to `--out` when it is done, and skipped when it stands there. Full:
an hour or two on one core; quick: one seed, a sixth of the budget, two methods.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optuna

import hypergrad as hg
from benchmarks.gauntlet_tasks import mnist1d
from hypergrad.knowledge.lengths import Lengths
from hypergrad.results.programs import Programs
from hypergrad.search.schedulers import bracket_steps, brackets
from hypergrad.study.distributions import Coordinates
from hypergrad.study.study import open_study

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import digits200
import hybrid_sweep as mixed

STEPS = 500


def lengths(task: "Task") -> Lengths:
    """Of plain full runs."""
    return Lengths(mixed.SPACE, task.batch, STEPS, None)


class Task(NamedTuple):
    """What is swept: the same space and network, on one data set or another."""

    make_problem: Callable[[dict[str, Any]], hg.Problem]
    data: hg.Splits
    batch: int


def tasks(name: str) -> Task:
    """One by its name."""
    if name == "digits200":
        return Task(mixed.make_problem, hg.Splits(*digits200.load()), digits200.BATCH)
    data = mnist1d(2000, 500, 2000)
    return Task(functools.partial(mixed.make_problem, inputs=data.train[0].shape[1]), data, 100)


# TPE's 200 full runs.
BUDGET = 200 * STEPS
MARKS = (0.05, 0.1, 0.25, 0.5, 1.0)
HYPERBAND = hg.Hyperband(min_steps=50)
# Candidates, and seeds of each.
CONFIRMED = (3, 2)
TEST_STREAM, CONFIRM_STREAM = 2**20, 2**21
DEFAULTS = {
    "untuned sgd": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 1e-2},
    "untuned adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
}
REST = {
    "activation": "relu",
    "width": 128,
    **{f"l2_{i}": 1e-4 for i in range(3)},
    **{f"dropout_{i}": 0.1 for i in range(2)},
}


def default(name: str) -> dict[str, Any]:
    """An untuned default of all active values."""
    return {**DEFAULTS[name], **REST}


def cost_of(task: Task, steps: float, refine: hg.Refine | None) -> float:
    """Gradient evaluations of training steps, differentiated or not."""
    if refine is None:
        return steps
    guide = len(task.data.valid[0]) / task.batch
    return 3 * steps + steps // refine.steps(STEPS) * guide


def trials_within(task: Task, budget: float, refine: hg.Refine | None, scheduler: Any) -> int:
    """How many trials a budget pays for, whole brackets only."""
    trials, spent = 0, 0.0
    for ladder in brackets(scheduler, STEPS, 5000 if scheduler else 1):
        spent += cost_of(task, bracket_steps(ladder), refine)
        if spent > budget and trials:
            break
        trials += ladder[0].members
    return trials if scheduler else int(budget // cost_of(task, STEPS, refine))


def swept(
    task: Task, seed: int, refine: hg.Refine | None, scheduler: Any, **options: Any
) -> tuple[Any, list[Any]]:
    """A sweep by this library: its result, and trials as (evaluations so far, score, values)."""
    result = hg.sweep(
        task.make_problem,
        mixed.SPACE,
        task.data,
        num_steps=STEPS,
        batch_size=task.batch,
        refine=refine,
        scheduler=scheduler,
        seed=seed,
        **options,
    )
    rows, spent, values = [], 0.0, Coordinates(mixed.SPACE).from_study
    for trial in result.study.trials:
        spent += cost_of(task, max(trial.intermediate_values, default=STEPS), refine)
        if trial.state.name == "COMPLETE":
            rows.append((spent, trial.value, values(trial.params)))
    return result, rows


def optuna_alone(task: Task, seed: int, budget: float) -> tuple[Any, list[Any]]:
    """Optuna's TPE and its HyperbandPruner, asked by Optuna, on the same compiled programs."""
    programs = Programs(task.make_problem, mixed.SPACE, task.data, lengths(task), None)
    opened = open_study(mixed.SPACE, sampler="tpe", seed=seed)
    study = opened.study
    study.pruner = optuna.pruners.HyperbandPruner(50, STEPS, 3)
    spent, rows = 0.0, []
    while spent < budget:
        proposal = opened.ask()
        assert proposal is not None
        program = programs.of(proposal.choices)
        hypers = {n: np.float32([proposal.start[n]]) for n in program.space.continuous}
        keys = jax.random.fold_in(jax.random.key(seed), proposal.number)[None]
        state, steps, pruned = program.members.init(hypers, keys), 0, False
        while steps < STEPS and not pruned:
            state = program.members.advance(state, 5)
            steps += 50
            score = float(program.members.report(state).score[0])
            if not np.isfinite(score):
                break
            proposal.trial.report(score, steps)
            pruned = proposal.trial.should_prune()
        spent += steps
        if not np.isfinite(score):
            opened.fail(proposal, "diverged")
        elif pruned and steps < STEPS:
            opened.prune(proposal, score, steps)
        else:
            opened.finish(proposal, score)
            rows.append((spent, score, {**proposal.choices, **proposal.start}))
    return programs, rows


def hybrid(task: Task, seed: int, budget: float) -> tuple[Any, list[Any]]:
    """A quarter of the budget: half of it in brackets of short runs, the rest polishes the best."""
    refine, scheduler = hg.Refine(), hg.SuccessiveHalving(min_steps=50)
    quarter = budget / 4 - 1.5 * CONFIRMED[0] * CONFIRMED[1] * STEPS
    short = trials_within(task, quarter / 1.9, refine, scheduler)
    spent = sum(
        cost_of(task, bracket_steps(ladder), refine) for ladder in brackets(scheduler, STEPS, short)
    )
    polish = max(int((quarter - spent) // cost_of(task, STEPS, refine)), 1)
    return swept(
        task,
        seed,
        refine,
        scheduler,
        num_trials=short + polish,
        polish=polish,
        population=1,
        told="last",
    )


def then_refined(task: Task, seed: int, budget: float) -> tuple[Any, list[Any]]:
    """A quarter of the budget: plain TPE, then its best three refined; starts and ends compete."""
    refine, (count, again) = hg.Refine(), CONFIRMED
    last = count * cost_of(task, STEPS, refine) + 1.5 * count * again * STEPS
    plain, rows = swept(task, seed, None, None, num_trials=int((budget / 4 - last) // STEPS))
    enqueue = [best.hyper for best in plain.top(count)]
    result, more = swept(task, seed + 1000, refine, None, num_trials=count, enqueue=enqueue)
    spent = rows[-1][0]
    return result, rows + [(spent + cost, score, values) for cost, score, values in more]


def black_box(scheduler: Any, sampler: str) -> Callable[[Task, int, float], tuple[Any, list[Any]]]:
    """The whole budget without hypergradients."""

    def run(task: Task, seed: int, budget: float) -> tuple[Any, list[Any]]:
        trials = trials_within(task, budget, None, scheduler)
        return swept(task, seed, None, scheduler, num_trials=trials, sampler=sampler, population=1)

    return run


def unwaiting(scheduler: Any) -> Callable[[Task, int, float], tuple[Any, list[Any]]]:
    """The whole budget, by TPE, under a scheduler whose trials end when they end."""

    def run(task: Task, seed: int, budget: float) -> tuple[Any, list[Any]]:
        most: dict[str, Any] = {"num_trials": 100_000, "max_evaluations": budget}
        return swept(task, seed, None, scheduler, population=1, **most)

    return run


METHODS: dict[str, Callable[[Task, int, float], tuple[Any, list[Any]]]] = {
    "hybrid": hybrid,
    "TPE, then refined": then_refined,
    "TPE": black_box(None, "tpe"),
    "random": black_box(None, "random"),
    "TPE + Hyperband": black_box(HYPERBAND, "tpe"),
    "Hyperband": black_box(HYPERBAND, "random"),
    "TPE + ASHA": unwaiting(hg.ASHA(min_steps=50)),
    "TPE + learning curves": unwaiting(hg.LearningCurves(min_steps=50)),
    "Optuna: TPE + HyperbandPruner": optuna_alone,
}


def auditor(task: Task) -> Callable[[dict[str, Any], int, int], tuple[float, float]]:
    """`(values, seeds, stream) -> mean (validation, test) losses` of frozen values, retrained."""
    programs = Programs(task.make_problem, mixed.SPACE, task.data, lengths(task), None)

    def mean(losses: jax.Array) -> float:
        found = np.asarray(losses, np.float64)
        return float(np.where(np.isfinite(found), found, np.inf).mean())

    def audit(values: dict[str, Any], seeds: int, stream: int) -> tuple[float, float]:
        choices = {n: values[n] for n in mixed.SPACE.discrete if n in values}
        program = programs.of(choices)
        hypers = {n: np.full(seeds, values[n], np.float32) for n in program.space.continuous}
        keys = jax.random.split(jax.random.key(stream), seeds)
        state = program.members.advance(program.members.init(hypers, keys), STEPS // 10)
        report = program.members.report(state)
        return mean(report.score), mean(report.test_score)

    return audit


def run(task: Task, name: str, seed: int, budget: float, seeds: int, audit: Any) -> dict[str, Any]:
    """One line of results: test losses on fresh seeds, of the best so far at each mark."""
    begin = time.perf_counter()
    result, rows = METHODS[name](task, seed, budget)
    seconds = time.perf_counter() - begin
    known: dict[str, float] = {}

    def test(values: dict[str, Any]) -> float:
        key = json.dumps(values, sort_keys=True)
        if key not in known:
            known[key] = audit(values, seeds, TEST_STREAM)[1]
        return known[key]

    marks = {}
    for mark in MARKS:
        until = [row for row in rows if row[0] <= mark * budget]
        # a method that has ended before has no value there
        if until and (len(until) < len(rows) or rows[-1][0] > 0.9 * mark * budget):
            marks[f"{mark:g}"] = test(min(until, key=lambda row: row[1])[2])
    best = sorted(rows, key=lambda row: row[1])
    count, again = CONFIRMED
    retrained = [(audit(row[2], again, CONFIRM_STREAM)[0], row[2]) for row in best[:count]]
    confirmed = min(retrained, key=lambda pair: pair[0])[1]
    if name in ("hybrid", "TPE, then refined"):
        confirmed = result.best.hyper
    return {
        "method": name,
        "seed": seed,
        "evaluations": rows[-1][0],
        "seconds": seconds,
        **marks,
        "score": best[0][1],
        "test": test(best[0][2]),
        "confirmed": test(confirmed),
        "best": confirmed,
    }


def table(lines: list[dict[str, Any]], budget: float) -> None:
    """Medians and worst per method; the columns before them are shares of the budget."""
    heads = "".join(f"{mark * budget:>9,.0f}" for mark in MARKS)
    print(f"{'':<31}{heads}   end: best, confirmed (worst)  evaluations  seconds  seeds")
    for name in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == name]
        cells = ""
        for mark in MARKS:
            found = [line[f"{mark:g}"] for line in own if f"{mark:g}" in line]
            cells += f"{np.median(found):>9.3f}" if len(found) == len(own) else f"{'-':>9}"
        end = ", ".join(
            f"{np.median(losses):.3f} ({max(losses):.3f})"
            for losses in ([line["test"] for line in own], [line["confirmed"] for line in own])
        )
        cost = np.mean([line["evaluations"] for line in own])
        seconds = np.mean([line["seconds"] for line in own])
        print(f"{name:<31}{cells}   {end:>29}{cost:>13,.0f}{seconds:>9.0f}{len(own):>7}")


def main(
    quick: bool = False,
    seeds: range = range(10, 15),
    methods: list[str] | None = None,
    out: str | None = None,
    data: str = "digits200",
) -> None:
    """Prints the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    budget, retrained = (16_000, 3) if quick else (BUDGET, 10)
    names = methods or (["hybrid", "random"] if quick else list(METHODS))
    task = tasks(data)
    audit, lines = auditor(task), []
    if out and Path(out).exists():
        lines = [json.loads(text) for text in Path(out).read_text().splitlines()]
    done = {(line["method"], line["seed"]) for line in lines}
    for name in DEFAULTS:
        print(f"{name:<31}{audit(default(name), retrained, TEST_STREAM)[1]:.3f}")
    for seed in seeds[:1] if quick else seeds:
        for name in names:
            if (name, seed) in done:
                continue
            lines.append(run(task, name, seed, budget, retrained, audit))
            found, seconds = lines[-1]["confirmed"], lines[-1]["seconds"]
            print(f"{name}, seed {seed}: {found:.3f}, {seconds:.0f} s", flush=True)
            if out:
                with Path(out).open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    table(lines, budget)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", choices=("digits200", "mnist1d"), default="digits200")
    parser.add_argument("--seeds", type=int, default=5, help="from 10 on")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS))
    parser.add_argument("--out")
    options = parser.parse_args()
    seeds = range(10, 10 + options.seeds)
    main(options.quick, seeds, options.methods, options.out, options.task)
