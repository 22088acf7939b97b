"""Outer optimisers that optax lacks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad.trees import inner_product


class NormAdamState(NamedTuple):
    """Moments of `norm_adam`: of the gradient, and of its squared norm."""

    updates: jax.Array
    mean: Any
    square: jax.Array


def norm_adam(learning_rate: float, b1: float = 0.7, b2: float = 0.9) -> Any:
    """Adam whose second moment is that of the whole gradient's norm, one scale for all entries.

    Adam divides every entry by its own magnitude, so a hyperparameter whose gradient is mostly
    noise (a small L2 coefficient) walks as far as one whose gradient is signal. Here directions
    keep their proportions and the step's length is about `learning_rate`. Gradients of norm above 1
    are first scaled to 1: hypergradients have heavy tails.

    Source: Adam (Kingma and Ba 2015) with the norm's second moment; compare ND-Adam (Zhang 2018).

    >>> import jax.numpy as jnp
    >>> optimizer = norm_adam(0.1)
    >>> updates, _ = optimizer.update(jnp.array([0.3, 0.4]), optimizer.init(jnp.zeros(2)))
    >>> [round(float(u), 3) for u in updates]
    [-0.06, -0.08]
    """

    def init(params: Any) -> NormAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return NormAdamState(jnp.zeros((), jnp.int32), zeros, inner_product(zeros, zeros))

    def update(grads: Any, state: NormAdamState, params: Any = None) -> tuple[Any, NormAdamState]:
        del params
        size = jnp.sqrt(inner_product(grads, grads))
        grads = jax.tree.map(lambda g: g / jnp.maximum(size, 1.0).astype(g.dtype), grads)
        count = state.updates + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = b2 * state.square + (1 - b2) * jnp.minimum(size, 1.0) ** 2
        # an all-zero gradient moves nothing, instead of 0 / 0
        rms = jnp.maximum(jnp.sqrt(square / (1 - b2**count)), jnp.finfo(square.dtype).tiny)
        factor = -learning_rate / (1 - b1**count) / rms
        updates = jax.tree.map(lambda m: factor.astype(m.dtype) * m, mean)
        return updates, NormAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)
