"""What an estimator is given, a window of training, and what it gives, a hypergradient."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.data.batches import Minibatches, last_batch, num_steps, step_inputs
from hypergrad.data.streams import refuse_missing_axis
from hypergrad.estimators.memory import compiled_for, shapes_of
from hypergrad.estimators.recompute import scan
from hypergrad.problem.eager import naming_closures
from hypergrad.problem.inner_gradient import while_true
from hypergrad.problem.problem import (
    Inner,
    Problem,
    judged_params,
    steps_done,
    training_steps,
    validation_loss,
)
from hypergrad.problem.structure import naming_missing, require_reach, require_slope, require_use
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Params,
    Scalar,
    State,
    Train,
    Tree,
    all_finite,
    is_inexact,
    row,
    select,
    widen,
    zeros,
)

ValidateAt = Literal["last", "mean"] | int | float


class Progress(NamedTuple):
    """What a window carries from step to step.

    Attributes:
      inner: the training state.
      total: the sum of the parameter vectors that are averaged, or None: the last are judged.
      first_bad_step: int32, the first step of the window whose training loss (`inner.loss`, or
        where there is none, whose parameters) is not finite; -1.
    """

    inner: InnerState
    total: Tree
    first_bad_step: jax.Array


Step = Callable[[Progress, tuple[jax.Array, Batch]], Progress]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inner", "train", "valid", "key", "limit", "end"],
    meta_fields=["problem", "averaged"],
)
@dataclasses.dataclass(frozen=True)
class Window:
    """K training steps and the validation loss after them, which is what estimators differentiate.

    `loss, progress = window.objective(hyper)` is E in its plainest form. The other methods are its
    parts, for estimators that follow training step by step:
    `begin`, then K times the step that `one_step` gives, then `loss` of what is `judged`.
    A pytree; the problem is static.

    Attributes:
      problem: what is trained and judged.
      inner: the training state before the first step; None: a fresh start, inside the gradient.
      train: K batches, leaves `[K, batch, ...]`, or a `Minibatches`.
      valid: one batch, or a `Minibatches`.
      key: step t of the run uses `jax.random.fold_in(key, t)`.
      averaged: how many of the last parameter vectors are judged, by their mean; see `judging`.
      limit: int32, after how many of the K steps training stands still; None: after none.
      end: int32, after how many of them what is judged ends; None: after all.
    """

    problem: Problem
    inner: InnerState | None
    train: Train
    valid: Batch
    key: Key
    averaged: int = 1
    limit: jax.Array | None = None
    end: jax.Array | None = None

    @property
    def num_steps(self) -> int:
        """K."""
        return num_steps(self.train)

    def objective(self, hyper: Hyper) -> tuple[Scalar, Progress]:
        """The validation loss after the K steps, and where training then stands."""
        start = self.begin(hyper)
        offset = steps_done(start.inner)
        end = self.through(hyper, start, offset)
        return self.loss(self.judged(end), hyper, offset), end

    def judging(self, validate_at: ValidateAt, within: int | None = None) -> "Window":
        """The same window, judged where `validate_at` says (see `Unrolled`).

        `within` is how many of its last steps are differentiated; None for all.
        """
        steps = self.num_steps if within is None else within
        count = {"last": 1, "mean": steps}.get(str(validate_at), validate_at)
        if isinstance(count, float) and 0 < count <= 1:
            count = max(round(count * steps), 1)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= steps:
            raise ValueError(
                f"validate_at={validate_at!r} is not possible in a window of {steps} steps: choose "
                "'last' (the last parameters), 'mean' (their mean over the window), an integer "
                "(the mean of that many last ones), or a float up to 1.0 (that share of the "
                "window)."
            )
        return dataclasses.replace(self, averaged=count)

    def start(self, hyper: Hyper) -> InnerState:
        """`inner`, or a fresh start inside the gradient if that is None."""
        return self.problem.init(hyper, self.key) if self.inner is None else self.inner

    def begin(self, hyper: Hyper) -> Progress:
        """The progress before the first step."""
        inner, total = self.start(hyper), None
        if self.averaged > 1:
            # Wide: a sum of bfloat16 parameters stops growing at 256 times one of them.
            total = jax.tree.map(
                lambda p: zeros(widen(p)) if is_inexact(p) else None,
                judged_params(self.problem, inner),
            )
        return Progress(inner, total, jnp.int32(-1))

    def one_step(self, hyper: Hyper, offset: jax.typing.ArrayLike) -> Step:
        """`(progress, (t, batch)) -> progress`; `offset` is the steps done before the window."""
        step = training_steps(self.problem, hyper, self.train, self.key, offset)
        if self.limit is not None:
            step = self._up_to(self.limit, hyper, offset)
        first_averaged = (self.num_steps if self.end is None else self.end) - self.averaged

        def advance(progress: Progress, x: tuple[jax.Array, Batch]) -> Progress:
            t, batch = x
            inner = step(progress.inner, t, batch)
            total = progress.total
            if total is not None:
                total = _map_averaged(
                    lambda s, p: None if s is None else s + jnp.where(t >= first_averaged, p, 0),
                    total,
                    judged_params(self.problem, inner),
                )
            # A state that shows its training loss spares a pass over all parameters in every step.
            finite = all_finite(inner.loss if hasattr(inner, "loss") else inner.params)
            bad = (progress.first_bad_step < 0) & ~finite
            return Progress(inner, total, jnp.where(bad, t, progress.first_bad_step))

        return advance

    def _up_to(
        self, limit: jax.Array, hyper: Hyper, offset: jax.typing.ArrayLike
    ) -> Callable[[Any, jax.Array, Any], Any]:
        """`training_steps` that stand still after `limit` of them."""

        def run(inner: InnerState, t: jax.Array, batch: Batch) -> Any:
            goes = t < limit
            # Not a shorter scan: its length is static, and every one would be a program of its own.
            # Not a branch: it would hold the state twice, and a GPU would wait for it in each step.
            now, under = while_true(goes, (inner, hyper))
            step = training_steps(self.problem, under, self.train, self.key, offset)
            return select(goes, step(now, t, batch), inner)

        return run

    def through(self, hyper: Hyper, progress: Progress, offset: jax.typing.ArrayLike) -> Progress:
        """All K steps from `progress`."""
        return scan(self.one_step(hyper, offset), progress, step_inputs(self.train))

    def trained(
        self,
        hyper: Hyper,
        progress: Progress,
        offset: jax.typing.ArrayLike,
        steps: int | None = None,
    ) -> Progress:
        """The first `steps` of the K steps from `progress`, None for all, without a derivative.

        Under a `limit` these are as many rounds of a loop, and no step is taken in vain.
        """
        steps = self.num_steps if steps is None else steps
        taken = steps if self.limit is None else jnp.minimum(self.limit, steps)
        step = dataclasses.replace(self, limit=None).one_step(hyper, offset)
        inputs = step_inputs(self.train)  # whole: the first ones of them would be a copy
        return jax.lax.fori_loop(0, taken, lambda t, p: step(p, row(inputs, t)), progress)

    def judged(self, progress: Progress) -> Params:
        """The parameters that are validated: the last, or the mean over the last `averaged`."""
        params = judged_params(self.problem, progress.inner)
        if progress.total is None:
            return params
        return _map_averaged(
            lambda s, p: p if s is None else (s / self.averaged).astype(p.dtype),
            progress.total,
            params,
        )

    def loss(self, params: Params, hyper: Hyper, offset: jax.typing.ArrayLike) -> Scalar:
        """The validation loss of `params` after the window's K steps."""
        step = offset + self.num_steps
        return validation_loss(self.problem, params, hyper, self.valid, self.key, step)


