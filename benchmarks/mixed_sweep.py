"""Sweeps of a mixed space on digits-200: hybrid, black boxes by `hg.sweep`, and Optuna by itself.

The space of examples/hybrid_sweep.py (optimizer, activation, width; learning rate, momentum, three
L2 coefficients, two dropout rates). Whatever a method found is frozen and retrained on 10 fresh
seeds; the mean test loss counts. Cost in gradient evaluations: a training step 1, its way back 2, a
validation gradient 200/64. For each method, the value after so many evaluations is that of the best
finished trial so far. Median and worst over the method's seeds; the untuned default and random
search stand beside them.

  python -m benchmarks.mixed_sweep [--quick] [--seeds 5] [--methods NAME ...] [--out RESULTS.jsonl]

Each (method, seed) is appended to `--out` when it is done, and skipped when it stands there. Full:
about three hours on one core; quick: 1 seed, a hundredth of the budget.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna

import hypergrad as hg
from hypergrad.search.program import Programs
from hypergrad.search.rungs import bracket_steps, brackets
from hypergrad.search.study import open_study

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import digits200 as task
import hybrid_sweep as mixed

# TPE's 200 full runs.
BUDGET = 200 * task.STEPS
MARKS = (0.05, 0.1, 0.25, 0.5, 1.0)
HYPERBAND = hg.Hyperband(min_steps=50)
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


def cost_of(steps: float, refine: hg.Refine | None) -> float:
    """Gradient evaluations of training steps, differentiated or not."""
    if refine is None:
        return steps
    return task.evaluations(int(steps), int(steps) // refine.steps_per_update)


def trials_within(budget: float, refine: hg.Refine | None, scheduler: Any) -> int:
    """How many trials a budget pays for, whole brackets only."""
    trials, spent = 0, 0.0
    for ladder in brackets(scheduler, task.STEPS, 5000 if scheduler else 1):
        spent += cost_of(bracket_steps(ladder), refine)
        if spent > budget and trials:
            break
        trials += ladder[0].members
    return trials if scheduler else int(budget // cost_of(task.STEPS, refine))


def swept(
    seed: int,
    budget: float,
    refine: hg.Refine | None = None,
    scheduler: Any = None,
    **options: Any,
) -> tuple[Any, list[Any]]:
    """A sweep by this library: its result, and trials as (evaluations so far, score, values)."""
    trials = trials_within(budget, refine, scheduler)
    result = hg.sweep(
        mixed.make_problem,
        mixed.SPACE,
        hg.Splits(*task.load()),
        num_trials=trials,
        num_steps=task.STEPS,
        batch_size=task.BATCH,
        refine=refine,
        scheduler=scheduler,
        seed=seed,
        **options,
    )
    rows, spent = [], 0.0
    for trial in result.study.trials:
        spent += cost_of(max(trial.intermediate_values, default=task.STEPS), refine)
        if trial.state.name == "COMPLETE":
            rows.append((spent, trial.value, result._opened.values(trial)))
    return result, rows


def optuna_alone(seed: int, budget: float) -> tuple[Any, list[Any]]:
    """Optuna's TPE and its HyperbandPruner, asked by Optuna, on the same compiled programs."""
    data = hg.Splits(*task.load())
    programs = Programs(mixed.make_problem, mixed.SPACE, data, task.BATCH, None, 10)
    opened = open_study(mixed.SPACE, sampler="tpe", seed=seed)
    study = opened.study
    study.pruner = optuna.pruners.HyperbandPruner(50, task.STEPS, 3)
    spent, rows = 0.0, []
    while spent < budget:
        proposal = opened.ask()
        assert proposal is not None
        program = programs.of(proposal.choices)
        hypers = {n: np.float32([proposal.start[n]]) for n in program.space.continuous}
        keys = jax.random.fold_in(jax.random.key(seed), proposal.number)[None]
        state, steps, pruned = program.members.init(hypers, keys), 0, False
        while steps < task.STEPS and not pruned:
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
        elif pruned and steps < task.STEPS:
            opened.prune(proposal, score, steps)
        else:
            opened.finish(proposal, score)
            rows.append((spent, score, {**proposal.choices, **proposal.start}))
    return programs, rows


