"""First points of a sweep, spread evenly over its space."""

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from hypergrad.knowledge.positions import value_at
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates


def spread_points(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` points in the user's units: a Latin hypercube (McKay et al. 1979).

    Of each range every `count`-th part holds one, and of a choice every option equally many, as far
    as conditions leave them active. Drawn independently, ten points miss one of four options in
    every fifth sweep, and a sampler that learns from them may not come to it in hundreds of trials.

    >>> from hypergrad import Categorical, Float
    >>> space = Space({"act": Categorical(["relu", "tanh"]), "rate": Float(1e-4, 1.0, scale="log")})
    >>> sorted(point["act"] for point in spread_points(space, 4, seed=0))
    ['relu', 'relu', 'tanh', 'tanh']
    """
    coordinates = Coordinates(space)
    generator = np.random.default_rng([seed % 2**32, 2])
    parts = generator.permuted(np.tile(np.arange(count), (len(space), 1)), axis=1)
    rows = (parts + generator.random(parts.shape)).T / count
    return [_point(coordinates, dict(zip(coordinates.order, row, strict=True))) for row in rows]


def _point(coordinates: Coordinates, places: dict[str, float]) -> dict[str, Any]:
    """The values at these places of [0, 1), parents first, without those that are inactive."""
    space, params = coordinates.space, dict[str, Any]()
    for name, key, distribution in coordinates.parameters():
        known = {n: params[n] for n in params if n in space.discrete}
        if space.is_active(name, known):
            params[key] = _value(distribution, places[name])
    return coordinates.from_study(params)


def _value(distribution: BaseDistribution, place: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(place * len(distribution.choices))]
    if isinstance(distribution, IntDistribution) and not distribution.log:
        # Rounded, the outer ones would have half a share.
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return values[int(place * len(values))]
    return value_at(distribution, place)
