"""A journal in Optuna's format that survives a full disk, lost power and `kill -9`.

Optuna's own writer leaves half a line where a write fails, glues the next one to it, and then reads
nothing any more; its lock is left behind by a killed process, and one whose target is missing is
waited for without a pause. Here a failed write is taken back, the end of the file is looked at
before every write, and reading goes on behind what cannot be read. Optuna alone reads the file,
too: a broken line at the end is cut off, one between others is overwritten in its place.
"""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages.journal import BaseJournalBackend

from hypergrad.checks import in_one_sentence
from hypergrad.files.lock import JournalLock

_log = logging.getLogger("hypergrad")

# What each operation of Optuna's journal must say, by its code.
_FIELDS: tuple[tuple[str, ...], ...] = (
    ("study_name", "directions"),
    ("study_id",),
    ("study_id", "user_attr"),
    ("study_id", "system_attr"),
    ("study_id", "datetime_start"),
    ("trial_id", "param_name", "param_value_internal", "distribution"),
    ("trial_id", "state", "values"),
    ("trial_id", "step", "intermediate_value"),
    ("trial_id", "user_attr"),
    ("trial_id", "system_attr"),
    (),
)
_MAKE_TRIAL, _NOTHING = 4, {"op_code": 10}
_BEGIN = b'{"op_code":'
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How long a write waits for room, in seconds.
_ROOM_PATIENCE = 20.0


