"""Locks that a killed process leaves to the next one, and that nobody waits for without an end."""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, Self

from hypergrad.checks import in_one_sentence

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("hypergrad")

# In seconds: when a wait is told of, and when it is given up; after how long a link of another
# machine, whose time stands still, is taken away.
_TELL_AFTER, _PATIENCE, _LINK_PATIENCE = 10.0, 600.0, 30.0


class JournalLock:
    """Optuna's symbolic link, behind a lock that the kernel releases when its holder dies.

    The link points at the file of this machine's kernel lock. Whoever has that lock and finds such
    a link knows that its maker died, and takes it away. Processes that use Optuna alone, and other
    machines, see a link as Optuna makes it and wait for it. Nobody waits without a pause, a line in
    the log and an end: TimeoutError after ten minutes.
    """

    def __init__(self, path: str) -> None:
        if fcntl is None:
            raise ValueError(
                f"storage={path!r}: journals need a POSIX system: use 'sqlite:///sweep.db'."
            )
        self._path = path
        # One name per machine: a kernel's lock may not reach beyond it (NFS).
        self._kernel_file = f"{path}.{_machine()}.lock"
        self._link_file = path + ".lock"
        # A name beside the link's own, as the link is followed for its age.
        self._target = os.path.basename(self._kernel_file)
        self._descriptor = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Wait for the lock."""
        self._descriptor = os.open(self._kernel_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take_kernels()
            # Another machine breaks a link that is 30 s old by the time on its target: without
            # this, all of our short locks would look to it like one long one.
            os.utime(self._kernel_file)
            # For whoever waits for us. Of no use if the disk is full, and of no harm.
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, f"{os.getpid():<10}\n".encode(), 0)
            self._take_link()
        except BaseException:
            self._let_go()
            raise

    def release(self) -> None:
        """Free it."""
        # In this order: whoever has the kernel's lock takes a link that is there for a dead one's.
        try:
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(self._link_file) == self._target:
                    os.unlink(self._link_file)
        finally:
            self._let_go()

    def _take_kernels(self) -> None:
        for _ in self._patiently(self._holder):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return

    def _take_link(self) -> None:
        seen, since = None, time.monotonic()
        for _ in self._patiently(lambda: "another machine, or a process that uses Optuna alone"):
            try:
                os.symlink(self._target, self._link_file)
                return
            except FileExistsError:
                pass
            with contextlib.suppress(OSError):
                if os.readlink(self._link_file) == self._target:
                    os.unlink(self._link_file)
                    continue
                now = self._age_of_link()
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > _LINK_PATIENCE and self._age_of_link() == seen:
                    _log.warning(
                        f"storage {self._path}: the lock {self._link_file} has stood "
                        "still for 30 s, and is taken away."
                    )
                    os.unlink(self._link_file)

    def _age_of_link(self) -> tuple[int, int]:
        """Changes as long as whoever made the link goes on working."""
        own = os.lstat(self._link_file).st_mtime_ns
        # A link whose target is missing has its own time alone.
        with contextlib.suppress(OSError):
            return own, os.stat(self._link_file).st_mtime_ns
        return own, 0

    def _patiently(self, holder: Any) -> Iterator[None]:
        """Attempts, with pauses between them."""
        begin, told, pause = time.monotonic(), 0.0, 0.001
        while True:
            yield
            waited = time.monotonic() - begin
            if waited > _PATIENCE:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"{holder()} has held its lock for {waited:.0f} s"
                )
            if waited - told > _TELL_AFTER:
                told = waited
                _log.warning(
                    f"storage {self._path}: waiting for {holder()}, which has held the "
                    f"lock for {waited:.0f} s (is it stopped?)."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.1 if waited < _TELL_AFTER else 1.0)

    def _holder(self) -> str:
        text = os.pread(self._descriptor, 10, 0).decode(errors="replace").strip()
        return f"process {text} on this machine"

    def _let_go(self) -> None:
        # In words: a process that was forked in between has the file open, too.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = -1


class FolderLock:
    """A folder is written by one process and one thread: a second one gets ValueError at once.

    A lock of the kernel, which ends with its process and is not inherited by processes that it
    starts, on a file in the folder that names its owner. Where only one machine sees such a lock
    (some network mounts), an owner on another machine that did not end by itself is warned of.
    """

    def __init__(self, folder: str | os.PathLike[str], what: str) -> None:
        self._folder, self._what = os.path.realpath(folder), what
        self._descriptor = -1

    def __enter__(self) -> Self:
        # The kernel knows processes alone; a fork takes nothing over.
        if _folders.setdefault((os.getpid(), self._folder), self) is not self:
            raise ValueError(self._refusal("another thread of this process"))
        try:
            flags = os.O_RDWR | os.O_CREAT
            self._descriptor = os.open(os.path.join(self._folder, ".lock"), flags, 0o666)
            self._take()
        except OSError as error:
            self.__exit__()
            raise in_one_sentence(
                error,
                f"{self._what}: {self._folder!r} cannot be written",
                "make room or give the right to write, and run the same command again",
            ) from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._owner()[:2] == self._me()[:2]:
                    os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1
        _folders.pop((os.getpid(), self._folder), None)

    def _take(self) -> None:
        if fcntl is not None:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    host, pid, since = [*self._owner(), "?", "?", "?"][:3]
                    who = f"process {pid} on {host}, since {since}"
                    raise ValueError(self._refusal(who)) from None
        owner = self._owner()
        if owner and owner[0] != self._me()[0]:
            _log.warning(
                f"{self._what}: process {owner[1]} on {owner[0]} wrote to {self._folder!r} and did "
                "not end by itself; if it still runs, end it."
            )
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, "\n".join(self._me()).encode(), 0)

    def _refusal(self, who: str) -> str:
        return (
            f"{self._what}: {self._folder!r} is written by {who}: wait for its end, or name "
            "another folder."
        )

    def _owner(self) -> list[str]:
        text = os.pread(self._descriptor, 1000, 0).decode(errors="replace")
        return text.splitlines() if text.count("\n") == 2 else []

    def _me(self) -> list[str]:
        return [socket.gethostname(), str(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S")]


_folders: dict[tuple[int, str], FolderLock] = {}


@cache
def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read(8)
    except OSError:
        return socket.gethostname()
