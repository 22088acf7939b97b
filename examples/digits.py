"""Tune a flax network's seven hyperparameters by hypergradients, beside random search and TPE.

digits-200 (see digits200.py), from a bad start and from a sensible default: one alternating run
that tunes while it trains; whole runs from there by `restarting`; 20 full runs each of random
search and Optuna's TPE. Every result is frozen and retrained on 10 fresh seeds.

  python examples/digits.py [--quick] [--out digits.png]

prints the table and writes the picture. About two minutes on two cores; --quick takes one start,
fewer runs and 2 fresh seeds, in under one.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import compiling
import digits200 as task
import jax
import jax.numpy as jnp
import numpy as np
import optuna
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import hypergrad as hg
from hypergrad.plotting import plot_losses, plot_trajectories
from hypergrad.plotting.panels import PALETTE, new_panels, png


class Result(NamedTuple):
    """One row of the table."""

    start: str
    method: str
    test_loss: float
    evaluations: float
    seconds: float
    compile_seconds: float


class Run(NamedTuple):
    """What an alternating run leaves behind."""

    start: str
    history: list[Any]
    best: Any


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    """`function` compiled for `args`, and the seconds it took."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*args).compile(compiler_options=compiling.OPTIONS)
    return program, time.perf_counter() - begin


def describe(info: Any) -> str:
    """The hyperparameters' values on one line."""
    hyper = jax.tree.map(np.asarray, info.hyper)
    return (
        f"loss {float(info.loss):.3f}  lr {hyper['learning_rate']:.4f}  "
        f"momentum {hyper['momentum']:.3f}  l2 {hyper['l2'].mean():.1e}  "
        f"dropout {hyper['dropout'].mean():.2f}"
    )


def alternating(start: str, data: task.Data, seeds: int, bar: Progress) -> tuple[Run, Result]:
    """One training run of 500 steps, tuned every 10."""
    tuner = hg.alternating(task.PROBLEM, task.SPACE)
    train = hg.Minibatches(data.train, task.BATCH, task.WINDOW)
    state = tuner.init(task.STARTS[start], jax.random.key(0))
    update, compile_seconds = compiled(tuner.update, state, train, data.valid)
    updates = task.STEPS // task.WINDOW
    row = bar.add_task(f"{start}: alternating", total=updates, info="")
    history, begin = [], time.perf_counter()
    for _ in range(updates):
        state, info = update(state, train, data.valid)
        history.append(info)
        bar.update(row, advance=1, info=describe(info))
    seconds = time.perf_counter() - begin
    schedule = hg.settled_schedule(task.SPACE, [info.hyper for info in history], task.WINDOW)
    cost = task.evaluations(task.STEPS, updates)
    loss = task.fresh_test_loss(schedule, data, seeds)
    result = Result(start, "one alternating run", loss, cost, seconds, compile_seconds)
    return Run(start, history, tuner.best(state)), result


def restarting(
    run: Run, data: task.Data, updates: int, seeds: int, bar: Progress, first: Result
) -> Result:
    """Whole runs from what the alternating run found, its cost counted in."""
    tuner = hg.restarting(
        task.PROBLEM, task.SPACE, hg.Unrolled(validate_at=task.WINDOW), fresh_seeds=True
    )
    train = hg.Minibatches(data.train, task.BATCH, task.STEPS)
    state = tuner.init(run.best, jax.random.key(1))
    update, compile_seconds = compiled(tuner.update, state, train, data.valid)
    row = bar.add_task(f"{run.start}: then restarting", total=updates, info="")
    begin = time.perf_counter()
    for _ in range(updates):
        state, info = update(state, train, data.valid)
        bar.update(row, advance=1, info=describe(info))
    seconds = time.perf_counter() - begin
    loss = task.fresh_test_loss(task.constant(tuner.best(state)), data, seeds)
    return Result(
        run.start,
        f"then restarting, {updates} runs",
        loss,
        first.evaluations + updates * task.evaluations(task.STEPS, 1),
        first.seconds + seconds,
        first.compile_seconds + compile_seconds,
    )