class JournalReader(BaseJournalBackend):
    """The journal at `path`, read only: nothing is locked, made or changed.

    What cannot be read is left out with a warning; an unfinished line at the end is not there yet.
    Raises ValueError for a file that is no journal, and where what cannot be read made a trial that
    later lines speak of.
    """

    # A writer puts an end to it first.
    _is_last_said = True

    def __init__(self, path: str) -> None:
        self.path = path
        self._place = self._made = 0, 0
        _refuse_other_files(path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The operations from a number on, one for each line."""
        if self._place[0] != log_number_from:
            self._place = self._made = 0, 0
        number, offset = self._place
        # Trials made, and the number of a line that may have made one more.
        made, lost = self._made
        with open(self.path, "rb") as file:
            file.seek(offset)
            waiting: list[tuple[bytes, dict[str, Any] | None]] = []
            for line in file:
                waiting.append((line, log_of(line)))
                if waiting[-1][1] is None:
                    # Another one has to follow: at the end it may be one that is being written.
                    continue
                for text, log in waiting:
                    number, offset = number + 1, offset + len(text)
                    if log is None:
                        _log.warning(
                            f"storage {self.path}: line {number} cannot be read and is "
                            f"left out: {_shown(text)}"
                        )
                        lost = number
                    elif log["op_code"] == _MAKE_TRIAL:
                        made += 1
                    elif lost and log.get("trial_id", -1) >= made:
                        raise ValueError(
                            f"storage={self.path!r} is damaged: line {lost} cannot be read, and "
                            "made a trial that later lines speak of. Restore the file from a copy, "
                            "or give another name."
                        )
                    self._place, self._made = (number, offset), (made, lost)
                    if number > log_number_from:
                        yield log or _NOTHING
                waiting = []
        # Whole but for its end. It is read again: the place stays before it.
        if self._is_last_said and len(waiting) == 1 and number >= log_number_from:
            last = log_of(waiting[0][0] + b"\n")
            if last is not None:
                yield last

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuse: who reads changes nothing."""
        raise PermissionError(f"storage {self.path} was opened to be read only.")


class Journal(JournalReader):
    """The journal at `path`, made where it is missing, with its end put in order.

    Raises as a reader does, and OSError, in one sentence, where the file cannot be written.
    """

    _is_last_said = False

    def __init__(self, path: str) -> None:
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            raise ValueError(
                f"storage={path!r} lies in {str(folder)!r}, which is no folder: make it."
            )
        with contextlib.suppress(FileNotFoundError):
            super().__init__(path)
        self.path, self._lock = path, JournalLock(path)
        # Where our last write ended: as long as nobody else writes, the end is known to be whole.
        self._end = 0
        with self._in_one_sentence("opened"), self._lock:
            with open(path, "ab"):
                pass
            with open(path, "r+b", buffering=0) as file:
                self._mend(file)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write operations, all or none; waits for room on a full disk for a while."""
        lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
        data, until = "".join(lines).encode(), time.monotonic() + _ROOM_PATIENCE
        told = False
        with self._in_one_sentence("written"):
            while True:
                try:
                    return self._append(data)
                except OSError as error:
                    if error.errno not in _FULL or time.monotonic() > until:
                        raise
                    if not told:
                        _log.warning(f"storage {self.path}: {error.strerror}; waiting for room.")
                told = True
                time.sleep(0.5)

    def _append(self, data: bytes) -> None:
        with self._lock, open(self.path, "r+b", buffering=0) as file:
            begin = file.seek(0, os.SEEK_END)
            if begin != self._end:
                begin = self._mend_end(file)
            try:
                _write(file, begin, data)
                os.fsync(file.fileno())
            except BaseException:
                # Before anybody else may write. Where even this fails, the next writer sees to it.
                with contextlib.suppress(OSError):
                    file.truncate(begin)
                raise
            self._end = begin + len(data)

    def _mend(self, file: BinaryIO) -> None:
        """Put the whole file in order."""
        for _ in self.read_logs(0):
            pass  # refuses what cannot be mended
        self._place = self._made = 0, 0
        self._mend_end(file)
        with open(self.path, "rb") as buffered:
            lines = list(buffered)
        repeated, offset = len(lines) - _repeated(lines), 0
        for i, line in enumerate(lines):
            # In its place: somebody may have read up to here, and counts in lines.
            if i >= repeated or _parsed(line) is None:
                self._overwrite(file, offset, line, blank=i >= repeated)
            offset += len(line)

    def _mend_end(self, file: BinaryIO) -> int:
        """Where the next line begins, once broken ones at the end are cut off."""
        end = size = file.seek(0, os.SEEK_END)
        while end:
            begin, line = _last_line(file, end)
            if log_of(line) is not None:
                if _parsed(line) is None:
                    self._overwrite(file, begin, line)
                break
            if end == size and log_of(line + b"\n") is not None:
                _write(file, size, b"\n")
                return size + 1
            end = begin
        if end == size:
            return end
        file.seek(end)
        lost = file.read(size - end)
        if end == 0 and not _may_begin(lost):
            raise ValueError(_no_journal(self.path, lost))
        _log.warning(
            f"storage {self.path}: its end cannot be read (a full disk, lost power?) and "
            f"is cut off: {_shown(lost)}"
        )
        file.truncate(end)
        return end

    def _overwrite(self, file: BinaryIO, offset: int, line: bytes, blank: bool = False) -> None:
        _log.warning(
            f"storage {self.path}: a line that is broken, or stands there twice, is mended: "
            f"{_shown(line)}"
        )
        _write(file, offset, _overwritten(line, blank))

    @contextlib.contextmanager
    def _in_one_sentence(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise in_one_sentence(
                error,
                f"storage={self.path!r} cannot be {done}",
                "what was told before stands in it: make room or give the right to write, and run "
                "the same call again",
            ) from None


def log_of(line: bytes) -> dict[str, Any] | None:
    """The operation that a line holds; None where it is broken or unfinished.

    Where half a line stands in front of a whole one, it is the whole one: what failed half-way was
    never done.
    """
    begin = 0
    while line.endswith(b"\n") and begin >= 0:
        log = _parsed(line[begin:])
        if log is not None:
            return log
        begin = line.find(_BEGIN, begin + 1)
    return None


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        log = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(log, dict) or type(log.get("op_code")) is not int:
        return None
    if not 0 <= log["op_code"] < len(_FIELDS):
        raise ValueError(
            f"a journal holds the operation {log['op_code']}, which this version of Optuna does "
            "not know: update Optuna."
        )
    return log if all(field in log for field in _FIELDS[log["op_code"]]) else None


def _overwritten(line: bytes, blank: bool) -> bytes:
    """A line of the same length: what is whole in a broken one, or that nothing was done."""
    begin = -1 if blank else line.find(_BEGIN, 1)
    while begin >= 0 and _parsed(line[begin:]) is None:
        begin = line.find(_BEGIN, begin + 1)
    whole = line[begin:-1] if begin >= 0 else b'{"op_code":10}'
    # Too short for anything: Optuna alone cannot read it, and nothing is lost by that.
    return whole.ljust(len(line) - 1) + b"\n" if len(whole) < len(line) else line


def _repeated(lines: list[bytes]) -> int:
    """How many lines at the end repeat earlier ones, the making of a trial first."""
    first: dict[bytes, int] = {}
    for i, line in enumerate(lines):
        log = log_of(line) if b'"datetime_start":"' in line else None
        # Two waiting trials may be alike; a time is of one.
        if log is not None and log["op_code"] == _MAKE_TRIAL:
            begin = first.setdefault(line, i)
            if begin < i and lines[i:] == lines[begin : begin + len(lines) - i]:
                return len(lines) - i
    return 0


def _last_line(file: BinaryIO, end: int) -> tuple[int, bytes]:
    """Where the last line before `end` begins, and the line."""
    size = 4096
    while True:
        begin = max(0, end - size)
        file.seek(begin)
        data = file.read(end - begin)
        newline = data.rfind(b"\n", 0, len(data) - 1)
        if newline >= 0 or begin == 0:
            return begin + newline + 1, data[newline + 1 :]
        size *= 4


def _write(file: BinaryIO, offset: int, data: bytes) -> None:
    # Not buffered: what is left in a buffer after an error would be written when it is closed.
    file.seek(offset)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _refuse_other_files(path: str) -> None:
    with open(path, "rb") as file:
        begin = file.read(1 << 16)
        if _may_begin(begin):
            return
        file.seek(0)
        if any(log_of(line) for line in file):
            return
    raise ValueError(_no_journal(path, begin))


def _may_begin(data: bytes) -> bool:
    """Whether a journal may begin so, or with what lost power leaves of one."""
    text = data.strip(b"\0\r\n\t ")
    return text[: len(_BEGIN)] == _BEGIN[: len(text)]


def _no_journal(path: str, data: bytes) -> str:
    return (
        f"storage={path!r} is no journal of a sweep: it begins with {_shown(data)}. Give the "
        "storage of a sweep, or a new name."
    )


def _shown(data: bytes) -> str:
    text = data[:60].decode(errors="replace")
    return repr(text) + (" ..." if len(data) > 60 else "")
