"""Kill a sweep (SIGKILL) at random moments, start it again with the same command, count its trials.

Run: `python -m benchmarks.crash` (20 to 40 minutes on two cores; `--quick`: 3 kills of 20 trials,
two processes, on journal and SQLite, a minute or two; `--storage`, `--kills`, `--trials` choose).

The sweep: 60 trials of a regression with two programs (sgd with a conditional momentum, adam),
refined by hypergradients, in populations of two; without a scheduler and with Hyperband. A quarter
of the kills falls at a random moment of the start (imports done: opening, recovery, proposing,
compiling), the others at a random moment between rungs (training, telling, halving). Of two
processes at once, three kills in four take both, one after the other. After every kill the finished
trials are read by Optuna alone.

Columns: finished trials of the 60; lost: finished trials that a later reading lacks or that
changed; doubled: finished trials beyond one per slot; zombies: trials left RUNNING or WAITING;
restarted: trials that died with their process and ran again; seconds; with `checkpoint=` (rows of
"kept") gone on: attempts that followed one with a finished rung, and the most finished rungs that
one death has cost a trial, beside the one under way. PostgreSQL is installed and
started where that can be (`benchmarks/postgresql.py`), else left out with the reason. Then what
else may befall a sweep, tried and survived: `benchmarks/mishaps.py`.
"""

import argparse
import contextlib
import logging
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import optuna
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import hypergrad as hg
from benchmarks import mishaps
from benchmarks.postgresql import UnavailableError, server

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = "imported"
# What a process may take to get from one sign of life to the next, in seconds.
PATIENCE = 300
STEPS_PER_UPDATE = 5
_GOES_ON = re.compile(r"#(\d+) goes on from update (\d+) of")


class Outcome(NamedTuple):
    """What a storage holds after the last process has ended by itself."""

    finished: int
    lost: int
    doubled: int
    zombies: int
    restarted: int
    kills: int
    seconds: float
    gone_on: int = 0
    most_lost: int = 0


def make_problem(choices: dict[str, Any]) -> hg.Problem:
    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> Any:
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def optimizer(hyper: Any) -> Any:
        if choices["optimizer"] == "sgd":
            return optax.sgd(hyper["rate"], momentum=hyper["momentum"])
        return optax.adam(hyper["rate"])

    return hg.bilevel(lambda key: jnp.zeros(4), loss, loss, optimizer)


def sweep(
    storage: str,
    num_trials: int,
    hyperband: bool,
    programs: int,
    population: int,
    checkpoint: str | None = None,
) -> None:
    """Run the sweep that is killed: the same call every time."""
    random_state = np.random.RandomState(0)
    inputs = random_state.normal(size=(60, 4)).astype(np.float32)
    targets = inputs @ np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    splits = [(inputs[a:b], targets[a:b]) for a, b in ((0, 40), (40, 50), (50, 60))]
    space = hg.Space(
        {
            "optimizer": hg.Categorical(["sgd", "adam"][:programs]),
            "momentum": hg.Float(0.1, 0.9, scale="reverse_log", when={"optimizer": "sgd"}),
            "rate": hg.Float(1e-3, 0.1, scale="log"),
        }
    )
    hg.sweep(
        make_problem,
        space,
        hg.Splits(*splits),
        num_trials=num_trials,
        num_steps=20,
        batch_size=8,
        refine=hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=STEPS_PER_UPDATE),
        scheduler=hg.Hyperband(min_steps=5, eta=2) if hyperband else None,
        storage=storage,
        population=population,
        checkpoint=checkpoint,
    )


