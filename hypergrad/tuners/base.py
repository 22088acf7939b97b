"""What both tuners share: a tuner's shape, and one judged outer step in unit coordinates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad.estimators.base import Estimate, Estimator, checked_estimate
from hypergrad.problem.problem import Problem
from hypergrad.space.space import Space
from hypergrad.trees import inner_product, norm, widen
from hypergrad.tuners.trust import TrustState, gropes, remember, temper


class Tuner(NamedTuple):
    """An outer loop as pure functions, to be called from your own.

    Attributes:
      init: `(hyper, key) -> state`, from starting values in the user's units; that of `alternating`
        also takes a training state to go on from, `inner=`.
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
      refused: int32, 0 for a trusted step, else an index into `hypergrad.tuners.trust.REASONS`.
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


def in_unit_coordinates(problem: Problem, space: Space) -> Problem:
    """`problem` as a function of unit coordinates, constant beyond the box."""

    def hyper_of(unit: Any) -> Any:
        return space.from_unit(space.project(unit))

    def judged(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, unit, batch, key: function(params, hyper_of(unit), batch, key)

    return Problem(
        init=lambda unit, key: problem.init(hyper_of(unit), key),
        step=judged(problem.step),
        train_loss=judged(problem.train_loss),
        valid_loss=judged(problem.valid_loss),
        metrics=None if problem.metrics is None else judged(problem.metrics),
    )


def run_key(key: jax.Array, inner: Any, updates: jax.Array) -> jax.Array:
    """The key of one update of a run that goes on.

    A state that counts its steps goes on in one stream; one that does not gets a new stream.
    """
    return key if hasattr(inner, "step") else jax.random.fold_in(key, updates)


def unit_state(
    estimator: Estimator, problem: Problem, space: Space, unit: Any, inner: Any, key: jax.Array
) -> Any:
    """The estimator's first state."""
    if estimator.perturbs:
        return estimator.init(in_unit_coordinates(problem, space), unit, inner, key)
    return estimator.init(problem, space.from_unit(unit), inner, key)


def unit_estimate(
    estimator: Estimator,
    problem: Problem,
    space: Space,
    unit: Any,
    inner: Any,
    train: Any,
    valid: Any,
    key: jax.Array,
    state: Any,
) -> tuple[Estimate, Any]:
    """The estimate with its gradient in unit coordinates.

    By the chain rule from the one in the user's units; an estimator that perturbs is handed unit
    coordinates to begin with, where one step size suits all hyperparameters.
    """
    if estimator.perturbs:
        problem = in_unit_coordinates(problem, space)
        return checked_estimate(estimator, problem, unit, inner, train, valid, key, state)
    hyper, pull_back = jax.vjp(space.from_unit, unit)
    estimate, state = checked_estimate(estimator, problem, hyper, inner, train, valid, key, state)
    return estimate._replace(grad=pull_back(estimate.grad)[0]), state


class Outer(NamedTuple):
    """What one hypergradient leads to.

    Attributes:
      unit: the hyperparameters after the outer step.
      outer_state: the outer optimiser's state after it.
      trust: the history with this hypergradient in it.
      accepted: go on from here: the hypergradient is trusted and the run was whole.
      moves_on: go back to the trusted position, but with the new hyperparameters.
      worth: the decrease of the validation loss that the step promises, to first order.
    """

    unit: Any
    outer_state: Any
    trust: TrustState
    accepted: jax.Array
    moves_on: jax.Array
    worth: jax.Array


def outer_update(
    optimizer: optax.GradientTransformation,
    space: Space,
    max_move: float,
    trust: TrustState,
    unit: Any,
    outer_state: Any,
    grad: Any,
    refused: jax.Array,
    steps: int,
) -> Outer:
    """One projected step in unit coordinates along a hypergradient that has been judged."""
    size = norm(grad)
    history = remember(trust, size, refused, steps)
    step_grad = temper(grad, size, trust, refused)
    updates, outer_state = optimizer.update(step_grad, outer_state, unit)
    moves = jax.tree.map(lambda u: jnp.clip(history.scale * u, -max_move, max_move), updates)
    moved = space.project(optax.apply_updates(unit, moves))
    whole = trust.shortened == 0
    accepted = (refused == 0) & whole
    moves_on = ((refused == 0) & ~whole) | gropes(trust, refused)
    worth = inner_product(step_grad, jax.tree.map(jnp.subtract, unit, moved))
    worth = jnp.where(accepted, worth, 0.0)
    return Outer(moved, outer_state, history, accepted, moves_on, worth)


def report(
    loss: jax.Array,
    hyper: Any,
    grad: Any,
    refused: jax.Array,
    outer: Outer,
    about: dict[str, jax.Array],
) -> Info:
    """The `info` of an update; `about` is the estimator's own."""
    return Info(
        loss=widen(loss),
        hyper=hyper,
        grad=grad,
        norm=norm(grad),
        worth=outer.worth,
        refused=refused,
        step_scale=outer.trust.scale,
        finite=about["finite"],
        first_bad_step=about["first_bad_step"],
        estimate=about,
    )
