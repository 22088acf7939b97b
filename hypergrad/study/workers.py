"""Who works on a study: each worker's sign of life, and who of them is dead.

A worker is one opening of a study by one process. It leaves a record in the study (host, process
id, start time of the process) and renews its beat every few seconds, on any storage: Optuna's own
heartbeat exists for databases only.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from functools import cache
from typing import Any

from optuna.storages import BaseStorage, InMemoryStorage

from hypergrad.checks import positive

_PREFIX = "hypergrad:worker:"
# Workers that are open in this process: a record of this process that is not among them was left
# by an interrupted sweep, whose process lives on (a notebook). With the process, as forks copy it.
_open_here: dict[str, int] = {}
# How long a stopped process is waited for, in seconds since its last beat.
_STOPPED_PATIENCE = 600.0


class Worker:
    """An opening of a study by this process, with a thread that beats every `beat_every` seconds.

    A beat is one write of about 200 bytes. Memory needs no beats and gets no thread. Raises
    ValueError for a period that is not positive and a grace shorter than two periods.
    """

    def __init__(
        self, storage: BaseStorage, study_id: int, beat_every: float, grace: float
    ) -> None:
        positive("beat_every", beat_every, "a period in seconds")
        positive("grace", grace, "a time in seconds", infinite=True)
        if grace < 2 * beat_every:
            raise ValueError(
                f"grace={grace!r} seconds declares a worker dead before it misses two beats: give "
                f"at least {2 * beat_every!r}, or a smaller beat_every={beat_every!r}."
            )
        self.id, pid = uuid.uuid4().hex, os.getpid()
        self.storage, self.study_id = storage, study_id
        started = _process_start(pid)
        self._record = {"place": _place(), "pid": pid, "started": started, "grace": grace}
        _open_here[self.id] = pid
        self.beat()
        self._stop = threading.Event()
        self._finalizer = weakref.finalize(self, _forget, self._stop, self.id)
        # The thread holds the worker weakly: one that is dropped without `close` must not beat on.
        if not isinstance(storage, InMemoryStorage):
            thread = threading.Thread(
                target=_beat_until,
                args=(self._stop, beat_every, weakref.ref(self)),
                name="hypergrad-heartbeat",
                daemon=True,
            )
            thread.start()

    def beat(self) -> None:
        """Write a sign of life now."""
        self._write(self._record | {"beat": time.time()})

    def is_alone(self) -> bool:
        """Say whether no other worker lives."""
        workers = read_workers(self.storage, self.study_id)
        return all(is_dead(w, record) for w, record in workers.items() if w != self.id)

    def close(self) -> None:
        """Stop beating and say that this worker ended."""
        self._finalizer()
        self._write(self._record | {"beat": time.time(), "ended": True})

    def _write(self, record: Mapping[str, Any]) -> None:
        self.storage.set_study_system_attr(self.study_id, _PREFIX + self.id, dict(record))


def read_workers(storage: BaseStorage, study_id: int) -> dict[str, dict[str, Any]]:
    """Return every worker's record by its id, dead ones included."""
    attributes = storage.get_study_system_attrs(study_id)
    return {k.removeprefix(_PREFIX): v for k, v in attributes.items() if k.startswith(_PREFIX)}


def is_dead(worker: str, record: Mapping[str, Any] | None) -> bool:
    """Say whether a worker will never finish its trials.

    At once where it ended, or where its process on this machine is gone; on another machine when
    its last beat is older than the grace that it gave itself (machines' clocks are compared:
    they should agree to within the grace).
    """
    if record is None or record.get("ended"):
        return True
    if _open_here.get(worker) == os.getpid():
        return False
    if record["place"] != _place():
        return time.time() - record["beat"] > record["grace"]
    if record["pid"] == os.getpid() or not _is_running(record["pid"], record["started"]):
        return True
    # A process that somebody has stopped may be continued, and is waited for, but not for ever.
    patience = max(_STOPPED_PATIENCE, record["grace"])
    return _is_stopped(record["pid"]) and time.time() - record["beat"] > patience


def others_alive(storage: BaseStorage, study_id: int, me: str) -> list[str]:
    """Name the other workers that live, for whoever waits for them."""
    named = []
    for worker, record in read_workers(storage, study_id).items():
        if worker != me and not is_dead(worker, record):
            here = record["place"] == _place()
            where = "here" if here else f"on {record['place'].split()[0]}"
            stopped = ", which is stopped" if here and _is_stopped(record["pid"]) else ""
            named.append(f"process {record['pid']} {where}{stopped}")
    return named


def _forget(stop: threading.Event, worker: str) -> None:
    stop.set()
    _open_here.pop(worker, None)


def _beat_until(
    stop: threading.Event, period: float, reference: weakref.ReferenceType[Worker]
) -> None:
    while not stop.wait(period):
        worker = reference()
        if worker is None:
            return
        # A database that is away for a while must not end the beats.
        with contextlib.suppress(Exception):
            worker.beat()
        # Or this frame would keep the worker alive during the next wait.
        del worker


@cache
def _place() -> str:
    """Name the machine, its boot and its table of processes: equal ones can see each other's."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_running(pid: int, started: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # It lives, and belongs to another user.
        pass
    now = _process_start(pid)
    # A process id is used again: its start tells. Killed and not yet reaped counts as gone.
    return now is None or started is None or (now == started)


def _process_start(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None where nobody tells.

    "gone" stands for a process that was killed and only waits to be reaped.
    """
    fields = _process_stat(pid)
    if fields is None:
        return None
    return "gone" if fields[0] in "ZX" else fields[19]


def _is_stopped(pid: int) -> bool:
    fields = _process_stat(pid)
    return fields is not None and fields[0] in "Tt"


def _process_stat(pid: int) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name, second and in parentheses, may hold anything.
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None
