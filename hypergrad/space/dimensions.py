"""What one hyperparameter may be: a Float with a gradient, an Int or a Categorical without.

Everything that can go wrong with bounds, scales and choices is refused at construction, before
anything is compiled. Unit coordinates are the position of a value between `low` and `high` on its
scale, in [0, 1].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import checks
from hypergrad.space import ranges
from hypergrad.trees import Leaf

_FLOAT_SCALES = ("linear", "log", "reverse_log")
_INT_SCALES = ("linear", "log")
# What every Optuna storage can keep and give back unchanged.
_CHOICE_TYPES = (bool, int, float, str, type(None))


@dataclass(frozen=True, repr=False)
class Float:
    """A continuous hyperparameter, tuned by gradients: a number, or a whole subtree of arrays.

    The starting value gives the shapes. `scale` is `"linear"`, `"log"` (natural logarithm of the
    value, for rates) or `"reverse_log"` (logarithm of one minus the value, for momentum and decay
    rates); the unit coordinate increases with the value on each of them. Without bounds the unit
    coordinate is the value itself. `when={"optimizer": "sgd"}` makes it conditional on discrete
    hyperparameters; a tuple lists several admissible values. With `step` only `low`, `low + step`,
    ... are used: training sees the nearest of them, and the unit coordinate moves on between them
    by the hypergradient taken there (straight through, Bengio 2013), so that a small step of the
    outer loop need not change the value. `prior` is where you believe the optimum to be: `sweep`
    tries it first and draws around it until its own results say more, `tune` starts there.

    Raises ValueError for `low >= high`, only one bound, bounds that are not finite, an unknown
    scale, `"log"` with `low <= 0`, `"reverse_log"` with `high >= 1`, a `step` that does not divide
    a linear range, and a `prior` outside the bounds.

    >>> rate = Float(1e-4, 1.0, scale="log")
    >>> print(f"{rate.from_unit(0.5):.4f} {rate.to_unit(0.01):.4f}")
    0.0100 0.5000
    """

    low: float | None = None
    high: float | None = None
    scale: str = "linear"
    # Compared, but a dict has no hash.
    when: Mapping[str, Any] | None = field(default=None, hash=False)
    step: float | None = None
    prior: float | None = None

    def __new__(cls, *_: Any, **given: Any) -> Float:  # noqa: D102
        ranges.refuse_log("Float", given)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        checks.choice("Float(scale", self.scale, _FLOAT_SCALES)
        object.__setattr__(self, "when", ranges.conditions("Float", self.when))
        if self.prior is not None:
            object.__setattr__(self, "prior", checks.finite("Float(prior", self.prior))
        if self.low is None and self.high is None:
            if self.step is not None:
                raise ValueError(f"Float(step={self.step!r}) starts at low: give low and high.")
            if self.scale != "linear":
                raise ValueError(
                    f"Float(scale={self.scale!r}) has no bounds to measure its scale between: "
                    "give low and high, or leave scale='linear'."
                )
            return
        if self.low is None or self.high is None:
            raise ValueError(
                f"Float(low={self.low!r}, high={self.high!r}) has only one bound: "
                "give both, or neither for an unbounded hyperparameter."
            )
        for name in ("low", "high"):
            remedy = "or neither bound for an unbounded hyperparameter"
            bound = checks.finite(f"Float({name}", getattr(self, name), remedy)
            object.__setattr__(self, name, bound)
        ranges.check_range("Float", self.low, self.high, self.scale)
        if self.step is not None:
            checks.positive("step", self.step, "a distance between two values, or None")
            ranges.check_step("Float", self.low, self.high, self.step, self.scale)
        ranges.check_prior("Float", self.low, self.high, self.prior)

    def __repr__(self) -> str:
        return _show(self, *(() if self.low is None else (self.low, self.high)))

    def to_unit(self, value: Leaf) -> jax.Array:
        """Return the unit coordinate of one array of values, elementwise."""
        x = as_float(value)
        bounds = self._bounds_in(x.dtype)
        if bounds is None:
            return x
        low, high = bounds
        # Measured from the nearer bound: both bounds map to 0 and 1 without rounding away, and the
        # anchor is selected before anything is computed, so no branch overflows into the gradient.
        upper = x >= self._middle(low, high)
        anchor = _select(upper, high, low, x.dtype)
        if self.scale == "linear":
            offset = (x - anchor) / (high - low)
        elif self.scale == "log":
            # Not `x / anchor`: XLA rewrites that quotient's derivative into products that overflow.
            inverse = _select(upper, 1 / high, 1 / low, x.dtype)
            offset = jnp.log(x * inverse) / (math.log(high) - math.log(low))
        else:
            rest = _select(upper, 1 - high, 1 - low, x.dtype)
            offset = -jnp.log1p((anchor - x) / rest) / (math.log1p(-low) - math.log1p(-high))
        return _select(upper, 1.0, 0.0, x.dtype) + offset

    def from_unit(self, unit: Leaf) -> jax.Array:
        """Return the value at one array of unit coordinates, elementwise.

        Within [0, 1] the value stays within the bounds; outside, the scale is continued.
        """
        if self.step is None:
            return self._between(as_float(unit))
        value, still = self._between(as_float(unit)), jax.lax.stop_gradient
        # The derivative of the value between the steps, at the value that is used.
        return still(self.on_grid(value)) + (value - still(value))

    def on_grid(self, value: Leaf) -> Any:
        """Return the nearest multiple of `step` above `low`; without a step the value itself."""
        if self.step is None or self.low is None:
            return value
        count = (value - self.low) / self.step
        count = round(count) if isinstance(count, float) else jnp.round(count)
        return self.low + count * self.step

    def _between(self, u: jax.Array) -> jax.Array:
        bounds = self._bounds_in(u.dtype)
        if bounds is None:
            return u
        low, high = bounds
        upper = u >= 0.5
        anchor = _select(upper, high, low, u.dtype)
        offset = u - _select(upper, 1.0, 0.0, u.dtype)
        if self.scale == "linear":
            return anchor + offset * (high - low)
        if self.scale == "log":
            return anchor * jnp.exp(offset * (math.log(high) - math.log(low)))
        # One minus the value is never formed in the array's dtype: near one it would lose digits.
        rest = _select(upper, 1 - high, 1 - low, u.dtype)
        return anchor - rest * jnp.expm1(-offset * (math.log1p(-low) - math.log1p(-high)))

    def _middle(self, low: float, high: float) -> float:
        """Return the value at unit coordinate one half."""
        if self.scale == "linear":
            return low + (high - low) / 2
        if self.scale == "log":
            return math.sqrt(low) * math.sqrt(high)
        return 1 - math.sqrt(1 - low) * math.sqrt(1 - high)

    def _bounds_in(self, dtype: np.dtype) -> tuple[float, float] | None:
        """Both bounds; refuse those that rounding to `dtype` moves off their scale or together."""
        if self.low is None or self.high is None:
            return None
        limits = jnp.finfo(dtype)
        with np.errstate(over="ignore"):
            low, high = float(dtype.type(self.low)), float(dtype.type(self.high))
        lost = low >= high or high - low > float(limits.max)
        tiny = float(limits.tiny)
        # What is smaller may be flushed to zero, and `to_unit` multiplies by 1 / low and 1 / high.
        lost |= self.scale == "log" and (low < tiny or high > 1 / tiny)
        lost |= self.scale == "reverse_log" and high >= 1
        if lost:
            raise ValueError(
                f"{self!r} cannot be resolved in {dtype.name}, where its bounds round to "
                f"{low!r} and {high!r}: move them, or enable 64-bit JAX (jax_enable_x64)."
            )
        return self.low, self.high

    def check_value(self, leaf: Leaf, label: str) -> None:
        """Refuse a concrete starting value that is not finite or outside the bounds."""
        cast = as_float(leaf, label)
        if isinstance(leaf, jax.core.Tracer):
            return
        given = np.asarray(leaf)
        # Compared after rounding to the coarser dtype: bfloat16(high) may exceed high.
        coarser = jnp.issubdtype(given.dtype, jnp.floating) and given.itemsize < cast.itemsize
        narrow = given.dtype if coarser else cast.dtype
        values = given.astype(narrow).astype(np.float64)
        why = "which is not finite: start from a finite number."
        _refuse_where(~np.isfinite(values), given, label, why)
        if self.low is None or self.high is None:
            return
        low, high = (float(np.asarray(bound, narrow)) for bound in (self.low, self.high))
        bounds = f"[{self.low!r}, {self.high!r}]"
        why = f"outside its bounds {bounds}: start inside them, or widen {self!r}."
        _refuse_where((values < low) | (values > high), given, label, why)


@dataclass(frozen=True, repr=False)
class Int:
    """A whole number between `low` and `high`, both included: it changes shapes or control flow.

    Discrete hyperparameters are chosen by the study and get no gradient. `scale` is `"linear"` or
    `"log"`; `step` keeps to `low`, `low + step`, ...; `when` and `prior` as in `Float`.

    In a sweep each value is a program of its own. With `traced` one program serves all values: the
    value is a traced int32 in `hyper`, as a Float's is, and stands in no `choices`. It may mask
    (`hypergrad.nn.MaskedDense`), count the steps of a schedule, or select; it cannot fix a shape.

    Raises ValueError for `low >= high`, an unknown scale, `"log"` with `low < 1`, a `step` that
    does not divide a linear range and a `prior` that is none of the values; TypeError for numbers
    that are no integers.

    >>> Int(1, 8).admits(3), Int(1, 8).admits(9), Int(16, 64, step=16).admits(40)
    (True, False, False)
    """

    low: int
    high: int
    scale: str = "linear"
    when: Mapping[str, Any] | None = field(default=None, hash=False)
    step: int | None = None
    prior: int | None = None
    traced: bool = False

    def __new__(cls, *_: Any, **given: Any) -> Int:  # noqa: D102
        ranges.refuse_log("Int", given)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        checks.choice("Int(scale", self.scale, _INT_SCALES)
        object.__setattr__(self, "when", ranges.conditions("Int", self.when))
        for name in ("low", "high"):
            remedy = "or use Float for a hyperparameter with a gradient"
            bound = checks.integer(f"Int({name}", getattr(self, name), None, remedy)
            object.__setattr__(self, name, bound)
        ranges.check_range("Int", self.low, self.high, self.scale)
        if self.step is not None:
            object.__setattr__(self, "step", checks.integer("Int(step", self.step))
            ranges.check_step("Int", self.low, self.high, self.step, self.scale)
        checks.flag("Int(traced", self.traced)
        ranges.refuse_prior_of(self)

    def __repr__(self) -> str:
        return _show(self, self.low, self.high)

    @property
    def count(self) -> int:
        """How many values there are."""
        return (self.high - self.low) // (self.step or 1) + 1

    def admits(self, value: Any) -> bool:
        """Say whether `value` is a whole number between the bounds, and on the step's grid."""
        inside = checks.is_integer(value) and self.low <= value <= self.high
        return inside and (value - self.low) % (self.step or 1) == 0


