"""Calls outside of `jax.jit`: compiled once, and kept no longer than what they belong to."""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.data.contents import refuse_text

# Of the strategies that one problem is used with.
_KEPT = 8


def compiled_outside_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays alone: inside of a trace itself, else compiled at the first call.

    An eager call of what scans or differentiates compiles all of it anew each time, as its closures
    are new. The compiled one lives as long as the result. Strict dtype promotion, where the user
    has asked for it, stops here: optax does not keep to it.

    Raises:
      WrongTypeError: an array of strings or objects, by name.

    >>> add = compiled_outside_jit(lambda x, y: x + y)
    >>> int(add(1, 2))
    3
    """
    compiled, signature = jax.jit(function), inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        with jax.numpy_dtype_promotion("standard"):
            if in_trace():
                return function(*given.args)
            for name, value in given.arguments.items():
                refuse_text(name, value)
            with naming_closures():
                return compiled(*given.args)

    return call


def compiled_for_each(owner: Any, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(owner, ...)` as a function of the rest, compiled as above and kept with its owner.

    owner: a NamedTuple of functions, with a dictionary of its own, where the last few are kept by
    `key`. They know the functions weakly: a table elsewhere, or a circle, would keep what is
    compiled, and the data that it closes over, alive after its owner.
    """
    kept = vars(owner).setdefault("_compiled", {})
    try:
        if key in kept:
            return kept[key]
        parts = [None if part is None else weakref.ref(part) for part in owner]
    except TypeError:  # a strategy without a hash, a function that cannot be referred to weakly
        return compiled_outside_jit(functools.partial(function, owner))
    kind = type(owner)

    def of_owner(*args: Any) -> Any:
        return function(kind(*(None if part is None else part() for part in parts)), *args)

    whole = inspect.signature(function)
    rest = list(whole.parameters.values())[1:]
    of_owner.__signature__ = whole.replace(parameters=rest)  # type: ignore[attr-defined]
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]
    kept[key] = compiled_outside_jit(of_owner)
    return kept[key]


@contextlib.contextmanager
def naming_closures() -> Iterator[None]:
    """Turns JAX's error about a traced value that has left its trace into one that says how.

    Raises:
      ValueError: a function of the problem closes over a traced value.
    """
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "A function of the problem closes over a traced value, whose derivative would be lost. "
            "Pass every hyperparameter through the `hyper` argument, and data through `batch`."
        ) from error


def in_trace() -> bool:
    """Whether JAX is tracing: compiling the parts alone would gain nothing, and change programs."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
