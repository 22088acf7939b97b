"""Checkpoints of a run: orbax's files, written by a thread, checked when they are read.

A folder holds one checkpoint per saved update, named by its number. Orbax gives each its name only
when it is complete. What a power failure or a full disk tears all the same is found by checksums.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from hypergrad.checks import folder_name, in_one_sentence, integer_field
from hypergrad.files.lock import FolderLock
from hypergrad.files.toml import VALUES, readable, write_toml
from hypergrad.training.arrays import (
    TornError,
    is_shared,
    put_back,
    read_checkpoint,
    saved_updates,
    system_error,
    take_apart,
    write_checkpoint,
)
from hypergrad.training.history import History
from hypergrad.training.identity import difference
from hypergrad.trees import Hyper, State

_log = logging.getLogger("hypergrad")


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `fit` saves.

    Args:
      folder: made where it is missing; the folder it lies in must exist.
      every: updates between two checkpoints; one more is written at the end and on SIGTERM.
      keep: how many are kept. A torn one is skipped for the one before, so keep two or more.

    Cost: the loop goes on while a thread writes; the state of one update stays on the device until
    it is copied, and the history of all updates is written each time. Raises ValueError for numbers
    below 1 and a folder whose parent is missing.

    >>> Checkpoint("run", every=50)
    Checkpoint(folder='run', every=50, keep=2)
    """

    folder: str | os.PathLike[str]
    every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        folder_name("folder", self.folder)
        integer_field(self, "every")
        integer_field(self, "keep")
        path = self.path
        try:
            path.lstat()
        except FileNotFoundError:
            pass  # to be made
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"folder={str(path)!r} is no folder's name ({why}).") from None
        else:
            if not path.is_dir():
                kind = "a link to nowhere" if not path.exists() else "a file"
                raise ValueError(f"folder={str(path)!r} is {kind}: give the name of a folder.")
        if not path.parent.is_dir():
            raise ValueError(
                f"folder={str(path)!r} lies in {str(path.parent)!r}, which is no folder: make it."
            )

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return Path(self.folder).expanduser().absolute()


