"""Tables as TOML, which Python reads (`tomllib`) but does not write; trees of arrays as tables."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypergrad.trees import Tree, path_name

# Where a folder of ours holds hyperparameters for people.
VALUES = "hyper.toml"
# Entries up to which an array stands in it.
_MANY = 64


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    """Put a table in the place of the file at `path`, in one move.

    Raises:
      OSError: the file cannot be written; an earlier one is then still there.
    """
    # A name that nobody can have put a link at.
    beside = path.with_name(f"{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(toml_of(table))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def readable(tree: Tree, elsewhere: str) -> Any:
    """A pytree of numbers and arrays as TOML knows them.

    In the place of an array of more than 64 entries stand its size and `elsewhere`, which says
    where it is.

    >>> readable({"rate": np.float32(0.1), "knots": [1.0, None], "l2": np.zeros(99)}, "a.npz")
    {'rate': 0.1, 'knots': [1.0], 'l2': 'float64[99], see a.npz'}
    """
    if isinstance(tree, Mapping):
        return {str(name): readable(value, elsewhere) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [readable(value, elsewhere) for value in tree if value is not None]
    if tree is None or isinstance(tree, str | bool | int | float):
        return tree
    if not jax.tree_util.all_leaves([tree]):
        # A class that is a pytree, by the paths of its leaves.
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(path): readable(leaf, elsewhere) for path, leaf in leaves}
    array = np.asarray(tree)
    if array.size > _MANY:
        return f"{array.dtype}{list(array.shape)}, see {elsewhere}"
    # To the digits of its own type: 0.1 of a float32 is not 0.10000000149.
    exact = array.dtype.kind in "biu"
    numbers = array if exact else np.array([float(str(x)) for x in array.ravel()])
    return numbers.reshape(array.shape).tolist()


def toml_of(table: Mapping[str, Any]) -> str:
    """A table of numbers, texts, truth values, lists and tables as TOML; None is left out.

    Raises:
      TypeError: a value of another type, by its name.

    >>> print(toml_of({"score": 0.5, "hyper": {"rate": 1e-3, "optimizer": "adam"}}), end="")
    score = 0.5
    <BLANKLINE>
    [hyper]
    rate = 0.001
    optimizer = "adam"
    """
    return "\n".join([*_lines(table, ()), ""]).lstrip("\n")


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Values first, as what stands below a heading is of its table."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    for key, value in table.items():
        if key not in inner and value is not None:
            yield f"{_key(key)} = {_value(value, '.'.join((*path, str(key))))}"
    for key, value in inner.items():
        below = (*path, _key(key))
        yield f"\n[{'.'.join(below)}]"
        yield from _lines(value, below)


def _key(key: Any) -> str:
    text = str(key)
    bare = text.isascii() and text.replace("-", "_").isidentifier()
    return text if bare else _text(text)


def _text(text: str) -> str:
    # JSON's escapes are TOML's; DEL alone may not stand in one and not in the other.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, Mapping):
        pairs = [f"{_key(key)} = {_value(x, name)}" for key, x in value.items() if x is not None]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(_value(item, name) for item in value)}]"
    raise TypeError(f"{name} is a {type(value).__name__}, which TOML has no value for.")
