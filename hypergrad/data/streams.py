"""Batches from anything that yields them: stacked, checked, and found again after a restart."""

import logging
import pickle
from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from hypergrad import checks
from hypergrad.data.batches import FIXES_A_SHAPE, Minibatches, num_steps
from hypergrad.data.contents import contents
from hypergrad.trees import Batch, Leaf, Train, Tree, leaf_names, path_name

_log = logging.getLogger("hypergrad")
_END = object()
# Where a stream stands, as JSON: a state of the iterable, how many batches were read after it and
# how many in all, and what the first batch was like.
StreamPosition = dict[str, Any]
Shapes = list[tuple[tuple[int, ...], str]]  # and dtypes, leaf by leaf


class RanOut(Exception):
    """A one-shot iterator has no whole group of batches left."""


class Constant:
    """Data that every update gets anew: arrays, or a `Minibatches`."""

    def __init__(self, data: Train | Batch) -> None:
        self._data = jax.device_put(data)

    def take(self) -> Train | Batch:
        """The data, on the device."""
        return self._data


class Stream:
    """Batches of an iterable, `group` at a time stacked along a new first axis; None: one by one.

    An iterable that can be started anew is, whenever it ends; an iterator that ends is `RanOut`.
    Batches that are only shorter than the first are left out (the rest at the end of an epoch).

    Args:
      name: of the argument, for messages.
      source: yields pytrees of what NumPy can read.
      group: batches per `take`.
      position: where an earlier run stood (`position` of its stream), to go on from.
      sharding: where the leaves of a batch go, `[batch, ...]`; None for the default device.
    """

    def __init__(
        self,
        name: str,
        source: Iterable[Batch],
        group: int | None,
        position: StreamPosition | None,
        sharding: Sharding | None = None,
    ) -> None:
        self._name, self._source, self._group = name, source, group
        self._sharding = sharding
        if isinstance(sharding, NamedSharding) and group is not None:
            self._sharding = sharding.update(spec=PartitionSpec(None, *sharding.spec))
        self._iterator: Any = None
        self._protocol: Literal["loader", "iterator"] | None = None
        # What the first batch was like: later ones share its compiled program.
        self._structure: Tree = None
        self._shapes: Shapes = []
        self._saved: str | None = None
        self._read = self._since_saved = 0
        self._warned = False
        self._start = position

    def take(self) -> Train | Batch:
        """The next batches, on the device. Raises RanOut. The first call finds the position."""
        if self._iterator is None:
            self._open()
        if self._group is None:
            return jax.device_put(jax.tree.map(_copy, self._next()), self._sharding)
        # A source may fill one buffer again and again.
        batches = [jax.tree.map(_copy, self._next()) for _ in range(self._group)]
        return jax.device_put(jax.tree.map(_stack, *batches), self._sharding)

    @property
    def awaited(self) -> str:
        """Which batch is read next, in words."""
        return f"batch {self._read + 1} of {self._name}"

    def save(self) -> None:
        """Ask the iterable for its state, where it has one, so that `position` is quick to find."""
        if self._protocol == "loader":
            self._saved = _pack(self._source.state_dict())  # type: ignore[attr-defined]
        elif self._protocol == "iterator":
            self._saved = _pack(self._iterator.get_state())
        else:
            return
        self._since_saved = 0

    def position(self) -> StreamPosition:
        """Where the stream stands."""
        like = [[list(shape), dtype] for shape, dtype in self._shapes]
        return {"saved": self._saved, "skip": self._since_saved, "read": self._read, "like": like}

    def _open(self) -> None:
        saved = None if self._start is None else self._start["saved"]
        self._protocol = _protocol(self._source)
        if saved is not None and self._protocol == "loader":
            # Before it is asked for an iterator, which starts from what was loaded.
            self._source.load_state_dict(_unpack(saved))  # type: ignore[attr-defined]
        self._iterator = iter(self._source)
        # An iterable whose iterators remember where they are, as grain's do.
        self._protocol = self._protocol or _protocol(self._iterator)
        if self._start is not None:
            self._go_on_from(self._start)

    def _go_on_from(self, start: StreamPosition) -> None:
        saved = start["saved"]
        if saved is not None:
            if self._protocol is None:
                raise ValueError(
                    f"{self._name} has no state to restore (state_dict and load_state_dict, or "
                    "get_state and set_state of its iterator), but had one when the checkpoint was "
                    "written: give the same kind of iterable."
                )
            if self._protocol == "iterator":
                self._iterator.set_state(_unpack(saved))
            self._saved = saved
            self._read = start["read"] - start["skip"]
        # Not `_next`: what was left out counted as read.
        for _ in range(start["skip"]):
            self._raw()
        self._since_saved = start["skip"]
        self._shapes = [(tuple(shape), dtype) for shape, dtype in start["like"]]

    def _raw(self) -> Batch:
        """The next batch as the iterable gives it, from its start again where it ends."""
        try:
            batch = next(self._iterator, _END)
            if batch is _END:
                self._iterator = iter(self._source)
                batch = next(self._iterator, _END)
        except Exception as error:
            source = type(self._source).__name__
            said = f"its {source} raised {type(error).__name__}: {error}"
            raise _of_kind(error, f"{self.awaited.capitalize()} cannot be read: {said}") from error
        if batch is _END:
            raise self._exhausted()
        self._read += 1
        self._since_saved += 1
        return batch

    def _next(self) -> Batch:
        """The next whole batch, on the host: after a shorter one, the one behind it."""
        batch, shapes = self._read_one()
        if shapes == self._shapes:
            return batch
        first = self._shapes[0][0][0]
        if not self._warned:
            text = "%s: a batch of %d examples instead of %d is left out, as all such at the end "
            _log.warning(text + "of an epoch.", self._name, shapes[0][0][0], first)
            self._warned = True
        batch, shapes = self._read_one()
        if shapes != self._shapes:
            raise ValueError(
                f"{self._name} yields batches of {shapes[0][0][0]} examples in a row, after a "
                f"first one of {first}. Only the last of an epoch may be shorter (it is left out): "
                "make all of one size, with drop_last=True."
            )
        return batch

    def _read_one(self) -> tuple[Batch, Shapes]:
        """The next batch, on the host, and its leaves' shapes; refuses what is unlike the first."""
        batch = jax.tree_util.tree_map_with_path(self._array, self._raw())
        shapes = [(np.shape(x), str(x.dtype)) for x in jax.tree.leaves(batch)]
        # Each by itself, as a position that was restored knows the shapes alone.
        if self._structure is None:
            self._structure = jax.tree.structure(batch)
        self._shapes = self._shapes or shapes
        self._refuse_unlike(batch, shapes)
        return batch, shapes

    def _refuse_unlike(self, batch: Batch, shapes: Shapes) -> None:
        structure = jax.tree.structure(batch)
        if structure != self._structure or len(shapes) != len(self._shapes):
            raise ValueError(
                f"Batch {self._read} of {self._name} has the structure {structure}, the first one "
                f"{self._structure}: give every batch the same."
            )
        for path, now, first in zip(leaf_names(batch), shapes, self._shapes, strict=True):
            (shape, dtype), (whole, kind) = now, first
            shorter = bool(shape) and shape[1:] == whole[1:] and shape[0] < whole[0]
            if now != first and not (dtype == kind and shorter):
                raise ValueError(
                    f"Batch {self._read} of {self._name} has {path} of {dtype}{list(shape)}, the "
                    f"first one {kind}{list(whole)}: give every batch the same shapes (pad it)."
                )

    def _exhausted(self) -> Exception:
        if self._read == 0:
            return ValueError(
                f"{self._name}={self._source!r} yields no batch: give an iterable of at least one "
                "(an iterator that was used up stays empty)."
            )
        return RanOut(
            f"{self._name} ran out after {self._read} batches. Give an iterable that can be "
            "started anew (a list, a DataLoader, a class whose __iter__ is a generator) or a "
            "longer one"
        )

    def _array(self, path: tuple[Any, ...], leaf: Leaf) -> jax.Array | np.ndarray:
        if isinstance(leaf, jax.Array):
            return leaf
        cause = None
        try:
            array = np.asarray(leaf)
            if array.dtype.kind not in "OSUMm":
                return array
        except (TypeError, ValueError, RuntimeError) as error:
            cause = error
        raise TypeError(
            f"{self._name} yields {type(leaf).__name__} at {path_name(path)}, which is no array of "
            "numbers: yield pytrees of NumPy arrays (a tensor: .cpu().numpy())."
        ) from cause