class Saver:
    """Writes checkpoints one after another in a thread, and deletes those no longer kept.

    Use it as a context: its end waits for the last one. What went wrong in the thread is raised at
    the next `submit`, or there. `together`: the processes that train `state` each have one, and
    write one checkpoint; the first process holds the folder.
    """

    def __init__(self, checkpoint: Checkpoint, together: bool = False) -> None:
        self.folder, self._keep = checkpoint.path, checkpoint.keep
        self._together, self.holds = together, holds_folder(together)
        self._lock = _lock(self.folder, together)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hypergrad-save")
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        with writing(self.folder, "made"):
            self.folder.mkdir(exist_ok=True)
        self._lock.__enter__()
        if self.holds:
            # Of killed processes: orbax gives a checkpoint its name when it is complete.
            _remove_unfinished(self.folder)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._lock.__exit__(None, None, None)

    def submit(
        self, update: int, state: State, columns: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        """Save `state` and the history's `columns`; waits where the last save still runs."""
        self.wait()
        self._running = self._pool.submit(self._save, update, state, columns, about)

    def write_values(self, done: int, history: History, hyper: Hyper) -> None:
        """Write the values to keep as a file for people, beside the records."""
        if not self.holds:
            return
        about = {"updates": done, "loss": history[-1].loss if history else None}
        with writing(self.folder, f"given {VALUES}"):
            write_toml(self.folder / VALUES, about | {"hyper": readable(hyper, str(done))})

    def wait(self) -> None:
        """Wait for the save that runs, and raise what went wrong in it."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _save(
        self, update: int, state: State, columns: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        about = about | {"update": update, "columns": list(columns)}
        with writing(self.folder, f"given update {update}"):
            arrays = [*take_apart(state), *columns.values()]
            write_checkpoint(self.folder, update, arrays, about, self._together)
        # Not before the new one is whole.
        for old in saved_updates(self.folder)[self._keep :] if self.holds else ():
            shutil.rmtree(self.folder / str(old), ignore_errors=True)


def is_together(state: State) -> bool:
    """Whether several processes train this state as one."""
    return any(map(is_shared, jax.tree.leaves(state)))


def holds_folder(together: bool) -> bool:
    """Whether this process is the one that writes what all have."""
    return not together or jax.process_index() == 0


def _lock(folder: Path, together: bool) -> contextlib.AbstractContextManager[Any]:
    lock = FolderLock(folder, "checkpoint")
    return lock if holds_folder(together) else contextlib.nullcontext()


@contextlib.contextmanager
def writing(folder: Path, done: str) -> Iterator[None]:
    """What keeps somebody from writing is one sentence, which says what is kept."""
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if not isinstance(found, OSError):
            raise
        _remove_unfinished(folder)
        kept = saved_updates(folder)[:1]
        raise in_one_sentence(
            found,
            f"checkpoint: {str(folder)!r} cannot be {done}",
            (f"update {kept[0]} is kept there" if kept else "it holds no checkpoint")
            + "; make room or give the right to write, and run the same command again",
        ) from None


def _remove_unfinished(folder: Path) -> None:
    for left in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)


class Resumed(NamedTuple):
    """Where a run begins, or goes on.

    Attributes:
      state: the tuner's state.
      done: updates that the state counts.
      history: the records so far.
      positions: where the streams of data stand, by name.
      program: what the checkpoint's update computes, see `identity.program_of`; None for a start.
    """

    state: Any
    done: int
    history: History
    positions: dict[str, Any]
    program: dict[str, Any] | None


def restore(checkpoint: Checkpoint, start: Resumed, about: dict[str, Any], stop: int) -> Resumed:
    """The newest whole checkpoint of the run that `about` describes; `start` where there is none.

    Torn ones are put aside once an older one is read. Raises ValueError where it is of another run,
    or beyond `stop` updates, or where all are torn; OSError and MemoryError where it cannot be read
    now.
    """
    folder = checkpoint.path
    if not folder.is_dir():
        return start
    with _lock(folder, is_together(start.state)):
        return _newest(folder, start, about, stop)


def _newest(folder: Path, start: Resumed, about: dict[str, Any], stop: int) -> Resumed:
    torn: dict[int, TornError] = {}
    for done in saved_updates(folder):
        try:
            arrays, stored = read_checkpoint(folder, done, jax.tree.leaves(start.state))
        except TornError as error:
            torn[done] = error
            continue
        differs = difference(stored, about)
        if differs:
            raise refusal(folder, done, differs)
        if done > stop:
            raise ValueError(
                f"checkpoint: the run in {str(folder)!r} has done {done} updates, more than the "
                f"{stop} that num_updates asks for: raise num_updates, or name another folder."
            )
        for bad, why in torn.items() if holds_folder(is_together(start.state)) else ():
            _put_aside(folder, bad, why)
        # The order of `Saver._save`: the state's leaves, then the history's columns.
        num = len(jax.tree.leaves(start.state))
        columns = dict(zip(stored["columns"], arrays[num:], strict=True))
        _log.info(f"checkpoint: going on from update {done} in {folder}")
        return Resumed(
            state=put_back(arrays[:num], start.state),
            done=done,
            history=History(start.history.hyper, columns),
            positions=stored["positions"],
            program=stored.get("program"),
        )
    reasons = "; ".join(f"update {done}: {error}" for done, error in torn.items())
    reasons = reasons or ", ".join(sorted(path.name for path in folder.glob("*.torn")))
    if reasons:
        raise ValueError(
            f"checkpoint: none of those in {str(folder)!r} can be used ({reasons}). To begin anew "
            "name another folder, or remove them."
        )
    return start


def _put_aside(folder: Path, done: int, error: TornError) -> None:
    _log.warning(
        f"checkpoint: update {done} in {folder} is torn ({error}); it is put aside as {done}.torn, "
        "and an older one taken."
    )
    # Not deleted: it may be somebody else's, if this is the wrong folder.
    shutil.rmtree(folder / f"{done}.torn", ignore_errors=True)
    (folder / str(done)).rename(folder / f"{done}.torn")


def refusal(folder: Path, done: int, differs: str) -> ValueError:
    """The error about a checkpoint of another run."""
    return ValueError(
        f"checkpoint: update {done} in {str(folder)!r} is of another run: {differs}. To begin a "
        "new run name another folder; to go on with that one make problem, space, tuner, start and "
        "data as they were."
    )
