"""Checkpoint folders that cannot be read or written, or that two want; runs told to end."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import hypergrad as hg
from hypergrad.training.arrays import saved_updates

ROOT = Path(__file__).resolve().parent.parent
SPACE = hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log")})


def _loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((params - batch) ** 2)


TUNER = hg.alternating(
    hg.bilevel(lambda key: jnp.zeros(3), _loss, _loss, lambda h: optax.sgd(h["rate"])), SPACE
)


def run(num_updates: int, folder: Any, **options: Any) -> Any:
    state = TUNER.init({"rate": 1e-3}, jax.random.key(0))
    checkpoint = hg.Checkpoint(folder, every=5)
    data = jnp.ones((4, 3)), jnp.ones(3)
    return hg.fit(TUNER, state, *data, num_updates, checkpoint=checkpoint, **options)


def content(folder: Path) -> dict[str, bytes]:
    """All files but the lock, whose owner changes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name != ".lock"}


def test_the_values_to_keep_stand_beside_the_records(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for num_updates in (3, 6):
        result = run(num_updates, folder)
        kept = tomllib.loads((folder / "hyper.toml").read_text())
        assert kept["updates"] == num_updates and kept["loss"] == result.history[-1].loss
        assert kept["hyper"] == {"rate": pytest.approx(float(result.hyper["rate"]), rel=1e-6)}
    assert kept["hyper"]["rate"] > 1.01e-3
    assert not list(folder.glob("*.tmp"))


# As orbax raises them, or tells them in the words of tensorstore.
CANNOT_NOW: dict[str, BaseException] = {
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "stale handle": OSError(errno.ESTALE, "Stale file handle"),
    "input/output": ValueError("DATA_LOSS: Error reading [os_error_code='5']"),
    "too many files": ValueError("Failed to open [OS error 24: EMFILE Too many open files]"),
    "memory": MemoryError("no room"),
    "memory in words": ValueError("RESOURCE_EXHAUSTED: out of memory"),
    "away": ExceptionGroup("several", [OSError(errno.EIO, "Input/output error")]),
}


@pytest.mark.parametrize("kind", CANNOT_NOW)
def test_cannot_read_now_is_not_broken(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both good checkpoints were put aside as torn, and the run began again at 0."""
    folder = tmp_path / "run"
    run(10, folder)
    before = content(folder)

    def refuse(*args: Any, **options: Any) -> Any:
        raise CANNOT_NOW[kind]

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", refuse)
        expected: type[BaseException] = MemoryError if "memory" in kind else OSError
        with pytest.raises(expected, match=r"checkpoint: .*run/10") as error:
            run(12, folder)
        assert "\n" not in str(error.value)
    assert content(folder) == before
    seen: list[int] = []
    run(12, folder, callbacks=[lambda record: seen.append(record.update)])
    assert seen == [10, 11]


def test_a_wrong_error_of_a_library_is_a_torn_checkpoint(tmp_path: Path) -> None:
    """One that is missing a file is; the one before is taken."""
    folder = tmp_path / "run"
    run(10, folder)
    (folder / "10" / "head" / ".zarray").unlink()
    seen: list[int] = []
    run(12, folder, callbacks=[lambda record: seen.append(record.update)])
    assert seen[0] == 5 and (folder / "10.torn").is_dir()


def test_one_writer_per_folder(tmp_path: Path) -> None:
    """Two wrote in turn, each over the other's checkpoints."""
    folder = tmp_path / "run"
    errors: list[BaseException] = []

    def second(record: Any) -> None:
        def other() -> None:
            try:
                run(3, folder)
            except ValueError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    run(1, folder, callbacks=[second])
    assert "is written by another thread of this process" in str(errors[0])
    run(2, folder)  # free again
    assert saved_updates(folder)[0] == 2


PROGRAM = """
import signal, sys, time
# A shell starts what runs in the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.test_checkpoints import run

mode, folder = sys.argv[1:]
say = lambda text: print(text, flush=True)

def callback(record):
    if record.update == 12:
        say("at 12")
        if mode in ("callback", "interrupt"):
            time.sleep(60)
        if mode == "stubborn":
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass

class Data:
    def __iter__(self):
        import numpy as np
        for i in range(100):
            if mode == "data" and i == 50:
                say("at 12")
                time.sleep(60)
            yield np.ones(3)

import hypergrad as hg, jax, jax.numpy as jnp
from tests.test_checkpoints import TUNER
state = TUNER.init({"rate": 1e-3}, jax.random.key(0))
options = dict(callbacks=[callback], checkpoint=hg.Checkpoint(folder, every=1000))
if mode == "data":
    hg.fit(TUNER, state, Data(), jnp.ones(3), 20, steps_per_update=4, **options)
else:
    hg.fit(TUNER, state, jnp.ones((4, 3)), jnp.ones(3), 20, **options)
say("done")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts the program in a mode, up to where it hangs."""
    processes: list[subprocess.Popen[str]] = []

    def begin(mode: str, until: str = "at 12\n") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, mode, str(tmp_path / "run")]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert until in process.stdout, process.stderr
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("mode", ["callback", "data", "stubborn"])
def test_sigterm_ends_what_hangs(mode: str, start: Any, tmp_path: Path) -> None:
    """A loader or a tracker that waits for ever kept the run from ever ending."""
    process, begin = start(mode), time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    # Three to five seconds on a machine that has time; for ever was what it took.
    assert time.monotonic() - begin < 25
    if mode != "stubborn":
        (done,) = saved_updates(tmp_path / "run")
        assert 1 <= done <= 18
        assert "stopped by SIGTERM" in process.stderr.read()


def test_a_second_sigterm_ends_at_once_and_ctrl_c_saves(start: Any, tmp_path: Path) -> None:
    process = start("callback")
    for second in (False, True):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3 * (not second))
    begin = time.monotonic()
    assert process.wait(30) == -signal.SIGTERM
    assert time.monotonic() - begin < 1.5
    process, begin = start("interrupt"), time.monotonic()
    # The folder's lock went with its owner; of two that live the second is refused.
    other = subprocess.run(
        [sys.executable, "-c", PROGRAM, "none", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert other.returncode == 1
    assert f"is written by process {process.pid} on" in other.stderr.splitlines()[-1]
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert "KeyboardInterrupt: checkpoint: stopped by SIGINT" in error
    assert saved_updates(tmp_path / "run")


def test_a_full_disk_is_one_sentence_that_says_what_is_kept(tmp_path: Path, capfd: Any) -> None:
    """It was sixty lines, most of them printed by a thread of orbax."""
    folder = tmp_path / "run"
    run(5, folder)
    before = content(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()

    def fill(record: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    try:
        with pytest.raises(OSError) as error:
            run(8, folder, callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(error.value)
    assert error.value.errno == errno.EFBIG and str(folder) in text and "\n" not in text
    assert "cannot be given update 8" in text and "update 5 is kept" in text
    assert capfd.readouterr().err.count("\n") < 5
    assert content(folder) == before and not list(folder.glob("*tmp*"))
    run(8, folder)
    assert saved_updates(folder)[0] == 8


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *more, **options)

    run(3, tmp_path / "run")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"run' cannot be written \(Read-only file system\): make"):
        run(4, tmp_path / "run")


@pytest.mark.parametrize("folder", ["link", "a\0b", "x" * 300, "file"])
def test_odd_names_of_folders(folder: str, tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="folder="):
        hg.Checkpoint(tmp_path / folder)


def test_checkpoints_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run(3, tmp_path / "run")
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & 0o077 for path in (tmp_path / "run").rglob("*"))
