"""Finite differences: the reference that every other estimator is measured against."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hypergrad.estimators.base import Estimate, Estimator, summary
from hypergrad.problem.problem import Problem
from hypergrad.problem.window import ValidateAt, objective


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
        if not self.step > 0:
            raise ValueError(f"step={self.step} must be positive, for instance 1e-5.")

    def estimate(
        self,
        problem: Problem,
        hyper: Any,
        inner: Any,
        train: Any,
        valid: Any,
        key: jax.Array,
        state: Any,
    ) -> tuple[Estimate, Any]:
        """The loss at `hyper` and central differences around it; see the class."""
        flat, unravel = ravel_pytree(hyper)

        def loss(flat: jax.Array) -> jax.Array:
            arguments = (inner, train, valid, key, self.validate_at)
            return objective(problem, unravel(flat), *arguments)[0]

        def difference(i: jax.Array) -> jax.Array:
            d = self.step * jnp.maximum(jnp.abs(flat[i]), 1e-3)
            up, down = flat.at[i].add(d), flat.at[i].add(-d)
            # what was really added, after rounding
            return (loss(up) - loss(down)) / (up[i] - down[i])

        grad = unravel(jax.lax.map(difference, jnp.arange(flat.size)).astype(flat.dtype))
        value, end = objective(problem, hyper, inner, train, valid, key, self.validate_at)
        return Estimate(value, grad, end.inner, summary(value, grad, end.first_bad_step)), state
