"""K training steps and what is judged after them: the function that estimators differentiate."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.data.batches import num_steps, step_inputs
from hypergrad.problem.problem import Problem, steps_done, training_steps, validation_loss
from hypergrad.trees import all_finite, is_inexact, widen

ValidateAt = Literal["last", "mean"] | int | float


class Progress(NamedTuple):
    """What a window carries from step to step.

    Attributes:
      inner: the training state.
      total: the sum of the parameter vectors that are averaged, or None: the last are judged.
      first_bad_step: int32, the first step of the window whose training loss (`inner.loss`, or
        where there is none, whose parameters) is not finite; -1.
    """

    inner: Any
    total: Any
    first_bad_step: jax.Array


def averaged(validate_at: ValidateAt, window: int) -> int:
    """How many of the window's last parameter vectors are averaged for validation; 1: the last."""
    count = {"last": 1, "mean": window}.get(str(validate_at), validate_at)
    if isinstance(count, float) and 0 < count <= 1:
        count = max(round(count * window), 1)
    if not isinstance(count, int) or not 1 <= count <= window:
        raise ValueError(
            f"validate_at={validate_at!r} is not possible in a window of {window} steps: choose "
            "'last' (the last parameters), 'mean' (their mean over the window), an integer (the "
            "mean of that many last ones), or a float up to 1.0 (that share of the window)."
        )
    return count


def begin(problem: Problem, hyper: Any, inner: Any, key: jax.Array, count: int) -> Progress:
    """The start of a window: at `inner`, or at a fresh start inside the gradient if it is None.

    `count` is how many last parameter vectors will be averaged.
    """
    inner = problem.init(hyper, key) if inner is None else inner
    total = None
    if count > 1:
        # Wide: a sum of bfloat16 parameters stops growing at 256 times one of them.
        total = jax.tree.map(
            lambda p: jnp.zeros_like(widen(p)) if is_inexact(p) else None, inner.params
        )
    return Progress(inner, total, jnp.int32(-1))


def one_step(
    problem: Problem,
    hyper: Any,
    train: Any,
    key: jax.Array,
    offset: jax.typing.ArrayLike,
    count: int = 1,
) -> Callable[[Progress, tuple[jax.Array, Any]], Progress]:
    """`(progress, (t, batch)) -> progress`; `offset` is the steps done before the window."""
    step = training_steps(problem, hyper, train, key, offset)
    first_averaged = num_steps(train) - count

    def advance(progress: Progress, x: tuple[jax.Array, Any]) -> Progress:
        t, batch = x
        inner = step(progress.inner, t, batch)
        total = progress.total
        if total is not None:
            total = _map_averaged(
                lambda s, p: None if s is None else s + jnp.where(t >= first_averaged, p, 0),
                total,
                inner.params,
            )
        # A state that shows its training loss spares a pass over all parameters in every step.
        finite = all_finite(inner.loss if hasattr(inner, "loss") else inner.params)
        bad = (progress.first_bad_step < 0) & ~finite
        return Progress(inner, total, jnp.where(bad, t, progress.first_bad_step))

    return advance


def through(
    problem: Problem,
    hyper: Any,
    progress: Progress,
    train: Any,
    key: jax.Array,
    offset: jax.typing.ArrayLike,
    count: int = 1,
) -> Progress:
    """All K steps of `train` from `progress`; `offset` and `count` as in `one_step`."""
    advance = one_step(problem, hyper, train, key, offset, count)
    return jax.lax.scan(lambda p, x: (advance(p, x), None), progress, step_inputs(train))[0]


def judged(progress: Progress, count: int) -> Any:
    """The parameters that are validated: the last, or the mean over the last `count`."""
    if progress.total is None:
        return progress.inner.params
    return _map_averaged(
        lambda s, p: p if s is None else (s / count).astype(p.dtype),
        progress.total,
        progress.inner.params,
    )


def _map_averaged(f: Callable[[Any, Any], Any], total: Any, params: Any) -> Any:
    # None marks the leaves that have no mean (counters); it must count as a leaf here.
    return jax.tree.map(f, total, params, is_leaf=lambda s: s is None)


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
    steps = num_steps(train)
    count = averaged(validate_at, steps)
    progress = begin(problem, hyper, inner, key, count)
    offset = steps_done(progress.inner)
    progress = through(problem, hyper, progress, train, key, offset, count)
    params = judged(progress, count)
    return validation_loss(problem, params, hyper, valid, key, offset + steps), progress
