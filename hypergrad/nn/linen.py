"""From a flax linen script to a problem, and from its TrainState to a training state and back."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training.train_state import TrainState

from hypergrad import checks
from hypergrad.problem.inner_gradient import with_aux
from hypergrad.problem.problem import Inner, Problem, bilevel, require_inner, zero_loss
from hypergrad.trees import Batch, Hyper, Key, Params, Scalar, Tree


def linen_problem(
    module: linen.Module,
    init: Callable[[jax.Array], Any],
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    rngs: Sequence[str] = ("dropout",),
    metrics: Callable[..., Any] | None = None,
    mixed_mode: bool = True,
    evaluate: Callable[[Any, Any], Any] | None = None,
) -> Problem:
    """A `Problem` whose losses call a linen module as a function: `model(images, train=True)`.

    The losses are `(model, hyper, batch, key) -> scalar` or `(scalar, aux)`, where `model` is
    `module` with its variables bound: call it, its methods, or read `model.variables["params"]` for
    a penalty. Hyperparameters that the model needs (dropout rates) are passed in the call. Only the
    collection `"params"` is trained; every other one (`"batch_stats"`) is what the model left
    behind after each training step. In `inner.params` are all variables, as plain dicts, for
    `module.apply`.

    Args:
      module: the module, not bound.
      init: `key -> variables`, as `lambda key: module.init(key, example, train=False)`.
      train_loss: called with mutable collections and random streams; switch the model to training
        yourself, as flax does (`train=True`, `deterministic=False`).
      valid_loss: called without either: a model that is left in training mode is an error of flax.
      optimizer: `hyper -> optax transformation` over `variables["params"]`, cf. `bilevel`.
      rngs: the names of the random streams that training uses; their keys come from the step's.
      metrics: optional, `(model, hyper, batch, key) -> {name: scalar}`, called as `valid_loss` is.
      mixed_mode: as in `bilevel`.
      evaluate: as in `bilevel`, of all variables and the optimiser's state.

    Cost: that of `bilevel`.

    Raises:
      ValueError: `init` gives no `"params"`, or the training loss leaves a collection behind of
        another structure than `init` gave (`sow` adds to its own at each call).

    >>> import jax.numpy as jnp
    >>> class Net(linen.Module):
    ...     @linen.compact
    ...     def __call__(self, x, train):
    ...         x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
    ...         return linen.Dense(1)(linen.relu(x))
    >>> net, x = Net(), jnp.ones((8, 3))
    >>> problem = linen_problem(
    ...     net,
    ...     lambda key: net.init(key, x, train=False),
    ...     lambda model, hyper, batch, key: jnp.mean((model(batch, train=True) - 1) ** 2),
    ...     lambda model, hyper, batch, key: jnp.mean((model(batch, train=False) - 1) ** 2),
    ...     lambda hyper: optax.adamw(hyper["lr"], weight_decay=hyper["decay"]),
    ... )
    >>> hyper = {"lr": 1e-2, "decay": 1e-4}
    >>> inner = problem.init(hyper, jax.random.key(0))
    >>> inner = problem.step(inner, hyper, x, jax.random.key(1))
    >>> sorted(inner.params), net.apply(inner.params, x, train=False).shape
    (['batch_stats', 'params'], (8, 1))
    """
    _check(module, init)
    for name, loss in (("train_loss", train_loss), ("valid_loss", valid_loss)):
        checks.function(name, loss, "model", "hyper", "batch", "key")
    # What the loss itself reports is nobody's business here: the model's state is what re-enters.
    pair = with_aux(train_loss, "train_loss")

    def trained(variables: Params, hyper: Hyper, batch: Batch, key: Key) -> tuple[Scalar, Params]:
        # Mutable is what the model leaves behind, not the parameters: those the optimiser moves.
        others = sorted(set(variables) - {"params"})
        # A split into no keys would still be traced, and be another program to a checkpoint.
        streams = dict(zip(rngs, jax.random.split(key, len(rngs)), strict=True)) if rngs else {}
        run = linen.apply(pair, module, mutable=others)
        (loss, _), left = run(variables, hyper, batch, key, rngs=streams)
        return loss, _unfrozen(dict(left))

    def absorb(variables: Params, left: Params) -> Params:
        for name, value in left.items():
            if jax.tree.structure(value) != jax.tree.structure(variables[name]):
                raise ValueError(
                    f"The training loss leaves {name!r} behind with another structure than init "
                    "gave it, which a compiled loop cannot carry. linen's sow appends at each "
                    "call: give it init_fn and reduce_fn that keep one value, or leave the "
                    "collection out of what init returns."
                )
        return {**variables, **left}

    return bilevel(
        lambda key: _unfrozen(dict(init(key))),
        trained,
        linen.apply(valid_loss, module),
        optimizer,
        trainable="params",
        absorb=absorb,
        metrics=None if metrics is None else linen.apply(metrics, module),
        mixed_mode=mixed_mode,
        evaluate=evaluate,
    )


def _check(module: linen.Module, init: Callable[[jax.Array], Any]) -> None:
    if not isinstance(module, linen.Module):
        given = getattr(module, "__name__", type(module).__name__)
        raise checks.WrongTypeError(
            f"module={given} is no flax.linen module: give one that is built, Net(...); an nnx "
            "model belongs into nnx_problem, an Equinox one into equinox_problem."
        )
    checks.function("init", init, "key")


def from_train_state(state: TrainState, collections: Sequence[str] | None = None) -> Inner:
    """The training state of a `linen_problem` where a flax `TrainState` stands.

    collections: the fields of a subclass that are collections of variables; None: `batch_stats`,
    where the state has it. `tuner.init(hyper, key, inner=from_train_state(state))` goes on with its
    parameters, optimiser state and step count, and says what differs where the tuned optimiser is
    not built from the same transformations. `to_train_state` is the way back.
    """
    if collections is None:
        collections = ["batch_stats"] if hasattr(state, "batch_stats") else []
    variables = {"params": state.params} | {name: getattr(state, name) for name in collections}
    variables, opt_state = _unfrozen((variables, state.opt_state))
    return Inner(variables, opt_state, jnp.asarray(state.step, jnp.int32), zero_loss(variables))


def to_train_state(inner: Inner, state: TrainState) -> TrainState:
    """`state` with the variables, optimiser state and step count of `inner`.

    Its other fields are kept: `tx` still holds the rates that it was built with. To go on without
    the tuner, build one from what was learned (`tuner.best`, `settled_schedule`).

    >>> import jax, optax
    >>> net, x = linen.Dense(1), jax.numpy.ones((2, 3))
    >>> params = net.init(jax.random.key(0), x)["params"]
    >>> state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(1e-3))
    >>> int(to_train_state(from_train_state(state)._replace(step=7), state).step)
    7
    """
    require_inner(inner)
    new = {**inner.params, "opt_state": inner.opt_state, "step": inner.step}
    # Where the state holds FrozenDicts it gets them back: both kinds flatten in the same order.
    return state.replace(
        **{
            name: jax.tree.unflatten(jax.tree.structure(getattr(state, name)), jax.tree.leaves(x))
            for name, x in new.items()
        }
    )


def _unfrozen(tree: Tree) -> Tree:
    """Plain dicts for flax's FrozenDicts, also inside an optimiser's state."""
    # flax returns either kind, and what a compiled loop carries must stay of one.
    frozen = lambda x: isinstance(x, flax.core.FrozenDict)  # noqa: E731
    return jax.tree.map(lambda x: x.unfreeze() if frozen(x) else x, tree, is_leaf=frozen)
