"""One hypergradient, in plain JAX."""

import functools
from typing import Literal

import jax

from hypergrad.checks import having, numbers, random_key
from hypergrad.estimators.auto import Auto
from hypergrad.estimators.base import Estimate, Estimator, ValidateAt, Window, checked_estimate
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.eager import compiled_for_each
from hypergrad.problem.mistakes import refuse_no_problem
from hypergrad.problem.problem import Problem
from hypergrad.trees import Batch, Hyper, InnerState, Key, Train, leaf_names, strong


def hypergradient(
    problem: Problem,
    hyper: Hyper,
    inner: InnerState | None,
    train: Train,
    valid: Batch,
    key: Key,
    estimator: Estimator | Literal["auto"] = Unrolled(),  # noqa: B008  frozen, so safe to share
) -> Estimate:
    """The gradient of the validation loss after K training steps, with respect to `hyper`.

    Args:
      problem: what is trained and judged.
      hyper: any pytree of floats and inexact arrays, in raw units.
      inner: the training state to start from (`problem.init(hyper, key)`), or None to start from a
        fresh one inside the gradient (learned starts, initial scales).
      train: K batches, a pytree with leaves `[K, batch, ...]`, or a `Minibatches`.
      valid: one validation batch (no K axis), or a `Minibatches`.
      key: randomness of the steps; step t of the run uses `jax.random.fold_in(key, t)`.
      estimator: the default is exact reverse mode through all K steps; "auto" is the cheapest exact
        one that fits the device's memory.

    An estimator with memory between calls starts afresh here; call its `init` and `estimate` to
    keep it. Pure and jit-able; the cost is the estimator's. Outside of `jax.jit` it is compiled at
    the first call with a problem, an estimator and shapes, and kept with the problem.

    Raises:
      ValueError: an integer hyperparameter, one that never reaches the validation loss, `train`
        leaves that disagree on K, a loss that is no scalar. Values that are not finite are not
        raised from compiled code but reported in `info`.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> hyper, key = {"lr": 0.25}, jax.random.key(0)
    >>> one_step = jnp.ones((1, 3))
    >>> hypergradient(problem, hyper, None, one_step, one_step[0], key).grad["lr"]
    Array(-2., dtype=float32)
    """
    refuse_no_problem(problem)
    random_key("key", key)
    hyper = checked_hyper(hyper)
    if inner is not None:
        having("inner", inner, ("params",), "problem.init(hyper, key), or None")
    estimator = as_estimator(estimator)
    estimate = compiled_for_each(problem, estimator, functools.partial(_estimate, estimator))
    return estimate(hyper, inner, train, valid, key)


def _estimate(
    estimator: Estimator,
    problem: Problem,
    hyper: Hyper,
    inner: InnerState | None,
    train: Train,
    valid: Batch,
    key: Key,
) -> Estimate:
    window = Window(problem, inner, train, valid, key)
    return checked_estimate(estimator, window, hyper, estimator.init(window, hyper))[0]


def checked_hyper(hyper: Hyper) -> Hyper:
    """`hyper` as strong arrays; refuses what is none by its name."""
    for name, leaf in zip(leaf_names(hyper), jax.tree.leaves(hyper), strict=True):
        if not hasattr(leaf, "dtype"):
            numbers(f"hyper[{name!r}]", leaf)
    return strong(hyper)


def as_estimator(
    estimator: Estimator | Literal["auto"], validate_at: ValidateAt = "last"
) -> Estimator:
    """A tuner's argument as an estimator: "auto" becomes `Auto`."""
    if isinstance(estimator, Estimator):
        return estimator
    if estimator == "auto":
        return Auto(validate_at)
    raise ValueError(
        f"estimator={estimator!r} is no estimator: give one such as hypergrad.Unrolled(), or "
        "'auto'."
    )