# What help() and editors show: not what __new__ takes, which only refuses `log`.
for _kind in (Float, Int):
    _of_init = inspect.signature(_kind.__init__)
    _, *_parameters = _of_init.parameters.values()
    setattr(_kind, "__signature__", _of_init.replace(parameters=_parameters))  # noqa: B010


@dataclass(frozen=True, repr=False, init=False)
class Categorical:
    """One of several named choices: an optimiser, a width, whether to use a layer at all.

    Choices are numbers, strings, booleans or None, so that every storage of a study can keep them.
    `when` and `prior` as in `Float`; a prior of None is none. Raises ValueError for no choices,
    equal ones (`1 == True` included) and a `prior` that is none of them, TypeError for choices of
    another type.

    >>> Categorical(["sgd", "adamw"])
    Categorical(['sgd', 'adamw'])
    """

    choices: tuple[Any, ...]
    when: Mapping[str, Any] | None = field(default=None, hash=False)
    prior: str | float | None = None

    # The annotation is what is stored; any iterable with an order may be given.
    def __init__(
        self,
        choices: Iterable[Any],
        when: Mapping[str, Any] | None = None,
        prior: str | float | None = None,
    ) -> None:
        if isinstance(choices, str | bytes | Mapping | Set) or not isinstance(choices, Iterable):
            raise TypeError(f"Categorical(choices={choices!r}) has no order: give a list.")
        values = tuple(c.item() if isinstance(c, np.generic) else c for c in choices)
        if not values:
            raise ValueError(f"Categorical(choices={choices!r}) is empty: give at least one.")
        for i, choice in enumerate(values):
            if not isinstance(choice, _CHOICE_TYPES) or choice != choice:
                raise TypeError(
                    f"Categorical(choices=...) holds {choice!r}: choices are numbers, strings, "
                    "booleans or None. Name the object by a string and look it up when building "
                    "the problem."
                )
            if choice in values[:i]:
                raise ValueError(
                    f"Categorical(choices={list(values)!r}) holds {choice!r} twice "
                    "(equal values count as one): remove one."
                )
        object.__setattr__(self, "choices", values)
        object.__setattr__(self, "when", ranges.conditions("Categorical", when))
        object.__setattr__(self, "prior", prior)
        ranges.refuse_prior_of(self)

    def __repr__(self) -> str:
        return _show(self, list(self.choices))

    def admits(self, value: object) -> bool:
        """Say whether `value` is one of the choices."""
        return value in self.choices


