"""What else may befall a sweep or a run: rows of `benchmarks.crash` and of `benchmarks.resume`.

Each row counts how often something was tried, and how often nothing was lost by it.

Sweeps: a disk that is full for 10 s while a process trains and beats (its files may not grow: half
of what it writes is written), on journal and SQLite; a journal broken in each of the ways of
`tests/test_journal.py`; of two processes one stopped (SIGSTOP) for 100 s; Ctrl-C. Afterwards the
same command ends the sweep, and every finished trial of before is there, unchanged, and no trial is
missing or doubled.

Runs: reading a checkpoint fails for each of the reasons of `tests/test_checkpoints.py`; a second
process on one folder, which must be refused while the first one ends with the bits of a run that
nobody disturbed; Ctrl-C, resumed to the same bits. And the memory of 10,000 updates and of 50 calls
of `fit`, which must not grow.
"""

import contextlib
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Tried(NamedTuple):
    """How often, and how often nothing was lost."""

    tried: int
    survived: int


def show(rows: dict[str, Tried]) -> dict[str, Tried]:
    """Print rows as they are.

    Raises:
      AssertionError: something was lost.
    """
    for label, row in rows.items():
        print(f"{label:44}{row.survived:4} of {row.tried}", flush=True)
    lost = {label: row for label, row in rows.items() if row.tried != row.survived}
    if lost:
        raise AssertionError(f"lost: {lost}")
    return rows


def of_sweeps(folder: Path, quick: bool) -> dict[str, Tried]:
    """The rows of sweeps; `folder` keeps what they leave."""
    _hear_interrupts()
    stopped = 5.0 if quick else 100.0
    full = 3.0 if quick else 10.0
    return {
        f"journal, disk full for {full:.0f} s": _sweeps(folder, "full.journal", _fill(full)),
        f"SQLite, disk full for {full:.0f} s": _sweeps(folder, "full.db", _fill(full)),
        f"journal, SIGSTOP for {stopped:.0f} s": _sweeps(
            folder, "stop.journal", _stop(stopped), 2, 1
        ),
        "journal, Ctrl-C": _sweeps(folder, "interrupt.journal", _interrupt),
        "broken journals": broken_journals(folder),
    }