def open_source(
    name: str,
    data: Train | Batch,
    group: int | None,
    position: StreamPosition | None = None,
    sharding: Sharding | None = None,
) -> Constant | Stream:
    """`data` as what updates take from: as it is, or `group` batches of it from `position` on."""
    if is_fixed(data):
        return Constant(data)
    if not isinstance(data, Iterable) or isinstance(data, dict | str | bytes):
        raise TypeError(
            f"{name}={data!r} is neither a pytree of arrays, nor a Minibatches, nor an iterable of "
            "batches: give one of these."
        )
    return Stream(name, data, group, position, sharding)


def fixed(**data: Train | Batch) -> dict[str, dict[str, str]]:
    """What those of the arguments hold that every update gets anew, see `contents`."""
    return {name: contents(value) for name, value in data.items() if is_fixed(value)}


def is_fixed(data: Train | Batch) -> bool:
    """Whether every update gets this as it is: arrays, or a `Minibatches`."""
    return isinstance(data, Minibatches) or _is_arrays(data)


def steps_of(train: Train, steps_per_update: int | None) -> int:
    """K, from the axis that `train` has, or as given where it is an iterable of single batches."""
    if steps_per_update is not None:
        steps_per_update = checks.integer(
            "steps_per_update", steps_per_update, remedy=FIXES_A_SHAPE
        )
    if not is_fixed(train):
        if steps_per_update is None:
            raise ValueError(
                f"train is a {type(train).__name__} of single batches, and fit cannot know how "
                "many steps K an update takes: give steps_per_update=10, or so, or the length of "
                "the run as num_steps=."
            )
        return steps_per_update
    steps = num_steps(train)
    if steps_per_update not in (None, steps):
        raise ValueError(
            f"steps_per_update={steps_per_update}, but train has its own axis K of {steps} steps, "
            "of which every update gets all: leave steps_per_update out, or give an iterable of "
            "single batches."
        )
    return steps


