"""Measure what our study costs per trial beyond Optuna's own ask and tell.

Run: `python -m benchmarks.study` (about a minute on one core; `main(quick=True)` 20 s).

The same TPE, seed and space (three Floats, an Int, a Categorical) by Optuna alone (`study.ask` with
its distributions, `study.tell`) and by `OpenStudy` (`ask`, `finish`), one trial of each in turn so
that both meet the same load and history; medians in ms after 20 trials. "recorded" is
`ask(record=True)`, which also must propose the same values; "refined" is `ask(record=False)` with
the start told as the refined value. Target: <= 2 ms over Optuna in memory. PostgreSQL, where there
is one or it can be installed, on the loopback interface and with fsync.

Then a whole `hg.sweep` of a problem that costs nothing, compilation apart (the first 20 trials are
left out): from one trial's end to the next, and after each one trial of Optuna alone, with the same
sampler and space. Wall clock and, where other processes are about, processor time. Targets: 5 ms
over Optuna in memory at 400 trials, 20 ms on SQLite.
"""

import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optuna

import hypergrad as hg
from benchmarks.postgresql import UnavailableError, server
from hypergrad.study.distributions import Coordinates
from hypergrad.study.storage import open_storage
from hypergrad.study.study import open_study

SPACE = hg.Space(
    {
        "optimizer": hg.Categorical(["sgd", "adamw"]),
        "width": hg.Int(16, 256, scale="log"),
        "learning_rate": hg.Float(1e-4, 1.0, scale="log"),
        "weight_decay": hg.Float(1e-6, 1e-1, scale="log"),
        "dropout": hg.Float(0.0, 0.8),
    }
)
WARM = 20
TARGET = 2.0
SWEEP_TARGETS = {"memory": 5.0, "sqlite": 20.0}


def value(params: dict) -> float:
    return params["dropout"] + params["learning_rate"] + params["width"] / 256


def measure(kind: str, folder: Path, num_trials: int, url: str | None) -> dict[str, list[float]]:
    """Return ms per trial of each way; `url` is that of PostgreSQL."""

    def storage(name: str) -> object:
        place = {
            "memory": None,
            "journal": f"{folder}/{name}.journal",
            "sqlite": f"sqlite:///{folder}/{name}.db",
            "postgresql": url,
        }[kind]
        return open_storage(place)

    distributions = Coordinates(SPACE).distributions
    alone = by_optuna(storage("alone"))
    ours = {
        name: open_study(SPACE, storage(name), "tpe", seed=0, name=name)
        for name in ("recorded", "refined")
    }
    times: dict[str, list[float]] = {"Optuna": [], "recorded": [], "refined": []}
    for i in range(num_trials):
        begin = time.perf_counter()
        trial = alone.ask(distributions)
        alone.tell(trial, value(trial.params))
        times["Optuna"].append(1e3 * (time.perf_counter() - begin))
        for name, opened in ours.items():
            begin = time.perf_counter()
            proposal = opened.ask(record=name == "recorded")
            hyper = {**proposal.choices, **proposal.start}
            opened.finish(proposal, value(hyper))
            times[name].append(1e3 * (time.perf_counter() - begin))
            if name == "recorded" and hyper != trial.params:
                raise AssertionError(f"trial {i} differs from Optuna's: {hyper}, {trial.params}")
    for opened in ours.values():
        opened.close()
    return times


def by_optuna(storage: Any) -> optuna.Study:
    return optuna.create_study(storage=storage, sampler=optuna.samplers.TPESampler(seed=0))


def make_problem(choices: dict[str, Any]) -> hg.Problem:
    """One weight, one step: nothing is left but what surrounds training."""

    def loss(weight: jax.Array, hyper: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        shrunk = weight * (hyper["weight_decay"] + hyper["dropout"] / hyper["width"])
        return jnp.mean((weight + shrunk - batch) ** 2)

    rule = {"sgd": optax.sgd, "adamw": optax.adamw}[choices["optimizer"]]
    return hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: rule(h["learning_rate"]))


class Between(logging.Handler):
    """Told of each rung: what the sweep took since the last, then one trial of Optuna alone."""

    def __init__(self, study: optuna.Study) -> None:
        super().__init__()
        self.times: dict[str, list[tuple[float, float]]] = {"Optuna": [], "sweep": []}
        self._study, self._since = study, _now()

    def emit(self, record: logging.LogRecord) -> None:
        if " steps: " not in record.getMessage():
            return
        self.times["sweep"].append(_ms_since(self._since))
        self._since = _now()
        trial = self._study.ask(Coordinates(TRACED).distributions)
        self._study.tell(trial, value(trial.params))
        self.times["Optuna"].append(_ms_since(self._since))
        self._since = _now()


