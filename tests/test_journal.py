"""Journals that were torn, filled up, locked and mistaken for others; what readers leave alone."""

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

import hypergrad as hg
from hypergrad.cli import main
from hypergrad.files import journal, lock
from hypergrad.files.journal import Journal, JournalReader, log_of
from hypergrad.files.lock import JournalLock
from hypergrad.study.storage import open_storage
from hypergrad.study.study import open_study

SPACE = hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log"), "width": hg.Categorical([8, 16])})


def run(path: Path, num_trials: int) -> list[Any]:
    """Go on to `num_trials` trials; returns all that finished, as a reader sees them."""
    with open_study(SPACE, str(path), "random", seed=0, num_trials=num_trials) as opened:
        while proposal := opened.ask():
            opened.finish(proposal, proposal.start["rate"])
    return read(path)


def read(path: Path, alone: bool = False) -> list[Any]:
    """The finished trials, by our reader or by Optuna `alone`."""
    storage: Any = open_storage(str(path), read_only=True)
    if alone:
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name="hypergrad", storage=storage)
    return [(t.number, t.value, t.params) for t in study.trials if t.value is not None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A journal of three trials whose worker died before it could say that it ended."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = tmp_path_factory.mktemp("whole") / "a.journal"
    run(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > 15 and b'"ended"' in lines[-1]
    return b"".join(lines[:-1])


def last_of(data: bytes) -> bytes:
    return data.splitlines(keepends=True)[-1]


def half(data: bytes) -> bytes:
    last = last_of(data)
    return last[: len(last) // 2]


def from_last_trial(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    (*_, begin) = (i for i, line in enumerate(lines) if b'"op_code":4' in line)
    return b"".join(lines[begin:])


# What a full disk, lost power, a copy that was cut short or somebody's editor leaves.
BROKEN = {
    "half a line": lambda d: d + half(d),
    "half a line with an end": lambda d: d + half(d) + b"\n",
    "a line glued to half a one": lambda d: d + half(d) + last_of(d),
    "lines glued to two halves": lambda d: d + half(d) + half(d) + last_of(d),
    "glued, and more behind it": lambda d: d + half(d) + last_of(d) + last_of(d),
    "no end of the last line": lambda d: d[:-1],
    "zeros": lambda d: d + bytes(512),
    "zeros with an end": lambda d: d + bytes(512) + b"\n",
    "zeros, and a line behind them": lambda d: d + bytes(512) + last_of(d),
    "garbage": lambda d: d + bytes(range(128, 256)),
    "garbage with ends": lambda d: d + b"\x93\xff\r\n\x00{{{\n]\n",
    "garbage among lines": lambda d: d.replace(b"\n", b"\n\xff\xfe garbage of some length {\n", 5),
    "JSON of another kind": lambda d: d + b'null\n[1]\n{"op_code":6}\n{"op_code":true}\n',
    "nested without end": lambda d: d + b"[" * 5000 + b"\n",
    "empty lines": lambda d: b"\n" + d + b"\n\n",
    "the last line twice": lambda d: d + last_of(d),
    "the last trial twice": lambda d: d + from_last_trial(d),
    "the last trial twice, cut short": lambda d: d + from_last_trial(d)[:-30],
    "a mark of its encoding": lambda d: b"\xef\xbb\xbf" + d,
    "ends of another system": lambda d: d.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("form", BROKEN)
def test_a_broken_journal_is_read_and_goes_on(
    form: str, whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Optuna alone reads none of most of these; what was finished before was unreadable."""
    path = tmp_path / "a.journal"
    path.write_bytes(whole)
    before = read(path)
    assert [number for number, *_ in before] == [0, 1, 2]
    broken = BROKEN[form](whole)
    path.write_bytes(broken)
    assert read(path) == before
    assert path.read_bytes() == broken and os.listdir(tmp_path) == [path.name]
    with caplog.at_level(logging.WARNING, "hypergrad"):
        after = run(path, 5)
    assert after[:3] == before and len(after) == 5
    assert len({hyper["rate"] for *_, hyper in after}) == 5
    if not form.startswith(("no end", "ends", "empty", "a mark", "the last line")):
        assert str(path) in caplog.text
    states = {t.state.name for t in open_storage(str(path), read_only=True).get_all_trials(0)}
    assert states == {"COMPLETE"}
    if form not in ("empty lines", "a mark of its encoding"):
        assert read(path, alone=True) == after


def test_an_empty_file_becomes_a_journal_and_a_lost_trial_is_refused(
    whole: bytes, tmp_path: Path
) -> None:
    """Numbers would name other trials than those that were told, were one's making left out."""
    path = tmp_path / "a.journal"
    for data in (b"", bytes(100), b"\n\n", b'{"op_co'):
        path.write_bytes(data)
        assert len(run(path, 2)) == 2
    lines = whole.splitlines(keepends=True)
    (*_, made, _, _) = (i for i, line in enumerate(lines) if b'"op_code":4' in line)
    lines[made] = lines[made][:40] + b"\n"
    path.write_bytes(b"".join(lines))
    for read_only in (True, False):
        with pytest.raises(ValueError, match=f"line {made + 1} cannot be read, and made a trial"):
            open_storage(str(path), read_only=read_only)
    assert path.read_bytes() == b"".join(lines)


def test_what_is_no_journal_is_neither_read_nor_written(tmp_path: Path, capsys: Any) -> None:
    """`hypergrad show` cut the last line of a log of training, or emptied it."""
    for name, text in {
        "train.log": "step 1 loss 3\nstep 2 lo",
        "one.log": "a file without an end",
        "json.log": '{"op": 1}\n{"loss": 2}\n',
        "binary.journal": "\x00\x01\x02\n",
    }.items():
        path = tmp_path / name
        path.write_text(text)
        assert main(["show", str(path)]) == 2
        assert "is no journal" in capsys.readouterr().err
        with pytest.raises(ValueError, match="is no journal"):
            open_storage(str(path))
        assert path.read_text() == text
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_readers_change_nothing(kind: str, tmp_path: Path, capsys: Any) -> None:
    """On a read-only mount, too, where no lock can be made; files of the sweep stay as they are."""
    path = tmp_path / f"a.{kind}"
    storage = str(path) if kind == "journal" else f"sqlite:///{path}"
    with open_study(SPACE, storage, "random", seed=0, num_trials=3) as opened:
        while proposal := opened.ask():
            opened.finish(proposal, 1.0)
    for other in set(os.listdir(tmp_path)) - {path.name}:
        (tmp_path / other).unlink()
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert main(["show", storage]) == 0
        assert "3 trials: 3 complete" in capsys.readouterr().out
        writer = open_storage(storage, read_only=True)
        with pytest.raises(Exception, match=r"read only|readonly|INTERNAL|commit"):
            writer.set_study_user_attr(0 if kind == "journal" else 1, "a", 1)
    finally:
        tmp_path.chmod(0o755)
    assert os.listdir(tmp_path) == [path.name]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_write_that_fails_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The beat's as well: half of one was the end of everybody's reading."""
    path = tmp_path / "a.journal"
    monkeypatch.setattr(journal, "_ROOM_PATIENCE", 0.3)
    with open_study(SPACE, str(path), "random", seed=0, num_trials=3) as opened:
        proposal = opened.ask()
        assert proposal is not None
        good = path.read_bytes()
        whole_write = journal._write

        def half_write(file: Any, offset: int, data: bytes) -> None:
            whole_write(file, offset, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(journal, "_write", half_write)
        with pytest.raises(OSError) as caught:
            opened.finish(proposal, 1.0)
        assert caught.value.errno == errno.ENOSPC
        assert str(path) in str(caught.value) and "No space left" in str(caught.value)
        assert "\n" not in str(caught.value) and "waiting for room" in caplog.text
        with pytest.raises(OSError):
            opened._worker.beat()
        assert path.read_bytes() == good
        # Room again, within the patience: nobody notices.
        seen = []

        def full_twice(file: Any, offset: int, data: bytes) -> None:
            seen.append(len(data))
            (half_write if len(seen) < 3 else whole_write)(file, offset, data)

        monkeypatch.setattr(journal, "_write", full_twice)
        monkeypatch.setattr(journal, "_ROOM_PATIENCE", 20.0)
        opened._held.add(proposal.number)
        assert opened.finish(proposal, 1.0)
    assert read(path, alone=True)[0][1] == 1.0
    assert len(run(path, 3)) == 3


def test_the_end_is_looked_at_before_every_write(whole: bytes, tmp_path: Path) -> None:
    """Whoever else wrote half a line, and could not take it back, may still be running."""
    path = tmp_path / "a.journal"
    path.write_bytes(whole)
    backend = Journal(str(path))
    for tail in (
        b'{"op_code":3,"wor',
        bytes(20),
        half(whole) + b"\n",
        half(whole) + last_of(whole),
    ):
        size = path.stat().st_size
        with path.open("ab") as file:
            file.write(tail)
        backend.append_logs([json.loads(last_of(whole))])
        lines = path.read_bytes()[size:].splitlines(keepends=True)
        assert lines[-1] == last_of(whole) and all(json.loads(line) for line in lines)


def test_a_lock_is_waited_for_with_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stopped process holds the kernel's lock for as long as it is stopped."""
    path = str(tmp_path / "a.journal")
    monkeypatch.setattr(lock, "_TELL_AFTER", 0.1)
    monkeypatch.setattr(lock, "_PATIENCE", 0.5)
    held = JournalLock(path)
    with held:
        begin = time.process_time()
        with pytest.raises(TimeoutError, match=f"process {os.getpid()} on this machine"):
            JournalLock(path).acquire()
        assert time.process_time() - begin < 0.3, "it waits without sleeping"
        assert f"waiting for process {os.getpid()}" in caplog.text
        with pytest.raises(TimeoutError, match=r"storage=.*a\.journal.*cannot be opened"):
            Journal(path)
    with JournalLock(path):
        pass


@pytest.mark.parametrize("target", ["nowhere", "other", "."])
def test_a_stale_link_is_taken_away(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna asks for ever, without a pause, whether a link is old whose target is missing."""
    path = str(tmp_path / "a.journal")
    (tmp_path / "other").touch()
    os.symlink(target, path + ".lock")
    monkeypatch.setattr(lock, "_LINK_PATIENCE", 0.3)
    begin, busy = time.monotonic(), time.process_time()
    with JournalLock(path):
        assert time.monotonic() - begin > 0.2
        assert os.readlink(path + ".lock") != target
    assert time.process_time() - busy < 0.2
    assert not os.path.lexists(path + ".lock")


def test_one_line_for_what_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.journal"
    run(path, 1)

    def read_only(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wa+"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return open(file, mode, *args, **options)

    # Not by the file's mode, which does not bind root.
    with monkeypatch.context() as patch:
        patch.setattr(journal, "open", read_only, raising=False)
        with pytest.raises(PermissionError, match=r"a\.journal' cannot be opened \(Permission"):
            open_storage(str(path))
    (tmp_path / "b.journal").mkdir()
    with pytest.raises(OSError, match=r"b\.journal"):
        open_storage(str(tmp_path / "b.journal"))


def test_what_is_shown_is_text(tmp_path: Path, capsys: Any) -> None:
    """Names and choices may hold what steers a terminal; matplotlib takes a `$` for a formula."""
    odd = "a\x1b[2J$\\frac{$"
    space = hg.Space({odd: hg.Float(0.0, 1.0), "b$^$": hg.Categorical(["$x_{$", "\x1b]0;t\x07"])})
    storage, page = str(tmp_path / "a.journal"), tmp_path / "page.html"
    with open_study(space, storage, "random", seed=0, num_trials=12) as opened:
        while proposal := opened.ask():
            opened.finish(proposal, proposal.start[odd])
    assert main(["show", storage]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"a\x1b[2J" in out
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.symlink(victim, tmp_path / "page.html.part")
    before = os.umask(0o027)
    try:
        assert main(["report", storage, "--out", str(page)]) == 0
    finally:
        os.umask(before)
    assert page.read_text().count("data:image/png") == 3
    assert victim.read_text() == "mine" and stat.S_IMODE(page.stat().st_mode) == 0o640
    assert main(["show", str(tmp_path / "no\x1b[31m.journal")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_malformed_study_is_one_line(tmp_path: Path, capsys: Any) -> None:
    def broken(attrs: dict[str, Any], trial: dict[str, Any]) -> str:
        path = str(tmp_path / f"{len(os.listdir(tmp_path))}.journal")
        with open_study(SPACE, path, "random", seed=0, num_trials=2) as opened:
            proposal = opened.ask()
            assert proposal is not None
            opened.finish(proposal, 1.0, attrs=trial)
            for name, value in attrs.items():
                opened.study.set_user_attr(name, value)
        return path

    for path in (
        broken({"hypergrad:space": 3}, {}),
        broken({"hypergrad:space": {"rate": {"kind": "Flout"}}}, {}),
        broken({"hypergrad:space": {"rate": {"kind": "Float", "low": "a"}}}, {}),
        broken({}, {"held_out": "a"}),
        broken({}, {"held_out": [1]}),
    ):
        for command in ("show", "report"):
            page = [] if command == "show" else ["--out", str(tmp_path / "page.html")]
            assert main([command, path, *page]) == 2, path
            err = capsys.readouterr().err
            assert err.startswith("hypergrad: ") and err.count("\n") == 1


def test_logs_are_those_of_optuna(whole: bytes) -> None:
    assert all(log_of(line) == json.loads(line) for line in whole.splitlines(keepends=True))
    assert log_of(b'{"op_code":10}') is None
    with pytest.raises(ValueError, match="update Optuna"):
        log_of(b'{"op_code":99}\n')


def test_a_reader_follows_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    run(path, 1)
    storage = optuna.storages.JournalStorage(JournalReader(str(path)))
    assert len(storage.get_all_trials(0)) == 1
    run(path, 3)
    assert len(storage.get_all_trials(0)) == 3


def test_a_stopped_process_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGSTOP while it holds the lock; the other waits, and goes on when it is freed."""
    path = tmp_path / "a.journal"
    program = (
        "import sys, time; from hypergrad.files.journal import JournalLock\n"
        "with JournalLock(sys.argv[1]): print('held', flush=True); time.sleep(0.5)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "_TELL_AFTER", 0.2)
        os.kill(process.pid, 0)
        continued = subprocess.Popen(["sh", "-c", f"sleep 0.6; kill -CONT {process.pid}"])
        with JournalLock(str(path)):
            assert f"process {process.pid} on this machine" in caplog.text
    process.wait()
    continued.wait()
    process.stdout.close()