def refuse_missing_axis(train: Train, valid: Batch) -> None:
    """Refuses a data set where K stacked batches belong: it would train on single examples.

    Told by arrays of one structure whose leaves have as many axes in `train` as in `valid`. A
    `valid` that has such an axis is told by one axis more, before the same shapes.
    """
    arrays = train.arrays if isinstance(train, Minibatches) else train
    judged = valid.arrays if isinstance(valid, Minibatches) else valid
    if not (_is_arrays(arrays) and _is_arrays(judged)):
        return
    if jax.tree.structure(arrays) != jax.tree.structure(judged):
        return
    shapes = [[x.shape for x in jax.tree.leaves(data)] for data in (arrays, judged)]
    pairs = list(zip(*shapes, strict=True))
    stacked = False
    if isinstance(valid, Minibatches):
        pass  # one batch of it has no axis of steps
    elif isinstance(train, Minibatches):
        examples = any(len(x) > 1 for x, _ in pairs)  # not numbers alone, as indices are
        stacked = examples and all(len(v) == len(x) + 1 and v[2:] == x[1:] for x, v in pairs)
    else:
        stacked = all(len(v) > 1 and v[1:] == x for x, v in pairs)
    if stacked:
        raise ValueError(
            f"valid's leaves {shapes[1]} have an axis before those of train, {shapes[0]}: valid is "
            "one batch, [batch, ...], without an axis of steps."
        )
    if not isinstance(train, Minibatches) and all(len(x) == len(v) for x, v in pairs):
        raise ValueError(
            f"train's leaves {shapes[0]} have as many axes as valid's {shapes[1]}, and lack the "
            "leading axis K of steps: give hypergrad.Minibatches(train, batch_size=32, "
            "num_steps=10), or stack K batches, [K, batch, ...]."
        )


def refuse_split_batch(**data: Train | Batch) -> None:
    """Refuses a list of the arrays of one batch, which would be read as one batch after another.

    Told by arrays that no batches of one kind have, or that are as many as the other data's.
    """
    for name, value in data.items():
        if not isinstance(value, list) or not value or not all(map(_is_array, value)):
            continue
        others = [x.arrays if isinstance(x, Minibatches) else x for x in data.values()]
        pairs = any(isinstance(x, tuple) and len(x) == len(value) for x in others)
        if pairs or len({(len(x.shape), *x.shape[1:], str(x.dtype)) for x in value}) > 1:
            raise ValueError(
                f"{name} is a list of {len(value)} arrays, and a list is read as one batch after "
                f"another: give one batch of several arrays as a tuple, {name}=(inputs, targets)."
            )


def _is_array(value: Tree) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_arrays(data: Tree) -> bool:
    """Whether this is one pytree of arrays. A list is always one of batches."""
    if isinstance(data, list):
        return False
    leaves = jax.tree.leaves(data)
    return bool(leaves) and all(map(_is_array, leaves))


def _protocol(source: object) -> Literal["loader", "iterator"] | None:
    if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        return "loader"
    if hasattr(source, "get_state") and hasattr(source, "set_state"):
        return "iterator"
    return None


def _stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    # Arrays of a device are not fetched from it.
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return jnp.stack(leaves)
    return np.stack(leaves)


def _copy(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    # A device on the host may share an array's memory, which its owner may write to again.
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _of_kind(error: Exception, text: str) -> Exception:
    try:
        return type(error)(text)
    except Exception:  # a kind that takes more than a text
        return RuntimeError(text)


def _pack(state: object) -> str:
    return b64encode(pickle.dumps(state)).decode()


def _unpack(text: str) -> Any:
    return pickle.loads(b64decode(text))
