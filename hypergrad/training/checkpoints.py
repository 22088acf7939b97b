"""Checkpoints of a run: orbax's files, written by a thread, checked when they are read.

A folder holds one checkpoint per saved update, named by its number. Orbax gives each its name only
when it is complete. What a power failure or a full disk tears all the same is found by checksums.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.checks import integer_field
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
        if not isinstance(self.folder, str | os.PathLike) or not os.fspath(self.folder):
            raise TypeError(f"folder={self.folder!r} is no path: give a folder's name.")
        integer_field(self, "every")
        integer_field(self, "keep")
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"folder={str(path)!r} is a file: give the name of a folder.")
        if not path.parent.is_dir():
            raise ValueError(
                f"folder={str(path)!r} lies in {str(path.parent)!r}, which is no folder: make it."
            )

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return Path(self.folder).expanduser().absolute()


class TornError(Exception):
    """A checkpoint that cannot be read, or reads as something else than was written."""


def take_apart(state: State) -> list[np.ndarray]:
    """The leaves of a state on the host; PRNG keys as their integers."""
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(state)]


def put_back(arrays: list[np.ndarray], like: Tree) -> Any:
    """A state with the structure and the places of `like`, from what `take_apart` gave."""

    def place(leaf: Leaf, array: np.ndarray) -> Any:
        if is_key(leaf):
            new = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        else:
            new = jnp.asarray(array)
        return jax.device_put(new, leaf.sharding) if getattr(leaf, "committed", False) else new

    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([place(*pair) for pair in zip(leaves, arrays, strict=True)])


def saved_updates(folder: Path) -> list[int]:
    """The updates that `folder` has a checkpoint of, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def save(folder: Path, update: int, arrays: list[np.ndarray], about: dict[str, Any]) -> None:
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


def load(folder: Path, update: int) -> tuple[list[np.ndarray], dict[str, Any]]:
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
        raise TornError(f"{type(error).__name__}: {str(error).strip()[:200]}") from error


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
    try:
        yield
    finally:
        logger.setLevel(before)


class Saver:
    """Writes checkpoints one after another in a thread, and deletes those no longer kept.

    Use it as a context: its end waits for the last one. What went wrong in the thread is raised at
    the next `submit`, or there.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self._keep = checkpoint.path, checkpoint.keep
        self.folder.mkdir(exist_ok=True)
        # Of killed processes: orbax gives a checkpoint its name when it is complete.
        for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hypergrad-save")
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

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
        save(self.folder, update, [*take_apart(state), *columns.values()], about)
        # Not before the new one is whole.
        for old in saved_updates(self.folder)[self._keep :]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)


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

    Torn ones are put aside. Raises ValueError where it is of another run, or beyond `stop` updates.
    """
    folder = checkpoint.path
    for done in saved_updates(folder):
        try:
            arrays, stored = load(folder, done)
        except TornError as error:
            _log.warning(
                f"checkpoint: update {done} in {folder} is torn ({error}); it is put aside as "
                f"{done}.torn, and the one before taken."
            )
            # Not deleted: it may be somebody else's, if this is the wrong folder.
            shutil.rmtree(folder / f"{done}.torn", ignore_errors=True)
            (folder / str(done)).rename(folder / f"{done}.torn")
            continue
        differs = difference(stored, about)
        if differs:
            raise refusal(folder, done, differs)
        if done > stop:
            raise ValueError(
                f"checkpoint: the run in {str(folder)!r} has done {done} updates, more than the "
                f"{stop} that num_updates asks for: raise num_updates, or name another folder."
            )
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
    return start


def refusal(folder: Path, done: int, differs: str) -> ValueError:
    """The error about a checkpoint of another run."""
    return ValueError(
        f"checkpoint: update {done} in {str(folder)!r} is of another run: {differs}. To begin a "
        "new run name another folder; to go on with that one make problem, space, tuner, start and "
        "data as they were."
    )
