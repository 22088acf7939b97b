"""Arguments, each kind checked by one rule; a refusal names argument, value and remedy."""

import inspect
import math
import os
import re
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
    if isinstance(value, jax.core.Tracer):
        return
    if np.asarray(value).dtype.kind not in "fiuV":
        raise WrongTypeError(f"{_given(name, value)} is no number and no array of them.")
    positive(name, np.min(value).item(), remedy, infinite=True)


def numbers(name: str, value: Leaf) -> None:
    """Refuse what is neither a number nor an array of them, whose values are not read."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        return
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if dtype.kind not in "fiuV":
        raise WrongTypeError(f"{name} is {_shown(value)}: give numbers.")


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


def instance(name: str, value: Any, kinds: Any, remedy: str) -> None:
    """Refuse what is no instance of `kinds` (a type, or a union of types).

    >>> instance("space", 3, dict, "a hypergrad.Space")
    Traceback (most recent call last):
        ...
    hypergrad.checks.WrongTypeError: space is 3, of type int: give a hypergrad.Space.
    """
    if not isinstance(value, kinds):
        raise WrongTypeError(f"{name} is {_shown(value)}: give {remedy}.")


def having(name: str, value: Any, parts: Collection[str], remedy: str) -> None:
    """Refuse what lacks one of the attributes `parts`, or is a class that has them."""
    if isinstance(value, type) or not all(hasattr(value, part) for part in parts):
        raise WrongTypeError(f"{name} is {_shown(value)}: give {remedy}.")


def flag(name: str, value: Any) -> None:
    """Refuse all but True and False."""
    instance(name, value, bool | np.bool_, "True or False")


def text(name: str, value: Any) -> str:
    """`value`, a text that is not empty."""
    instance(name, value, str, "a text")
    if not value:
        raise ValueError(f"{name} is empty: give a text.")
    return value


def checked_seed(seed: Any) -> int:
    """`seed`, as NumPy's and JAX's generators take it."""
    if integer("seed", seed, 0) >= 2**32:
        raise ValueError(f"seed={seed!r} must lie below 2**32.")
    return int(seed)


def folder_name(name: str, value: Any) -> str:
    """`value`, the path of a folder or a file, as a text."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise WrongTypeError(f"{name}={value!r} is no path: give a name.")
    return path


def optimizer(name: str, value: Any) -> None:
    """Refuse what is no optax transformation."""
    remedy = "an optax transformation, such as optax.adam(0.03)"
    having(name, value, ("init", "update"), remedy)


def random_key(name: str, value: Any) -> None:
    """Refuse what is no PRNG key, typed or raw; a batch of them passes."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (
        dtype == np.uint32 or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    ):
        raise WrongTypeError(f"{name} is {_shown(value)}: give a PRNG key, jax.random.key(0).")


def _shown(value: Any) -> str:
    short = repr(value)
    short = short if len(short) <= 80 else f"{short[:80]} ..."
    return f"{short}, of type {type(value).__name__}"


def in_one_sentence(error: OSError, what: str, then: str) -> OSError:
    """`error` again, of its kind, as `what` failed, why, and what to do `then`.

    >>> in_one_sentence(OSError(28, "No space left"), "a.txt cannot be written", "make room")
    OSError('a.txt cannot be written (No space left): make room.')
    """
    told = type(error)(f"{what} ({error.strerror or error}): {then}.")
    told.errno = error.errno
    return told


def printable(text: str) -> str:
    r"""`text` with what would steer a terminal written out.

    >>> print(printable("a\x1b[2Jb\nc"))
    a\x1b[2Jb\nc
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_passwords(text: str, urls_only: bool = False) -> str:
    """`text` without the passwords of URLs in it: they must not stand in messages.

    A URL may lack its slashes or its scheme, unless `urls_only`: in a program `x[:, i]@w` is none.

    >>> without_passwords("postgresql://me:pa@ss@host/db?sslpassword=x")
    'postgresql://me:***@host/db?sslpassword=***'
    """
    if urls_only:
        return re.sub(r"(\w://[^\s/:@'\"]*:)[^\s'\"]*@", r"\1***@", text)
    # Greedy: a password that was not quoted may hold an @ itself.
    text = re.sub(r"((?:^|[\s'\"=(])(?:[\w+.-]+:/*)?[^\s/:@'\"]*:)[^\s]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&]\w*(?:pass|pwd|secret|token)\w*=)[^&\s'\"]+", r"\1***", text)


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
