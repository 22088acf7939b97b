"""Checkpoints of a run: orbax's files, written by a thread, checked when they are read.

A folder holds one checkpoint per saved update, named by its number. Orbax gives each its name only
when it is complete. What a power failure or a full disk tears all the same is found by checksums.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.checks import folder_name, in_one_sentence, integer_field
from hypergrad.files.lock import FolderLock
from hypergrad.training.history import History
from hypergrad.training.identity import difference
from hypergrad.trees import Leaf, State, Tree, is_key

_log = logging.getLogger("hypergrad")

# Arrays below this many bytes are written as one: each array of its own costs orbax a millisecond.
_SMALL = 1 << 18


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


class TornError(Exception):
    """A checkpoint that lacks a file, or reads as something else than was written."""


def take_apart(state: State) -> list[np.ndarray]:
    """The leaves of a state on the host; PRNG keys as their integers."""
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(state)]


def put_back(arrays: list[np.ndarray], like: Tree) -> Any:
    """A state with the structure and the places of `like`, from what `take_apart` gave."""

    def place(leaf: Leaf, array: np.ndarray) -> Any:
        committed = getattr(leaf, "committed", False)
        if is_key(leaf):
            new = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
            return jax.device_put(new, leaf.sharding) if committed else new
        # From the host to its shards: whole, it may fit no device.
        return jax.device_put(array, leaf.sharding) if committed else jnp.asarray(array)

    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([place(*pair) for pair in zip(leaves, arrays, strict=True)])


def saved_updates(folder: Path) -> list[int]:
    """The updates that `folder` has a checkpoint of, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def write_checkpoint(
    folder: Path, update: int, arrays: list[np.ndarray], about: dict[str, Any]
) -> None:
    """Write one checkpoint: `arrays` in order, and what there is to know about them, as JSON."""
    import orbax.checkpoint as ocp

    entries = [[str(x.dtype), list(x.shape), zlib.crc32(_bytes(x).data)] for x in arrays]
    written = {f"{i:06}": _bytes(x) for i, x in enumerate(arrays) if x.nbytes >= _SMALL}
    small = [_bytes(x) for x in arrays if x.nbytes < _SMALL]
    text = json.dumps({"arrays": entries, "about": about}).encode()
    written["small"] = np.concatenate([*small, np.zeros(1, np.uint8)])  # orbax takes no empty array
    written["head"] = np.frombuffer(text + _checksum(text), np.uint8)
    # OCDBT gathers many small arrays in one file; ours are few, and quicker in files of their own.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with _quiet(), ocp.Checkpointer(handler) as orbax:
        orbax.save(folder / str(update), args=ocp.args.PyTreeSave(written), force=True)


def read_checkpoint(folder: Path, update: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The arrays of one checkpoint, and what was said about them.

    Raises TornError where a byte is missing or is not what was written.
    """
    import orbax.checkpoint as ocp

    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            read = {k: np.asarray(v) for k, v in orbax.restore(folder / str(update)).items()}
        # The head holds the arrays' checksums; its own are its last four bytes.
        text = read["head"].tobytes()
        if _checksum(text[:-4]) != text[-4:]:
            raise TornError("its head has another checksum")
        head = json.loads(text[:-4])
        begin, arrays = 0, []
        for i, (dtype, shape, checksum) in enumerate(head["arrays"]):
            kind = jnp.dtype(dtype)
            size = kind.itemsize * math.prod(shape)
            own = read.get(f"{i:06}")
            data = read["small"][begin : begin + size] if own is None else own
            begin += size if own is None else 0
            if zlib.crc32(np.ascontiguousarray(data).data) != checksum:
                raise TornError(f"array {i} has another checksum")
            arrays.append(np.frombuffer(data.tobytes(), kind).reshape(shape))
        return arrays, head["about"]
    except TornError:
        raise
    # Orbax and what it is built on raise nearly anything on files that are cut short.
    except Exception as error:
        cannot = cannot_now(error, folder / str(update))
        if cannot is not None:
            raise cannot from None
        said = " ".join(str(error).split())[:200]
        raise TornError(f"{type(error).__name__}: {said}") from error


def cannot_now(error: BaseException, path: Path) -> OSError | MemoryError | None:
    """What kept somebody from reading or writing a checkpoint, in one sentence.

    None where the reason lies in its own files: one that is missing, or holds something else.
    """
    found = _system_error(error)
    if isinstance(found, MemoryError):
        return MemoryError(f"checkpoint: there is no memory for {str(path)!r}: nothing is changed.")
    missing = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, None)
    if found is None or (found.errno in missing and path.is_dir()):
        return None
    return in_one_sentence(
        found,
        f"checkpoint: {str(path)!r} cannot be read or written",
        "nothing is changed; see that the folder can be reached and run the same command again",
    )


def _system_error(error: BaseException | None) -> OSError | MemoryError | None:
    """The error of the system behind orbax's, which tensorstore tells in words only."""
    while error is not None:
        if isinstance(error, OSError | MemoryError):
            return error
        if isinstance(error, BaseExceptionGroup):
            found = (_system_error(part) for part in error.exceptions)
            return next((part for part in found if part is not None), None)
        if number := re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error)):
            code = int(number[1] or number[2])
            return OSError(code, os.strerror(code))
        if "RESOURCE_EXHAUSTED" in str(error):
            return MemoryError(str(error))
        error = error.__cause__ or error.__context__
    return None


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _checksum(text: bytes) -> bytes:
    return zlib.crc32(text).to_bytes(4, "big")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports every step of a save, and files of one process that it need not merge."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    complain = threading.excepthook

    def unless_orbaxs(args: threading.ExceptHookArgs) -> None:
        # What went wrong in its threads is raised here, too.
        if not type(args.thread).__module__.startswith("orbax."):
            complain(args)

    threading.excepthook = unless_orbaxs
    try:
        yield
    finally:
        logger.setLevel(before)
        threading.excepthook = complain


class Saver:
    """Writes checkpoints one after another in a thread, and deletes those no longer kept.

    Use it as a context: its end waits for the last one. What went wrong in the thread is raised at
    the next `submit`, or there.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self._keep = checkpoint.path, checkpoint.keep
        self._lock = FolderLock(self.folder, "checkpoint")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hypergrad-save")
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        with writing(self.folder, "made"):
            self.folder.mkdir(exist_ok=True)
        self._lock.__enter__()
        # Of killed processes: orbax gives a checkpoint its name when it is complete.
        _remove_unfinished(self.folder)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._lock.__exit__()

    def submit(
        self, update: int, state: State, columns: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        """Save `state` and the history's `columns`; waits where the last save still runs."""
        self.wait()
        self._running = self._pool.submit(self._save, update, state, columns, about)

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
            write_checkpoint(self.folder, update, [*take_apart(state), *columns.values()], about)
        # Not before the new one is whole.
        for old in saved_updates(self.folder)[self._keep :]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path, done: str) -> Iterator[None]:
    """What keeps somebody from writing is one sentence, which says what is kept."""
    try:
        yield
    except Exception as error:
        found = _system_error(error)
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
    with FolderLock(folder, "checkpoint"):
        return _newest(folder, start, about, stop)


def _newest(folder: Path, start: Resumed, about: dict[str, Any], stop: int) -> Resumed:
    torn: dict[int, TornError] = {}
    for done in saved_updates(folder):
        try:
            arrays, stored = read_checkpoint(folder, done)
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
        for bad, why in torn.items():
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
