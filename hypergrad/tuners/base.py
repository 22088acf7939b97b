"""What both tuners share: a tuner's shape, and one outer step in unit coordinates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad.space import Space
from hypergrad.trees import inner_product


class Tuner(NamedTuple):
    """An outer loop as pure functions, to be called from your own.

    Attributes:
      init: `(hyper, key) -> state`, from starting values in the user's units.
      update: `(state, train, valid) -> (state, info)`; wrap it in `jax.jit` as a whole. `train` is
        K stacked batches, leaves `[K, batch, ...]`, or a `Minibatches`; `valid` one batch.
      best: `state -> hyper`, the values to keep: the mean of the trusted iterates in unit
        coordinates (`alternating` gives later ones more weight, as it forgets a far start).
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    best: Callable[..., Any]


class Info(NamedTuple):
    """What one update has to say; nothing here is needed by the next one.

    Attributes:
      loss: the validation loss under `hyper`.
      hyper: the hyperparameters this update trained with, in the user's units.
      grad: the hypergradient in unit coordinates.
      norm: its Euclidean norm.
      worth: the decrease of the validation loss that the outer step promises, to first order; 0
        for a refused step.
      refused: int32, 0 for a trusted step, else an index into `hypergrad.trust.REASONS`.
      step_scale: what outer steps are multiplied with after refusals, at most 1.
      finite: whether loss and hypergradient are.
      first_bad_step: the first training step of this update that was not finite; -1 if none.
      estimate: the estimator's own `info`.
    """

    loss: jax.Array
    hyper: Any
    grad: Any
    norm: jax.Array
    worth: jax.Array
    refused: jax.Array
    step_scale: jax.Array
    finite: jax.Array
    first_bad_step: jax.Array
    estimate: dict[str, jax.Array]


class Average(NamedTuple):
    """A running mean of trusted iterates in unit coordinates."""

    unit: Any
    seen: jax.Array


def include(average: Average, unit: Any, trusted: jax.Array, power: int = 0) -> Average:
    """The mean with one more iterate, if it is trusted; the n-th has a weight of about n**power.

    Source: polynomial-decay averaging, Shamir and Zhang 2013, section 4.
    """
    seen = average.seen + trusted
    weight = jnp.where(trusted, (1.0 + power) / (seen + power), 0.0)
    mean = jax.tree.map(lambda m, u: m + weight.astype(m.dtype) * (u - m), average.unit, unit)
    return Average(mean, seen)


def unit_gradient(space: Space, unit: Any, grad: Any) -> Any:
    """The gradient in unit coordinates, by the chain rule from the one in the user's units."""
    return jax.vjp(space.from_unit, unit)[1](grad)[0]


def outer_step(
    optimizer: optax.GradientTransformation,
    space: Space,
    unit: Any,
    grad: Any,
    outer_state: Any,
    scale: jax.Array,
    max_move: float,
) -> tuple[Any, Any, jax.Array]:
    """One projected step in unit coordinates: (unit, outer_state, promised decrease)."""
    updates, outer_state = optimizer.update(grad, outer_state, unit)
    moves = jax.tree.map(lambda u: jnp.clip(scale * u, -max_move, max_move), updates)
    moved = space.project(optax.apply_updates(unit, moves))
    change = jax.tree.map(jnp.subtract, unit, moved)
    return moved, outer_state, inner_product(grad, change)
