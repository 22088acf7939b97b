"""Forward mode: tangents carried along with training, in memory that does not depend on K."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hypergrad.estimators.base import Estimate, Estimator, summary
from hypergrad.problem import Problem, num_steps, step_inputs, steps_done, validation_loss
from hypergrad.trees import split_inexact
from hypergrad.window import Progress, ValidateAt, averaged, begin, judged, one_step


@dataclasses.dataclass(frozen=True)
class Forward(Estimator):
    """Forward mode: Z_t = A_t Z_{t-1} + B_t, gradient dE/dparams Z_K + dE/dhyper; exact.

    A_t and B_t are the derivatives of step t in the state and in `hyper`; Z has a leading axis
    |hyper| over the inexact leaves of `inner`.

    Args:
      carry: False: Z starts at zero in each estimate (with `inner=None`, at the derivative of
        `problem.init`), and equals `Unrolled()` to rounding. True: Z goes on from the last estimate
        (RTHO), so that an online tuner sees effects older than the window; the state is Z.
      validate_at: as in `Unrolled`.

    Cost in gradient evaluations per step: 1 + 1.7 |hyper|; memory (1 + |hyper|) |inner|, the same
    at any K.

    Source: Franceschi et al. 2017, eq. 13-15 (forward mode) and section 3.3 (RTHO).
    """

    carry: bool = False
    validate_at: ValidateAt = "last"

    def init(self, problem: Problem, hyper: Any, inner: Any, key: jax.Array) -> Any:
        """Zero tangents with `carry`, else `()`."""
        return _no_tangents(hyper, inner) if self.carry and inner is not None else ()

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
        """One value and gradient of the validation loss; see the class."""
        flat, unravel = ravel_pytree(hyper)
        basis = jnp.eye(flat.size, dtype=flat.dtype)
        steps = num_steps(train)
        count = averaged(self.validate_at, steps)
        start, zs = _pushforward(
            lambda h, _: begin(problem, unravel(h), inner, key, count),
            flat,
            basis,
            (),
            [],
        )
        carried = self.carry and inner is not None
        if carried:
            zs = _with_inner_tangents(zs, state)
        offset = steps_done(start.inner)

        # The step is counted in the carry: indices to scan along would grow with K.
        def advance(carry: tuple[jax.Array, Progress, Any], batch: Any) -> tuple[Any, None]:
            t, progress, zs = carry

            def step(h: jax.Array, p: Progress) -> Progress:
                return one_step(problem, unravel(h), train, key, offset, count)(p, (t, batch))

            return (t + 1, *_pushforward(step, flat, basis, progress, zs)), None

        begun = (jnp.zeros((), jnp.int32), start, zs)
        (_, end, zs), _ = jax.lax.scan(advance, begun, step_inputs(train)[1], length=steps)

        def loss_at(h: jax.Array, progress: Progress) -> jax.Array:
            params = judged(progress, count)
            return validation_loss(problem, params, unravel(h), valid, key, offset + steps)

        loss, [grads] = _pushforward(loss_at, flat, basis, end, zs)
        grad = unravel(grads.astype(flat.dtype))
        info = summary(loss, grad, end.first_bad_step)
        return Estimate(loss, grad, end.inner, info), zs[: len(state)] if carried else ()


Tangents = list[jax.Array]  # one [|hyper|, ...] per inexact leaf


def _pushforward(
    f: Callable[[jax.Array, Any], Any], flat: jax.Array, basis: jax.Array, tree: Any, zs: Tangents
) -> tuple[Any, Tangents]:
    """`f(flat, tree)` and the tangents of its inexact leaves along every row of `basis`."""
    floats, join = split_inexact(tree)

    def on_floats(h: jax.Array, floats: list[Any]) -> tuple[list[Any], Any]:
        out = f(h, join(floats))
        return split_inexact(out)[0], out

    def along(e: jax.Array, z: Tangents) -> tuple[Any, Tangents]:
        _, dz, out = jax.jvp(on_floats, (flat, floats), (e, z), has_aux=True)
        return out, dz

    # The primal does not depend on the direction, so vmap computes it once.
    return jax.vmap(along, out_axes=(None, 0))(basis, zs)


def _no_tangents(hyper: Any, inner: Any) -> Tangents:
    size = ravel_pytree(hyper)[0].size
    return [jnp.zeros((size, *jnp.shape(x)), jnp.result_type(x)) for x in split_inexact(inner)[0]]


def _with_inner_tangents(zs: Tangents, inner_zs: Tangents) -> Tangents:
    # A Progress flattens with its inner first.
    return [*inner_zs, *zs[len(inner_zs) :]]