class Process:
    """The command in a process of its own; its lines say how far it is."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                self.output.append(line)
                self._lines.put(line)
        self._lines.put(None)

    def await_lines(self, count: int, having: str) -> bool:
        """Wait for `count` more lines with this text; False where it ended before."""
        while count:
            line = self._lines.get(timeout=PATIENCE)
            if line is None:
                self._lines.put(None)
                return False
            count -= having in line
        return True

    def ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        return self._popen.returncode is not None

    @property
    def pid(self) -> int:
        return self._popen.pid

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._reader.join()

    def finish(self) -> None:
        """Wait for its end.

        Raises:
          RuntimeError: it failed; with what it printed.
        """
        if self._popen.wait(PATIENCE):
            raise RuntimeError(f"exit {self._popen.returncode}: {''.join(self.output)[-4000:]}")


def crash(
    storage: str,
    *,
    num_trials: int,
    kills: int,
    folder: Path,
    hyperband: bool = False,
    programs: int = 2,
    population: int = 2,
    processes: int = 1,
    seed: int = 0,
    checkpoint: bool = False,
) -> Outcome:
    """Kill the sweep `kills` times, let it end, and count.

    Kills that would come after the sweep's end are left out: `kills` of the outcome says how many
    were. `folder` keeps compiled programs, so that a process gets to work in seconds.

    Raises:
      RuntimeError: a process failed by itself.
    """
    command = command_of(storage, num_trials, programs, population, hyperband)
    if checkpoint:
        command += ["--checkpoint", str(folder / f"kept-{seed}")]
    rng = random.Random(seed)
    begin, done, lost = time.monotonic(), 0, 0
    known: dict[int, Any] = {}
    alive = [start(command, folder) for _ in range(processes)]
    begun = list(alive)
    try:
        for i in range(kills):
            victim = alive[i % processes]
            if not victim.await_lines(1, IMPORTED):
                break
            # No further than its share of the trials, so that all kills find something to kill.
            share = num_trials * (i + 1) / (kills + 1)
            if rng.random() < 0.25 or len(known) > share:
                ended = victim.ends_within(rng.uniform(0.0, 1.0))
            else:
                ended = not victim.await_lines(rng.randint(1, 2), " steps: ")
                ended = ended or victim.ends_within(rng.uniform(0.0, 0.3))
            if ended:
                break
            done += 1
            # Mostly all at once: a survivor would have finished before the others are back.
            dying = [victim] if rng.random() < 0.25 else alive
            for process in dying:
                process.kill()
                time.sleep(rng.uniform(0.0, 0.1))
            now = finished_trials(storage)
            lost += sum(now.get(number) != trial for number, trial in known.items())
            known = now
            alive = [start(command, folder) if p in dying else p for p in alive]
            begun += [process for process in alive if process not in begun]
        for process in alive:
            process.finish()
    finally:
        for process in alive:
            process.kill()
    now = finished_trials(storage)
    lost += sum(now.get(number) != trial for number, trial in known.items())
    found = count_of(storage)._replace(lost=lost, kills=done, seconds=time.monotonic() - begin)
    if checkpoint:
        rungs = rungs_lost(storage, [line for process in begun for line in process.output])
        found = found._replace(gone_on=len(rungs), most_lost=max(rungs, default=0))
    return found


def rungs_lost(storage: str, lines: list[str]) -> list[int]:
    """How many finished rungs each death of a trial's process has cost it.

    `lines` are what the processes have logged. An attempt that died before it began counts with the
    one before it.
    """
    said = [_GOES_ON.search(line) for line in lines]
    went_on = {int(m[1]): STEPS_PER_UPDATE * int(m[2]) for m in said if m}
    trials, result = _trials(storage), []
    finished = {trial.number for trial in with_result(trials)}
    attempts: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        root = trial.system_attrs.get("hypergrad:root", trial.number)
        attempts.setdefault(root, []).append(trial)
    for slot in attempts.values():
        behind: set[int] = set()
        for trial in slot:
            begin, own = went_on.get(trial.number, 0), set(trial.intermediate_values)
            if begin or own or trial.number in finished:
                if behind:
                    result.append(sum(step > begin for step in behind))
                behind = own | ({begin} if begin else set())
    return result


def command_of(
    storage: str,
    num_trials: int,
    programs: int = 1,
    population: int = 1,
    hyperband: bool = False,
) -> list[str]:
    """The sweep as a command."""
    command = [sys.executable, "-m", "benchmarks.crash", "--sweep", storage]
    command += ["--trials", str(num_trials), "--programs", str(programs)]
    command += ["--population", str(population)]
    return command + (["--hyperband"] if hyperband else [])


def start(command: list[str], folder: Path) -> Process:
    """Run it; `folder` keeps compiled programs."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return Process(command, environment)


def count_of(storage: str) -> Outcome:
    """What a storage holds; nothing is known of what was lost."""
    trials = _trials(storage)
    slots = Counter(t.system_attrs.get("hypergrad:root", t.number) for t in with_result(trials))
    states = Counter(t.state for t in trials)
    return Outcome(
        finished=len(slots),
        lost=0,
        doubled=sum(slots.values()) - len(slots),
        zombies=states[TrialState.RUNNING] + states[TrialState.WAITING],
        restarted=sum("hypergrad:lost" in t.system_attrs for t in trials),
        kills=0,
        seconds=0.0,
    )


