"""What is trained and what is judged: the bilevel problem as four pure functions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import checks
from hypergrad.data.batches import Minibatches, step_inputs
from hypergrad.data.keys import SHUFFLE, VALID
from hypergrad.problem.eager import compiled_for_each
from hypergrad.problem.inner_gradient import inner_gradient, with_aux
from hypergrad.problem.mistakes import explained, refuse_modules
from hypergrad.problem.optimizer import check_optimizer, first_opt_state, optimizer_update
from hypergrad.problem.skips import skipping
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Params,
    Train,
    Tree,
    cast_like,
    is_inexact,
)


class _Functions(NamedTuple):
    init: Callable[..., Any]
    step: Callable[..., Any]
    train_loss: Callable[..., Any]
    valid_loss: Callable[..., Any]
    metrics: Callable[..., Any] | None = None
    evaluate: Callable[..., Any] | None = None


class Problem(_Functions):
    """A bilevel problem: how training starts and advances, and what is judged.

    `bilevel` fills it from losses and an optax optimiser; fill it by hand for anything else (an RL
    inner loop, a solver of your own). The four functions must be pure and traceable.

    Attributes:
      init: `(hyper, key) -> inner`; `inner` is any pytree with an attribute `params`. If it also
        has an integer attribute `step`, the steps done so far, then keys and minibatches go on
        where the last call stopped, so that windows of 5 + 5 steps equal one of 10.
      step: `(inner, hyper, batch, key) -> inner`, one training step; same structure and dtypes.
        Use `hypergrad.inner_gradient` inside for the fast, small reverse mode; `jax.grad` works.
      train_loss: `(params, hyper, batch, key) -> scalar`.
      valid_loss: `(params, hyper, batch, key) -> scalar`, the outer objective.
      metrics: optional `(params, hyper, batch, key) -> {name: scalar}` for reports.
      evaluate: optional `inner -> params`, what `valid_loss` and `metrics` receive where that is
        not `inner.params`.

    A NamedTuple, with a dictionary for what is compiled for it (`compiled_for_each`).
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self)


