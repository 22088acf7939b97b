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
from hypergrad.trees import Hyper, Scalar, State, Tree, split_inexact


@dataclasses.dataclass(frozen=True)
class FiniteDifference(Estimator):
    """Central differences (E(h + d) - E(h - d)) / 2d, one hyperparameter at a time.

    All evaluations share one key (common random numbers), so noise is differentiated as a function
    of `hyper`, not sampled anew.

    Args:
      step: d relative to max(|h|, 1e-3), to begin with. Where the losses then differ by less than
        1000 of their own rounding errors it grows tenfold, up to a tenth: in float64 the first one
        stays (error about 1e-9 relative), in float32 expect two to four digits.
      validate_at: as in `Unrolled`.

    A number whose loss does not differ at any of these steps though training does is NaN, and not
    0: its derivative is lost in the loss's rounding (use float64, or take a constant off the loss).

    Cost: 2 |hyper| + 1 runs of K steps and two for each growth, one after another, so memory is
    that of one run.
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
        value, end = window.objective(hyper)
        noise = jnp.finfo(value.dtype).eps * jnp.abs(value)

        def difference(i: jax.Array) -> Scalar:
            def wider(last: Tree) -> Tree:
                step = 10 * last[0]
                d = step * jnp.maximum(jnp.abs(flat[i]), 1e-3)
                up, down = flat.at[i].add(d), flat.at[i].add(-d)
                (high, after_up), (low, after_down) = (
                    window.objective(unravel(x)) for x in (up, down)
                )
                moved = _differ(after_up.inner, after_down.inner)
                return step, high - low, up[i] - down[i], moved  # what was added, after rounding

            def drowned(last: Tree) -> jax.Array:
                step, gap, width, _ = last
                return (width == 0) | ((jnp.abs(gap) <= 1000 * noise) & (step < 0.05))

            first = jnp.asarray(self.step / 10, flat.dtype)
            begun = first, jnp.zeros_like(value), jnp.zeros_like(flat[i]), jnp.bool_(False)
            _, gap, width, moved = jax.lax.while_loop(drowned, wider, begun)
            return jnp.where((gap == 0) & moved, jnp.nan, gap / width)

        grad = unravel(jax.lax.map(difference, jnp.arange(flat.size)).astype(flat.dtype))
        return Estimate(value, grad, end.inner, summary(value, grad, end.first_bad_step)), state


def _differ(a: Tree, b: Tree) -> jax.Array:
    pairs = zip(split_inexact(a)[0], split_inexact(b)[0], strict=True)
    return jnp.stack([jnp.any(x != y) for x, y in pairs]).any()
