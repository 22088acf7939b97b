"""A scan whose way back is its own: what is stored, and where a state comes from, is a scheme's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from hypergrad.problem.cut import Gradients, MakeStep, Reads, TracedStep
from hypergrad.trees import Hyper, InnerState, Tree, flagged, row, zeros

# `(t, memory) -> (the progress before step t, its gradients or None, memory)`, last step first.
Before = Callable[[jax.Array, Tree], tuple[InnerState, Gradients | None, Tree]]


class Scheme(NamedTuple):
    """How a scan gets back.

    Attributes:
      forth: `(given, start) -> (end, stored)`, `given` what all steps read.
      back: `(given, start, stored) -> (memory, before)`, what it begins with, and how it goes on.
    """

    forth: Callable[[Reads, InnerState], tuple[InnerState, Tree]]
    back: Callable[[Reads, InnerState, Tree], tuple[Tree, Before]]


def with_row(stored: Tree, i: jax.typing.ArrayLike, row: Tree) -> Any:
    """`stored` with these i-th entries."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), stored, row)


def rows(like: Tree, count: int) -> Any:
    """Room for `count` of them, arrays or their shapes, along a leading axis."""

    def room(x: Any) -> jax.Array:
        how = jax.typeof(x).sharding if isinstance(x, jax.Array) else x.sharding
        if how is None or how.mesh.empty:
            return jnp.zeros((count, *x.shape), x.dtype)
        # under an Explicit mesh, which need not be set as the current one
        with jax.sharding.use_abstract_mesh(how.mesh):
            how = NamedSharding(how.mesh, PartitionSpec(None, *how.spec))
            return jax.lax.full((count, *x.shape), 0, x.dtype, sharding=how)

    return jax.tree.map(room, like)


def strong_start(make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """As a scan does: arrays, and a Python number takes the dtype that the step gives it."""
    progress = jax.tree.map(jnp.asarray, progress)
    is_weak = lambda x: jax.typeof(x).weak_type  # noqa: E731
    if not any(map(is_weak, jax.tree.leaves(progress))):
        return progress
    after = jax.eval_shape(make_step(hyper), progress, row(xs, 0))
    strong = lambda x, y: jnp.asarray(x, y.dtype) if is_weak(x) else x  # noqa: E731
    return jax.tree.map(strong, progress, after)


def walked(step: TracedStep, scheme: Scheme, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """The progress after all steps, whose derivatives are taken as the scheme says.

    Only `hyper`, the first progress and the first leaf of `xs`, `[length]`, get derivatives.
    """
    length = xs[0].shape[0]

    @jax.custom_vjp
    def run(given: Reads, start: InnerState) -> Any:
        return scheme.forth(given, start)[0]

    def forward(*args: Any) -> Any:
        is_primal = lambda x: isinstance(x, CustomVJPPrimal)  # noqa: E731
        given, start = jax.tree.map(lambda x: x.value, args, is_leaf=is_primal)
        end, stored = scheme.forth(given, start)
        return end, (given, start, stored)

    def backward(kept: Any, cotangent: InnerState) -> Any:
        given, start, stored = kept
        memory, before = scheme.back(given, start, stored)
        is_zero = lambda x: isinstance(x, SymbolicZero)  # noqa: E731
        ends = jax.tree.leaves(cotangent, is_leaf=is_zero)
        moving = step.moving([not is_zero(c) for c in ends])
        pairs = zip(flagged(ends, moving), flagged(jax.tree.leaves(start), moving), strict=True)
        adjoint = [zeros(x) if is_zero(c) else c for c, x in pairs]

        def back_one_step(i: jax.Array, carry: Any) -> Any:
            memory, adjoint, grad, squares = carry
            t = length - 1 - i
            progress, gradients, memory = before(t, memory)
            back = step.pulled_back(given.at(t), progress, gradients, moving, adjoint)
            more, adjoint, square = back
            return memory, adjoint, jax.tree.map(jnp.add, grad, more), squares.at[t].set(square)

        carry = memory, adjoint, *zeros((given.hyper, given.probe))
        _, adjoint, grad, squares = jax.lax.fori_loop(0, length, back_one_step, carry)
        supply = iter(adjoint)
        to_start = [next(supply) if m else None for m in moving]
        constant: Any = None
        return Reads(constant, grad, squares, constant), jax.tree.structure(start).unflatten(
            to_start
        )

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(Reads(step.consts, hyper, *xs), progress)
