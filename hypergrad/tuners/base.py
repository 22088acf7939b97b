"""A tuner's shape: what it is, what it knows, and what it has to say about an update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hypergrad.space.space import Space
from hypergrad.trees import Hyper, InnerState, Scalar, State, Unit


class Tuner(NamedTuple):
    """An outer loop as pure functions, to be called from your own.

    Attributes:
      init: `(hyper, key) -> state`, from starting values in the user's units; that of `alternating`
        also takes a training state to go on from, `inner=`.
      update: `(state, train, valid) -> (state, info)`; outside of `jax.jit` it is compiled at its
        first call; wrap it in `jax.jit` as a whole to donate the state. `train` is
        K stacked batches, leaves `[K, batch, ...]`, or a `Minibatches`; `valid` one batch.
      best: `state -> hyper`, the values to keep: the mean of the trusted iterates in unit
        coordinates (`alternating` gives later ones more weight, as it forgets a far start).
      space: what is tuned, by which a checkpoint knows its own; None for a tuner that has none.
    """

    init: Callable[..., State]
    update: Callable[..., tuple[State, Any]]
    best: Callable[[State], Hyper]
    space: Space | None = None


class Info(NamedTuple):
    """What one update has to say; nothing here is needed by the next one.

    Attributes:
      loss: the validation loss under `hyper`.
      hyper: the hyperparameters this update trained with, in the user's units.
      grad: the hypergradient in unit coordinates.
      norm: its Euclidean norm.
      worth: the decrease of the validation loss that the outer step promises, to first order; 0
        for a refused step.
      refused: int32, 0 for a trusted step, else an index into `hypergrad.tuners.trust.REASONS`.
      step_scale: what outer steps are multiplied with after refusals, at most 1.
      finite: whether loss and hypergradient are.
      first_bad_step: the first training step of this update that was not finite; -1 if none.
      estimate: the estimator's own `info`.
    """

    loss: Scalar
    hyper: Hyper
    grad: Unit
    norm: Scalar
    worth: Scalar
    refused: jax.Array
    step_scale: Scalar
    finite: jax.Array
    first_bad_step: jax.Array
    estimate: dict[str, jax.Array]


class Position(NamedTuple):
    """Where tuning stands: what a refused step goes back to, as one piece.

    `inner` is `()` for a tuner that trains from fresh parameters.
    """

    unit: Unit
    outer_state: State
    inner: InnerState
    estimator_state: State


class Average(NamedTuple):
    """A running mean of trusted iterates in unit coordinates."""

    unit: Unit
    seen: jax.Array