class Inner(NamedTuple):
    """The training state of a `bilevel` problem.

    Attributes:
      params: what the losses receive: the parameters, or all variables (batch statistics too).
      opt_state: the optax optimiser's state, of the trainable part of `params`.
      step: int32, training steps done.
      loss: the last step's training loss; 0 before the first.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    loss: jax.Array


def bilevel(
    init_params: Callable[[jax.Array], Any],
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    trainable: str | Sequence[str] | None = None,
    absorb: Callable[[Any, Any], Any] | None = None,
    metrics: Callable[..., Any] | None = None,
    mixed_mode: bool = True,
    evaluate: Callable[[Any, Any], Any] | None = None,
) -> Problem:
    """A `Problem` from two losses and an optax optimiser built from hyperparameters.

    Args:
      init_params: `key -> params`, any pytree. For a start that hyperparameters shape, replace
        `problem.init`, see `Problem`.
      train_loss: `(params, hyper, batch, key) -> scalar` or `(scalar, aux)`.
      valid_loss: the same signature, judged without noise; an `aux` is ignored.
      optimizer: `hyper -> optax transformation`. It is called inside the traced program with
        traced values, which costs nothing. Rates kept in the optimiser's state
        (`optax.inject_hyperparams`) get no gradient from `hyper` and are refused.
      trainable: what the optimiser sees of a mapping `params` (dict, FrozenDict, `nnx.State`): the
        value under one key, `"params"` for flax variables with batch statistics, which would
        otherwise be decayed, so that its state is that of a flax `TrainState`; or the mapping of
        several keys. None: everything.
      absorb: `(params, aux) -> params`, how the training loss's `aux` re-enters after each step
        (new batch statistics), with the structure of `params`. None: it does not.
      metrics: optional `(params, hyper, batch, key) -> {name: scalar}`.
      mixed_mode: False takes the training gradient by plain `jax.grad`: slower, and differentiable
        to any order, as a problem needs that stands inside another one's training loss.
      evaluate: `(params, opt_state) -> params`, the parameters that are judged where they are not
        the trained ones: an exponential moving average kept by the optimiser,
        `optax.contrib.schedule_free_eval_params`, lookahead's slow ones (docs/recipes.md). The
        hypergradient flows through it; `problem.evaluate(inner)` gives the parameters to keep.

    The training gradient is `inner_gradient`'s (mixed mode), and passes through
    `nonzero_gradient`, so that Adam's square root has a derivative everywhere.

    Parameters of bfloat16 keep their dtype, hypergradients that of `hyper`: within 5% of those of
    float32 parameters over 10 steps (tests/test_adapters.py); over 100 the runs themselves part.
    Float32 parameters that compute in bfloat16 (flax's `dtype=`) do not lose small updates.

    Raises:
      ValueError: a loss that is no scalar; an optimiser that keeps its rates in its state; a
        `trainable` key that `params` lacks; an `absorb` that changes the structure of `params`.

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> inner = problem.init({"lr": 0.25}, jax.random.key(0))
    >>> float(problem.step(inner, {"lr": 0.25}, jnp.ones(3), jax.random.key(0)).params)
    0.5
    """
    checks.function("init_params", init_params, "key")
    check_optimizer(optimizer)
    train_pair = _loss("train_loss", train_loss)
    valid_pair = _loss("valid_loss", valid_loss)
    for name, optional, arguments in (
        ("absorb", absorb, ("params", "aux")),
        ("metrics", metrics, ("params", "hyper", "batch", "key")),
        ("evaluate", evaluate, ("params", "opt_state")),
    ):
        if optional is not None:
            checks.function(name, optional, *arguments)

    def loss_of_trainable(trained: Params, rest: Tree, batch: Batch, key: Key) -> Any:
        hyper, frozen = rest
        return train_pair(_merge(trained, frozen, trainable), hyper, batch, key)

    gradient = inner_gradient(loss_of_trainable, mixed_mode=mixed_mode)

    def init(hyper: Hyper, key: Key) -> Inner:
        with explained("init_params"):
            params = init_params(key)
        refuse_modules(params)
        params = cast_like(params, params)  # strong dtypes: weak ones recompile at the next window
        opt_state = first_opt_state(optimizer, hyper, _split(params, trainable)[0])
        opt_state = cast_like(opt_state, opt_state)
        return Inner(params, opt_state, jnp.zeros((), jnp.int32), zero_loss(params))

    def step(inner: Inner, hyper: Hyper, batch: Batch, key: Key) -> Inner:
        trained, frozen = _split(inner.params, trainable)
        # The frozen part (batch statistics) depends on hyper through earlier steps, so it travels
        # where derivatives flow.
        grads, (loss, aux) = gradient(trained, (hyper, frozen), batch, key)
        grads = nonzero_gradient(grads)
        # Lookahead trains the fast ones of its two sets of parameters, and moves both.
        grads = grads.fast if isinstance(grads, optax.LookaheadParams) else grads
        # Functions of the parameters, for line searches and for optimisers that look around.
        at = (hyper, frozen), batch, key
        extra = {
            "value": loss,
            "grad": grads,
            # optax's line searches want every other keyword to be one of this function's.
            "value_fn": lambda params, grad_fn=None: loss_of_trainable(params, *at)[0],
            "grad_fn": lambda params, _: nonzero_gradient(gradient(params, *at)[0]),
        }
        updates, opt_state = optimizer_update(
            optimizer, hyper, grads, inner.opt_state, trained, extra
        )
        moved = optax.apply_updates(trained, updates)
        # Decay would eat integer leaves (counters): 5 - 0.01 is 4 as an integer.
        moved = jax.tree.map(lambda new, old: new if is_inexact(old) else old, moved, trained)
        params = _merge(moved, frozen, trainable)
        params = params if absorb is None else absorb(params, aux)
        _refuse_other_structure(params, inner.params)
        # A float32 rate promotes a bfloat16 momentum; the state must keep its dtypes in a scan.
        params, opt_state = cast_like((params, opt_state), (inner.params, inner.opt_state))
        return Inner(params, opt_state, inner.step + 1, loss.astype(inner.loss.dtype))

    def plain_valid_loss(params: Params, hyper: Hyper, batch: Batch, key: Key) -> jax.Array:
        return valid_pair(params, hyper, batch, key)[0]

    def plain_train_loss(params: Params, hyper: Hyper, batch: Batch, key: Key) -> jax.Array:
        return train_pair(params, hyper, batch, key)[0]

    def judged(inner: Inner) -> Params:
        assert evaluate is not None
        with explained("evaluate"):
            return evaluate(inner.params, inner.opt_state)

    functions = init, step, plain_train_loss, plain_valid_loss, metrics
    return Problem(*functions, None if evaluate is None else judged)


def _loss(name: str, loss: Callable[..., Any]) -> Callable[..., tuple[jax.Array, Tree]]:
    pair = with_aux(checks.function(name, loss, "params", "hyper", "batch", "key"), name)

    def checked(*args: Any) -> tuple[jax.Array, Tree]:
        with explained(name):
            return pair(*args)

    return checked


def judged_params(problem: Problem, inner: InnerState) -> Params:
    """What the validation loss is taken of: the parameters, or what `problem.evaluate` makes."""
    return inner.params if problem.evaluate is None else problem.evaluate(inner)


def require_inner(inner: InnerState) -> None:
    """Raises TypeError for anything but the training state of a `bilevel` problem."""
    if not isinstance(inner, Inner):
        raise TypeError(
            f"inner is a {type(inner).__name__}: give the training state of a tuner's state, "
            "state.inner, of what fit returns, result.state.inner, or of rollout."
        )


def zero_loss(params: Params) -> jax.Array:
    """`Inner.loss` before the first step, in at least float32."""
    floats = [x for x in jax.tree.leaves(params) if is_inexact(x)]
    return jnp.zeros((), jnp.result_type(jnp.float32, *floats))


def nonzero_gradient(grads: Tree) -> Tree:
    """Gradients with every entry below 1e-16 in size moved to that size, its derivative kept.

    `sqrt(v)` has no finite derivative at v = 0, and optax's Adam and its kin take it of every
    squared gradient that was never anything but zero (constant input columns, dead units), or so
    small that its square is zero in float32: the hypergradient is then NaN. With entries of 1e-16
    the square is 1e-32, representable in float32, and an Adam step with eps=1e-8 moves such a
    weight by 1e-8 of a step; nothing else changes.
    `bilevel` applies it; use it in a hand-filled `step` in front of an Adam-like optimiser.
    float16 cannot hold 1e-16 and gets no protection.

    >>> float(nonzero_gradient(jnp.array([0.0, 2.0]))[0] > 0)
    1.0
    """

    def lift(g: jax.Array) -> jax.Array:
        if not is_inexact(g):
            return g
        least = jnp.asarray(1e-16, g.dtype)
        lifted = jnp.where(g < 0, -least, least)
        return g + jax.lax.stop_gradient(jnp.where(jnp.abs(g) < least, lifted, 0))

    return jax.tree.map(lift, grads)


def rollout(problem: Problem, hyper: Hyper, inner: InnerState, train: Train, key: Key) -> Any:
    """The training state after all K steps of `train`, from `inner`.

    Outside of `jax.jit` it is compiled at its first call. `train` is a pytree whose leaves have a
    leading axis `[K, ...]`, or a `Minibatches`. Step t of the run (counted in `inner.step` where
    that exists) uses `jax.random.fold_in(key, t)`.
    Cost: K training steps; memory independent of K under `Minibatches`.

    Raises:
      ValueError: leaves of `train` that disagree on K.
    """
    return compiled_for_each(problem, "rollout", _rollout)(hyper, inner, train, key)


def _rollout(problem: Problem, hyper: Hyper, inner: InnerState, train: Train, key: Key) -> Any:
    run = training_steps(problem, hyper, train, key, steps_done(inner))
    batches = step_inputs(train)
    return jax.lax.scan(lambda state, x: (run(state, *x), None), inner, batches)[0]


def training_steps(
    problem: Problem, hyper: Hyper, train: Train, key: Key, offset: jax.typing.ArrayLike
) -> Callable[[Any, jax.Array, Any], Any]:
    """`(inner, t, batch) -> inner` for the K steps of `train`, to be scanned over `step_inputs`."""
    shuffle = jax.random.fold_in(key, SHUFFLE)

    def run(inner: InnerState, t: jax.Array, batch: Batch) -> Any:
        step = t + offset
        if isinstance(train, Minibatches):
            batch = train.batch(step, shuffle)
        return skipping(problem.step)(inner, hyper, batch, jax.random.fold_in(key, step))

    return run


def steps_done(inner: InnerState) -> jax.typing.ArrayLike:
    """The training steps behind `inner`: its `step`, or 0 for a state that does not count."""
    return getattr(inner, "step", 0)


def run_key(key: Key, inner: InnerState, updates: jax.Array) -> Key:
    """The key of the next window of a run that goes on, after `updates` windows.

    A state that counts its steps goes on in one stream; one that does not gets a new stream.
    """
    return key if hasattr(inner, "step") else jax.random.fold_in(key, updates)


def validation_loss(
    problem: Problem,
    params: Params,
    hyper: Hyper,
    valid: Batch,
    key: Key,
    step: jax.typing.ArrayLike,
) -> jax.Array:
    """The outer objective at `params`; a `Minibatches` gives the batch numbered by `step`."""
    # By the step, not by a count of calls: a resumed run must be judged on the same batch.
    key = jax.random.fold_in(jax.random.fold_in(key, VALID), step)
    if isinstance(valid, Minibatches):
        valid = valid.batch(0, key)
    loss = problem.valid_loss(params, hyper, valid, key)
    if jnp.shape(loss) != ():
        raise ValueError(
            f"valid_loss returned an array of shape {jnp.shape(loss)}, not a scalar. Take a mean "
            "or a sum over the batch."
        )
    return loss


def _split(params: Params, trainable: str | Sequence[str] | None) -> tuple[Any, Any]:
    if trainable is None:
        return params, None
    is_list = isinstance(trainable, Sequence) and hasattr(params, "keys")
    if not is_list:
        raise TypeError(
            f"trainable={trainable!r} names keys of params, a {type(params).__name__}: give a key "
            "or a list of keys of a mapping, or None for everything."
        )
    names = [trainable] if isinstance(trainable, str) else list(trainable)
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(
            f"trainable={trainable!r} names {missing}, which init_params does not return: it "
            f"returns {sorted(params)}. Name keys that exist."
        )
    # An nnx.State hands out its mappings as States, and would not be rebuilt as it was.
    values: Any = getattr(params, "raw_mapping", params)
    frozen = type(params)({name: value for name, value in values.items() if name not in names})
    if isinstance(trainable, str):
        return values[trainable], frozen
    return {name: values[name] for name in names}, frozen


def _merge(trained: Params, frozen: Tree, trainable: str | Sequence[str] | None) -> Any:
    if trainable is None:
        return trained
    trained = {trainable: trained} if isinstance(trainable, str) else trained
    # A FrozenDict or an nnx.State stays one: a scan refuses a state that changes its structure.
    values: Any = getattr(frozen, "raw_mapping", frozen)
    return type(frozen)({**trained, **values})


def _refuse_other_structure(params: Params, like: Tree) -> None:
    new, old = jax.tree.structure(params), jax.tree.structure(like)
    if new != old:
        raise ValueError(
            f"absorb returned params of the structure {new}, but init_params gave {old}. Return "
            "the same containers and the same keys: {**params, 'batch_stats': new} for a dict."
        )
