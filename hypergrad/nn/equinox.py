"""From an Equinox script to a problem, and from its model and optimiser to a state and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from hypergrad import checks
from hypergrad.problem.inner_gradient import with_aux
from hypergrad.problem.noise import Form, check_rate, dropout
from hypergrad.problem.problem import Inner, Problem, bilevel, require_inner, zero_loss
from hypergrad.trees import Batch, Hyper, Key, Leaf, Params, Scalar, State, Tree


class EquinoxDropout(eqx.Module):
    """`equinox.nn.Dropout` with a rate that has a gradient, given here or at the call.

    Takes the place of Equinox's own, which stops the gradient: the same `key` and `inference`, and
    `equinox.nn.inference_mode` switches it off. p: a number in [0, 1), a scalar or one per unit;
    `p` at the call goes before the attribute, and is what to use for a hyperparameter. form: see
    `hypergrad.dropout`, as for bias, variance and what happens at rate 0.

    Raises `ValueError` where neither place gives a rate, or noise is wanted without a key.

    >>> layer, x = EquinoxDropout(), jnp.ones((32, 4))
    >>> loss = lambda p, key: jnp.sum(layer(x, p=p, key=key) ** 2)
    >>> bool(jax.jit(jax.grad(loss))(0.1, jax.random.key(1)) != 0)
    True
    """

    p: float | None = eqx.field(static=True)
    inference: bool
    form: str | Form = eqx.field(static=True)

    def __init__(
        self, p: float | None = None, inference: bool = False, *, form: str | Form = "bernoulli"
    ) -> None:
        if p is not None:
            check_rate(p)
        self.p, self.inference, self.form = p, inference, form

    def __call__(
        self,
        x: jax.Array,
        *,
        key: Key | None = None,
        inference: bool | None = None,
        p: Leaf | None = None,
    ) -> jax.Array:
        """Drop units of `x`, or return it untouched in inference."""
        if self.inference if inference is None else inference:
            return x
        rate = self.p if p is None else p
        if rate is None:
            raise ValueError(
                "EquinoxDropout got no rate: pass p= to the constructor or to the call."
            )
        if key is None:
            raise ValueError("EquinoxDropout trains and has no key: pass key= to the call.")
        return dropout(x, rate, key, self.form)


def equinox_problem(
    make_model: Callable[[jax.Array], Any],
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    metrics: Callable[..., Any] | None = None,
    mixed_mode: bool = True,
    evaluate: Callable[[Any, Any], Any] | None = None,
) -> Problem:
    """A `Problem` whose losses call an Equinox model: `jax.vmap(model)(images)`.

    The losses are `(model, hyper, batch, key) -> scalar` or `(scalar, aux)`, where `model` is what
    `make_model` returns, with its arrays as they are after the steps so far; in `valid_loss` and
    `metrics` it is in inference mode. Where `make_model` returns a pair, as
    `equinox.nn.make_with_state` does, the losses receive the pair `(model, state)`, and
    `train_loss` returns `(scalar, state)`, the state that the model left behind. Hyperparameters
    that the model needs (dropout rates) are passed in the call.

    Only floating-point arrays of the model are trained, as `equinox.filter_grad` does. All else
    stays what `make_model` gave: functions, strings, static fields; integer arrays may be state.
    `inner.params` is `{"params": floats, "rest": other arrays and the state}`.

    Args:
      make_model: `key -> model` or `key -> (model, state)`, as
        `lambda key: equinox.nn.MLP(4, 1, 8, 2, key=key)`. All keys must give one structure.
      train_loss: see above.
      valid_loss: see above; what it returns beside the scalar is ignored.
      optimizer: `hyper -> optax transformation` over `equinox.filter(model, is_inexact_array)`.
      metrics: optional, `(model, hyper, batch, key) -> {name: scalar}`, in inference mode.
      mixed_mode: as in `bilevel`.
      evaluate: as in `bilevel`, of `inner.params` and the optimiser's state.

    Cost: that of `bilevel`. `to_equinox(inner, model)` gives the trained model.

    Raises:
      TypeError: a model where a function that makes one belongs.
      ValueError: a model with a state whose `train_loss` returns none.

    >>> problem = equinox_problem(
    ...     lambda key: eqx.nn.MLP(3, 1, 8, 1, key=key),
    ...     lambda model, hyper, batch, key: jnp.mean((jax.vmap(model)(batch) - 1) ** 2),
    ...     lambda model, hyper, batch, key: jnp.mean((jax.vmap(model)(batch) - 1) ** 2),
    ...     lambda hyper: optax.adam(hyper["lr"]),
    ... )
    >>> inner = problem.init({"lr": 0.1}, jax.random.key(0))
    >>> inner = problem.step(inner, {"lr": 0.1}, jnp.ones((4, 3)), jax.random.key(1))
    >>> to_equinox(inner, eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0)))(jnp.ones(3)).shape
    (1,)
    """
    if isinstance(make_model, eqx.Module) and not isinstance(make_model, jax.tree_util.Partial):
        raise checks.WrongTypeError(
            f"make_model is the model {type(make_model).__name__} itself: give a function that "
            "builds it, make_model=lambda key: Net(..., key=key), as each run starts from new "
            "weights."
        )
    checks.function("make_model", make_model, "key")
    for name, loss in (("train_loss", train_loss), ("valid_loss", valid_loss)):
        checks.function(name, loss, "model", "hyper", "batch", "key")
    # Without arrays. What is static is taken from here: a lambda within the model is another
    # object after each `make_model`, and would be another structure.
    like = eqx.filter_eval_shape(make_model, jax.random.key(0))
    has_state = isinstance(like, tuple)

    def filled(variables: Params) -> Any:
        # By leaves, for the same reason; a used-up `State` is made anew, too.
        return _filled(like, variables)

    def init(key: Key) -> Params:
        return _as_in(like, _variables(make_model(key)))

    def trained(variables: Params, hyper: Hyper, batch: Batch, key: Key) -> tuple[Scalar, Tree]:
        loss, aux = with_aux(train_loss, "train_loss")(filled(variables), hyper, batch, key)
        if not has_state:
            return loss, variables["rest"]
        if not isinstance(aux, eqx.nn.State):
            raise ValueError(
                "make_model returns (model, state), and train_loss no state: return (loss, state), "
                "the state that the model's last call gave."
            )
        return loss, {**variables["rest"], "state": jax.tree.leaves(aux)}

    def judged(
        function: Callable[..., Any], variables: Params, hyper: Hyper, batch: Batch, key: Key
    ) -> Any:
        model = eqx.nn.inference_mode(filled(variables))
        return function(model, hyper, batch, key)

    return bilevel(
        init,
        trained,
        partial(judged, valid_loss),
        optimizer,
        trainable="params",
        absorb=lambda variables, rest: {**variables, "rest": rest},
        metrics=None if metrics is None else partial(judged, metrics),
        mixed_mode=mixed_mode,
        evaluate=evaluate,
    )


def from_equinox(model: Any, opt_state: State, step: int | jax.Array = 0) -> Inner:
    """The training state of an `equinox_problem` where a model and its optimiser's state stand.

    model: the model, or the pair `(model, state)`. opt_state: of
    `optimizer.init(equinox.filter(model, equinox.is_inexact_array))`. `to_equinox` is the way back
    for the model; the optimiser's state is `inner.opt_state`.
    """
    variables = _variables(model)
    # Equinox leaves the model's own functions in what it filters.
    opt_state = jax.tree.map(jnp.asarray, eqx.filter(opt_state, eqx.is_array_like))
    return Inner(variables, opt_state, jnp.asarray(step, jnp.int32), zero_loss(variables))


def to_equinox(inner: Inner, model: Any) -> Any:
    """`model`, or the pair `(model, state)`, with the arrays of `inner`.

    model: made as the problem's are, its own arrays are not read.
    """
    require_inner(inner)
    return _filled(model, inner.params)


def _variables(made: Any) -> Params:
    """What `inner.params` holds of a model, or of a pair of model and state."""
    model, state = made if isinstance(made, tuple) else (made, ())
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    return {
        "params": floats,
        "rest": {
            "arrays": jax.tree.leaves(eqx.filter(rest, eqx.is_array)),
            "state": jax.tree.leaves(state),
        },
    }


def _filled(like: Any, variables: Params) -> Any:
    """`like`, a model or a pair, with the arrays of `variables`."""
    floats = iter(jax.tree.leaves(variables["params"]))
    others = iter(variables["rest"]["arrays"])

    def new(leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        return next(floats if jnp.issubdtype(leaf.dtype, jnp.inexact) else others)

    model, state = like if isinstance(like, tuple) else (like, None)
    model = jax.tree.map(new, model)
    if state is None:
        return model
    structure = jax.tree.structure(state)
    return model, jax.tree.unflatten(structure, variables["rest"]["state"])


def _as_in(like: Any, variables: Params) -> Params:
    """`variables` whose trained part has the structure that it has in `like`."""
    model = like[0] if isinstance(like, tuple) else like
    is_float = lambda leaf: _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)  # noqa: E731
    structure = jax.tree.structure(eqx.filter(model, is_float))
    floats = jax.tree.unflatten(structure, jax.tree.leaves(variables["params"]))
    return {**variables, "params": floats}


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
