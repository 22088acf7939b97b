"""Where a study is kept: memory, a journal file, or any storage of Optuna, safe against `kill -9`.

Optuna's journal takes a lock file that a killed process leaves behind, and everybody then waits
30 s for it; a machine that loses power may leave half a line, which no later reader accepts; on
SQLite two processes can both take the same waiting trial; two that open a new database at once
both make its tables, and one fails; and a machine that is lost within a transaction keeps its locks
on PostgreSQL for hours. Each is mended here.
"""

import contextlib
import os
import random
import shlex
import socket
import time
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
)
from optuna.storages.journal import JournalFileBackend

from hypergrad.study.optuna_private import backend_of, path_of, symlink_lock

try:
    import fcntl
except ImportError:  # Windows: Optuna's own lock alone.
    fcntl = None  # type: ignore[assignment]

# How long a process waits for another one's transaction on SQLite, in seconds.
_SQLITE_PATIENCE = 60
# After how long PostgreSQL ends a transaction whose client went silent, in seconds. Ours take
# milliseconds; the worker's own grace is as long.
_POSTGRESQL_PATIENCE = 60


def open_storage(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    """Return an Optuna storage: None is memory, a path is a journal file, a URL is a database.

    A path ends in `.journal` (or `.log`); its folder must exist. `"grpc://host:port"` is Optuna's
    proxy; every other text with `://` is a URL of SQLAlchemy (`sqlite:///sweep.db`,
    `postgresql://...`). A storage object is used as it is. Raises ValueError for any other text.

    >>> type(open_storage(None)).__name__
    'InMemoryStorage'
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return optuna.storages.get_storage(storage)
    text = os.fspath(storage)
    if text.startswith("grpc://"):
        host, _, port = text.removeprefix("grpc://").rstrip("/").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"storage={text!r} names no proxy: write 'grpc://host:port'.")
        return GrpcStorageProxy(host=host, port=int(port))
    if "://" in text:
        return _open_database(text)
    if not text.endswith((".journal", ".log")):
        raise ValueError(
            f"storage={text!r} is neither a journal nor a URL: end the path in '.journal', or "
            "write 'sqlite:///sweep.db'."
        )
    return open_journal(text)


def open_journal(path: str) -> JournalStorage:
    """Return the journal at `path`, made where it is missing, its torn last line cut off."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"storage={path!r} lies in {str(folder)!r}, which is no folder: make it.")
    if fcntl is None:
        return JournalStorage(JournalFileBackend(path))
    lock = _Lock(path)
    # Optuna asks for two methods; the base class that it names is private.
    backend = JournalFileBackend(path, lock_obj=lock)  # type: ignore[arg-type]
    # First, as the storage reads the whole journal when it is made.
    _cut_torn_line(path, lock)
    return JournalStorage(backend)


class _Lock:
    """Optuna's symbolic link, behind a lock that the kernel releases when its holder dies.

    The link points at the file of this machine's kernel lock. Whoever has that lock and finds such
    a link knows that its maker died, and takes it away. Processes that use Optuna alone, and other
    machines, see a link as Optuna makes it and wait for it.
    """

    def __init__(self, path: str) -> None:
        # One name per machine: a kernel's lock may not reach beyond it (NFS).
        self._kernel_file = f"{path}.{_machine()}.lock"
        self._link_file = path + ".lock"
        # A name beside the link's own, as the link is followed for its age.
        self._target = os.path.basename(self._kernel_file)
        self._link = symlink_lock(path, self._target)
        self._descriptor = -1

    def acquire(self) -> bool:
        self._descriptor = os.open(self._kernel_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Another machine breaks a link that is 30 s old by the time on its target: without
            # this, all of our short locks would look to it like one long one.
            os.utime(self._kernel_file)
            with contextlib.suppress(OSError):
                if os.readlink(self._link_file) == self._target:
                    self._link.release()
            return self._link.acquire()
        except BaseException:
            self._let_go()
            raise

    def release(self) -> None:
        # In this order: whoever has the kernel's lock takes a link that is there for a dead one's.
        try:
            self._link.release()
        finally:
            self._let_go()

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


def _cut_torn_line(path: str, lock: _Lock) -> None:
    # Under the lock, as a line without an end may be one that somebody is just writing.
    lock.acquire()
    try:
        with open(path, "rb+") as file:
            kept, newline = file.seek(0, os.SEEK_END), -1
            while kept and newline < 0:
                begin = max(0, kept - 65536)
                file.seek(begin)
                newline = file.read(kept - begin).rfind(b"\n")
                kept = begin + newline + 1
            file.truncate(kept)
    finally:
        lock.release()


def _open_database(url: str) -> BaseStorage:
    if _is_in_memory(url):
        return optuna.storages.get_storage(url)
    if url.startswith("sqlite"):
        return _open_sqlite(url)
    # Connections that a server or a firewall has closed are noticed before they are used.
    database = _with_tables(url, {"pool_pre_ping": True})
    # Sessions are ended, not dropped, when the storage is no longer used.
    weakref.finalize(database, database.engine.dispose)
    if url.startswith("postgresql"):
        _free_locks_of_lost_machines(database)
    return optuna.storages.get_storage(database)


def _with_tables(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Open a database, and make its tables where they are missing."""
    from sqlalchemy.exc import DBAPIError, IntegrityError

    attempts = 20
    while True:
        try:
            return RDBStorage(url, engine_kwargs=dict(engine_kwargs))
        except DBAPIError as error:
            # Another process is making the same tables; when it has, we find them.
            race = isinstance(error, IntegrityError) or "already exists" in str(error)
            attempts -= 1
            if not race or not attempts:
                raise ValueError(
                    f"storage={url!r} cannot be opened: {error.orig}. Check that the server runs, "
                    "or that the file's folder exists, and that this user may write there."
                ) from error
        # At random, so that those who collided do not meet again.
        time.sleep(random.uniform(0.01, 0.2))


def _free_locks_of_lost_machines(database: RDBStorage) -> None:
    from sqlalchemy import event

    @event.listens_for(database.engine, "connect")
    def _limit_silence(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{_POSTGRESQL_PATIENCE}s'")
        cursor.close()
        # The setting is part of a transaction, and a rollback would take it back.
        connection.commit()

    database.engine.dispose()


def _open_sqlite(url: str) -> BaseStorage:
    from sqlalchemy import event

    database = _with_tables(url, {"connect_args": {"timeout": _SQLITE_PATIENCE}})

    # SQLite has no SELECT ... FOR UPDATE, on which Optuna relies: between its reading and its
    # writing another process may do the same. A transaction that locks at its start may not.
    @event.listens_for(database.engine, "connect")
    def _no_implicit_begin(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(database.engine, "begin")
    def _begin_locked(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    # Connections from before the listeners would go on without them.
    database.engine.dispose()
    return optuna.storages.get_storage(database)


def dashboard_command(storage: BaseStorage) -> str:
    """Return the shell command that opens optuna-dashboard on `storage`.

    A path stays as it was given, so that a relative one asks for the same folder; a database's URL
    keeps its password. Install the dashboard by `pip install 'hypergrad-jax[dashboard]'`; it shows
    a running sweep, too. Raises ValueError for a storage that no other process can open: memory, a
    proxy, an object that holds no path and no URL.

    >>> from hypergrad.study.storage import open_storage
    >>> dashboard_command(open_storage("sqlite://"))
    Traceback (most recent call last):
        ...
    ValueError: This study is kept in memory, where no dashboard can see it: sweep with ...
    """
    backend = backend_of(storage)
    if isinstance(backend, JournalFileBackend):
        return f"optuna-dashboard {shlex.quote(path_of(backend))}"
    if isinstance(backend, RDBStorage) and not _is_in_memory(backend.url):
        return f"optuna-dashboard {shlex.quote(backend.url)}"
    if isinstance(backend, GrpcStorageProxy):
        raise ValueError(
            "This study is kept behind a gRPC proxy, which optuna-dashboard cannot open: run it on "
            "the database that the proxy serves."
        )
    kept = f"in a {type(backend).__name__}, which has neither a path nor a URL"
    if isinstance(backend, InMemoryStorage | RDBStorage):
        kept = "in memory, where no dashboard can see it"
    raise ValueError(
        f"This study is kept {kept}: sweep with storage='sweep.journal' or a database's URL."
    )


def _is_in_memory(url: str) -> bool:
    return url.rstrip("/") == "sqlite:" or ":memory:" in url
