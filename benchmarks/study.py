"""Measure what our study costs per trial beyond Optuna's own ask and tell.

Run: `python -m benchmarks.study` (about a minute on one core; `main(quick=True)` 20 s).

The same TPE, seed and space (three Floats, an Int, a Categorical) by Optuna alone (`study.ask` with
its distributions, `study.tell`) and by `OpenStudy` (`ask`, `finish`), one trial of each in turn so
that both meet the same load and history; medians in ms after 20 trials. "recorded" is
`ask(record=True)`, which also must propose the same values; "refined" is `ask(record=False)` with
the start told as the refined value. Target: <= 2 ms over Optuna in memory. PostgreSQL, where there
is one or it can be installed, on the loopback interface and with fsync.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

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
    alone = optuna.create_study(
        storage=storage("alone"), sampler=optuna.samplers.TPESampler(seed=0)
    )
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
    return extra


if __name__ == "__main__":
    main()
