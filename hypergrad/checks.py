"""Arguments, each kind checked by one rule; a refusal names argument, value and remedy."""

import inspect
import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np

from hypergrad.trees import Leaf


class WrongTypeError(TypeError, ValueError):
    """An argument of a type that it cannot have.

    A ValueError too, as callers who guard a call against bad arguments expect one kind of error.
    """


def integer(name: str, value: Any, least: int | None = 1, remedy: str = "") -> int:
    """`value` as a Python int: of any integer type (NumPy's too) but bool, and at least `least`.

    >>> integer("window", 0, remedy="or None for all K steps")
    Traceback (most recent call last):
        ...
    ValueError: window=0 must be at least 1, or None for all K steps.
    """
    end = f", {remedy}." if remedy else "."
    if not is_integer(value):
        range_ = "" if least is None else f" of at least {least}"
        raise WrongTypeError(f"{_given(name, value)} is no integer: give an int{range_}{end}")
    if least is not None and value < least:
        # "or None" goes on with the range; anything else says why there is one.
        end = end if remedy.startswith("or ") else end.replace(",", ":", 1)
        raise ValueError(f"{_given(name, value)} must be at least {least}{end}")
    return int(value)


def integer_field(strategy: Any, name: str, least: int = 1, remedy: str = "") -> None:
    """`integer` for a field of a frozen dataclass, where the Python int then stands."""
    object.__setattr__(strategy, name, integer(name, getattr(strategy, name), least, remedy))


def is_integer(value: object) -> bool:
    """Whether this is of an integer type, NumPy's included; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive(
    name: str, value: Leaf, remedy: str = "", *, zero: bool = False, infinite: bool = False
) -> Leaf:
    """`value`, a finite number above 0; with `zero` also 0 itself, with `infinite` infinity too.

    Of a traced value nothing is known, and it passes.

    >>> positive("step_size", -1)
    Traceback (most recent call last):
        ...
    ValueError: step_size=-1 must be positive and finite.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    end = f": {remedy}." if remedy else "."
    _refuse_other_than_numbers(name, value, end)
    if not ((value > 0 or (zero and value == 0)) and (infinite or math.isfinite(value))):
        kind = ("0 or " if zero else "") + "positive" + ("" if infinite else " and finite")
        raise ValueError(f"{name}={value!r} must be {kind}{end}")
    return value


def positive_if_known(name: str, value: Leaf, remedy: str = "") -> None:
    """`positive`, of a number or of every entry of an array; of a traced one nothing is known."""
    if not isinstance(value, jax.core.Tracer):
        positive(name, np.min(value).item(), remedy, infinite=True)


def finite(name: str, value: Any, remedy: str = "") -> float:
    """`value`, a finite number, as a float."""
    end = f", {remedy}." if remedy else "."
    _refuse_other_than_numbers(name, value, end)
    if not math.isfinite(value):
        raise ValueError(f"{_given(name, value)} is not finite: give a finite number{end}")
    return float(value)


def within(name: str, value: Any, low: float, high: float, remedy: str = "") -> float:
    """`value`, a number in [low, high].

    >>> within("perturb", 2, 0, 1)
    Traceback (most recent call last):
        ...
    ValueError: perturb=2 must lie between 0 and 1.
    """
    end = f": {remedy}." if remedy else "."
    _refuse_other_than_numbers(name, value, end)
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} must lie between {low} and {high}{end}")
    return value


def choice(name: str, value: Any, known: Collection[str], remedy: str = "") -> str:
    """`value`, one of the texts `known`.

    >>> choice("of", "best", ("stationary", "fixed_point"))
    Traceback (most recent call last):
        ...
    ValueError: of='best' is unknown: choose 'stationary' or 'fixed_point'.
    """
    if not isinstance(value, str) or value not in known:
        *most, last = (repr(k) for k in known)
        listed = f"{', '.join(most)} or {last}" if most else last
        end = f", {remedy}." if remedy else "."
        raise ValueError(f"{_given(name, value)} is unknown: choose {listed}{end}")
    return value


def function(name: str, value: Any, *arguments: str) -> Callable[..., Any]:
    """`value`, a function that can be called with these positional arguments.

    >>> function("train_loss", lambda params, batch: 0.0, "params", "hyper", "batch", "key")
    Traceback (most recent call last):
        ...
    hypergrad.checks.WrongTypeError: train_loss takes (params, batch) and is called with ...
    """
    called = f"({', '.join(arguments)})"
    if not callable(value):
        raise WrongTypeError(f"{name} is a {type(value).__name__}: give a function of {called}.")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of code that is not Python's
        return value
    try:
        signature.bind(*arguments)
    except TypeError:
        takes = f"({', '.join(signature.parameters)})"
        raise WrongTypeError(
            f"{name} takes {takes} and is called with {called}: give a function of these "
            f"{len(arguments)}, or wrap it: lambda {', '.join(arguments)}: ..."
        ) from None
    return value


def _given(name: str, value: object) -> str:
    # The name may begin with its owner's: `Int(low` is reported as `Int(low=2.5)`.
    return f"{name}={value!r}{')' * name.count('(')}"


def _refuse_other_than_numbers(name: str, value: Any, end: str) -> None:
    # An array without axes is a number in the same sense as a NumPy scalar.
    scalar = isinstance(value, jax.Array | np.ndarray) and value.shape == () and value.dtype != bool
    if isinstance(value, bool) or not (scalar or isinstance(value, Real)):
        raise WrongTypeError(f"{_given(name, value)} is no number: give a float{end}")
