"""The hypergradient in unit coordinates, over as much of the horizon as is trusted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.estimators.base import Estimate, Estimator, Window, checked_estimate
from hypergrad.problem.problem import Problem
from hypergrad.space.space import Space
from hypergrad.trees import Hyper, InnerState, Key, State, Unit
from hypergrad.tuners.base import TrustState


def shorten(window: Window, state: TrustState) -> Window:
    """`window` with training standing still after a quarter, a sixteenth, ... of its steps."""
    taken = jnp.maximum(window.num_steps >> (2 * state.shortened), 1)
    return dataclasses.replace(window, limit=taken)


def unit_state(
    estimator: Estimator, problem: Problem, space: Space, unit: Unit, inner: InnerState, key: Key
) -> State:
    """The estimator's first state."""
    window = Window(problem, inner, None, None, key)
    if estimator.perturbs:
        return estimator.init(in_unit_coordinates(window, space), unit)
    return estimator.init(window, space.from_unit(unit))


def unit_estimate(
    estimator: Estimator, window: Window, space: Space, unit: Unit, state: State
) -> tuple[Estimate, State]:
    """The estimate with its gradient in unit coordinates.

    By the chain rule from the one in the user's units; an estimator that perturbs is handed unit
    coordinates to begin with, where one step size suits all hyperparameters.
    """
    if estimator.perturbs:
        return checked_estimate(estimator, in_unit_coordinates(window, space), unit, state)
    hyper, pull_back = jax.vjp(space.from_unit, unit)
    estimate, state = checked_estimate(estimator, window, hyper, state)
    return estimate._replace(grad=pull_back(estimate.grad)[0]), state


def in_unit_coordinates(window: Window, space: Space) -> Window:
    """`window` with a problem of unit coordinates, constant beyond the box."""
    problem = window.problem

    def hyper_of(unit: Unit) -> Hyper:
        return space.from_unit(space.project(unit))

    def judged(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, unit, batch, key: function(params, hyper_of(unit), batch, key)

    moved = problem._replace(
        init=lambda unit, key: problem.init(hyper_of(unit), key),
        step=judged(problem.step),
        train_loss=judged(problem.train_loss),
        valid_loss=judged(problem.valid_loss),
        metrics=None if problem.metrics is None else judged(problem.metrics),
    )
    return dataclasses.replace(window, problem=moved)
