"""An alternating run that looks beyond its window: K steps on, judged some steps later."""

import dataclasses

import jax.numpy as jnp

from hypergrad.data.batches import Minibatches
from hypergrad.estimators.base import Estimate, Estimator, Window
from hypergrad.problem.problem import steps_done
from hypergrad.trees import Hyper, State


@dataclasses.dataclass(frozen=True)
class Ahead(Estimator):
    """`estimator` on a window that is `steps` longer; training goes on by the K steps alone.

    A short horizon sees what pays within K steps. Under label noise dropout pays later, and what
    was not looked ahead for is tuned away (docs/experiments.md). Training data are `Minibatches`,
    which have batches beyond the window.

    Cost: that of `estimator` on K + `steps` steps, and K steps of training.
    """

    estimator: Estimator
    steps: int

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """The longer window's value and gradient, and where K steps of training stand."""
        train = window.train
        assert isinstance(train, Minibatches)
        longer = dataclasses.replace(train, num_steps=train.num_steps + self.steps)
        limit = window.limit
        if limit is not None:  # a run that is not cut short is not cut short by its window's end
            limit = jnp.where(limit < train.num_steps, limit, longer.num_steps)
        ahead = dataclasses.replace(window, train=longer, limit=limit)
        estimate, state = self.estimator.estimate(ahead, hyper, state)
        start = window.begin(hyper)
        reached = window.trained(hyper, start, steps_done(start.inner))
        return estimate._replace(inner=reached.inner), state
