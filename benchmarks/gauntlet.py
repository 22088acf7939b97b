"""Does tuning work on data that nobody tuned it on? Small real tasks of different kinds.

  python -m benchmarks.gauntlet [--quick] [--data FOLDER] [--out FILE.json] [--tasks NAME ...]
                                [--methods NAME ...] [--seeds 3]

Every task (benchmarks/gauntlet_tasks.py) in two forms: a constant rate, and a cosine decay inside
the optimiser; from an ordinary default, a low and a hot start. A row is the test loss of what a
user gets: the network that the method trained ("own"), or the mean over two fresh seeds of values
frozen and retrained. Median (worst) over the method's seeds. Selection looks at validation only.
Cost in plain training runs: a training step counts 1, its way back 2, a validation gradient
n_valid / batch; runs that judge are counted. Without `--data` the tasks whose data a package
brings; the others too with it. `--out` keeps every cell, and the same call goes on from there.
`--quick`: two tasks, one seed, five trials for each search.

The table's last lines: the share of (task, form) at or below TPE-20 of the same form, the mean
rank, and the cells that end worse than the untuned start.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna

import hypergrad as hg
from benchmarks.gauntlet_tasks import DECAYS, FREE, NAMES, Task, task
from hypergrad.population.refine import plain
from hypergrad.tuners.alternating import horizon
from hypergrad.tuners.averaged import averaging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import compiling

JUDGES = 2
# What needs no tuning, each at its authors' setting: in the optimiser's place, at one run's cost.
TUNING_FREE: dict[str, Callable[[], Any]] = {
    "Prodigy": optax.contrib.prodigy,
    "DoG": optax.contrib.dog,
    "schedule-free AdamW": lambda: optax.contrib.schedule_free_adamw(2.5e-3, warmup_steps=50),
}
WHOLE_RUNS = 6


class Cell:
    """One task in one form, and the programs that its methods share, compiled once."""

    def __init__(self, task: Task, trials: int) -> None:
        self.task, self.trials = task, trials
        self._programs: dict[Any, Any] = {}

    def compiled(self, name: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The program of this name."""
        if name not in self._programs:
            self._programs[name] = jax.jit(make(), compiler_options=compiling.OPTIONS)
        return self._programs[name]

    def judged(self, problem: hg.Problem, params: Any, hyper: Any) -> jax.Array:
        """(validation, test) loss."""
        key = jax.random.key(0)
        splits = (self.task.data.valid, self.task.data.test)
        return jnp.stack([problem.valid_loss(params, hyper, split, key) for split in splits])

    def plain(self, values: hg.Schedule, seeds: range) -> np.ndarray:
        """(validation, test) losses [seeds, 2] of runs under frozen values; infinite for NaN."""
        this, problem = self.task, self.task.problem

        def run(values: hg.Schedule, key: jax.Array) -> jax.Array:
            train = hg.Minibatches(this.data.train, this.batch, this.steps)
            inner = hg.replay(problem, values, problem.init(values(0), key), train, key)
            return self.judged(problem, inner.params, values(0))

        def runs(values: Any, keys: jax.Array) -> jax.Array:
            schedule = hg.Schedule(values, length)
            return jax.lax.map(lambda key: run(schedule, key), keys)

        length = values.steps_per_update
        updates = jax.tree.leaves(values.values)[0].shape[0]
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        program = self.compiled(("plain", length, updates, len(seeds)), lambda: runs)
        return finite(program(values.values, keys))

    def averaged(self, hyper: Any, seed: int) -> np.ndarray:
        """(validation, test) losses of one such run: of its weights or their mean, by validation.

        As `hg.tune` does it: what of its advantage is the mean's.
        """
        this, updates = self.task, 20
        tuner = averaging(plain(this.problem, this.space))
        train = hg.Minibatches(this.data.train, this.batch, this.steps // updates)

        def run(hyper: Any, key: jax.Array) -> jax.Array:
            def update(state: Any, _: None) -> Any:
                return tuner.update(state, train, this.data.valid)[0], None

            state, _ = jax.lax.scan(update, tuner.init(hyper, key), None, length=updates)
            networks = (state.inner.params, state.averaged.params)
            return jnp.stack([self.judged(this.problem, params, hyper) for params in networks])

        found = finite(self.compiled("averaged", lambda: run)(hyper, jax.random.key(seed)))
        return found[np.argmin(found[:, 0])]

    def frozen(self, hyper: Any) -> tuple[float, float]:
        """Mean (validation, test) loss of constant values on fresh seeds."""
        return tuple(self.plain(constant(hyper, self.task), range(10_000, 10_000 + JUDGES)).mean(0))

    def start(self, name: str) -> dict[str, jax.Array]:
        """A start as arrays."""
        return {n: jnp.asarray(v, jnp.float32) for n, v in self.task.starts[name].items()}

    def guide(self) -> float:
        """Gradient evaluations of one validation gradient."""
        return len(jax.tree.leaves(self.task.data.valid)[0]) / self.task.batch


Row = dict[str, Any]


def finite(losses: Any) -> np.ndarray:
    """A run that diverged has lost by any measure."""
    return np.nan_to_num(np.asarray(losses, np.float64), nan=np.inf)


def constant(hyper: Any, this: Task) -> hg.Schedule:
    """The schedule that never changes."""
    return hg.Schedule(jax.tree.map(lambda x: jnp.asarray(x)[None], hyper), this.steps)


def row(what: str, losses: Any, runs: float) -> Row:
    """One result: the (validation, test) loss of what a user gets, at a cost in plain runs."""
    return {"what": what, "valid": float(losses[0]), "test": float(losses[1]), "runs": float(runs)}


def untuned(cell: Cell, start: str, seed: int) -> Iterator[Row]:
    """The start as it is."""
    seeds = range(20_000 + seed, 20_001 + seed)
    losses = cell.plain(constant(cell.start(start), cell.task), seeds)[0]
    yield row("untuned", losses, 1)


def tuning_free(name: str) -> Callable[[Cell, str, int], Iterator[Row]]:
    """An optimiser that needs no rate, in the place of the task's own."""

    def run_one(cell: Cell, start: str, seed: int) -> Iterator[Row]:
        this = cell.task
        problem = this.make_problem(lambda hyper: TUNING_FREE[name]())

        def run(hyper: Any, key: jax.Array) -> jax.Array:
            train = hg.Minibatches(this.data.train, this.batch, this.steps)
            inner = hg.rollout(problem, hyper, problem.init(hyper, key), train, key)
            params = inner.params
            if name.startswith("schedule-free"):
                params = optax.contrib.schedule_free_eval_params(inner.opt_state, params)
            return cell.judged(problem, params, hyper)

        # The rate is theirs: what else is tuned (dropout, penalties) stands at the default.
        hyper = cell.start("default")
        yield row(name, finite(cell.compiled(name, lambda: run)(hyper, jax.random.key(seed))), 1)

    return run_one


def black_box(name: str, mean: bool = False) -> Callable[[Cell, str, int], Iterator[Row]]:
    """The best of 20 plain runs by validation: its own network, and its values retrained.

    With `mean` each network is its weights or their mean, whichever has the lower loss.
    """

    def search(cell: Cell, start: str, seed: int) -> Iterator[Row]:
        samplers = {"random": optuna.samplers.RandomSampler, "TPE": optuna.samplers.TPESampler}
        study = optuna.create_study(sampler=samplers[name](seed=seed))
        found = []
        for number in range(cell.trials):
            trial = study.ask()
            unit = {
                name: np.reshape(
                    [trial.suggest_float(f"{name}/{i}", 0, 1) for i in range(np.size(value))],
                    np.shape(value),
                ).astype(np.float32)
                for name, value in cell.task.starts["default"].items()
            }
            hyper = cell.task.space.from_unit(unit)
            run = 1000 * seed + number
            if mean:
                losses = cell.averaged(hyper, run)
            else:
                losses = cell.plain(constant(hyper, cell.task), range(run, run + 1))[0]
            study.tell(trial, float(min(losses[0], 1e30)))
            found.append((losses[0], losses, hyper))
        best = min(found, key=lambda entry: entry[0])
        if mean:
            yield row(f"{name} by means", best[1], cell.trials)
            return
        yield row(f"{name}-{cell.trials}: own", best[1], cell.trials)
        yield row(f"{name}-{cell.trials}: frozen", cell.frozen(best[2]), cell.trials + JUDGES)

    return search


def alternating(name: str, **options: Any) -> Callable[[Cell, str, int], Iterator[Row]]:
    """One alternating run: its own network, the values to keep, the settled schedule."""

    def run_one(cell: Cell, start: str, seed: int) -> Iterator[Row]:
        this = cell.task
        tuner = hg.alternating(this.problem, this.space, **options)
        length = horizon(this.steps)
        updates = this.steps // length
        train = hg.Minibatches(this.data.train, this.batch, length)

        def run(hyper: Any, key: jax.Array) -> Any:
            def update(state: Any, _: None) -> Any:
                state, info = tuner.update(state, train, this.data.valid)
                return state, (info.hyper, info.refused)

            state, path = jax.lax.scan(update, tuner.init(hyper, key), None, length=updates)
            own = cell.judged(this.problem, state.inner.params, hyper)
            return own, path, tuner.best(state)

        program = cell.compiled(name, lambda: run)
        hyper = cell.start(start)
        own, (values, refused), best = jax.device_get(program(hyper, jax.random.key(seed)))
        estimator = options.get("estimator", hg.Unrolled())
        differentiated = length if estimator.window is None else estimator.window
        cost = 1 + updates * (2 * differentiated + cell.guide()) / this.steps
        history = [jax.tree.map(lambda x, i=i: x[i], values) for i in range(updates)]
        settled = hg.settled_schedule(this.space, history, length)
        seeds = range(10_000, 10_000 + JUDGES)
        refusals = {"refused": float(np.mean(refused > 0))}
        yield row(f"{name}: own", finite(own), cost) | refusals
        yield row(f"{name}: best", cell.frozen(best), cost + JUDGES) | refusals
        yield row(f"{name}: settled", cell.plain(settled, seeds).mean(0), cost + JUDGES) | refusals

    return run_one


def restarting(cell: Cell, start: str, seed: int) -> Iterator[Row]:
    """Whole-run steps: the values they reached, and the average that `best` returns."""
    this = cell.task
    estimator = hg.Unrolled(validate_at=10)
    tuner = hg.restarting(this.problem, this.space, estimator, fresh_seeds=True)
    train = hg.Minibatches(this.data.train, this.batch, this.steps)

    def run(hyper: Any, key: jax.Array) -> Any:
        def update(state: Any, _: None) -> Any:
            state, info = tuner.update(state, train, this.data.valid)
            return state, info.refused

        state, refused = jax.lax.scan(update, tuner.init(hyper, key), None, length=WHOLE_RUNS)
        return this.space.from_unit(state.now.unit), tuner.best(state), refused

    program = cell.compiled("restarting", lambda: run)
    now, best, refused = jax.device_get(program(cell.start(start), jax.random.key(seed)))
    cost = WHOLE_RUNS * (3 + cell.guide() / this.steps) + JUDGES
    refusals = {"refused": float(np.mean(refused > 0))}
    yield row("restarting: values", cell.frozen(now), cost) | refusals
    yield row("restarting: best", cell.frozen(best), cost) | refusals


def tuned(budget: int) -> Callable[[Cell, str, int], Iterator[Row]]:
    """`hg.tune`: the network that it returns, and its constant values retrained."""

    def run(cell: Cell, start: str, seed: int) -> Iterator[Row]:
        this = cell.task
        result = hg.tune(
            this.problem,
            this.space,
            this.data,
            this.starts[start],
            num_steps=this.steps,
            batch_size=this.batch,
            budget=budget,
            seed=seed,
            progress=False,
        )
        cost = result.evaluations / this.steps
        own = finite(cell.judged(this.problem, result.params, result.hyper))
        kind = {"kind": result.best.kind}
        yield row(f"tune-{budget}: network", own, cost) | kind
        yield row(f"tune-{budget}: frozen", cell.frozen(result.hyper), cost) | kind

    return run


METHODS: dict[str, Callable[[Cell, str, int], Iterator[Row]]] = {
    "untuned": untuned,
    **{name: tuning_free(name) for name in TUNING_FREE},
    "random": black_box("random"),
    "TPE": black_box("TPE"),
    "TPE, means": black_box("TPE", mean=True),
    "alternating": alternating("alternating"),
    # The cheapest mode there is: only the last of ten steps is differentiated.
    "window 1": alternating("window 1", estimator=hg.Unrolled(window=1)),
    "restarting": restarting,
    "tune-6": tuned(6),
    "tune-20": tuned(20),
}
# These know no start.
STARTLESS = {*TUNING_FREE, "random", "TPE", "TPE, means"}


def measure(names: list[str], methods: list[str], args: argparse.Namespace) -> list[Row]:
    """Every cell, those that stand in the file first."""
    out = Path(args.out) if args.out else None
    rows: list[Row] = json.loads(out.read_text())["rows"] if out and out.exists() else []
    done = {(r["task"], r["method"], r["start"], r["seed"]) for r in rows}
    for name in names:
        for decay in DECAYS:
            cell = Cell(task(name, decay, args.data), 5 if args.quick else 20)
            for method in methods:
                starts = ["default"] if method in STARTLESS else list(cell.task.starts)[:3]
                for start in starts[:1] if args.quick else starts:
                    for seed in range(1 if args.quick else args.seeds):
                        about = (cell.task.name, method, start, seed)
                        if about in done:
                            continue
                        begin = time.perf_counter()
                        keys = ("task", "method", "start", "seed")
                        labels: Row = dict(zip(keys, about, strict=True))
                        found = [labels | r for r in METHODS[method](cell, start, seed)]
                        seconds = time.perf_counter() - begin
                        rows += [r | {"seconds": seconds} for r in found]
                        if out:
                            beside = out.with_name(out.name + ".tmp")
                            beside.write_text(json.dumps({"rows": rows}))
                            beside.replace(out)
            show(rows, cell.task.name)
            jax.clear_caches()
    return rows


def table(rows: list[Row], name: str) -> dict[tuple[str, str], Row]:
    """Of one task by (what, start): the median and worst test loss, cost, refusals."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for r in rows:
        if r["task"] == name:
            groups[r["what"], r["start"]].append(r)
    return {
        key: {
            "median": float(np.median([r["test"] for r in group])),
            "worst": max(r["test"] for r in group),
            "runs": group[0]["runs"],
            "refused": float(np.mean([r.get("refused", 0.0) for r in group])),
        }
        for key, group in groups.items()
    }


def show(rows: list[Row], name: str) -> None:
    """One task's table."""
    found = table(rows, name)
    starts = list(dict.fromkeys(start for _, start in found))
    print(f"\n{name:28}{'runs':>6}" + "".join(f"{start:>20}" for start in starts))
    for what in dict.fromkeys(what for what, _ in found):
        cells = [found.get((what, start)) for start in starts]
        texts = ["" if c is None else f"{c['median']:.3f} ({c['worst']:.3f})" for c in cells]
        runs = next(c["runs"] for c in cells if c)
        print(f"{what:28}{runs:6.1f}" + "".join(f"{text:>20}" for text in texts), flush=True)


def summary(rows: list[Row]) -> dict[str, Row]:
    """By method: tasks at or below TPE-20's better form of result, mean rank, cells made worse."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    below, ranks = defaultdict(list), defaultdict(list)
    worse: dict[str, int] = defaultdict(int)
    for name in tasks:
        found = table(rows, name)
        searched = [c["median"] for (what, _), c in found.items() if what.startswith("TPE-")]
        defaults = {what: c for (what, start), c in found.items() if start == "default"}
        order = sorted(defaults, key=lambda what: defaults[what]["median"])
        for what, cell in defaults.items():
            ranks[what].append(order.index(what) + 1)
            if searched:
                below[what].append(cell["median"] <= min(searched))
        for (what, start), cell in found.items():
            start_alone = found.get(("untuned", start))
            worse[what] += start_alone is not None and cell["median"] > 1.05 * start_alone["median"]
    result = {
        what: {
            "at or below TPE-20": float(np.mean(below[what])) if below[what] else float("nan"),
            "mean rank": float(np.mean(ranks[what])),
            "cells 5% worse than untuned": worse[what],
        }
        for what in ranks
    }
    print(f"\n{'from the default start':28}{'<= TPE-20':>12}{'mean rank':>12}{'worse cells':>14}")
    for what, r in sorted(result.items(), key=lambda item: item[1]["mean rank"]):
        share, rank, cells = r.values()
        print(f"{what:28}{share:12.0%}{rank:12.1f}{cells:14}")
    return result


def main(quick: bool = False, argv: list[str] | None = None) -> dict[str, Row]:
    """Measures, prints one table per task and a summary, and writes `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, help="gauntlet.npz and MNIST's idx files")
    parser.add_argument("--out", help="JSON with every cell; the same call goes on from it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=NAMES)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    args = parser.parse_args([] if argv is None else argv)
    args.quick |= quick
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = args.tasks or list(NAMES if args.data else FREE)
    names = names[-2:] if args.quick and not args.tasks else names
    rows = measure(names, args.methods or list(METHODS), args)
    result = summary(rows)
    if args.out:
        Path(args.out).write_text(json.dumps({"rows": rows, "summary": result}))
    return result


if __name__ == "__main__":
    main(argv=sys.argv[1:])
