"""What arrays hold: by which data sets are told apart, what is not finite, what is no number."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.checks import WrongTypeError
from hypergrad.trees import Leaf, Tree, leaf_names

# So many examples are named.
_MOST_NAMED = 10


def contents(data: Tree) -> dict[str, str]:
    """Type, shape and checksum of each leaf, by its name. Cost: one pass over the data.

    >>> contents({"x": np.zeros(3, np.float32)})
    {'x': 'float32[3], checksum 7bd5c66f'}
    """
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}, checksum {_checksum(leaf)}"
        for name, leaf in zip(leaf_names(data), map(as_array, jax.tree.leaves(data)), strict=True)
    }


def as_array(leaf: Leaf) -> np.ndarray | jax.Array:
    """A leaf on the host, a key as its integers; as it is where a host sees a part of it only."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not leaf.is_fully_addressable:
            return leaf
    return np.asarray(leaf)


def _checksum(leaf: np.ndarray | jax.Array) -> str:
    if not isinstance(leaf, np.ndarray) or leaf.dtype == object:
        return "unknown"
    return f"{zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data):08x}"


def bad_examples(data: Tree, axes: int = 1) -> str | None:
    """In words, which entries of the first axes hold what is not finite; None where all are.

    `axes` is 1 for examples, 2 for K batches of them.

    >>> bad_examples((np.array([1.0, np.nan, 2.0]),))
    '[1] of 3 (leaf 0)'
    """
    for name, leaf in zip(leaf_names(data), map(as_array, jax.tree.leaves(data)), strict=True):
        if not isinstance(leaf, np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        finite = np.isfinite(leaf.astype(np.float32) if leaf.dtype.kind == "V" else leaf)
        bad = np.argwhere(~finite.all(axis=tuple(range(min(axes, leaf.ndim), leaf.ndim))))
        if len(bad):
            places = [tuple(map(int, at)) for at in bad[:_MOST_NAMED]]
            named = ", ".join(str(at[0] if len(at) == 1 else list(at)) for at in places)
            more = ", ..." if len(bad) > len(places) else ""
            of = " x ".join(map(str, leaf.shape[:axes]))
            return f"[{named}{more}] of {of} (leaf {name})"
    return None


def refuse_text(name: str, data: Any) -> None:
    """Refuses arrays that JAX cannot hold.

    Raises:
      WrongTypeError: names the leaf, its dtype and the remedy.
    """
    leaves = jax.tree.leaves(data)
    if not any(map(_is_odd, leaves)):
        return
    leaf, value = next(x for x in zip(leaf_names(data), leaves, strict=True) if _is_odd(x[1]))
    kind = f"dtype {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
    raise WrongTypeError(
        f"{name} holds the leaf {leaf!r} of {kind}, which JAX cannot compute with: leave it out, "
        "or give numbers, as labels = numpy.unique(names, return_inverse=True)[1]."
    )


def _is_odd(value: Any) -> bool:
    # Objects, two kinds of strings, bytes, dates. A PRNG key's dtype has no kind.
    kind = getattr(getattr(value, "dtype", None), "kind", "V")
    return isinstance(value, str | bytes) or kind in "OUTSM"
