"""How many programs a sweep compiles, told before it starts: one per set of choices and width."""

import logging
import warnings
from typing import Any

from hypergrad.space.dimensions import Int
from hypergrad.space.space import Space

_log = logging.getLogger("hypergrad")

# Values of an Int, beyond which compiling is likely to take longer than training.
_MANY = 16


def tell_of_programs(space: Space, num_trials: int) -> None:
    """Say how many programs there may be, and warn of Ints whose values are one each."""
    count = min(count_programs(space), num_trials)
    _log.info(f"at most {count} programs of equal choices for {num_trials} trials.")
    for name in space.discrete:
        dimension = space[name]
        if not isinstance(dimension, Int) or dimension.traced or dimension.count <= _MANY:
            continue
        count, step = dimension.count, -(-(dimension.high - dimension.low) // 8)
        warnings.warn(
            f"{name!r} is {dimension!r} with {count} values, and each is a program of its own: "
            f"up to {min(count, num_trials)} are compiled for {num_trials} trials. Give "
            f"step={step} or so, a Categorical of a few values, or, where masks will do "
            "(hypergrad.nn.MaskedDense), traced=True.",
            stacklevel=4,
        )


def count_programs(space: Space) -> int:
    """How many sets of choices there are that are programs of their own: traced Ints are none."""
    static = [name for name in space.discrete if name not in space.traced]
    parents = {parent for name in space for parent in space[name].when or {}}
    groups: list[dict[str, Any]] = [{}]
    for name in (name for name in static if name in parents):
        groups = [
            {**group, **choice}
            for group in groups
            for choice in (
                [{name: v} for v in space.values_of(name)] if space.is_active(name, group) else [{}]
            )
        ]
    total = 0
    for group in groups:
        count = 1
        for name in (name for name in static if name not in parents):
            count *= len(space.values_of(name)) if space.is_active(name, group) else 1
        total += count
    return total