# The width is traced, so that there are two programs only.
TRACED = hg.Space({**dict(SPACE), "width": hg.Int(16, 256, scale="log", traced=True)})


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _ms_since(begin: tuple[float, float]) -> tuple[float, float]:
    now = _now()
    return 1e3 * (now[0] - begin[0]), 1e3 * (now[1] - begin[1])


def swept(place: Callable[[str], Any], num_trials: int, refine: hg.Refine | None) -> list[float]:
    """Medians of ms per trial: Optuna's, the sweep's over it, and that in processor time."""
    splits = hg.Splits(*(jnp.arange(float(n)) for n in (8, 4, 4)))
    between, log = Between(by_optuna(open_storage(place("alone")))), logging.getLogger("hypergrad")
    level, log.propagate = log.level, False
    log.addHandler(between)
    log.setLevel(logging.INFO)
    try:
        hg.sweep(
            make_problem,
            TRACED,
            splits,
            num_trials=num_trials,
            num_steps=5,
            batch_size=4,
            refine=refine,
            storage=place("sweep"),
        )
    finally:
        log.removeHandler(between)
        log.setLevel(level)
        log.propagate = True
    theirs, ours = (between.times[name][WARM:] for name in ("Optuna", "sweep"))
    over = [[a[i] - b[i] for a, b in zip(ours, theirs, strict=True)] for i in (0, 1)]
    return [statistics.median(ms) for ms in ([wall for wall, _ in theirs], *over)]


def overhead(quick: bool = False) -> None:
    """Print what a sweep adds to Optuna."""
    sizes = {"memory": 100, "journal": 50, "sqlite": 40} if quick else {
        "memory": 400, "journal": 100, "sqlite": 100}  # fmt: skip
    heads = f"{'Optuna':>9}{'over':>8}{'of CPU':>8}"
    print(f"{'sweep':11}{'trials':>7}{'refined':>9}{heads}  ms per trial")
    for kind, num_trials in sizes.items():
        for refine in (None, hg.Refine(steps_per_update=5)):
            with tempfile.TemporaryDirectory() as folder:
                place = {
                    "memory": lambda name: None,
                    "journal": lambda name, folder=folder: f"{folder}/{name}.journal",
                    "sqlite": lambda name, folder=folder: f"sqlite:///{folder}/{name}.db",
                }[kind]
                theirs, over, cpu = swept(place, num_trials, refine)
            target = SWEEP_TARGETS.get(kind)
            missed = "   MISSED" if target is not None and over > target else ""
            name = "no" if refine is None else "yes"
            print(
                f"{kind:11}{num_trials:7d}{name:>9}{theirs:9.2f}{over:+8.2f}{cpu:+8.2f}{missed}",
                flush=True,
            )


def main(quick: bool = False) -> dict[str, float]:
    """Print ms per trial by storage; returns the medians over Optuna's own."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sizes = {"memory": 100, "journal": 50, "sqlite": 30} if quick else {
        "memory": 500, "journal": 200, "sqlite": 50, "postgresql": 100}  # fmt: skip
    print(f"{'storage':11}{'trials':>7}{'Optuna':>9}{'recorded':>10}{'refined':>9}  ms per trial")
    extra = {}
    for kind, num_trials in sizes.items():
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            try:
                url = stack.enter_context(server(durable=True)) if kind == "postgresql" else None
            except UnavailableError as error:
                print(f"{kind} is left out: {error}")
                continue
            times = measure(kind, Path(folder), num_trials, url)
        medians = {name: statistics.median(ms[WARM:]) for name, ms in times.items()}
        # Trial by trial, as a history's length and the machine's load change both.
        pairs = list(zip(times["Optuna"], times["recorded"], strict=True))[WARM:]
        extra[kind] = statistics.median(ours - theirs for theirs, ours in pairs)
        missed = "   MISSED" if kind == "memory" and extra[kind] > TARGET else ""
        print(
            f"{kind:11}{num_trials:7d}{medians['Optuna']:9.2f}{medians['recorded']:10.2f}"
            f"{medians['refined']:9.2f}  recorded: {extra[kind]:+.2f}{missed}",
            flush=True,
        )
    overhead(quick)
    return extra


if __name__ == "__main__":
    main()
