"""What an estimator is: advance training K steps, return the gradient of the validation loss."""

import abc
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.estimators.memory import compiled_for, shapes_of
from hypergrad.problem.problem import Problem
from hypergrad.problem.structure import naming_missing, require_reach, require_use
from hypergrad.problem.window import objective
from hypergrad.trees import all_finite, is_inexact, widen


class Estimate(NamedTuple):
    """One hypergradient and the training it came with.

    Attributes:
      loss: the validation loss after the K steps, a scalar.
      grad: its gradient in `hyper`, in raw (the user's) units; the structure of `hyper`.
      inner: the training state after the K steps: go on from here.
      info: a dict of scalars. Always `finite` (bool: loss and gradient are) and `first_bad_step`
        (int32: the first step of the window whose parameters are not finite, -1 if none); more
        where the estimator can say more about its trustworthiness.
    """

    loss: jax.Array
    grad: Any
    inner: Any
    info: dict[str, jax.Array]


class Estimator(abc.ABC):
    """Base of all estimators: subclass it as a frozen dataclass and write `estimate`.

    What an estimator remembers between calls (tangents, a warm linear solve, particles) lives in
    the `state` that `init` makes and `estimate` returns; the object itself only configures.
    """

    # Whether the estimate moves `hyper` by finite amounts instead of differentiating: hard masks
    # and the like are fine then, and tuners hand over unit coordinates, in which one step size
    # suits every hyperparameter.
    perturbs: ClassVar[bool] = False

    def init(self, problem: Problem, hyper: Any, inner: Any, key: jax.Array) -> Any:
        """The state before the first estimate; `()` for an estimator without memory."""
        return ()

    @abc.abstractmethod
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
        """Advances `inner` by the K steps of `train` and differentiates the validation loss.

        `inner` None means: start from `problem.init(hyper, key)` inside the gradient.
        """

    def resolve(
        self, problem: Problem, hyper: Any, inner: Any, train: Any, valid: Any, key: jax.Array
    ) -> "Estimator":
        """The estimator that does the work on inputs of these shapes: itself, unless it chooses.

        Reads shapes only, so that tuners can ask while they are traced.
        """
        return self

    def check_structure(
        self, problem: Problem, hyper: Any, inner: Any, train: Any, valid: Any, key: jax.Array
    ) -> None:
        """Raises where a gradient would be missing by structure; traces once, runs nothing."""

        def loss(hyper: Any) -> jax.Array:
            return objective(problem, hyper, inner, train, valid, key)[0]

        (require_use if self.perturbs else require_reach)(loss, hyper)


def checked_estimate(
    estimator: Estimator,
    problem: Problem,
    hyper: Any,
    inner: Any,
    train: Any,
    valid: Any,
    key: jax.Array,
    state: Any,
) -> tuple[Estimate, Any]:
    """`estimator.estimate`, resolved, behind the structure check, which traces and runs nothing.

    Raises:
      ValueError: a gradient would be missing by structure, or a loss closes over a traced value.
    """
    estimator = estimator.resolve(problem, hyper, inner, train, valid, key)
    require_structure(estimator, problem, hyper, inner, train, valid, key)
    try:
        return estimator.estimate(problem, hyper, inner, train, valid, key, state)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "A function of the problem closes over a traced value, whose derivative would be lost. "
            "Pass every hyperparameter through the `hyper` argument, and data through `batch`."
        ) from error


def require_structure(
    estimator: Estimator,
    problem: Problem,
    hyper: Any,
    inner: Any,
    train: Any,
    valid: Any,
    key: jax.Array,
) -> None:
    """`estimator.check_structure`; a name that `hyper` lacks becomes an error that says so.

    Raises:
      ValueError: the problem reads a hyperparameter that is not there, or a gradient would be
        missing by structure.
    """
    with naming_missing(hyper):
        estimator.check_structure(problem, hyper, inner, train, valid, key)


def compiled_estimate(
    estimator: Estimator,
    problem: Problem,
    hyper: Any,
    inner: Any,
    train: Any,
    valid: Any,
    key: jax.Array,
) -> Any:
    """One estimate from the estimator's first state, compiled for inputs of these shapes.

    Call it with (hyper, inner, train, valid, key), or ask it what memory it needs. The last few are
    kept, so that asking again, or running what was asked about, compiles nothing.
    """
    leaves, treedef = jax.tree.flatten(shapes_of((hyper, inner, train, valid, key)))
    # Programs also depend on what new arrays become.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    around = (jnp.result_type(float), device)
    try:
        hash(problem)
    except TypeError:
        return _compiled.__wrapped__(estimator, problem, treedef, tuple(leaves), around)
    return _compiled(estimator, problem, treedef, tuple(leaves), around)


@functools.lru_cache(maxsize=16)
def _compiled(
    estimator: Estimator, problem: Problem, treedef: Any, leaves: tuple[Any, ...], around: Any
) -> Any:
    def run(hyper: Any, inner: Any, train: Any, valid: Any, key: jax.Array) -> Estimate:
        state = estimator.init(problem, hyper, inner, key)
        return estimator.estimate(problem, hyper, inner, train, valid, key, state)[0]

    return compiled_for(run, *treedef.unflatten(leaves))


def strong(hyper: Any) -> Any:
    """`hyper` as strongly typed arrays of at least float32: weakly typed scalars recompile."""
    return jax.tree.map(lambda x: widen(x) if is_inexact(x) else jnp.asarray(x), hyper)


def summary(loss: jax.Array, grad: Any, first_bad_step: jax.Array) -> dict[str, jax.Array]:
    """The part of `info` that every estimator gives."""
    return {"finite": all_finite((loss, grad)), "first_bad_step": first_bad_step}
