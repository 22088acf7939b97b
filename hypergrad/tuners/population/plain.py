"""Training without tuning, in the shape of a tuner: what a black-box trial is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.problem.problem import Problem, rollout, run_key
from hypergrad.space.space import Space
from hypergrad.tuners.base import Tuner


class Plain(NamedTuple):
    """A member that trains under hyperparameters that stand still; cf. `AlternatingState`.

    Attributes:
      hyper: in the user's units.
      inner: the training state.
      key: the run's key.
      updates: int32, blocks of K training steps done.
    """

    hyper: Any
    inner: Any
    key: jax.Array
    updates: jax.Array


class Untuned(NamedTuple):
    """What an update has to say that follows no hypergradient.

    Attributes:
      refused: 0, as of a trusted step.
    """

    refused: int = 0


def plain(problem: Problem, space: Space) -> Tuner:
    """Training under hyperparameters that stand still, in the shape of a tuner."""

    def init(hyper: Any, key: jax.Array) -> Plain:
        hyper = space.validate(hyper)
        return Plain(hyper, problem.init(hyper, key), key, jnp.zeros((), jnp.int32))

    def update(run: Plain, train: Any, valid: Any) -> tuple[Plain, Untuned]:
        key = run_key(run.key, run.inner, run.updates)
        inner = rollout(problem, run.hyper, run.inner, train, key)
        return run._replace(inner=inner, updates=run.updates + 1), Untuned()

    return Tuner(init, update, lambda run: run.hyper)
