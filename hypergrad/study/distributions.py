"""What Optuna sees of a space: one distribution per hyperparameter, and how values map to it.

Everything is a parameter of the study under its own name, in the user's own units and on its own
scale, except a `reverse_log` Float: Optuna has no such scale, so the study holds one minus its
value, on a log scale, under the name `"1 - momentum"`. On each of these scales the prior is
uniform in the Float's unit coordinate, which is what a sampler models.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from hypergrad.checks import instance, integer
from hypergrad.space.dimensions import Categorical, Dimension, Float, Int
from hypergrad.space.space import Space

# A grid is listed in full; beyond this it is a mistake.
_LARGEST_GRID = 100_000


class Coordinates:
    """The parameters of a study for each hyperparameter of `space`.

    Raises ValueError for an unbounded Float, from which nothing can be proposed, and for a name
    that is taken by the parameter of a `reverse_log` Float.

    >>> space = Space({"momentum": Float(0.5, 0.99, scale="reverse_log")})
    >>> print({name: round(value, 3) for name, value in
    ...        Coordinates(space).to_study({"momentum": 0.9}).items()})
    {'1 - momentum': 0.1}
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.names = {name: _study_name(name, space[name]) for name in space}
        self.distributions = {name: _distribution(name, space[name]) for name in space}
        for name, study_name in self.names.items():
            if study_name != name and study_name in space:
                raise ValueError(
                    f"Space holds {study_name!r}, under which the study keeps {name!r} "
                    "(reverse_log): rename it."
                )
        # Parents first, otherwise as the user wrote them.
        self.order = tuple(dict.fromkeys(itertools.chain.from_iterable(map(self._up, space))))

    def parameters(self) -> Iterator[tuple[str, str, BaseDistribution]]:
        """Go through all names, parents first, with the parameter of each and its distribution."""
        return ((name, self.names[name], self.distributions[name]) for name in self.order)

    def to_study(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return parameters of the study for `values` in the user's units, clipped to the bounds.

        Clipping only undoes rounding (float32 to float64, one minus the value).
        """
        result = {}
        for name, value in values.items():
            distribution = self.distributions[name]
            if isinstance(distribution, FloatDistribution):
                value = 1 - float(value) if self.names[name] != name else float(value)
                dimension = self.space[name]
                # float32's multiples of a step are none of float64's
                value = dimension.on_grid(value) if isinstance(dimension, Float) else value
                value = min(max(value, distribution.low), distribution.high)
            elif isinstance(distribution, IntDistribution):
                value = int(value)
            elif isinstance(value, np.generic):  # JSON knows no NumPy scalar.
                value = value.item()
            result[self.names[name]] = value
        return result

    def from_study(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return values in the user's units, in the space's order, of the parameters we know."""
        return {
            name: self.value(name, params[study_name])
            for name, study_name in self.names.items()
            if study_name in params
        }

    def internal(self, params: Mapping[str, Any]) -> dict[str, tuple[float, BaseDistribution]]:
        """Return parameters of the study as storages keep them, each with its distribution."""
        kept = {n: d for _, n, d in self.parameters() if n in params}
        return {name: (d.to_internal_repr(params[name]), d) for name, d in kept.items()}

    def value(self, name: str, parameter: Any) -> Any:
        """Return the value of `name` in the user's units for one parameter of the study."""
        dimension = self.space[name]
        if self.names[name] == name or not isinstance(dimension, Float):
            return parameter
        assert dimension.low is not None and dimension.high is not None
        return min(max(1 - parameter, dimension.low), dimension.high)

    def check(self, values: Mapping[str, Any], label: str, complete: bool) -> None:
        """Refuse values that are not of this space; `complete` asks for every active one.

        Raises ValueError naming the hyperparameter: unknown, inadmissible, outside its bounds,
        inactive under the other values, or missing.
        """
        instance(label, values, Mapping, "a dict of values by name")
        for name, value in values.items():
            if name not in self.space:
                raise ValueError(f"{label} holds {name!r}: this space holds {list(self.space)}.")
            self._check_value(self.space[name], value, f"{label}[{name!r}]")
        choices = {name: values[name] for name in self.space.discrete if name in values}
        for name in self.order:
            # A parent that is left out is proposed later: whether this one is active is open.
            parents_known = all(p in choices for p in self._up(name)[:-1])
            if not complete and not parents_known:
                continue
            active = self.space.is_active(name, choices)
            if name in values and not active:
                raise ValueError(
                    f"{label} holds {name!r}, which is inactive under {choices!r}: leave it out."
                )
            if complete and active and name not in values:
                raise ValueError(f"{label} has no {name!r}: give a value of {self.space[name]!r}.")

    def _check_value(self, dimension: Dimension, value: object, label: str) -> None:
        if not isinstance(dimension, Float):
            if not dimension.admits(value):
                raise ValueError(f"{label} is {value!r}: give one of the values of {dimension!r}.")
            return
        number = np.asarray(value)
        if number.shape or not np.issubdtype(number.dtype, np.number) or not np.isfinite(number):
            raise ValueError(f"{label} is {value!r}: give one finite number.")
        assert dimension.low is not None and dimension.high is not None
        # A float32 of a bound lies outside it by rounding; `to_study` clips it back.
        slack = 1e-6 * max(abs(dimension.low), abs(dimension.high))
        if not dimension.low - slack <= number <= dimension.high + slack:
            raise ValueError(
                f"{label} is {value!r}, outside [{dimension.low!r}, {dimension.high!r}]: give a "
                "value inside, or widen the space."
            )

    def grid(self, points: int, seed: int | None) -> list[dict[str, Any]]:
        """Return the points of a grid as parameters of the study, without inactive ones.

        A Float, and an Int with more values than that, has `points` points spaced evenly on its
        scale, both bounds included; everything else has all its values. Points with equal choices
        follow one another, so that they can train together; else the order is shuffled by `seed`.
        Raises ValueError for `points < 2` and for more than 100,000 points.
        """
        points = integer("grid_points", points, 2)
        space = self.space
        axes = {name: _grid_axis(self.distributions[name], points) for name in self.order}
        groups: list[dict[str, Any]] = [{}]
        for name in space.discrete:
            choices = [{name: value} for value in axes[name]]
            groups = [
                {**group, **choice}
                for group in groups
                for choice in (choices if space.is_active(name, group) else [{}])
            ]
        floats = [[n for n in space.continuous if space.is_active(n, group)] for group in groups]
        size = sum(points ** len(names) for names in floats)
        if size > _LARGEST_GRID:
            raise ValueError(
                f"sampler='grid' has {size} points in this space: use sampler='random' or 'tpe', "
                f"or fewer than grid_points={points!r}."
            )
        rng = np.random.default_rng(0 if seed is None else seed)
        result = []
        for i in rng.permutation(len(groups)):
            product = list(itertools.product(*(axes[name] for name in floats[i])))
            for j in rng.permutation(len(product)):
                values = dict(zip(floats[i], product[j], strict=True))
                result.append({self.names[n]: v for n, v in {**groups[i], **values}.items()})
        return result

    def _up(self, name: str) -> list[str]:
        parents = self.space[name].when or {}
        return [*itertools.chain.from_iterable(self._up(p) for p in parents), name]


def _study_name(name: str, dimension: Dimension) -> str:
    reverse = isinstance(dimension, Float) and dimension.scale == "reverse_log"
    return f"1 - {name}" if reverse else name


def _distribution(name: str, dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Categorical):
        return CategoricalDistribution(dimension.choices)
    if isinstance(dimension, Int):
        return IntDistribution(
            dimension.low, dimension.high, dimension.scale == "log", dimension.step or 1
        )
    if dimension.low is None or dimension.high is None:
        raise ValueError(
            f"Space[{name!r}] is {dimension!r} without bounds, from which no study can propose: "
            "give low and high, or keep it out of the sweep's space."
        )
    if dimension.scale == "reverse_log":
        return FloatDistribution(1 - dimension.high, 1 - dimension.low, log=True)
    return FloatDistribution(
        dimension.low, dimension.high, dimension.scale == "log", dimension.step
    )


def _grid_axis(distribution: BaseDistribution, points: int) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and (high - low) / step < points:
        return [low + i * step for i in range(round((high - low) / step) + 1)]
    if distribution.log:
        values = np.exp(np.linspace(math.log(low), math.log(high), points))
    else:
        values = np.linspace(low, high, points)
    if step is not None:
        # Small integers coincide on a log scale.
        on_grid = [low + round((v - low) / step) * step for v in values.tolist()]
        return sorted({min(max(v, low), high) for v in on_grid})
    # The bounds as they are: exp(log(low)) may lie outside by a rounding, of which Optuna warns.
    return [low, *values[1:-1].tolist(), high]