def _trials(storage: str) -> list[FrozenTrial]:
    """All trials as Optuna alone reads them."""
    database = "://" in storage
    place = RDBStorage(storage) if database else JournalStorage(JournalFileBackend(storage))
    try:
        return optuna.load_study(study_name="hypergrad", storage=place).trials
    except KeyError:  # Killed before it was made.
        return []
    finally:
        if isinstance(place, RDBStorage):
            place.engine.dispose()


def with_result(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that ended by themselves; one whose process died runs again as another."""
    return [
        t
        for t in trials
        if t.state in (TrialState.COMPLETE, TrialState.PRUNED)
        or (t.state == TrialState.FAIL and "error" in t.user_attrs)
    ]


def finished_trials(storage: str) -> dict[int, Any]:
    """What each finished trial says."""
    found = with_result(_trials(storage))
    return {t.number: (t.state, t.value, t.params, t.user_attrs["start"]) for t in found}


@contextlib.contextmanager
def places(folder: Path, kinds: list[str]) -> Iterator[dict[str, str]]:
    """Storages of these kinds, one pattern each with room for a name."""
    found = {"journal": f"{folder}/{{}}.journal", "sqlite": f"sqlite:///{folder}/{{}}.db"}
    found = {kind: place for kind, place in found.items() if kind in kinds}
    with contextlib.ExitStack() as stack:
        if "postgresql" in kinds:
            try:
                url = stack.enter_context(server(durable=True))
                # One schema is enough: every run has a study of its own by emptying it.
                found["postgresql"] = url
            except UnavailableError as error:
                print(f"postgresql is left out: {error}")
        yield found


def main(
    quick: bool = False, kinds: str = "", kills: int = 0, num_trials: int = 0
) -> dict[str, Outcome]:
    """Print the table; returns every row by its label."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kills, num_trials = kills or (3 if quick else 20), num_trials or (20 if quick else 60)
    names = kinds.split(",") if kinds else ["journal", "sqlite"] + ([] if quick else ["postgresql"])
    rows = {}
    columns = "".join(f"{name:>10}" for name in Outcome._fields)
    print(f"{'storage':12}{'scheduler':17}{'processes':10}{columns}", flush=True)
    with tempfile.TemporaryDirectory() as name, places(Path(name), names) as found:
        for kind, pattern in found.items():
            ways = ((False, 1, False), (True, 1, False), (True, 2, False), (True, 1, True))
            for hyperband, processes, checkpoint in ways[2 * quick :]:
                label = f"{kind}-{'hyperband' if hyperband else 'none'}-{processes}"
                label += "-kept" * checkpoint
                if "{}" not in pattern:
                    _empty(pattern)
                outcome = crash(
                    pattern.format(label),
                    num_trials=num_trials,
                    kills=kills,
                    folder=Path(name),
                    hyperband=hyperband,
                    processes=processes,
                    seed=len(rows),
                    checkpoint=checkpoint,
                )
                scheduler = ("Hyperband" if hyperband else "-") + ", kept" * checkpoint
                values = "".join(f"{value:10.0f}" for value in outcome)
                print(f"{kind:12}{scheduler:17}{processes:<10}{values}", flush=True)
                rows[label] = outcome
                wrong = outcome.lost or outcome.doubled or outcome.zombies
                if outcome.finished != num_trials or wrong or outcome.most_lost > 1:
                    raise AssertionError(f"{label}: {outcome}")
        mishaps.show(mishaps.of_sweeps(Path(name), quick))
    return rows


def _empty(url: str) -> None:
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name="hypergrad", storage=url)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--storage", default="", help="journal,sqlite,postgresql: which of them")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--sweep", help="be the sweep that is killed, on this storage")
    parser.add_argument("--hyperband", action="store_true")
    parser.add_argument("--checkpoint", help="where the sweep keeps its unfinished trials")
    parser.add_argument("--programs", type=int, default=2)
    parser.add_argument("--population", type=int, default=2)
    options = parser.parse_args()
    if options.sweep:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
        logging.getLogger("hypergrad").setLevel(logging.INFO)
        print(IMPORTED, flush=True)
        sweep(
            options.sweep,
            options.trials,
            options.hyperband,
            options.programs,
            options.population,
            options.checkpoint,
        )
    else:
        main(options.quick, options.storage, options.kills, options.trials)
