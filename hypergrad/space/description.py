"""A space as JSON: what studies and checkpoints are signed with, and how two of them differ."""

from collections.abc import Mapping
from typing import Any

from hypergrad.space.dimensions import Categorical, Dimension, Float, Int
from hypergrad.space.space import Space


def fingerprint(space: Space) -> dict[str, dict[str, Any]]:
    """Return what a study is made for, as JSON: kinds, ranges, scales, choices, conditions."""
    result = {}
    for name, dimension in space.items():
        entry: dict[str, Any] = {"kind": type(dimension).__name__}
        if isinstance(dimension, Categorical):
            entry["choices"] = list(dimension.choices)
        else:
            entry |= {"low": dimension.low, "high": dimension.high, "scale": dimension.scale}
            # Only where there is one: studies of before know no steps.
            entry |= {} if dimension.step is None else {"step": dimension.step}
        when = dimension.when or {}
        entry["when"] = {parent: list(values) for parent, values in when.items()} or None
        result[name] = entry
    return result


def space_of(description: Mapping[str, Mapping[str, Any]]) -> Space:
    """The space that `fingerprint` described."""
    dimensions: dict[str, Dimension] = {}
    for name, entry in description.items():
        if entry["kind"] == "Categorical":
            dimensions[name] = Categorical(entry["choices"], when=entry["when"])
        else:
            kind = {"Float": Float, "Int": Int}[entry["kind"]]
            fields = {key: entry.get(key) for key in ("low", "high", "scale", "when", "step")}
            dimensions[name] = kind(**fields)
    return Space(dimensions)


def first_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in words where two fingerprints differ first; None where they do not."""
    for name in stored:
        if name not in now:
            return f"it has {name!r}, which this space lacks"
    for name, entry in now.items():
        if name not in stored:
            return f"it lacks {name!r}"
        for key in ("kind", "low", "high", "scale", "step", "choices", "when"):
            before, after = stored[name].get(key), entry.get(key)
            # `1 == True`, but they are two choices.
            if before != after or repr(before) != repr(after):
                return f"{name!r} has {key} {before!r} there and {after!r} here"
    return None
