"""Where a study is kept: memory, a journal file, or any storage of Optuna, safe against `kill -9`.

A journal is in `journal.py`. On SQLite two processes can both take the same waiting trial; two that
open a new database at once both make its tables, and one fails; and a machine that is lost within a
transaction keeps its locks on PostgreSQL for hours. Each is mended here.
"""

import contextlib
import os
import random
import re
import shlex
import time
import weakref
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
)
from optuna.storages.journal import JournalFileBackend

from hypergrad.checks import WrongTypeError, without_passwords
from hypergrad.files.journal import Journal, JournalReader
from hypergrad.study.optuna_private import backend_of, path_of

# How long a process waits for another one's transaction on SQLite, in seconds.
_SQLITE_PATIENCE = 60
# After how long PostgreSQL ends a transaction whose client went silent, in seconds. Ours take
# milliseconds; the worker's own grace is as long.
_POSTGRESQL_PATIENCE = 60


def open_storage(
    storage: str | os.PathLike[str] | BaseStorage | None, *, read_only: bool = False
) -> BaseStorage:
    """Return an Optuna storage: None is memory, a path is a journal file, a URL is a database.

    A path ends in `.journal` (or `.log`); its folder must exist. `"grpc://host:port"` is Optuna's
    proxy; every other text with `://` is a URL of SQLAlchemy (`sqlite:///sweep.db`,
    `postgresql://...`). A storage object is used as it is. What is opened `read_only` is there
    already, and nothing beside it is made or changed.

    Raises ValueError for any other text and what cannot be opened, and OSError for a journal that
    cannot be read or written; no message holds a URL's password.

    >>> type(open_storage(None)).__name__
    'InMemoryStorage'
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return optuna.storages.get_storage(storage)
    if not isinstance(storage, str | os.PathLike) or not isinstance(os.fspath(storage), str):
        raise WrongTypeError(
            f"storage={storage!r} is no storage: give a path 'sweep.journal', a database's URL, an "
            "Optuna storage, or None."
        )
    text = os.fspath(storage)
    named = f"storage={without_passwords(text)!r}"
    if text.startswith("grpc://"):
        host, _, port = text.removeprefix("grpc://").rstrip("/").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{named} names no proxy: write 'grpc://host:port'.")
        return GrpcStorageProxy(host=host, port=int(port))
    if "://" in text:
        return _open_database(text, read_only)
    if not text.endswith((".journal", ".log")):
        raise ValueError(
            f"{named} is neither a journal nor a URL: end the path in '.journal', or write "
            "'sqlite:///sweep.db'."
        )
    return JournalStorage(JournalReader(text) if read_only else Journal(text))


@contextlib.contextmanager
def told_in_one_sentence(storage: BaseStorage) -> Iterator[None]:
    """What a storage raises when it is full or away, as one sentence: OSError, without its frames.

    A database's error is a page of its statements otherwise, a journal's one of Optuna's calls.
    """
    try:
        yield
    except OSError as error:
        if not str(error).startswith("storage="):
            raise
        raise error.with_traceback(None) from None
    except Exception as error:
        backend = backend_of(storage)
        database = "sqlalchemy" in type(error).__module__ or isinstance(error, StorageInternalError)
        if not (database and isinstance(backend, RDBStorage)):
            raise
        raise OSError(
            f"storage={without_passwords(backend.url)!r} cannot be used "
            f"({_reason(error, backend.url)}): what "
            "was told before stands in it; see that it is there and has room, and run the same "
            "call again."
        ) from None


def _reason(error: BaseException, url: str) -> str:
    """What a database's driver says, in one line, without the URL's password or a part of it."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    text = " ".join(str(getattr(cause, "orig", None) or cause or error).split())
    password = re.search(r"://[^/:@]*:(.*)@", url)
    # One that was not quoted is taken apart, and its parts for a host or a port.
    for part in re.split(r"[@:/?#]", unquote(password[1])) if password else ():
        text = text.replace(part, "***") if part else text
    return without_passwords(text)


def _open_database(url: str, read_only: bool) -> BaseStorage:
    if _is_in_memory(url):
        return optuna.storages.get_storage(url)
    if read_only:
        return optuna.storages.get_storage(_existing(url))
    if url.startswith("sqlite"):
        return _open_sqlite(url)
    # Connections that a server or a firewall has closed are noticed before they are used.
    database = _with_tables(url, {"pool_pre_ping": True})
    # Sessions are ended, not dropped, when the storage is no longer used.
    weakref.finalize(database, database.engine.dispose)
    if url.startswith("postgresql"):
        _free_locks_of_lost_machines(database)
    return optuna.storages.get_storage(database)


def _existing(url: str) -> RDBStorage:
    """Open a database that has its tables, and write nothing to it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    given = url
    try:
        parsed = make_url(url)
        if url.startswith("sqlite") and not (parsed.database or "").startswith("file:"):
            file = f"file:{quote(os.path.abspath(parsed.database or ''))}"
            url = f"{parsed.drivername}:///{file}?mode=ro&uri=true"
        storage = RDBStorage(url, skip_table_creation=True)
        # Opening reads nothing, so that a file that is none or no database would be found later.
        storage.get_all_studies()
    except (ArgumentError, ImportError, ValueError, StorageInternalError) as error:
        raise ValueError(_unusable(given, error)) from None
    return storage


def _unusable(url: str, error: BaseException) -> str:
    return (
        f"storage={without_passwords(url)!r} cannot be opened: {_reason(error, url)}. Check the "
        "URL, that the server runs, or that the file's folder exists, and that this user may write "
        "there."
    )


def _with_tables(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Open a database, and make its tables where they are missing."""
    from sqlalchemy.exc import DBAPIError, IntegrityError

    attempts = 20
    while True:
        try:
            return RDBStorage(url, engine_kwargs=dict(engine_kwargs))
        except Exception as error:
            # Another process is making the same tables; when it has, we find them.
            race = isinstance(error, IntegrityError) or "already exists" in str(error)
            attempts -= 1
            if not race or not attempts or not isinstance(error, DBAPIError):
                raise ValueError(_unusable(url, error)) from None
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

    A path stays as it was given, so that a relative one asks for the same folder. In a database's
    URL `$PASSWORD` stands for the password: set it in the shell. Install the dashboard by
    `pip install 'hypergrad-jax[dashboard]'`; it shows a running sweep, too. Raises ValueError for a
    storage that no other process can open: memory, a proxy, an object that holds no path and no
    URL.

    >>> from hypergrad.study.storage import open_storage
    >>> dashboard_command(open_storage("sqlite://"))
    Traceback (most recent call last):
        ...
    ValueError: This study is kept in memory, where no dashboard can see it: sweep with ...
    """
    backend, place = backend_of(storage), place_of(storage)
    if place is not None:
        url = without_passwords(place).split("***") if "://" in place else [place]
        return "optuna-dashboard " + '"$PASSWORD"'.join(map(shlex.quote, url))
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


def place_of(storage: BaseStorage) -> str | None:
    """Return the path or the URL by which another process can open a storage; None without one."""
    backend = backend_of(storage)
    if isinstance(backend, JournalReader):
        return backend.path
    if isinstance(backend, JournalFileBackend):
        return path_of(backend)
    if isinstance(backend, RDBStorage) and not _is_in_memory(backend.url):
        return backend.url
    return None


def _is_in_memory(url: str) -> bool:
    return url.rstrip("/") == "sqlite:" or ":memory:" in url