def black_box(sampler: str, data: task.Data, runs: int, seeds: int, bar: Progress) -> Result:
    """Random search or TPE over the same box, each trial a full run, the best by validation."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"random": optuna.samplers.RandomSampler, "TPE": optuna.samplers.TPESampler}
    study = optuna.create_study(sampler=samplers[sampler](seed=0))
    _, unravel = ravel_pytree(task.SPACE.to_unit(task.STARTS["def"]))
    row = bar.add_task(f"{sampler}, {runs} full runs", total=runs, info="")
    train, compile_seconds = compiled(
        task.retrain,
        task.constant(task.STARTS["def"]),
        data,
        jax.random.split(jax.random.key(0), 1),
    )
    begin = time.perf_counter()

    def hyper_of(params: dict[str, float]) -> Any:
        return task.SPACE.from_unit(unravel(jnp.asarray(list(params.values()), jnp.float32)))

    for number in range(runs):
        trial = study.ask()
        params = {f"u{i}": trial.suggest_float(f"u{i}", 0, 1) for i in range(task.num_hyper())}
        keys = jax.random.split(jax.random.key(100 + number), 1)
        loss = float(train(task.constant(hyper_of(params)), data, keys)[0][0])
        study.tell(trial, min(loss, 20.0) if np.isfinite(loss) else 20.0)
        bar.update(row, advance=1, info=f"best validation loss {study.best_value:.3f}")
    seconds = time.perf_counter() - begin
    best = task.constant(hyper_of(study.best_params))
    name = f"{sampler}, best of {runs} full runs"
    cost = runs * task.STEPS
    loss = task.fresh_test_loss(best, data, seeds)
    return Result("-", name, loss, cost, seconds, compile_seconds)


def show(results: list[Result], seeds: int, console: Console) -> None:
    """The table."""
    title = f"digits-200: test loss, mean of {seeds} fresh seeds"
    table = Table(title=title, title_justify="left")
    for name in ("start", "method", "test loss", "gradient evaluations", "seconds", "compile s"):
        table.add_column(name, justify="left" if name in ("start", "method") else "right")
    for r in results:
        numbers = (f"{r.test_loss:.3f}", f"{r.evaluations:,.0f}", f"{r.seconds:.1f}")
        table.add_row(r.start, r.method, *numbers, f"{r.compile_seconds:.1f}")
    console.print(table)


def draw(runs: list[Run], results: list[Result], path: str) -> None:
    """Trajectories of the alternating runs, and where every method ends."""
    colours = {"bad": PALETTE[1], "def": PALETTE[0], "-": "#777777"}
    axes = new_panels(6, (9, 6))
    for run in runs:
        style = {"steps_per_update": task.WINDOW, "label": run.start, "color": colours[run.start]}
        plot_trajectories(run.history, task.SPACE, axes=axes[:4], **style)
        plot_losses(run.history, axes=axes[4], **style)
    axes[2].set_ylabel("l2 per layer")
    axes[3].set_ylabel("dropout per layer")
    axes[3].set_ylim(-0.01, 0.3)
    names = [f"{r.method} ({r.start})" if r.start != "-" else r.method for r in results]
    axis = axes[5]
    axis.barh(
        names,
        [min(r.test_loss, 0.3) for r in results],
        color=[colours[r.start] for r in results],
        alpha=0.45,
    )
    for i, (r, name) in enumerate(zip(results, names, strict=True)):
        axis.text(0.104, i, name, va="center", fontsize=8)
        axis.text(0.345, i, f"{r.test_loss:.3f}", va="center", ha="right", fontsize=8)
    axis.set_xlim(0.1, 0.35)
    axis.invert_yaxis()
    axis.set_yticks([])
    axis.set_xlabel("test loss on fresh seeds (cut at 0.3)")
    figure = axes[0].figure
    figure.suptitle("One training run of 500 steps tunes seven hyperparameters (digits-200)")
    Path(path).write_bytes(png(figure))


def main() -> None:
    """Run everything, print the table, write the picture."""
    parser = argparse.ArgumentParser(description="hypergradients on digits-200")
    parser.add_argument("--quick", action="store_true", help="one start, fewer runs and seeds")
    parser.add_argument("--out", default="digits.png", help="where the picture goes")
    options = parser.parse_args()
    starts = ["bad"] if options.quick else ["bad", "def"]
    updates, trials, seeds = (2, 5, 2) if options.quick else (8, 20, 10)
    # In a narrow terminal or a log the table would wrap inside its names.
    data, console = task.load(), Console(width=max(Console().width, 100))
    columns = (TextColumn("{task.description:<24}"), BarColumn(20), TimeElapsedColumn())
    runs, results = [], []
    with Progress(*columns, TextColumn("{task.fields[info]}"), console=console) as bar:
        for start in starts:
            loss = task.fresh_test_loss(task.constant(task.STARTS[start]), data, seeds)
            results.append(Result(start, "untuned", loss, 0, 0, 0))
            run, result = alternating(start, data, seeds, bar)
            runs.append(run)
            results.append(result)
            results.append(restarting(run, data, updates, seeds, bar, result))
        for sampler in ("random", "TPE"):
            results.append(black_box(sampler, data, trials, seeds, bar))
    show(results, seeds, console)
    draw(runs, results, options.out)
    console.print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
