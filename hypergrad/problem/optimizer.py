"""The user's optimiser: built from traced values, called with what it takes, refused by name."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from hypergrad import checks
from hypergrad.problem.mistakes import explained
from hypergrad.problem.rules import Traced
from hypergrad.trees import Hyper, Params, State, is_key, leaf_names

Factory = Callable[[Any], optax.GradientTransformation]
_ROOTS = {"sqrt", "rsqrt", "cbrt"}


def check_optimizer(optimizer: Factory) -> None:
    """Raises WrongTypeError for what is no function of `hyper`."""
    remedy = 'optimizer=lambda hyper: optax.adam(hyper["learning_rate"])'
    if isinstance(optimizer, optax.GradientTransformation) or hasattr(optimizer, "update"):
        raise checks.WrongTypeError(
            f"optimizer is a {type(optimizer).__name__}, built already, whose rates have no "
            f"gradient: give a function of hyper that builds it, {remedy}."
        )
    function = getattr(optimizer, "func", optimizer)  # of a partial
    if str(getattr(function, "__module__", "")).split(".")[0] == "optax":
        name = getattr(function, "__name__", "optimizer")
        raise checks.WrongTypeError(
            f"optimizer=optax.{name} would be called with hyper: say which of its arguments come "
            f"from there, {remedy}."
        )
    checks.function("optimizer", optimizer, "hyper")


def _built(optimizer: Factory, hyper: Hyper) -> optax.GradientTransformationExtraArgs:
    transform = optimizer(hyper)
    if not (hasattr(transform, "init") and hasattr(transform, "update")):
        raise checks.WrongTypeError(
            f"optimizer returned a {type(transform).__name__}: return an optax transformation."
        )
    return optax.with_extra_args_support(transform)


def first_opt_state(optimizer: Factory, hyper: Hyper, params: Params) -> State:
    """The state of the optimiser that `hyper` gives, before the first update."""
    if any(is_key(leaf) for leaf in jax.tree.leaves(params)):
        raise checks.WrongTypeError(
            "init_params returns a PRNG key among what is trained, and a key has no gradient: let "
            "the losses use their argument key, or say by trainable= which part is trained."
        )
    with explained("optimizer"):
        opt_state = _built(optimizer, hyper).init(params)
    # Read from the state, as the transformation itself is opaque.
    _refuse_injected_rates(opt_state)
    _refuse_other_lookahead(opt_state, params)
    return opt_state


def optimizer_update(
    optimizer: Factory,
    hyper: Hyper,
    grads: Params,
    state: State,
    params: Params,
    extra: dict[str, Any],
) -> tuple[Params, State]:
    """One update, given what of the keywords `extra` the optimiser takes."""

    def update(hyper: Hyper, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        return _update(_built(optimizer, hyper), grads, state, params, extra)

    # Built anew in every step: its rates are traced values, and building costs nothing. Where the
    # user wants strict promotion, optax does not keep to it.
    with explained("optimizer"), jax.numpy_dtype_promotion("standard"):
        traced = Traced(update, hyper, grads, state, params)
        # What a root's derivative needs (Adam: 6 copies of the parameters in each step of an
        # unroll) is cheaper to compute again from the arguments (3) than to keep; momentum needs 1.
        run = jax.checkpoint(traced, prevent_cse=False) if traced.uses(_ROOTS) else traced
        return run(hyper, grads, state, params)


def _update(
    transform: optax.GradientTransformationExtraArgs,
    grads: Params,
    state: State,
    params: Params,
    extra: dict[str, Any],
) -> tuple[Params, State]:
    try:
        return transform.update(grads, state, params, **extra)
    except TypeError as error:
        # An optimiser is opaque, and only this says what it does not know.
        refused = [name for name in extra if f"unexpected keyword argument '{name}'" in str(error)]
        if not refused:
            raise
        fewer = {name: value for name, value in extra.items() if name not in refused}
    return _update(transform, grads, state, params, fewer)


def _refuse_other_lookahead(opt_state: State, params: Params) -> None:
    is_pair = isinstance(params, optax.LookaheadParams)
    if isinstance(opt_state, optax.LookaheadState) and not is_pair:
        raise checks.WrongTypeError(
            "optimizer is an optax.lookahead, which keeps two sets of parameters: let init_params "
            "return optax.LookaheadParams.init_synced(params), and the losses read params.fast."
        )


def _refuse_injected_rates(opt_state: State) -> None:
    injected = (
        optax.InjectHyperparamsState,
        optax.schedules.InjectStatefulHyperparamsState,
    )
    is_injected = lambda x: isinstance(x, injected)  # noqa: E731
    for state in jax.tree.leaves(opt_state, is_leaf=is_injected):
        if is_injected(state):
            names = leaf_names(state.hyperparams)
            raise ValueError(
                f"optimizer keeps {names} in its state (optax.inject_hyperparams): updates read "
                "them from there, so hyper would get no gradient. Build the optimiser from hyper "
                'directly: optimizer=lambda hyper: optax.adam(hyper["learning_rate"]).'
            )
