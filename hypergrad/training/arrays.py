"""Arrays in a folder: orbax's files, checked when they are read.

Of an array that lies over several processes each writes its part, and reads what it is to hold.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.checks import in_one_sentence
from hypergrad.trees import Leaf, State, Tree, is_key

# Arrays below this many bytes are written as one: each array of its own costs orbax a millisecond.
_SMALL = 1 << 18


class TornError(Exception):
    """A checkpoint that lacks a file, or reads as something else than was written."""


def take_apart(state: State) -> list[Any]:
    """The leaves of a state on the host; PRNG keys as their integers.

    A leaf that no process holds whole stays a `jax.Array`.
    """
    every = [_numbers(leaf) for leaf in jax.tree.leaves(state)]
    return [leaf if is_spread(leaf) else np.asarray(leaf) for leaf in every]


def put_back(arrays: Sequence[Any], like: Tree) -> Any:
    """A state with the structure and the places of `like`, from what `take_apart` gave."""

    def place(leaf: Leaf, array: Any) -> Any:
        if is_key(leaf):
            # Split as its integers are: the last axis is theirs alone.
            numbers, kind = placed(_numbers(leaf), array), jax.random.key_impl(leaf)
            new = jax.random.wrap_key_data(numbers, impl=kind)
            local = getattr(leaf, "committed", False) and not is_shared(leaf)
            return jax.device_put(new, leaf.sharding) if local else new
        return placed(leaf, array)

    def placed(leaf: Leaf, array: Any) -> jax.Array:
        if isinstance(array, jax.Array):  # read to its place
            return array
        if is_shared(leaf):
            return jax.make_array_from_callback(array.shape, leaf.sharding, lambda at: array[at])
        # From the host to its shards: whole, it may fit no device.
        committed = getattr(leaf, "committed", False)
        return jax.device_put(array, leaf.sharding) if committed else jnp.asarray(array)

    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([place(*pair) for pair in zip(leaves, arrays, strict=True)])


def is_shared(leaf: Leaf) -> bool:
    """Whether it lies over several processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def is_spread(leaf: Leaf) -> bool:
    """Whether it lies over several processes, and none holds it whole."""
    return is_shared(leaf) and not leaf.is_fully_replicated


def _numbers(leaf: Leaf) -> Leaf:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def saved_updates(folder: Path) -> list[int]:
    """The updates that `folder` has a checkpoint of, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def write_checkpoint(
    folder: Path,
    update: int,
    arrays: Sequence[Any],
    about: dict[str, Any],
    together: bool = False,
) -> None:
    """Write one checkpoint: `arrays` in order, and what there is to know about them, as JSON.

    `together`: all processes of the run make this call. The first writes what all hold, and each
    its part of what is spread.
    """
    import orbax.checkpoint as ocp

    spread = {f"{i:06}": x for i, x in enumerate(arrays) if is_spread(x)}
    entries = [[str(x.dtype), list(x.shape), _checksum_of(x)] for x in arrays]
    whole = [(i, x) for i, x in enumerate(arrays) if not is_spread(x)]
    written = {f"{i:06}": _bytes(x) for i, x in whole if x.nbytes >= _SMALL} | spread
    small = [_bytes(x) for _, x in whole if x.nbytes < _SMALL]
    text = json.dumps({"arrays": entries, "about": about}).encode()
    written["small"] = np.concatenate([*small, np.zeros(1, np.uint8)])  # orbax takes no empty array
    written["head"] = np.frombuffer(text + _checksum(text), np.uint8)
    with _orbax(together) as orbax:
        orbax.save(folder / str(update), args=ocp.args.PyTreeSave(written), force=True)


def read_checkpoint(
    folder: Path, update: int, like: Sequence[Leaf] = ()
) -> tuple[list[Any], dict[str, Any]]:
    """The arrays of one checkpoint, and what was said about them.

    `like`: leaves in the same order. What was spread over processes when it was written is read to
    the places of one that is spread now, and else whole, to the host.

    Raises TornError where a byte is missing or is not what was written.
    """
    path, like = folder / str(update), [_numbers(leaf) for leaf in like]
    try:
        with _orbax(any(map(is_shared, like))) as orbax:
            # The head holds the arrays' checksums; its own are its last four bytes.
            text = _restored(orbax, path, {"head": None})["head"].tobytes()
            if _checksum(text[:-4]) != text[-4:]:
                raise TornError("its head has another checksum")
            head = json.loads(text[:-4])
            read = _restored(orbax, path, _places(head["arrays"], like))
        begin, arrays = 0, list[Any]()
        for i, (dtype, shape, checksum) in enumerate(head["arrays"]):
            kind = jnp.dtype(dtype)
            size = kind.itemsize * math.prod(shape)
            own = read.get(f"{i:06}")
            if checksum is None:
                arrays.append(own)
                continue
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


def _places(entries: list[Any], like: Sequence[Leaf]) -> dict[str, Any]:
    """By name, where an array is to be read to: a sharding, or None for the host."""
    places: dict[str, Any] = {"small": None}
    for i, (dtype, shape, checksum) in enumerate(entries):
        if checksum is None:
            leaf: Any = like[i] if i < len(like) else None
            # Of another shape it belongs to another run, which is for others to say.
            fits = is_spread(leaf) and list(leaf.shape) == shape
            places[f"{i:06}"] = leaf.sharding if fits else None
        elif jnp.dtype(dtype).itemsize * math.prod(shape) >= _SMALL:
            places[f"{i:06}"] = None
    return places


def _restored(orbax: Any, path: Path, places: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    on_host = ocp.RestoreArgs(restore_type=np.ndarray)
    how = {
        name: on_host if place is None else ocp.ArrayRestoreArgs(sharding=place)
        for name, place in places.items()
    }
    some = ocp.args.PyTreeRestore(item=dict.fromkeys(places, 0), restore_args=how, transforms={})
    return orbax.restore(path, args=some)


@contextlib.contextmanager
def _orbax(together: bool) -> Iterator[Any]:
    import orbax.checkpoint as ocp

    # Named, they meet by the coordinator: a collective of the devices, which orbax takes otherwise,
    # would come between those of the training that goes on.
    everyone = set(range(jax.process_count())) if together else None
    options = ocp.options.MultiprocessingOptions(active_processes=everyone)
    # OCDBT gathers many small arrays in one file; ours are few, and quicker in files of their own.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=options)
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=options) as orbax:
        yield orbax


def _checksum_of(array: Any) -> int | None:
    """None for one that no process holds whole."""
    return None if is_spread(array) else zlib.crc32(_bytes(array).data)


def cannot_now(error: BaseException, path: Path) -> OSError | MemoryError | None:
    """What kept somebody from reading or writing a checkpoint, in one sentence.

    None where the reason lies in its own files: one that is missing, or holds something else.
    """
    found = system_error(error)
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


def system_error(error: BaseException | None) -> OSError | MemoryError | None:
    """The error of the system behind orbax's, which tensorstore tells in words only."""
    while error is not None:
        if isinstance(error, OSError | MemoryError):
            return error
        if isinstance(error, BaseExceptionGroup):
            found = (system_error(part) for part in error.exceptions)
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
