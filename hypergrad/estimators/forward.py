"""Forward mode: tangents carried along with training, in memory that does not depend on K."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hypergrad.data.batches import num_steps, step_inputs
from hypergrad.estimators.base import Estimate, Estimator, summary
from hypergrad.problem.problem import Problem, steps_done, validation_loss
from hypergrad.problem.window import (
    Progress,
    ValidateAt,
    averaged,
    begin,
    judged,
    objective,
    one_step,
)
from hypergrad.trees import split_inexact


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

      chunk: how many tangents are carried at once; None for all. The run is repeated for each
        chunk, so that 100 hyperparameters fit where 10 do.

    Cost in gradient evaluations per step: 1 + 1.7 |hyper|, and with chunks one more for each;
    memory (1 + |hyper|) |inner|, or (1 + chunk) |inner| (with `carry` the state keeps all of Z),
    the same at any K.

    Hyperparameters that share a window of W steps (FDS) are the entries of one array that
    `hypergrad.piecewise_constant` spreads over the run.

    Source: Franceschi et al. 2017, eq. 13-15 (forward mode) and section 3.3 (RTHO); Micaelli and
    Storkey 2021 (sharing).
    """

    carry: bool = False
    validate_at: ValidateAt = "last"
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1, or None for all at once.")

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
        steps = num_steps(train)
        count = averaged(self.validate_at, steps)
        carried = self.carry and inner is not None

        def along(basis: jax.Array, carried_zs: Tangents) -> tuple[Any, Progress, jax.Array, Any]:
            """Loss, end, and the gradient's entries and tangents along the rows of `basis`."""
            start, zs = _pushforward(
                lambda h, _: begin(problem, unravel(h), inner, key, count), flat, basis, (), []
            )
            zs = _with_inner_tangents(zs, carried_zs)
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

            loss, [entries] = _pushforward(loss_at, flat, basis, end, zs)
            return loss, end, entries.astype(flat.dtype), zs[: len(carried_zs)]

        basis = jnp.eye(flat.size, dtype=flat.dtype)
        zs = list(state) if carried else []
        if self.chunk is None or self.chunk >= flat.size:
            loss, end, entries, zs = along(basis, zs)
        else:
            blocks = _in_blocks((basis, zs), self.chunk)
            entries, zs = jax.lax.map(lambda block: along(*block)[2:], blocks)
            entries, zs = _joined((entries, zs), flat.size)
            loss, end = objective(problem, hyper, inner, train, valid, key, self.validate_at)
        grad = unravel(entries)
        info = summary(loss, grad, end.first_bad_step)
        return Estimate(loss, grad, end.inner, info), zs if carried else ()


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


def _in_blocks(tree: Any, size: int) -> Any:
    """Leaves `[n, ...]` as `[blocks, size, ...]`, the last block filled up with zeros."""

    def block(x: jax.Array) -> jax.Array:
        missing = -x.shape[0] % size
        padded = jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)])
        return padded.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(block, tree)


def _joined(tree: Any, length: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], tree)
