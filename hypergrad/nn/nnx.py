"""From a flax nnx script to a problem, and from its model and optimiser to a state and back."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.filterlib import Filter
from flax.nnx.module import first_from
from flax.nnx.nn.normalization import _canonicalize_axes, _compute_stats

from hypergrad import checks
from hypergrad.problem.inner_gradient import with_aux
from hypergrad.problem.problem import Inner, Problem, bilevel, require_inner, zero_loss
from hypergrad.trees import Batch, Hyper, Key, Params, Scalar, Tree


class NNXBatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` whose running averages carry a derivative.

    Takes the place of flax's own, which stops the gradient there (0.12; linen's does not): the
    validation loss reads the averages, so that a hypergradient through them would lack a part. In
    tests/test_adapters.py, after four steps, flax's own was 1% off for a learning rate and 19% for
    a weight decay. The same arguments, variables and values.

    >>> import jax.numpy as jnp
    >>> def mean(layer, scale):
    ...     layer(scale * jnp.ones((2, 1)))
    ...     return layer.mean[0]
    >>> [float(jax.grad(lambda s: mean(norm(1, momentum=0.75, rngs=nnx.Rngs(0)), s))(2.0))
    ...  for norm in (nnx.BatchNorm, NNXBatchNorm)]
    [0.0, 0.25]
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalise `x`, and move the running averages where they are not used."""
        old = self.mean[...], self.var[...]
        out = super().__call__(x, use_running_average, mask=mask)
        if first_from(use_running_average, self.use_running_average, error_msg="checked by flax"):
            return out
        # flax has moved them without a gradient: they move again, from where they were.
        x, *_ = self.promote_dtype((x, *old), dtype=self.dtype)
        features = _canonicalize_axes(x.ndim, self.axis)
        new = _compute_stats(
            x,
            tuple(i for i in range(x.ndim) if i not in features),
            dtype=self.dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            use_fast_variance=self.use_fast_variance,
            mask=mask,
        )
        for statistic, before, now in zip((self.mean, self.var), old, new, strict=True):
            statistic[...] = self.momentum * before + (1 - self.momentum) * now
        return out


def nnx_problem(
    make_model: Callable[..., nnx.Module],
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    wrt: Filter = nnx.Param,
    metrics: Callable[..., Any] | None = None,
    mixed_mode: bool = True,
    evaluate: Callable[[Any, Any], Any] | None = None,
) -> Problem:
    """A `Problem` whose losses call an nnx model: `model(images)`.

    The losses are `(model, hyper, batch, key) -> scalar` or `(scalar, aux)`, with `model` in
    training mode (`model.train()`) in `train_loss` and in evaluation mode in `valid_loss`, so that
    one function may serve as both. Hyperparameters that the model needs (dropout rates) are passed
    in the call.
    `inner.params` is `{"params": State, "rest": State}` of plain arrays: what `wrt` selects, and
    every other variable (batch statistics), which is what the model left behind after each training
    step. The model's random streams are no part of it: each step starts them from its own key, so
    that a run is decided by the tuner's key alone.

    Args:
      make_model: `rngs -> model`, as `lambda rngs: Net(64, 10, rngs=rngs)`, or a class whose
        `rngs` is a keyword.
      train_loss: see above.
      valid_loss: see above.
      optimizer: `hyper -> optax transformation` over the `State` that `wrt` selects.
      wrt: the filter of what is trained, as in `nnx.Optimizer`.
      metrics: optional, `(model, hyper, batch, key) -> {name: scalar}`, in evaluation mode.
      mixed_mode: as in `bilevel`.
      evaluate: as in `bilevel`, of `inner.params` and the optimiser's state.

    Warns (`UserWarning`) of an `nnx.BatchNorm`: take `NNXBatchNorm`, else a part of the
    hypergradient is missing.

    Cost: that of `bilevel`. `nnx.update(model, *inner.params.values())` puts the values into a
    model; `from_nnx` and `to_nnx` do so with the optimiser's too.

    >>> import jax.numpy as jnp
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.norm, self.head = NNXBatchNorm(3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.head(self.norm(x))
    >>> loss = lambda model, hyper, batch, key: jnp.mean((model(batch) - 1) ** 2)
    >>> problem = nnx_problem(Net, loss, loss, lambda hyper: optax.adam(hyper["lr"]))
    >>> inner = problem.init({"lr": 0.1}, jax.random.key(0))
    >>> inner = problem.step(inner, {"lr": 0.1}, jnp.ones((4, 3)), jax.random.key(1))
    >>> model = Net(nnx.Rngs(0))
    >>> nnx.update(model, *inner.params.values())
    >>> [round(float(mean), 6) for mean in model.norm.mean[...]]   # 0.99 of 0 and 0.01 of 1
    [0.01, 0.01, 0.01]
    """
    make = _by_rngs(make_model)
    for name, loss in (("train_loss", train_loss), ("valid_loss", valid_loss)):
        checks.function(name, loss, "model", "hyper", "batch", "key")
    # Without arrays, so that one graph serves every init, under jit and vmap too.
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, _, streams = _split(abstract, wrt)
    if any(type(module) is nnx.BatchNorm for _, module in nnx.iter_modules(abstract)):
        warnings.warn(
            "The model holds an nnx.BatchNorm, which stops the gradient of its running averages: "
            "a part of every hypergradient is missing. Use hypergrad.nn.NNXBatchNorm instead.",
            stacklevel=2,
        )

    def merged(variables: Params, key: Key) -> nnx.Module:
        return nnx.merge(graph, *variables.values(), _streams(streams, key))

    def trained(variables: Params, hyper: Hyper, batch: Batch, key: Key) -> tuple[Scalar, Params]:
        model = merged(variables, key)
        model.train()
        loss, _ = with_aux(train_loss, "train_loss")(model, hyper, batch, key)
        # Without the random streams' counts: the next step starts them from a key of its own.
        return loss, _split(model, wrt)[1]["rest"]

    def judged(
        function: Callable[..., Any], variables: Params, hyper: Hyper, batch: Batch, key: Key
    ) -> Any:
        model = merged(variables, key)
        model.eval()
        return function(model, hyper, batch, key)

    return bilevel(
        lambda key: _split(make(nnx.Rngs(key)), wrt)[1],
        trained,
        partial(judged, valid_loss),
        optimizer,
        trainable="params",
        absorb=lambda variables, rest: {**variables, "rest": rest},
        metrics=None if metrics is None else partial(judged, metrics),
        mixed_mode=mixed_mode,
        evaluate=evaluate,
    )


