"""Scans that differ in what they store of each step for the way back, and what they compute again.

All map `(make_step, hyper, progress, xs)` to the last progress, for `step = make_step(hyper)` along
the leading axis of `xs`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.problem.rules import Traced
from hypergrad.trees import Hyper, InnerState, Tree, select, split_inexact

Step = Callable[[InnerState, Any], InnerState]
MakeStep = Callable[[Hyper], Step]


def scan(step: Step, progress: InnerState, inputs: Tree) -> Any:
    """`step` along the leading axis of `inputs`."""
    return jax.lax.scan(lambda p, x: (step(p, x), None), progress, inputs)[0]


def store_all(make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """Stores what each step needs on the way back."""
    return scan(make_step(hyper), progress, xs)


def store_states(make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """Stores the state before each step, which is taken again."""
    return _scan_step(make_step(hyper), progress, xs)


def store_roots(make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """Chunks of about sqrt(length) steps: stores one state per chunk, then one per step of it."""
    step = make_step(hyper)
    length = jax.tree.leaves(xs)[0].shape[0]
    root = math.isqrt(length)
    # The steps of a remainder would be compiled a second time: take a divisor near the root.
    size = next((s for s in range(root, root // 2, -1) if length % s == 0), root)
    whole = length // size * size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs)
    rest = jax.tree.map(lambda x: x[whole:], xs)
    chunk = jax.checkpoint(lambda p, x: _scan_step(step, p, x), prevent_cse=False)
    progress = scan(chunk, progress, chunks)
    return _scan_step(step, progress, rest) if whole < length else progress


def _scan_step(step: Step, progress: InnerState, xs: Tree) -> Any:
    # A scan's body cannot be merged with another's, so that no barrier need slow it down.
    return scan(jax.checkpoint(step, prevent_cse=False), progress, xs)


def store_few(make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """Stores about log2(length) states, placed anew as the way back goes on.

    With s places for states and each step taken r times again, C(s + r, s) steps can be passed.
    Only `hyper`, the first progress and the first leaf of `xs`, `[length]`, get derivatives.

    Source: Griewank and Walther 2000, "Algorithm 799: revolve".
    """
    probes, inputs = xs
    length = probes.shape[0]
    places = snapshots(length)

    def one(hyper: Hyper, progress: InnerState, probe: jax.Array, x: Tree) -> InnerState:
        return make_step(hyper)(progress, (probe, x))

    # What the step closes over becomes an argument: a custom rule may close over nothing traced.
    first = jax.tree.map(lambda x: x[0], inputs)
    is_weak = lambda x: jax.typeof(x).weak_type  # noqa: E731
    if any(map(is_weak, jax.tree.leaves(progress))):
        # as a scan does: a Python number takes the dtype that the step gives it
        after = jax.eval_shape(one, hyper, progress, probes[0], first)
        strong = lambda x, y: jnp.asarray(x, y.dtype) if is_weak(x) else x  # noqa: E731
        progress = jax.tree.map(strong, progress, after)
    traced = Traced(one, hyper, progress, probes[0], first)

    def step_at(consts: Any, hyper: Hyper, t: jax.Array, progress: Any, probe: Any, xs: Any) -> Any:
        x = jax.tree.map(lambda x: x[t], xs)
        return traced.under(consts, hyper, progress, probe, x)

    @jax.custom_vjp
    def run(consts: Any, hyper: Hyper, progress: InnerState, probes: Any, xs: Any) -> InnerState:
        def body(progress: InnerState, t: jax.Array) -> tuple[InnerState, None]:
            return step_at(consts, hyper, t, progress, probes[t], xs), None

        return jax.lax.scan(body, progress, jnp.arange(length))[0]

    def forward(*args: Any) -> Any:
        return run(*args), args

    def backward(args: Any, cotangent: InnerState) -> Any:
        consts, hyper, start, probes, xs = args

        def advance(t: jax.Array, progress: InnerState) -> InnerState:
            return step_at(consts, hyper, t, progress, probes[t], xs)

        # The first state has no row of its own: it is held anyway.
        def state_at(place: jax.Array, stored: Any) -> Any:
            if places == 1:
                return start
            return select(place == 0, start, row(stored, place - 1))

        def to_next_place(carry: Any) -> Any:
            """From the last stored state on, to where the next one is to be stored."""
            end, top, at, stored = carry
            steps = left_of_next(end - at[top], places - top)
            there = jax.lax.fori_loop(at[top], at[top] + steps, advance, state_at(top, stored))
            at = at.at[top + 1].set(at[top] + steps)
            return end, top + 1, at, _with_row(stored, top, there)

        def has_room(carry: Any) -> jax.Array:
            end, top, at, _ = carry
            return (end - at[top] > 1) & (top + 1 < places)

        def back_one_step(i: jax.Array, carry: Any) -> Any:
            top, at, stored, adjoint, grad, squares = carry
            t = length - 1 - i
            if places > 1:
                _, top, at, stored = jax.lax.while_loop(
                    has_room, to_next_place, (t + 1, top, at, stored)
                )
            before = jax.lax.fori_loop(at[top], t, advance, state_at(top, stored))
            floats, join = split_inexact(before)

            def after(hyper: Hyper, floats: Any, probe: jax.Array) -> Any:
                return split_inexact(step_at(consts, hyper, t, join(floats), probe, xs))[0]

            more, adjoint, square = jax.vjp(after, hyper, floats, probes[t])[1](adjoint)
            grad = jax.tree.map(jnp.add, grad, more)
            top = jnp.where(at[top] == t, jnp.maximum(top - 1, 0), top)
            return top, at, stored, adjoint, grad, squares.at[t].set(square)

        top, at = jnp.zeros((), jnp.int32), jnp.zeros(places, jnp.int32)
        stored = jax.tree.map(lambda x: jnp.broadcast_to(x, (places - 1, *jnp.shape(x))), start)
        leaves, starts = jax.tree.leaves(cotangent), jax.tree.leaves(start)
        pairs = zip(leaves, starts, strict=True)
        adjoint = [c for c, x in pairs if jnp.issubdtype(x.dtype, jnp.inexact)]
        zeros = jax.tree.map(jnp.zeros_like, (hyper, probes))
        carry = (top, at, stored, adjoint, *zeros)
        *_, adjoint, grad, squares = jax.lax.fori_loop(0, length, back_one_step, carry)
        supply = iter(adjoint)
        to_start = [next(supply) if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in starts]
        return None, grad, jax.tree.structure(start).unflatten(to_start), squares, None

    run.defvjp(forward, backward)
    return run(traced.consts, hyper, progress, probes, inputs)


def snapshots(length: int) -> int:
    """The states that `store_few` stores."""
    return max(length.bit_length() - 1, 1)


def left_of_next(length: jax.Array, places: jax.Array) -> jax.Array:
    """The steps to go before the next state is stored, of `length` with `places` for states.

    Where C(places + r, places) steps can be passed by taking each r times, r / (places + r) of them
    are left of the next place, and can be passed by r - 1.
    """

    def more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        times, reach = carry
        return times + 1, reach * (places + times + 1) / (times + 1)

    start = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    times, _ = jax.lax.while_loop(lambda carry: carry[1] < length, more, start)
    steps = (length * (times / (places + times))).astype(jnp.int32)
    return jnp.clip(steps, 1, length - 1)


def repetitions(length: int) -> int:
    """How often `store_few` takes each step again, at most."""
    places, times, reach = snapshots(length), 0, 1.0
    while reach < length:
        times += 1
        reach *= (places + times) / times
    return times


def row(stored: Tree, i: jax.typing.ArrayLike) -> Any:
    """The i-th entries along the leading axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stored)


def _with_row(stored: Tree, i: jax.Array, row: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), stored, row)