def _hear_interrupts() -> None:
    """In what a shell starts in the background Ctrl-C is ignored, and so in what that starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _sweeps(
    folder: Path, name: str, mishap: Callable[[Any, str], None], processes: int = 1, times: int = 3
) -> Tried:
    """Sweeps that the mishap befalls, each somewhere else."""
    found = [_survives(folder, f"{i}-{name}", mishap, processes, i + 1) for i in range(times)]
    return Tried(times, sum(found))


def _survives(
    folder: Path, name: str, mishap: Callable[[Any, str], None], processes: int, rungs: int
) -> bool:
    """Whether a sweep that the mishap befalls after so many rungs is whole in the end."""
    from benchmarks.crash import command_of, count_of, finished_trials, start

    storage = str(folder / name)
    storage = f"sqlite:///{storage}" if name.endswith(".db") else storage
    command = command_of(storage, num_trials=16)
    alive = [start(command, folder) for _ in range(processes)]
    if not alive[0].await_lines(rungs, " steps: "):
        raise RuntimeError(f"{name}: the sweep ended before anything befell it")
    time.sleep(random.uniform(0.0, 0.3))
    known = finished_trials(storage)
    mishap(alive[0], storage)
    for process in alive[1:]:
        process.finish()
    alive[0].ends_within(300)
    start(command, folder).finish()
    now, whole = finished_trials(storage), count_of(storage)
    kept = all(now.get(number) == trial for number, trial in known.items())
    return kept and (whole.finished, whole.doubled, whole.zombies) == (16, 0, 0)


def _fill(seconds: float) -> Callable[[Any, str], None]:
    def fill(process: Any, storage: str) -> None:
        path = storage.removeprefix("sqlite:///")
        # The next line of a journal is cut in half; a database writes no page behind its first.
        size = os.path.getsize(path) + 60 if path == storage else 1000
        _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, most))
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))

    return fill


def _stop(seconds: float) -> Callable[[Any, str], None]:
    def stop(process: Any, storage: str) -> None:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGCONT)

    return stop


def _interrupt(process: Any, storage: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGINT)


def broken_journals(folder: Path) -> Tried:
    """Each broken form is read, goes on, and holds what it held."""
    from tests.test_journal import BROKEN, read, run

    logging.getLogger("hypergrad").setLevel(logging.ERROR)  # it tells of each broken line
    path = folder / "broken.journal"
    run(path, 3)
    whole = path.read_bytes()
    before, survived = read(path), 0
    for form in BROKEN.values():
        path.write_bytes(form(whole))
        with contextlib.suppress(Exception):
            survived += read(path) == before and run(path, 5)[:3] == before
    return Tried(len(BROKEN), survived)


def of_runs(folder: Path, quick: bool) -> dict[str, Tried]:
    """The rows of single runs."""
    _hear_interrupts()
    return {
        "checkpoints that cannot be read now": unreadable_checkpoints(folder),
        "a second writer": _second_writers(folder, 1 if quick else 5),
        "Ctrl-C": _interrupted_runs(folder, 1 if quick else 5),
        "memory: 10,000 updates, 50 calls": flat_memory(quick),
    }


def unreadable_checkpoints(folder: Path) -> Tried:
    """The reason is raised, nothing is renamed, and the next attempt goes on."""
    import orbax.checkpoint as ocp

    from tests.test_checkpoints import CANNOT_NOW, content, run

    survived, restore = 0, ocp.Checkpointer.restore
    for i, (kind, error) in enumerate(CANNOT_NOW.items()):
        place = folder / f"unreadable-{i}"
        run(10, place)
        before, raised = content(place), False
        ocp.Checkpointer.restore = _raising(error)
        try:
            run(12, place)
        except (OSError, MemoryError):
            raised = True
        finally:
            ocp.Checkpointer.restore = restore
        seen: list[int] = []
        kept = content(place) == before
        run(12, place, callbacks=[lambda record, seen=seen: seen.append(record.update)])
        survived += raised and kept and seen == [10, 11]
        if not (raised and kept):
            print(kind, raised, kept)
    return Tried(len(CANNOT_NOW), survived)


def _raising(error: BaseException) -> Callable[..., Any]:
    def restore(*args: Any, **options: Any) -> Any:
        raise error

    return restore


def _second_writers(folder: Path, count: int) -> Tried:
    from benchmarks.resume import equal, finish, start, wait_for

    reference, survived = finish(folder / "alone"), 0
    for i in range(count):
        place = folder / f"shared-{i}"
        first = start(place)
        wait_for(first, random.randrange(40))
        first.send_signal(signal.SIGSTOP)  # or it would be done before the second one is imported
        begin = time.monotonic()
        second = subprocess.run(
            [sys.executable, "-m", "tests.resume_worker", str(place), "0.01"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        first.send_signal(signal.SIGCONT)
        first.communicate()
        refused = second.returncode == 1 and "is written by process" in second.stderr
        ended = not first.returncode and equal(reference, finish(place))
        survived += refused and ended and time.monotonic() - begin < 120
    return Tried(count, survived)


def _interrupted_runs(folder: Path, count: int) -> Tried:
    from benchmarks.resume import equal, finish, start, wait_for

    reference, survived = finish(folder / "undisturbed"), 0
    for i in range(count):
        place = folder / f"interrupted-{i}"
        process = start(place)
        wait_for(process, random.randrange(50))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        told = "stopped by SIGINT" in error
        survived += told and equal(reference, finish(place))
    return Tried(count, survived)


def flat_memory(quick: bool) -> Tried:
    """Resident memory in the second half, against the first: at most 5 MB more, of a history."""
    updates, calls = (2000, 10) if quick else (10_000, 50)
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(updates), str(calls)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown = [float(x) for x in run.stdout.split()[-2:]]
    print(f"{'':44}grown by {grown[0]:.1f} MB over updates, {grown[1]:.1f} MB over calls")
    return Tried(2, sum(x < 5 for x in grown))


_MEMORY = """
import sys, jax, jax.numpy as jnp
from tests.test_checkpoints import TUNER, hg

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

updates, calls = map(int, sys.argv[1:])
data = jnp.ones((4, 3)), jnp.ones(3)
state, seen = TUNER.init({"rate": 1e-3}, jax.random.key(0)), []
at = updates // 2, updates - 1
note = lambda record: seen.append(resident()) if record.update in at else None
hg.fit(TUNER, state, *data, updates, callbacks=[note])
for call in range(calls):
    hg.fit(TUNER, state, *data, 20)
    if call in (calls // 2, calls - 1):
        seen.append(resident())
print(seen[1] - seen[0], seen[3] - seen[2])
"""