Dimension = Float | Int | Categorical


def as_float(leaf: Leaf, label: str = "value") -> jax.Array:
    """Return `leaf` as a strongly typed array of at least float32, refusing what is no number."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        what = f"an array of {dtype}" if is_array else f"{leaf!r} ({dtype})"
        raise TypeError(
            f"{label} is {what}, no real number: give a float or an array of floats, or make it "
            "a Categorical."
        )
    wide = not jnp.issubdtype(dtype, jnp.floating) or dtype == np.float64
    return jnp.asarray(leaf, jnp.result_type(float) if wide else jnp.float32)


def _select(upper: jax.Array, high: float, low: float, dtype: np.dtype) -> jax.Array:
    return jnp.where(upper, jnp.asarray(high, dtype), jnp.asarray(low, dtype))


def _refuse_where(wrong: np.ndarray, given: np.ndarray, label: str, why: str) -> None:
    for index in np.argwhere(wrong):
        place = f"{label}[{', '.join(map(str, index))}]" if index.size else label
        raise ValueError(f"{place} starts at {given[tuple(index)]}, {why}")


def _show(dimension: Dimension, *values: object) -> str:
    arguments = [repr(value) for value in values]
    if not isinstance(dimension, Categorical) and dimension.scale != "linear":
        arguments.append(f"scale={dimension.scale!r}")
    if not isinstance(dimension, Categorical) and dimension.step is not None:
        arguments.append(f"step={dimension.step!r}")
    if dimension.prior is not None:
        arguments.append(f"prior={dimension.prior!r}")
    if isinstance(dimension, Int) and dimension.traced:
        arguments.append("traced=True")
    if dimension.when is not None:
        when = {name: v[0] if len(v) == 1 else v for name, v in dimension.when.items()}
        arguments.append(f"when={when!r}")
    return f"{type(dimension).__name__}({', '.join(arguments)})"
