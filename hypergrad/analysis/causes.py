"""Why a hypergradient is not finite: where the first such number arises, and what made it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hypergrad.data.batches import Minibatches, step_inputs
from hypergrad.data.keys import SHUFFLE
from hypergrad.estimators.base import Window
from hypergrad.estimators.forward import Tangents, pushforward
from hypergrad.problem.problem import steps_done, training_steps
from hypergrad.trees import (
    Hyper,
    InnerState,
    Tree,
    all_finite,
    is_inexact,
    leaf_names,
    norm,
    split_inexact,
)


def entries_of(hyper: Hyper) -> list[str]:
    """The names of all numbers of `hyper`: a leaf's, with the index of an array's entry."""
    names = []
    for name, leaf in zip(leaf_names(hyper), jax.tree.leaves(hyper), strict=True):
        size, shape = np.size(leaf), np.shape(leaf)
        names += [
            name + (f"[{', '.join(map(str, np.unravel_index(i, shape)))}]" if shape else "")
            for i in range(size)
        ]
    return names


def unless_custom_vjp(tangent: Callable[..., jax.Array], *args: Any) -> np.ndarray | None:
    """`tangent(*args)`, or None where a `custom_vjp` function forbids forward mode."""
    try:
        return np.asarray(tangent(*args))
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return None


def cause_of_nan(window: Window, hyper: Hyper, bad: list[str]) -> str:
    """Where the first number that is not finite arises: in training, or only in its derivative."""
    which = f"The hypergradient of {', '.join(bad)}" if bad else "The validation loss"
    if broken := _broken_leaves(hyper):
        return f"{which} is not finite: the value of {', '.join(broken)} is not."
    first = window.start(hyper)
    if broken := _broken_leaves(first):
        origin = "what init_params (or problem.init) returns" if window.inner is None else "inner"
        return (
            f"{which} is not finite: training starts with values that are not, in leaf "
            f"{', '.join(broken)}. Look at {origin}."
        )
    # A step that is skipped may show a loss that is not finite, and has done no harm.
    named = [(name, x) for name, x in _named_leaves(first) if is_inexact(x)]
    names = [name for name, _ in named]
    counted = np.array([name != "loss" for name in names])

    def finite(floats: list[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.isfinite(x).all() for x in floats])

    def first_bad(flags: np.ndarray) -> tuple[int, str]:
        t = int(np.argmin(flags.all(1)))
        return t, names[int(np.argmin(flags[t]))]

    @jax.jit
    def training(hyper: Hyper) -> jax.Array:
        def body(inner: InnerState, x: Tree) -> tuple[InnerState, jax.Array]:
            inner = _step(window, hyper, first)(inner, *x)
            return inner, finite(split_inexact(inner)[0])

        return jax.lax.scan(body, window.start(hyper), step_inputs(window.train))[1]

    flags = np.asarray(training(hyper)) | ~counted
    if not flags.all():
        t, leaf = first_bad(flags)
        return (
            f"{which} is not finite: training itself is not. First at step {t} of "
            f"{window.num_steps}, in {leaf!r}. Likely cause: "
            f"{_cause_in_training(window, hyper, t)}."
        )
    if empty := [name for name, leaf in _named_leaves(window.valid) if not np.size(leaf)]:
        return (
            f"{which} is not finite, though training is: the validation batch holds 0 examples, in "
            f"leaf {', '.join(empty)}."
        )
    if broken := _broken_leaves(window.valid):
        return (
            f"{which} is not finite, though training is: the validation batch holds values that "
            f"are not finite, in leaf {', '.join(broken)}."
        )

    flat, unravel = ravel_pytree(hyper)

    @jax.jit
    def tangents(flat: jax.Array, direction: jax.Array) -> jax.Array:
        push = pushforward(flat, direction[None])

        def body(carry: tuple[Tree, Tangents], x: Tree) -> tuple[Tree, jax.Array]:
            carry = push(lambda h, s: _step(window, unravel(h), first)(s, *x), *carry)
            return carry, finite(carry[1])

        begun = push(lambda h, _: window.start(unravel(h)), (), [])
        after = jax.lax.scan(body, begun, step_inputs(window.train))[1]
        return jnp.concatenate([finite(begun[1])[None], after])

    entries = entries_of(hyper)
    for name in bad[:8]:  # one run each; the first nearly always tells
        direction = jnp.zeros_like(flat).at[entries.index(name)].set(1)
        found = unless_custom_vjp(tangents, flat, direction)
        if found is None:
            continue
        if not found[0].all():
            leaf = names[int(np.argmin(found[0]))]
            where = "lost at step 0, in problem.init already"
        elif not (after := found[1:] | ~counted).all():
            t, leaf = first_bad(after)
            where = f"lost at step {t} of {window.num_steps}"
        else:
            continue
        return (
            f"{which} is not finite, though training is: the derivative of {leaf!r} in "
            f"{name!r} is {where}. Likely cause: an infinite slope, such as the square root in "
            "Adam, or a norm, at exactly zero (hypergrad.nonzero_gradient in a hand-filled step)."
        )
    return (
        f"{which} is not finite, though training is and no tangent is lost on the way. Likely "
        "cause: valid_loss (a logarithm or a square root at 0), a NaN in the branch that jnp.where "
        "does not take (jax.lax.cond keeps it out), or an adjoint that overflows because training "
        "is chaotic at these values: lower the learning rate."
    )


def _step(window: Window, hyper: Hyper, first: InnerState) -> Callable[..., InnerState]:
    return training_steps(window.problem, hyper, window.train, window.key, steps_done(first))


def _named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    return list(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _broken_leaves(tree: Tree) -> list[str]:
    def broken(leaf: Any) -> bool:
        return is_inexact(leaf) and not bool(jnp.isfinite(leaf).all())

    return [name for name, leaf in _named_leaves(tree) if broken(leaf)]


def _cause_in_training(window: Window, hyper: Hyper, t: int) -> str:
    """What turned a finite state into one that is not, in step t."""
    first, train = window.start(hyper), window.train
    step = jax.jit(_step(window, hyper, first))
    inputs = [jax.tree.map(lambda x, i=i: x[i], step_inputs(train)) for i in range(t + 1)]
    inner = first
    for x in inputs[:-1]:
        inner = step(inner, *x)
    count, batch = t + steps_done(first), inputs[-1][1]
    where = f"the batch of step {t}"
    if isinstance(train, Minibatches):
        batch = train.batch(count, jax.random.fold_in(window.key, SHUFFLE))
        where = f"the data, in an example of step {t},"
    if broken := _broken_leaves(batch):
        return f"{where} holds values that are not finite, in leaf {', '.join(broken)}"
    if norm(inner.params) > 1e3 * (1 + norm(first.params)):
        return "training diverges: the learning rate or momentum is too high for this problem"
    floats, join = split_inexact(inner.params)
    key = jax.random.fold_in(window.key, count)

    def loss(floats: list[jax.Array]) -> jax.Array:
        return window.problem.train_loss(join(floats), hyper, batch, key)

    value, slopes = jax.jit(jax.value_and_grad(loss))(floats)
    if not bool(jnp.isfinite(value)):
        return (
            "train_loss, which is not finite at parameters and data that are: a logarithm, a root "
            "or a division out of its range"
        )
    if not bool(all_finite(slopes)):
        return (
            "an infinite slope of train_loss, which is finite itself: a square root or a norm at "
            "exactly zero, or a NaN in the branch that jnp.where does not take"
        )
    return "training diverges: the learning rate or momentum is too high for this problem"
