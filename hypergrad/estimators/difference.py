"""Finite differences: the reference that every other estimator is measured against."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hypergrad.checks import positive
from hypergrad.estimators.base import (
    Estimate,
    Estimator,
    ValidateAt,
    Window,
    refuse_wrong_place,
    summary,
)
from hypergrad.trees import Hyper, Scalar, State


@dataclasses.dataclass(frozen=True)
class FiniteDifference(Estimator):
    """Central differences (E(h + d) - E(h - d)) / 2d, one hyperparameter at a time.

    All evaluations share one key (common random numbers), so noise is differentiated as a function
    of `hyper`, not sampled anew.

    Args:
      step: d relative to max(|h|, 1e-3). The default suits float64 (error about 1e-9 relative); in
        float32 take 1e-3 and expect two to four digits.
      validate_at: as in `Unrolled`.

    Cost: 2 |hyper| + 1 runs of K steps, one after another, so memory is that of one run.
    """

    step: float = 1e-5
    validate_at: ValidateAt = "last"
    perturbs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_wrong_place(self.validate_at)
        positive("step", self.step, "for instance 1e-5")

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """The loss at `hyper` and central differences around it; see the class."""
        window = window.judging(self.validate_at)
        flat, unravel = ravel_pytree(hyper)

        def loss(flat: jax.Array) -> Scalar:
            return window.objective(unravel(flat))[0]

        def difference(i: jax.Array) -> Scalar:
            d = self.step * jnp.maximum(jnp.abs(flat[i]), 1e-3)
            up, down = flat.at[i].add(d), flat.at[i].add(-d)
            # what was really added, after rounding
            return (loss(up) - loss(down)) / (up[i] - down[i])

        grad = unravel(jax.lax.map(difference, jnp.arange(flat.size)).astype(flat.dtype))
        value, end = window.objective(hyper)
        return Estimate(value, grad, end.inner, summary(value, grad, end.first_bad_step)), state
