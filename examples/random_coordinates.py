"""An estimator of your own, whole: a few random hyperparameters at a time, by forward mode.

Forward mode costs 1.7 gradient evaluations per step and hyperparameter. With many hyperparameters
and long runs, whose states reverse mode would have to keep, it can look at `count` of them in each
estimate: the others' entries are 0, those looked at stand n / count times as long, so that the mean
over draws is the hypergradient (randomised coordinate descent, Nesterov 2012).

docs/adding_an_estimator.md explains it; tests/test_random_coordinates.py is its contract.

Run: `python examples/random_coordinates.py`
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad import checks
from hypergrad.data.keys import NOISE
from hypergrad.estimators.base import summary
from hypergrad.problem.problem import steps_done


@dataclass(frozen=True)
class RandomCoordinates(hg.Estimator):
    """`count` of the n entries of the hypergradient, drawn anew in each estimate; unbiased.

    Exact with `count` >= n. Cost in gradient evaluations per step: 1 + 1.7 count; memory
    (1 + count) |inner| at any K. The variance of an entry is n / count - 1 times its square.
    Raises ValueError for a `count` below 1. Source: Nesterov 2012, section 2 (coordinates);
    Franceschi et al. 2017, eq. 13-15 (forward mode).
    """

    count: int = 1

    def __post_init__(self) -> None:
        checks.integer_field(self, "count", remedy="the entries looked at in each estimate")

    def init(self, window: hg.Window, hyper: Any) -> jax.Array:
        """The number of estimates so far, so that each draws other entries."""
        return jnp.zeros((), jnp.int32)

    def estimate(
        self, window: hg.Window, hyper: Any, state: jax.Array
    ) -> tuple[hg.Estimate, jax.Array]:
        """Advances training by the K steps of the window; see the class."""
        flat, unravel = ravel_pytree(hyper)
        count = min(self.count, flat.size)
        # By the step and by the state: a refused update takes the state back, but never the step.
        stream = jax.random.fold_in(jax.random.fold_in(window.key, NOISE), state)
        draw = jax.random.fold_in(stream, steps_done(window.start(hyper)))
        chosen = jax.random.permutation(draw, flat.size)[:count]

        def along(index: jax.Array) -> Any:
            direction = jnp.zeros_like(flat).at[index].set(1)
            loss_at = lambda flat: window.objective(unravel(flat))  # noqa: E731
            loss, slope, end = jax.jvp(loss_at, (flat,), (direction,), has_aux=True)
            return slope, loss, end

        # Training itself does not depend on the direction: vmap computes it once.
        slopes, loss, end = jax.vmap(along, out_axes=(0, None, None))(chosen)
        scaled = flat.size / count * slopes.astype(flat.dtype)
        grad = unravel(jnp.zeros_like(flat).at[chosen].set(scaled))
        info = summary(loss, grad, end.first_bad_step)
        return hg.Estimate(loss, grad, end.inner, info), state + 1


def main() -> None:
    """One learning rate for each of 8 weights, two of them looked at in each estimate."""

    def loss(w: jax.Array, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    problem = hg.bilevel(
        lambda key: jnp.zeros(8),
        loss,
        loss,
        lambda hyper: optax.chain(optax.sgd(1.0), hg.scale_by_tree(hyper["rates"])),
    )
    x = jax.random.normal(jax.random.key(0), (256, 8)) * jnp.logspace(-1, 0, 8)
    y = x @ jnp.arange(8.0)
    train = hg.Minibatches((x[:200], y[:200]), batch_size=32, num_steps=10)
    space = hg.Space({"rates": hg.Float(1e-3, 0.5, scale="log")})
    tuner = hg.alternating(problem, space, RandomCoordinates(2))
    state = tuner.init({"rates": jnp.full(8, 1e-2)}, jax.random.key(1))
    update = jax.jit(tuner.update)
    for _ in range(60):
        state, info = update(state, train, (x[200:], y[200:]))
    print(f"validation loss {float(info.loss):.3g}; rates of weak to strong inputs:")
    print([round(rate, 3) for rate in tuner.best(state)["rates"].tolist()])


if __name__ == "__main__":
    main()
