"""The command that opens optuna-dashboard on a study's storage."""

from __future__ import annotations

import shlex

from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
)
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages.journal import JournalFileBackend


def dashboard_command(storage: BaseStorage) -> str:
    """Return the shell command that opens optuna-dashboard on `storage`.

    A path stays as it was given, so that a relative one asks for the same folder; a database's URL
    keeps its password. Install the dashboard by `pip install 'hypergrad-jax[dashboard]'`; it shows
    a running sweep, too. Raises ValueError for a storage that no other process can open: memory, a
    proxy, an object that holds no path and no URL.

    >>> from hypergrad.search.storage import open_storage
    >>> dashboard_command(open_storage("sqlite://"))
    Traceback (most recent call last):
        ...
    ValueError: This study is kept in memory, where no dashboard can see it: sweep with ...
    """
    backend = storage._backend if isinstance(storage, _CachedStorage | JournalStorage) else storage
    if isinstance(backend, JournalFileBackend):
        return f"optuna-dashboard {shlex.quote(backend._file_path)}"
    if isinstance(backend, RDBStorage) and not _is_in_memory(backend):
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


def _is_in_memory(database: RDBStorage) -> bool:
    return database.url.rstrip("/") == "sqlite:" or ":memory:" in database.url
