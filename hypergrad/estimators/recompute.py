"""Scans that differ in what they store of each step for the way back, and what they compute again.

All map `(make_step, hyper, progress, xs)` to the last progress, for `step = make_step(hyper)` along
the leading axis of `xs`. Through `store_gradients` and `store_few` only `hyper`, the first progress
and the first leaf of `xs`, `[length]`, get derivatives.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.estimators.walk import Before, Scheme, rows, strong_start, walked, with_row
from hypergrad.problem.cut import MakeStep, Reads, Step, TracedStep
from hypergrad.trees import Hyper, InnerState, Tree, row, select

# Between two stored states: of 8 steps, each is updated 3.5 times again.
_MOST_UPDATES = 8


def scan(step: Step, progress: InnerState, inputs: Tree) -> Any:
    """`step` along the leading axis of `inputs`."""
    return jax.lax.scan(lambda p, x: (step(p, x), None), progress, inputs)[0]


def store_all(make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """Stores what each step needs on the way back."""
    return scan(make_step(hyper), progress, xs)


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

    Source: Griewank and Walther 2000, "Algorithm 799: revolve".
    """
    progress = strong_start(make_step, hyper, progress, xs)
    step = TracedStep(make_step, hyper, progress, xs)
    length = xs[0].shape[0]
    places = snapshots(length)

    def forth(given: Reads, start: InnerState) -> tuple[InnerState, Tree]:
        advance = lambda t, progress: step.taken(given.at(t), progress)  # noqa: E731
        return jax.lax.fori_loop(0, length, advance, start), ()

    def back(given: Reads, start: InnerState, _: Tree) -> tuple[Tree, Before]:
        def advance(t: jax.Array, progress: InnerState) -> InnerState:
            return step.taken(given.at(t), progress)

        def to_next_place(carry: Any) -> Any:
            """From the last stored state on, to where the next one is to be stored."""
            end, top, at, stored = carry
            steps = left_of_next(end - at[top], places - top)
            here = _state_at(top, start, stored)
            there = jax.lax.fori_loop(at[top], at[top] + steps, advance, here)
            at = at.at[top + 1].set(at[top] + steps)
            return end, top + 1, at, with_row(stored, top, there)

        def has_room(carry: Any) -> jax.Array:
            end, top, at, _ = carry
            return (end - at[top] > 1) & (top + 1 < places)

        def before(t: jax.Array, memory: Tree) -> tuple[InnerState, None, Tree]:
            top, at, stored = memory
            if places > 1:
                carry = t + 1, top, at, stored
                _, top, at, stored = jax.lax.while_loop(has_room, to_next_place, carry)
            here = _state_at(top, start, stored)
            progress = jax.lax.fori_loop(at[top], t, advance, here)
            top = jnp.where(at[top] == t, jnp.maximum(top - 1, 0), top)
            return progress, None, (top, at, stored)

        nothing = jnp.zeros((), jnp.int32), jnp.zeros(places, jnp.int32)
        return (*nothing, rows(start, places - 1)), before

    return walked(step, Scheme(forth, back), hyper, progress, xs)


def store_gradients(make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> Any:
    """Stores the gradient of each step, and the state before every few; others are had by updates.

    A gradient is one copy of the parameters, Adam's state three. An update passes over the
    parameters once, where a gradient passes once for each example. A step that takes no
    `inner_gradient`, or one inside of a call or a loop of its own, is taken again as a whole.
    """
    progress = strong_start(make_step, hyper, progress, xs)
    step = TracedStep(make_step, hyper, progress, xs)
    if not step.takes_gradients:
        taken = lambda p, x: step.taken(Reads(step.consts, hyper, *x), p)  # noqa: E731
        return _scan_step(taken, progress, xs)
    length = xs[0].shape[0]
    pieces = -(-length // _MOST_UPDATES)
    size = -(-length // pieces)

    def forth(given: Reads, start: InnerState) -> tuple[InnerState, Tree]:
        def advance(t: jax.Array, carry: Any) -> Any:
            progress, gradients = carry
            progress, found = step.with_gradients(given.at(t), progress)
            return progress, with_row(gradients, t, found)

        def advance_piece(i: jax.Array, carry: Any) -> Any:
            progress, gradients, states = carry
            if pieces > 1:  # the first piece's state gives way to the second's
                states = with_row(states, jnp.maximum(i - 1, 0), progress)
            end = jnp.minimum((i + 1) * size, length)
            carry = progress, gradients
            return *jax.lax.fori_loop(i * size, end, advance, carry), states

        like = jax.eval_shape(lambda: step.with_gradients(given.at(0), start)[1])
        carry = start, rows(like, length), rows(start, pieces - 1)
        progress, gradients, states = jax.lax.fori_loop(0, pieces, advance_piece, carry)
        return progress, (gradients, states)

    def back(given: Reads, start: InnerState, stored: Tree) -> tuple[Tree, Before]:
        gradients, states = stored

        def again(t: jax.Array, progress: InnerState) -> InnerState:
            return step.replayed(given.at(t), progress, row(gradients, t))

        def before(t: jax.Array, memory: Tree) -> tuple[InnerState, Any, Tree]:
            piece = t // size
            here = _state_at(piece, start, states)
            progress = jax.lax.fori_loop(piece * size, t, again, here)
            return progress, row(gradients, t), memory

        return (), before

    return walked(step, Scheme(forth, back), hyper, progress, xs)


def _state_at(place: jax.Array, start: InnerState, stored: Tree) -> Any:
    # The first state has no row of its own: it is held anyway.
    if not jax.tree.leaves(stored)[0].shape[0]:
        return start
    return select(place == 0, start, row(stored, jnp.maximum(place - 1, 0)))


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