def _by_rngs(make_model: Callable[..., nnx.Module]) -> Callable[[nnx.Rngs], nnx.Module]:
    """`make_model` as a function of `rngs`, which many models take by keyword."""
    if not callable(make_model) or isinstance(make_model, nnx.Module):
        raise checks.WrongTypeError(
            f"make_model is a {type(make_model).__name__}: give a function that builds the model, "
            "make_model=lambda rngs: Net(64, 10, rngs=rngs), as each run starts from new weights."
        )
    # The signature of an nnx class is that of its metaclass.
    is_class = isinstance(make_model, type)
    signature = inspect.signature(make_model.__init__ if is_class else make_model)
    parameters = list(signature.parameters.values())[is_class:]
    wanted = [p.name for p in parameters if p.default is p.empty and "VAR" not in p.kind.name]
    if set(wanted) > {"rngs"}:
        raise checks.WrongTypeError(
            f"make_model={make_model.__name__} wants {wanted} and is called with rngs alone: give "
            f"make_model=lambda rngs: {make_model.__name__}(..., rngs=rngs)."
        )
    if any(p.name == "rngs" and p.kind != p.POSITIONAL_ONLY for p in parameters):
        return lambda rngs: make_model(rngs=rngs)
    return make_model if is_class else checks.function("make_model", make_model, "rngs")


def from_nnx(model: nnx.Module, optimizer: nnx.Optimizer) -> Inner:
    """The training state of an `nnx_problem` where an nnx model and its optimiser stand.

    `tuner.init(hyper, key, inner=from_nnx(model, optimizer))` goes on from there, cf.
    `from_train_state`; `to_nnx` is the way back.
    """
    variables = _split(model, optimizer.wrt)[1]
    step = jnp.asarray(optimizer.step[...], jnp.int32)
    return Inner(variables, nnx.as_pure(optimizer.opt_state), step, zero_loss(variables))


def to_nnx(inner: Inner, model: nnx.Module, optimizer: nnx.Optimizer | None = None) -> None:
    """Writes the variables, optimiser state and step count of `inner` into both, in place.

    `optimizer.tx` still holds the rates that it was built with, cf. `to_train_state`. None for a
    model that is only to be used.
    """
    require_inner(inner)
    nnx.update(model, *inner.params.values())
    if optimizer is None:
        return
    nnx.update(optimizer.opt_state, nnx.state(inner.opt_state))
    optimizer.step[...] = jnp.asarray(inner.step, optimizer.step[...].dtype)


def _split(model: nnx.Module, wrt: Filter) -> tuple[nnx.GraphDef, Params, Tree]:
    """The graph, the variables as `inner.params` holds them, and the random streams."""
    graph, *states = nnx.split(model, wrt, nnx.RngState, ...)

    params, streams, rest = map(nnx.as_pure, states)
    return graph, {"params": params, "rest": rest}, streams


def _streams(like: Tree, key: Key) -> Tree:
    """An nnx model's random streams, all from `key`: another one each, counted from 0."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves)) if leaves else ()

    def start(leaf: jax.Array, key: Key) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(key, leaf.shape) if leaf.shape else key
        return jnp.zeros(leaf.shape, leaf.dtype)

    return treedef.unflatten([start(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])