def _map_averaged(f: Callable[[Any, Any], Any], total: Tree, params: Params) -> Tree:
    # None marks the leaves that have no mean (counters); it must count as a leaf here.
    return jax.tree.map(f, total, params, is_leaf=lambda s: s is None)


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

    loss: Scalar
    grad: Hyper
    inner: InnerState
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

    def init(self, window: Window, hyper: Hyper) -> State:
        """The state before the first estimate; `()` for an estimator without memory.

        Only `problem`, `inner` and `key` of this window need be there: no data were seen yet.
        """
        return ()

    @abc.abstractmethod
    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """Advances training by the K steps of the window and differentiates its objective."""

    def resolve(self, window: Window, hyper: Hyper) -> "Estimator":
        """The estimator that does the work on a window of these shapes: itself, unless it chooses.

        Reads shapes only, so that tuners can ask while they are traced.
        """
        return self

    def check_structure(self, window: Window, hyper: Hyper) -> None:
        """Raises where a gradient would be missing by structure; traces once, runs nothing."""
        if not self.perturbs:
            require_smooth_losses(window, hyper)
        check = require_use if self.perturbs else require_reach
        check(lambda hyper: window.objective(hyper)[0], hyper)


def require_smooth_losses(window: Window, hyper: Hyper) -> None:
    """Refuses an accuracy where a loss belongs; traces both losses once."""
    problem, key = window.problem, window.key
    inner = jax.eval_shape(window.start, hyper)
    valid = window.valid
    if isinstance(valid, Minibatches):
        valid = jax.eval_shape(lambda valid, key: valid.batch(0, key), valid, key)
    params = jax.eval_shape(lambda inner: judged_params(problem, inner), inner)
    require_slope("valid_loss", problem.valid_loss, params, hyper, valid, key)
    # By hand, a problem may train by other gradients than those of its training loss.
    if isinstance(inner, Inner):
        batch = jax.eval_shape(lambda train, key: last_batch(train, key, 0), window.train, key)
        require_slope("train_loss", problem.train_loss, inner.params, hyper, batch, key)


