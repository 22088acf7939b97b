"""What a pytree looks like without its arrays, as JSON, and the tree again.

Nothing is unpickled and nothing imported: a class that a description names is looked for among
those that are loaded.
"""

import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.trees import Tree, is_key

# Leaves that stand in the description themselves: choices, counts, sizes.
_PLAIN = (str, bool, int, float)


def layout(tree: Tree) -> Any:
    """The description of a tree, in which `arrays_of` the tree are left out.

    >>> layout({"w": np.zeros(2), "act": "relu", "none": None})["keys"]
    ['act', 'none', 'w']
    """
    if tree is None:
        return None
    if jax.tree_util.all_leaves([tree]):
        if isinstance(tree, _PLAIN):
            return {"value": tree}
        return {"key": str(jax.random.key_impl(tree))} if is_key(tree) else "array"
    kind = type(tree)
    parts = _parts(tree)
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "keys": [key for key, _ in parts],
        "parts": [layout(part) for _, part in parts],
    }


def arrays_of(tree: Tree) -> list[Any]:
    """The leaves that `layout` leaves out, in order."""
    return [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, _PLAIN)]


def arranged(description: Any, arrays: Iterator[np.ndarray]) -> Tree:
    """The tree of a description with these arrays.

    Dicts, lists, tuples and named tuples come back as they were; of another node, whose class is
    not loaded or is made in a way of its own, what comes back has its parts by the same names.

    Raises:
      ValueError: an array of float64 or int64 where JAX holds none.
    """
    if description is None:
        return None
    if description == "array":
        return _on_device(next(arrays))
    if "value" in description:
        return description["value"]
    if "key" in description:
        return jax.random.wrap_key_data(jnp.asarray(next(arrays)), impl=description["key"])
    parts = [arranged(part, arrays) for part in description["parts"]]
    return _made(description["class"], description["keys"], parts)


def _parts(node: Tree) -> list[tuple[Any, Any]]:
    """The children of a node, in JAX's order, each with its key, name or place."""
    found, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)

    def name(entry: Any) -> Any:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                value = getattr(entry, attribute)
                return value if isinstance(value, str | int) else str(value)
        return str(entry)

    return [(name(path[0]), part) for path, part in found]


def _made(kind: str, keys: list[Any], parts: list[Any]) -> Tree:
    by_key = dict(zip(keys, parts, strict=True))
    found: Any = _loaded(kind)
    if found in (list, tuple):
        return found(parts)
    if issubclass(found, Mapping):
        return found(by_key)
    if issubclass(found, tuple) and getattr(found, "_fields", None) == tuple(keys):
        return found(*parts)
    texts = all(isinstance(key, str) for key in keys)
    if texts and all(key.isidentifier() and key[0] != "_" for key in keys):
        # Its attributes go by the same names.
        return namedtuple(kind.rpartition(".")[2].rpartition(":")[2], keys, rename=True)(*parts)
    return by_key


def _loaded(kind: str) -> type:
    """The class of this name, if its module is loaded already; else one that is nothing."""
    module, _, path = kind.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else type(None)


def _on_device(array: np.ndarray) -> jax.Array:
    placed = jnp.asarray(array)
    if placed.dtype != array.dtype:
        raise ValueError(
            f"an array of {array.dtype} was saved, and JAX would make it {placed.dtype}: set "
            "jax.config.update('jax_enable_x64', True) before."
        )
    return placed
