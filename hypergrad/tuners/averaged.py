"""A run that also keeps the mean of its weights, at no further gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Params,
    State,
    Train,
    cast_like,
    is_inexact,
    strong,
)
from hypergrad.tuners.base import Tuner

# The weight of an update grows with its number: half of the mean is of the last three tenths.
_POWER = 1.0


class Averaged(NamedTuple):
    """The state of `averaging`.

    Attributes:
      tuned: the state of the tuner within.
      mean: of the parameters after each update, late ones above all, in at least float32; of what
        is no float (a counter, a key) the last.
      updates: int32, updates done.
    """

    tuned: State
    mean: Params
    updates: jax.Array

    @property
    def inner(self) -> InnerState:
        """The training state."""
        return self.tuned.inner

    @property
    def averaged(self) -> InnerState:
        """The training state with the mean in place of the parameters."""
        return self.inner._replace(params=cast_like(self.mean, self.inner.params))


def averaging(tuner: Tuner) -> Tuner:
    """`tuner`, which trains as before and keeps a running mean of the parameters.

    A mean over the end of a run under a constant rate is often the better network, as one that
    annealed would be: polynomial-decay averaging (Shamir and Zhang 2013), of the parameters once an
    update. Batch statistics among the parameters are averaged, too.

    Cost: no gradient; memory of one more copy of the parameters.
    """

    def init(hyper: Hyper, key: Key) -> Averaged:
        tuned = tuner.init(hyper, key)
        # Of its own buffers: a donated state must not hold one twice.
        mean = jax.tree.map(jnp.copy, strong(tuned.inner.params))
        return Averaged(tuned, mean, jnp.zeros((), jnp.int32))

    def update(state: Averaged, train: Train, valid: Batch) -> tuple[Averaged, Any]:
        tuned, info = tuner.update(state.tuned, train, valid)
        share = (1 + _POWER) / (state.updates + 1 + _POWER)

        def towards(mean: jax.Array, now: jax.Array) -> jax.Array:
            return mean + share * (now - mean) if is_inexact(now) else now

        mean = jax.tree.map(towards, state.mean, strong(tuned.inner.params))
        return Averaged(tuned, mean, state.updates + 1), info

    return Tuner(init, update, lambda state: tuner.best(state.tuned), tuner.space)
