"""Tables as TOML, which Python reads (`tomllib`) but does not write."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


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
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else repr(value).replace("'", "")
    if isinstance(value, Sequence):
        return f"[{', '.join(_value(item, name) for item in value)}]"
    raise TypeError(f"{name} is a {type(value).__name__}, which TOML has no value for.")