def checked_estimate(
    estimator: Estimator, window: Window, hyper: Hyper, state: State
) -> tuple[Estimate, State]:
    """`estimator.estimate`, resolved, behind the structure check, which traces and runs nothing.

    Raises:
      ValueError: a gradient would be missing by structure, or a loss closes over a traced value.
    """
    estimator = estimator.resolve(window, hyper)
    require_structure(estimator, window, hyper)
    try:
        with naming_closures():
            result = estimator.estimate(window, hyper, state)
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        raise ValueError(
            "A function of the problem holds a loop of unknown length (jax.lax.while_loop, the "
            "line search of optax.lbfgs), which reverse mode cannot pass: use hypergrad.Forward(), "
            "or a loop of known length (jax.lax.scan)."
        ) from error
    pair = type(result) is tuple and len(result) == 2
    if not pair or not isinstance(result[0], Estimate):
        raise TypeError(
            f"estimator={estimator!r}: its estimate returned a {type(result).__name__}: return "
            "(hypergrad.Estimate(loss, grad, inner, info), state)."
        )
    return result


def refuse_wrong_place(validate_at: ValidateAt) -> None:
    """Refuse what no window could be judged at; `Window.judging` knows its length."""
    if validate_at in ("last", "mean") and isinstance(validate_at, str):
        return
    share = isinstance(validate_at, float) and 0 < validate_at <= 1
    if not share and not (checks.is_integer(validate_at) and validate_at >= 1):  # type: ignore[operator]
        raise ValueError(
            f"validate_at={validate_at!r} is no place: choose 'last', 'mean', an integer (the mean "
            "of that many last parameters), or a float up to 1.0 (that share of the window)."
        )


def require_structure(estimator: Estimator, window: Window, hyper: Hyper) -> None:
    """`estimator.check_structure`; a name that `hyper` lacks becomes an error that says so.

    Raises:
      ValueError: the problem reads a hyperparameter that is not there, or a gradient would be
        missing by structure.
    """
    _check_train(window.train, window.valid)
    with naming_missing(hyper):
        estimator.check_structure(window, hyper)


def _check_train(train: Train, valid: Batch) -> None:
    """Refuses data without an axis K, as `fit` does; but here a list is a pytree like any other."""
    num_steps(train)
    train, valid = (tuple(x) if isinstance(x, list) else x for x in (train, valid))
    axes = [jnp.ndim(leaf) for leaf in jax.tree.leaves(train)]
    # One array of vectors is as good as K steps of a vector each.
    if len(axes) > 1 and max(axes) > 1:
        refuse_missing_axis(train, valid)


def compiled_estimate(estimator: Estimator, window: Window, hyper: Hyper) -> jax.stages.Compiled:
    """One estimate from the estimator's first state, compiled for inputs of these shapes.

    Call it with (window, hyper), or ask it what memory it needs. The last few are kept, so that
    asking again, or running what was asked about, compiles nothing.
    """
    leaves, treedef = jax.tree.flatten(shapes_of((window, hyper)))
    # Programs also depend on what new arrays become.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    around = (jnp.result_type(float), device)
    try:
        hash(window.problem)
    except TypeError:
        return _compiled.__wrapped__(estimator, treedef, tuple(leaves), around)
    return _compiled(estimator, treedef, tuple(leaves), around)


@functools.lru_cache(maxsize=16)
def _compiled(
    estimator: Estimator, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], around: Any
) -> jax.stages.Compiled:
    def run(window: Window, hyper: Hyper) -> Estimate:
        return estimator.estimate(window, hyper, estimator.init(window, hyper))[0]

    return compiled_for(run, *treedef.unflatten(leaves))


def summary(loss: Scalar, grad: Hyper, first_bad_step: jax.Array) -> dict[str, jax.Array]:
    """The part of `info` that every estimator gives."""
    return {"finite": all_finite((loss, grad)), "first_bad_step": first_bad_step}
