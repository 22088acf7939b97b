"""Runs killed at random moments end with the bits of one that nobody disturbed.

Run: `python -m benchmarks.resume` (six minutes on two cores; `main(quick=True)`, 3 kills, one).
Needs `tests/resume_worker.py`, the run that is killed: 60 updates of 3 steps from a shuffled
iterable, a checkpoint every 7 updates, JSON lines.

Each of 20 runs is killed once, by SIGKILL and SIGTERM in turn: up to 0.1 s after an update drawn at
random, whatever it does then (an update, reading, writing a checkpoint); every fifth one while it
still imports and compiles. Then the same command is run again, and its final state, history and
JSON lines are compared byte by byte with those of a run that was never killed. Prints a line per
kill: signal, the update aimed at and the last one printed, the newest checkpoint found, whether all
bytes are equal.
Target: 20 of 20. Then what else may befall a run, tried and survived: `benchmarks/mishaps.py`.
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mishaps
from hypergrad.training.arrays import saved_updates
from tests.resume_worker import UPDATES

ROOT = Path(__file__).resolve().parent.parent
# Seconds that the source waits per batch: they spread the updates over a time that can be hit.
PAUSE = 0.01


def start(folder: Path) -> subprocess.Popen[str]:
    """The run that is killed, in a process of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.resume_worker", str(folder), str(PAUSE)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen[str], update: int | None) -> str:
    """What a run has printed once it has come to an update; nothing where None is waited for."""
    seen = ""
    while update is not None and f"at {update}\n" not in seen:
        assert process.stdout is not None
        seen += process.stdout.readline()
    return seen


def finish(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Run the command to its end: the bytes of its JSON lines, and its arrays."""
    process = start(folder)
    out, error = process.communicate()
    if process.returncode or not out.endswith("done\n"):
        raise RuntimeError(f"the run in {folder} failed: {error}")
    with np.load(folder / "result.npz") as arrays:
        return (folder / "history.jsonl").read_bytes(), {k: arrays[k] for k in arrays.files}


def equal(one: tuple[bytes, dict[str, Any]], other: tuple[bytes, dict[str, Any]]) -> bool:
    """Whether two ends are the same, byte by byte."""
    return (
        one[0] == other[0]
        and list(one[1]) == list(other[1])
        and all(a.tobytes() == other[1][k].tobytes() for k, a in one[1].items())
    )


def main(quick: bool = False) -> int:
    """Print a line per kill; returns how many ended with the same bytes."""
    kills = 3 if quick else 20
    random = np.random.default_rng()
    same = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begin = time.perf_counter()
        reference = finish(folder / "undisturbed")
        usual = time.perf_counter() - begin
        print(
            f"{'kill':>4} {'signal':8}{'aimed at':>9}{'reached':>8}{'checkpoint':>11}  same bytes"
        )
        for i in range(kills):
            number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
            run = folder / f"run-{i}"
            process = start(run)
            aim = None if i % 5 == 4 else int(random.integers(UPDATES - 5))
            seen = wait_for(process, aim)
            time.sleep(random.uniform(0.0, 0.5 * usual if aim is None else 0.1))
            process.send_signal(number)
            seen += process.communicate()[0]
            reached = seen.split("at ")[-1].split("\n")[0] if "at " in seen else "-"
            found = (saved_updates(run / "run") or ["-"])[0]
            ended = equal(reference, finish(run))
            same += ended
            target = "start" if aim is None else aim
            line = f"{i + 1:4} {number.name:8}{target:>9}{reached:>8}{found:>11}  {ended}"
            print(line, flush=True)
        print(f"{same} of {kills} with the same bytes")
        mishaps.show(mishaps.of_runs(folder, quick))
    return same


if __name__ == "__main__":
    main()
