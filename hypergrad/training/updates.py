"""A tuner's update as `fit` runs it: compiled once per tuner, its state donated."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.trees import Leaf, State


def compiled_update(update: Callable[..., Any]) -> Any:
    """The compiled update, the same for each call of `fit` with one tuner.

    One that is jitted already is used as it is.
    """
    return update if hasattr(update, "trace") else _donating(update)


# Eight and not all: a compiled update keeps its tuner alive, and the data that it closes over.
@lru_cache(maxsize=8)
def _donating(update: Callable[..., Any]) -> Any:
    return jax.jit(update, donate_argnums=0)


def owned(state: State) -> State:
    """`state` in buffers of its own, to be donated; the caller's stay as they are."""
    return jax.tree.map(jnp.copy, state)


def strongly_typed(leaf: Leaf) -> jax.Array:
    """A leaf without a weak type, which a checkpoint could not give back."""
    if isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False):  # keys have none
        return leaf
    return jnp.asarray(leaf, jnp.result_type(leaf))