METHODS: dict[str, Callable[[int, float], tuple[Any, list[Any]]]] = {
    "hybrid": lambda seed, budget: swept(
        seed, budget / 4, hg.Refine(), population=1, told="last", polish=10
    ),
    "hybrid, nothing polished": lambda seed, budget: swept(
        seed, budget / 4, hg.Refine(), population=1, told="last"
    ),
    "hybrid, the trusted mean told": lambda seed, budget: swept(
        seed, budget / 4, hg.Refine(), population=1, told="best", polish=10
    ),
    "hybrid + Hyperband": lambda seed, budget: swept(
        seed, budget / 4, hg.Refine(), HYPERBAND, population=4
    ),
    "random": lambda seed, budget: swept(seed, budget, sampler="random", population=1),
    "TPE": lambda seed, budget: swept(seed, budget, population=1),
    "TPE + Hyperband": lambda seed, budget: swept(seed, budget, None, HYPERBAND, population=1),
    "Hyperband": lambda seed, budget: swept(
        seed, budget, None, HYPERBAND, sampler="random", population=1
    ),
    "Optuna: TPE + HyperbandPruner": optuna_alone,
}


def auditor(seeds: int) -> Callable[[dict[str, Any]], float]:
    """`values -> mean test loss` over fresh seeds; infinite where one diverged."""
    data = hg.Splits(*task.load())
    programs = Programs(mixed.make_problem, mixed.SPACE, data, task.BATCH, None, 10)

    def audit(values: dict[str, Any]) -> float:
        choices = {n: values[n] for n in mixed.SPACE.discrete if n in values}
        program = programs.of(choices)
        hypers = {n: np.full(seeds, values[n], np.float32) for n in program.space.continuous}
        keys = jax.random.split(jax.random.key(2**20), seeds)
        state = program.members.advance(program.members.init(hypers, keys), task.STEPS // 10)
        losses = np.asarray(program.members.report(state).test_score, np.float64)
        return float(np.where(np.isfinite(losses), losses, np.inf).mean())

    return audit


def run(name: str, seed: int, budget: float, audit: Callable[[dict[str, Any]], float]) -> Any:
    """One line of results: the fresh-seed loss of the best so far at each mark of the budget."""
    begin = time.perf_counter()
    _, rows = METHODS[name](seed, budget)
    line: dict[str, Any] = {
        "method": name,
        "seed": seed,
        "evaluations": rows[-1][0],
        "seconds": time.perf_counter() - begin,
        "trials": len(rows),
    }
    fresh: dict[int, float] = {}
    for mark in MARKS:
        until = [row for row in rows if row[0] <= mark * budget]
        if until and (mark * budget <= 1.1 * rows[-1][0] or len(until) < len(rows)):
            best = min(range(len(until)), key=lambda i: until[i][1])
            if best not in fresh:
                fresh[best] = audit(until[best][2])
            line[f"{mark:g}"] = fresh[best]
    best = min(range(len(rows)), key=lambda i: rows[i][1])
    line["score"], line["best"] = rows[best][1], rows[best][2]
    line["test"] = fresh[best] if best in fresh else audit(rows[best][2])
    return line


def table(lines: list[dict[str, Any]], budget: float) -> None:
    """Median and worst per method; columns are shares of the budget."""
    names = list(dict.fromkeys(line["method"] for line in lines))
    heads = "".join(f"{mark * budget:>10,.0f}" for mark in MARKS)
    print(f"{'method':<32}{heads}   at its end, median / worst   evaluations  seconds  seeds")
    for name in names:
        own = [line for line in lines if line["method"] == name]
        cells = ""
        for mark in MARKS:
            found = [line[f"{mark:g}"] for line in own if f"{mark:g}" in line]
            cells += f"{np.median(found):>10.3f}" if len(found) == len(own) else f"{'-':>10}"
        end = [line["test"] for line in own]
        print(
            f"{name:<32}{cells}   {np.median(end):>13.3f} / {max(end):.3f}"
            f"{np.mean([line['evaluations'] for line in own]):>20,.0f}"
            f"{np.mean([line['seconds'] for line in own]):>9.0f}{len(own):>7}"
        )


def main(quick: bool = False, seeds: int = 5, methods: Any = None, out: str | None = None) -> None:
    """Prints the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    budget, seeds = (8_000, 1) if quick else (BUDGET, seeds)
    audit, lines = auditor(3 if quick else 10), []
    if out and Path(out).exists():
        lines = [json.loads(text) for text in Path(out).read_text().splitlines()]
    done = {(line["method"], line["seed"]) for line in lines}
    for name in DEFAULTS:
        print(f"{name:<32}{audit(default(name)):.3f}")
    for seed in range(seeds):
        for name in methods or METHODS:
            if (name, seed) in done:
                continue
            lines.append(run(name, seed, budget, audit))
            print(
                name, seed, f"{lines[-1]['test']:.3f}", f"{lines[-1]['seconds']:.0f} s", flush=True
            )
            if out:
                with Path(out).open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    table(lines, budget)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS))
    parser.add_argument("--out")
    options = parser.parse_args()
    main(options.quick, options.seeds, options.methods, options.out)
