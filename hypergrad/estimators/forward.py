"""Forward mode: tangents carried along with training, in memory that does not depend on K."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hypergrad import checks
from hypergrad.data.batches import step_inputs
from hypergrad.estimators.base import (
    Estimate,
    Estimator,
    Progress,
    ValidateAt,
    Window,
    refuse_wrong_place,
    summary,
)
from hypergrad.problem.problem import steps_done
from hypergrad.problem.structure import naming_backward_rules
from hypergrad.trees import Batch, Hyper, Scalar, State, Tree, split_inexact


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

    Raises:
      ValueError: a function on the way has a `custom_vjp` rule that forward mode cannot pass.

    Hyperparameters that share a window of W steps (FDS) are the entries of one array that
    `hypergrad.piecewise_constant` spreads over the run.

    Source: Franceschi et al. 2017, eq. 13-15 (forward mode) and section 3.3 (RTHO); Micaelli and
    Storkey 2021 (sharing).
    """

    carry: bool = False
    validate_at: ValidateAt = "last"
    chunk: int | None = None

    def __post_init__(self) -> None:
        refuse_wrong_place(self.validate_at)
        checks.flag("carry", self.carry)
        if self.chunk is not None:
            checks.integer_field(self, "chunk", remedy="or None for all at once")

    def init(self, window: Window, hyper: Hyper) -> State:
        """Zero tangents with `carry`, else `()`."""
        if not self._goes_on(window):
            return ()
        size = ravel_pytree(hyper)[0].size
        floats = split_inexact(window.inner)[0]
        return [jnp.zeros((size, *jnp.shape(x)), jnp.result_type(x)) for x in floats]

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One value and gradient of the validation loss; see the class."""
        window = window.judging(self.validate_at)
        with naming_backward_rules(window.objective, hyper):
            return self._estimate(window, hyper, state)

    def _estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        flat, unravel = ravel_pytree(hyper)
        goes_on = self._goes_on(window)

        def along(directions: jax.Array, carried: Tangents) -> tuple[Any, ...]:
            """Loss, end, and the gradient's entries and the tangents along rows of the identity."""
            push = pushforward(flat, directions)
            s, z = push(lambda h, _: window.begin(unravel(h)), (), [])  # Z_0 = ds_0/dhyper
            z = z._replace(inner=carried) if goes_on else z
            offset = steps_done(s.inner)

            # The step is counted in the carry: indices to scan along would grow with K.
            def advance(carry: tuple[jax.Array, Progress, Progress], batch: Batch) -> Any:
                t, s, z = carry

                def step(h: jax.Array, s: Progress) -> Progress:
                    return window.one_step(unravel(h), offset)(s, (t, batch))

                return (t + 1, *push(step, s, z)), None  # Z_t = A_t Z_(t-1) + B_t

            begun = (jnp.zeros((), jnp.int32), s, z)
            batches = step_inputs(window.train)[1]
            (_, s, z), _ = jax.lax.scan(advance, begun, batches, length=window.num_steps)

            def error(h: jax.Array, s: Progress) -> Scalar:
                return window.loss(window.judged(s), unravel(h), offset)

            loss, [entries] = push(error, s, z)  # dE/ds Z_K + dE/dhyper
            return loss, s, entries.astype(flat.dtype), z.inner if goes_on else []

        identity = jnp.eye(flat.size, dtype=flat.dtype)
        z = list(state) if goes_on else []
        if self.chunk is None or self.chunk >= flat.size:
            loss, end, entries, z = along(identity, z)
        else:
            blocks = _in_blocks((identity, z), self.chunk)
            entries, z = jax.lax.map(lambda block: along(*block)[2:], blocks)
            entries, z = _joined((entries, z), flat.size)
            loss, end = window.objective(hyper)
        grad = unravel(entries)
        info = summary(loss, grad, end.first_bad_step)
        return Estimate(loss, grad, end.inner, info), z if goes_on else ()

    def _goes_on(self, window: Window) -> bool:
        # A fresh start has no past whose tangents could be carried.
        return self.carry and window.inner is not None


Tangents = list[jax.Array]  # one [|hyper|, ...] per inexact leaf, in the order of the leaves


def pushforward(
    flat: jax.Array, directions: jax.Array
) -> Callable[[Callable[..., Any], Tree, Tree], tuple[Any, Tree]]:
    """`(f, tree, z) -> (f(flat, tree), tangents of its inexact leaves)`, along every direction.

    The tangents of a `Progress` stand in another one, a list for each of its parts.
    """

    def push(f: Callable[[jax.Array, Tree], Any], tree: Tree, z: Tree) -> tuple[Any, Tree]:
        floats, join = _parts(tree)

        def on_floats(h: jax.Array, floats: Tree) -> tuple[Tree, Any]:
            out = f(h, join(floats))
            return _parts(out)[0], out

        def along(e: jax.Array, z: Tree) -> tuple[Any, Tree]:
            _, dz, out = jax.jvp(on_floats, (flat, floats), (e, z), has_aux=True)
            return out, dz

        # The primal does not depend on the direction, so vmap computes it once.
        return jax.vmap(along, out_axes=(None, 0))(directions, z)

    return push


def _parts(tree: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """`split_inexact`, of a `Progress` part by part, so that each is found by its name."""
    if not isinstance(tree, Progress):
        return split_inexact(tree)
    floats, joins = zip(*map(split_inexact, tree), strict=True)
    return Progress(*floats), lambda parts: Progress(
        *(join(part) for join, part in zip(joins, parts, strict=True))
    )


def _in_blocks(tree: Tree, size: int) -> Tree:
    """Leaves `[n, ...]` as `[blocks, size, ...]`, the last block filled up with zeros."""

    def block(x: jax.Array) -> jax.Array:
        missing = -x.shape[0] % size
        padded = jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)])
        return padded.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(block, tree)


def _joined(tree: Tree, length: int) -> Tree:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], tree)
