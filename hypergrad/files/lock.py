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
        os.close(self._descriptor)
        self._descriptor = -1


@cache
def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read(8)
    except OSError:
        return socket.gethostname()
