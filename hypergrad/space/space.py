"""Search spaces: which hyperparameters there are, which are active, and their unit coordinates.

Outer steps are taken in unit coordinates (see `dimensions.py`). `Space.to_unit` and
`Space.from_unit` are pure functions of pytrees; wrong names and conditions are refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.space.dimensions import Categorical, Dimension, Float, Int, as_float
from hypergrad.trees import Leaf


@dataclass(frozen=True, repr=False, eq=False)
class Space(Mapping[str, Dimension]):
    """The hyperparameters of a search by name: a read-only mapping, hashable and printable.

    `hyper` and `unit` are dicts from the names of Floats to subtrees of arrays; a conditional
    Float that is not active is left out of both. Unit coordinates and values are at least
    float32 (float64 where 64-bit JAX is on and the input has it) and never weakly typed.

    Raises ValueError where a condition names an unknown or continuous hyperparameter, asks for a
    value that it cannot take, or stands in a circle.

    >>> space = Space({"rate": Float(1e-4, 1.0, scale="log"), "dropout": Float(0.0, 0.8)})
    >>> unit = space.to_unit({"rate": 1e-2, "dropout": 0.2})
    >>> print({name: round(float(u), 4) for name, u in unit.items()})
    {'rate': 0.5, 'dropout': 0.25}
    """

    dimensions: Mapping[str, Dimension]

    def __post_init__(self) -> None:
        if not isinstance(self.dimensions, Mapping):
            raise TypeError(f"Space({self.dimensions!r}) is no mapping: give a dict by name.")
        object.__setattr__(self, "dimensions", dict(self.dimensions))
        for name, dimension in self.dimensions.items():
            if not isinstance(name, str):
                raise TypeError(f"Space holds the name {name!r}: names are strings.")
            if not isinstance(dimension, Float | Int | Categorical):
                raise TypeError(
                    f"Space[{name!r}] is {dimension!r}: give a Float, an Int or a Categorical."
                )
        for name in self.dimensions:
            self._check_conditions(name)
        for name in self.dimensions:
            self._parents_first(name, ())

    def __getitem__(self, name: str) -> Dimension:
        if name not in self.dimensions:
            raise KeyError(f"{name!r} is not in this space: it holds {list(self.dimensions)}.")
        return self.dimensions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    def __hash__(self) -> int:
        # Without order, as a mapping's equality has none.
        return hash(frozenset(self.dimensions.items()))

    def __repr__(self) -> str:
        lines = [f"    {name!r}: {dimension!r},\n" for name, dimension in self.items()]
        return "Space({\n" + "".join(lines) + "})" if lines else "Space({})"

    @property
    def continuous(self) -> tuple[str, ...]:
        """The names of the Floats, in order."""
        return tuple(name for name, dimension in self.items() if isinstance(dimension, Float))

    @property
    def discrete(self) -> tuple[str, ...]:
        """The names of the Ints and Categoricals, each after those that its condition names."""
        order: dict[str, None] = {}
        for name, dimension in self.items():
            if not isinstance(dimension, Float):
                order.update(dict.fromkeys(self._parents_first(name, ())))
        return tuple(order)

    @property
    def traced(self) -> tuple[str, ...]:
        """The names of the traced Ints, in order."""
        return tuple(name for name in self.discrete if getattr(self[name], "traced", False))

    def values_of(self, name: str) -> list[Any]:
        """All values of an Int or a Categorical."""
        dimension = self[name]
        if isinstance(dimension, Int):
            return list(range(dimension.low, dimension.high + 1, dimension.step or 1))
        assert isinstance(dimension, Categorical)
        return list(dimension.choices)

    def is_active(self, name: str, choices: Mapping[str, Any]) -> bool:
        """Say whether the conditions of `name`, and those of what it depends on, are met.

        Only the choices that the answer depends on are read, so a sampler may ask while it goes
        through `discrete`. Raises ValueError where one of them is missing or inadmissible.
        """
        for parent, admissible in (self[name].when or {}).items():
            if not self.is_active(parent, choices):
                return False
            if parent not in choices:
                raise ValueError(
                    f"choices has no {parent!r}, on which {name!r} depends: "
                    f"add one of the values of {self[parent]!r}."
                )
            self._check_choice(parent, choices[parent], f"choices[{parent!r}]")
            if choices[parent] not in admissible:
                return False
        return True

    def active(self, choices: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names, continuous and discrete, that are active under the discrete `choices`.

        A hyperparameter whose parent is inactive is inactive. Values of Floats in `choices` are
        ignored, and so are values of inactive hyperparameters. Raises ValueError for an unknown
        name, an inadmissible value and a missing value that a condition needs.

        >>> space = Space({
        ...     "optimizer": Categorical(["sgd", "adamw"]),
        ...     "momentum": Float(0.5, 0.999, scale="reverse_log", when={"optimizer": "sgd"}),
        ... })
        >>> space.active({"optimizer": "sgd"}), space.active({"optimizer": "adamw"})
        (('optimizer', 'momentum'), ('optimizer',))
        """
        for name, value in choices.items():
            if name not in self:
                raise ValueError(f"choices holds {name!r}: this space holds only {list(self)}.")
            if not isinstance(self[name], Float):
                self._check_choice(name, value, f"choices[{name!r}]")
        return tuple(name for name in self if self.is_active(name, choices))

    def to_unit(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """Return the unit coordinates of `hyper`: same names, same subtrees; pure and jittable.

        Values are not checked against their bounds (see `validate`). Any subset of the Floats may
        be given. Raises ValueError for other names, TypeError for leaves that are no numbers.
        """
        return self._each(Float.to_unit, "hyper", hyper)

    def from_unit(self, unit: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values at unit coordinates `unit`, the inverse of `to_unit`.

        Differentiable, with finite derivatives at both bounds: gradients of a loss with respect
        to `unit` come from `jax.grad` through this function.

        >>> space = Space({"momentum": Float(0.0, 0.99, scale="reverse_log")})
        >>> print(f"{space.from_unit({'momentum': 0.5})['momentum']:.4f}")
        0.9000
        """
        return self._each(Float.from_unit, "unit", unit)

    def project(self, unit: Mapping[str, Any]) -> dict[str, Any]:
        """Return `unit` clipped into [0, 1]; unbounded Floats are left as they are. NaN stays."""
        return self._each(_clip, "unit", unit)

    def cast(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """Return `hyper` with strong dtypes of at least float32; integers become floats."""
        return {
            name: jax.tree_util.tree_map_with_path(
                lambda path, leaf, n=name: as_float(leaf, _label(n, path)), hyper[name]
            )
            for name in self._floats("hyper", hyper)
        }

    def validate(
        self, hyper: Mapping[str, Any], choices: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Check starting values, then return them `cast`.

        With `choices` (values of the discrete hyperparameters) `hyper` must hold exactly the
        active Floats; without, every unconditional Float and any of the conditional ones. Values
        known only inside a trace are not checked. Raises ValueError for missing or unknown names,
        a value outside its bounds and a value that is not finite; TypeError for a boolean, a
        string, or anything else that is no real number.

        >>> Space({"dropout": Float(0.0, 0.8)}).validate({"dropout": 0.9})
        Traceback (most recent call last):
            ...
        ValueError: hyper['dropout'] starts at 0.9, outside its bounds [0.0, 0.8]: start ...
        """
        floats = self._floats("hyper", hyper)
        self._check_complete(floats, choices)
        for name, dimension in floats.items():
            leaves = jax.tree_util.tree_leaves_with_path(hyper[name])
            if not leaves:
                raise ValueError(
                    f"hyper[{name!r}] is {hyper[name]!r} and holds no number: give one."
                )
            for path, leaf in leaves:
                dimension.check_value(leaf, _label(name, path))
        return self.cast(hyper)

    def _each(
        self, function: Callable[[Float, Leaf], jax.Array], argument: str, tree: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`function` of every leaf of `tree`, given the Float that the leaf belongs to."""
        return {
            name: jax.tree.map(partial(function, dimension), tree[name])
            for name, dimension in self._floats(argument, tree).items()
        }

    def _floats(self, argument: str, tree: Mapping[str, Any]) -> dict[str, Float]:
        """Return the Floats that `tree` names, refusing every other name."""
        if not isinstance(tree, Mapping):
            raise TypeError(f"{argument} is {tree!r}: give a dict from names to values.")
        floats = {}
        for name in tree:
            dimension = self.dimensions.get(name)
            if dimension is None:
                raise ValueError(
                    f"{argument} holds {name!r}, which is not in the space (it holds "
                    f"{list(self)}): add it there, or close over it as a constant."
                )
            if not isinstance(dimension, Float):
                raise ValueError(
                    f"{argument} holds {name!r}, which is discrete ({dimension!r}) and has no unit "
                    "coordinate: pass it among the choices."
                )
            floats[name] = dimension
        return floats

    def _check_complete(self, given: Collection[str], choices: Mapping[str, Any] | None) -> None:
        """Refuse names of Floats that lack one which is needed, or hold one which is not active."""
        needed = [name for name in self.continuous if self[name].when is None]
        if choices is not None:
            active = self.active(choices)
            needed = [name for name in self.continuous if name in active]
            for name in given:
                if name not in active:
                    raise ValueError(
                        f"hyper[{name!r}] is inactive under {dict(choices)!r}: leave it out, or "
                        f"change the condition {self[name].when!r}."
                    )
        for name in needed:
            if name not in given:
                raise ValueError(
                    f"hyper has no {name!r}: give a starting value for {self[name]!r}."
                )

    def _check_choice(self, name: str, value: object, label: str) -> None:
        dimension = self[name]
        if not isinstance(dimension, Float) and not dimension.admits(value):
            raise ValueError(f"{label} is {value!r}: give one of the values of {dimension!r}.")

    def _check_conditions(self, name: str) -> None:
        for parent, admissible in (self[name].when or {}).items():
            if parent not in self:
                raise ValueError(
                    f"Space[{name!r}] has a condition on {parent!r}, which is not in the space: "
                    f"add it, or name one of {list(self)}."
                )
            if isinstance(self[parent], Float):
                raise ValueError(
                    f"Space[{name!r}] has a condition on {parent!r}, which is continuous: "
                    "conditions name an Int or a Categorical."
                )
            if getattr(self[parent], "traced", False):
                raise ValueError(
                    f"Space[{name!r}] has a condition on {parent!r}, which is traced: what is "
                    "active must be known when a program is made. Leave traced=True out."
                )
            for value in admissible:
                self._check_choice(parent, value, f"Space[{name!r}]: when[{parent!r}]")

    def _parents_first(self, name: str, children: tuple[str, ...]) -> list[str]:
        """Return what `name` depends on, then `name`; refuse a circle."""
        if name in children:
            circle = " -> ".join((*children[children.index(name) :], name))
            raise ValueError(f"Space has a circle of conditions, {circle}: remove one of them.")
        parents = self[name].when or {}
        ancestors = [a for p in parents for a in self._parents_first(p, (*children, name))]
        return [*ancestors, name]


def _clip(dimension: Float, unit: Leaf) -> jax.Array:
    u = as_float(unit)
    return u if dimension.low is None else jnp.clip(u, 0.0, 1.0)


def _label(name: str, path: tuple[Any, ...]) -> str:
    return f"hyper[{name!r}]{jax.tree_util.keystr(path)}"
