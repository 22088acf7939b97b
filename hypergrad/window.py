"""K training steps and what is judged after them: the function that estimators differentiate."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.problem import (
    Problem,
    fresh_inner,
    num_steps,
    step_inputs,
    steps_done,
    training_steps,
    validation_loss,
)
from hypergrad.trees import all_finite, is_inexact

ValidateAt = Literal["last", "mean"]


class Progress(NamedTuple):
    """What a window carries from step to step.

    Attributes:
      inner: the training state.
      total: the sum of the window's parameter vectors, or None where the last are judged.
      first_bad_step: int32, the first step of the window whose training loss (`inner.loss`, or
        where there is none, whose parameters) is not finite; -1.
    """

    inner: Any
    total: Any
    first_bad_step: jax.Array


def begin(
    problem: Problem, hyper: Any, inner: Any, key: jax.Array, validate_at: ValidateAt
) -> Progress:
    """The start of a window: at `inner`, or at a fresh start inside the gradient if it is None."""
    if validate_at not in ("last", "mean"):
        raise ValueError(
            f"validate_at={validate_at!r} is unknown: choose 'last' (the last parameters) or "
            "'mean' (the mean over the window's parameter vectors)."
        )
    inner = fresh_inner(problem, hyper, key) if inner is None else inner
    total = None
    if validate_at == "mean":
        total = jax.tree.map(lambda p: jnp.zeros_like(p) if is_inexact(p) else None, inner.params)
    return Progress(inner, total, jnp.int32(-1))


def one_step(
    problem: Problem, hyper: Any, train: Any, key: jax.Array, offset: jax.typing.ArrayLike
) -> Callable[[Progress, tuple[jax.Array, Any]], Progress]:
    """`(progress, (t, batch)) -> progress`; `offset` is the steps done before the window."""
    step = training_steps(problem, hyper, train, key, offset)

    def advance(progress: Progress, x: tuple[jax.Array, Any]) -> Progress:
        t, batch = x
        inner = step(progress.inner, t, batch)
        total = progress.total
        if total is not None:
            total = jax.tree.map(
                lambda s, p: None if s is None else s + p,
                total,
                inner.params,
                is_leaf=lambda s: s is None,
            )
        # A state that shows its training loss spares a pass over all parameters in every step.
        finite = all_finite(inner.loss if hasattr(inner, "loss") else inner.params)
        bad = (progress.first_bad_step < 0) & ~finite
        return Progress(inner, total, jnp.where(bad, t, progress.first_bad_step))

    return advance


def judged(progress: Progress, window: int) -> Any:
    """The parameters that are validated: the last, or the mean over the window's `window` steps."""
    if progress.total is None:
        return progress.inner.params
    return jax.tree.map(
        lambda s, p: p if s is None else (s / window).astype(s.dtype),
        progress.total,
        progress.inner.params,
        is_leaf=lambda s: s is None,
    )


def objective(
    problem: Problem,
    hyper: Any,
    inner: Any,
    train: Any,
    valid: Any,
    key: jax.Array,
    validate_at: ValidateAt = "last",
) -> tuple[jax.Array, Progress]:
    """The validation loss after the K steps of `train`, and where training then stands.

    This is the function that every estimator differentiates, in its plainest form.
    """
    progress = begin(problem, hyper, inner, key, validate_at)
    offset = steps_done(progress.inner)
    advance = one_step(problem, hyper, train, key, offset)
    progress = jax.lax.scan(lambda p, x: (advance(p, x), None), progress, step_inputs(train))[0]
    steps = num_steps(train)
    params = judged(progress, steps)
    return validation_loss(problem, params, hyper, valid, key, offset + steps), progress
