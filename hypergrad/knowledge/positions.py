"""Where a value lies within its distribution, in [0, 1], and how far two points are apart."""

import math
from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

# How far apart two different choices are.
_OTHER = 0.5


def position(distribution: BaseDistribution, value: Any) -> float:
    """The place of a number between its bounds, on their scale."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    if low == high:
        return 0.5
    if distribution.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


def value_at(distribution: BaseDistribution, place: float) -> float | int:
    """The number at a place, which is cut to [0, 1]; the nearest one where there are steps."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, place = distribution.low, distribution.high, min(max(place, 0.0), 1.0)
    value = low + place * (high - low)
    if distribution.log:
        value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
    if distribution.step is not None:
        value = low + round((value - low) / distribution.step) * distribution.step
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else value


def distance(distribution: BaseDistribution, one: Any, other: Any) -> float:
    """How far two values are apart, in ranges."""
    if isinstance(distribution, CategoricalDistribution):
        return 0.0 if one == other else _OTHER
    return abs(position(distribution, one) - position(distribution, other))


def mean_square_distance(
    distributions: Mapping[str, BaseDistribution], one: Mapping[str, Any], other: Mapping[str, Any]
) -> float:
    """Over all parameters of either point; one that the other lacks counts as another choice."""
    names = [n for n in distributions if n in one or n in other]
    squares = [
        distance(distributions[n], one[n], other[n]) ** 2 if n in one and n in other else _OTHER**2
        for n in names
    ]
    return sum(squares) / len(squares) if squares else _OTHER**2
