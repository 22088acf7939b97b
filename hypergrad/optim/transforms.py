"""Optimisers and transformations that optax lacks: outer ones, and ones for the user's own loop."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import checks
from hypergrad.trees import Leaf, Params, State, Tree, cast_like, inner_product, leaf_names, widen


class NormAdamState(NamedTuple):
    """Moments of `norm_adam`: of the gradient, and of its squared norm."""

    updates: jax.Array
    mean: Params
    square: jax.Array


def norm_adam(
    learning_rate: float, b1: float = 0.7, b2: float = 0.9
) -> optax.GradientTransformation:
    """Adam whose second moment is that of the whole gradient's norm, one scale for all entries.

    Adam divides every entry by its own magnitude, so a hyperparameter whose gradient is mostly
    noise (a small L2 coefficient) walks as far as one whose gradient is signal. Here directions
    keep their proportions and the step's length over all hyperparameters together is about
    `learning_rate`: for n that matter alike (data weights) take sqrt(n) times as much. Gradients of
    norm above 1 are first scaled to 1: hypergradients have heavy tails.

    Source: Adam (Kingma and Ba 2015) with the norm's second moment; compare ND-Adam (Zhang 2018).

    >>> import jax.numpy as jnp
    >>> optimizer = norm_adam(0.1)
    >>> updates, _ = optimizer.update(jnp.array([0.3, 0.4]), optimizer.init(jnp.zeros(2)))
    >>> [round(float(u), 3) for u in updates]
    [-0.06, -0.08]
    """
    if not callable(learning_rate):
        checks.positive_if_known("learning_rate", learning_rate, "give 0.1, for instance")
    for name, value in (("b1", b1), ("b2", b2)):
        _check_decay(name, value)

    def init(params: Params) -> NormAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return NormAdamState(jnp.zeros((), jnp.int32), zeros, inner_product(zeros, zeros))

    def update(
        grads: Params, state: NormAdamState, params: Params | None = None
    ) -> tuple[Params, NormAdamState]:
        del params
        size = jnp.sqrt(inner_product(grads, grads))
        grads = jax.tree.map(lambda g: g / jnp.maximum(size, 1.0).astype(g.dtype), grads)
        count = state.updates + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = b2 * state.square + (1 - b2) * jnp.minimum(size, 1.0) ** 2
        # an all-zero gradient moves nothing, instead of 0 / 0
        rms = jnp.maximum(jnp.sqrt(square / (1 - b2**count)), jnp.finfo(square.dtype).tiny)
        factor = -learning_rate / (1 - b1**count) / rms
        updates = jax.tree.map(lambda m: factor.astype(m.dtype) * m, mean)
        return updates, NormAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


class HypergradientDescentState(NamedTuple):
    """State of `hypergradient_descent`.

    Attributes:
      learning_rate: a scalar, float32 or wider: the rate of the last update.
      tangent: d(last update)/d(its learning rate), like the parameters.
      optimizer_state: the state of the optimiser whose rate is adapted.
    """

    learning_rate: jax.Array
    tangent: Params
    optimizer_state: State


def hypergradient_descent(
    optimizer_factory: Callable[[Any], optax.GradientTransformation],
    learning_rate: Leaf,
    hyper_learning_rate: Leaf,
    rule: Literal["additive", "multiplicative"] = "additive",
    min_learning_rate: Leaf = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Any optax optimiser, its learning rate adapted by the training loss's own gradient in it.

    Before each update the rate a moves against dL_t/da = <grad_t, d update_{t-1}/da>: what another
    rate in the last step would have done to the loss now. No validation data is used, so this tunes
    how fast training goes and nothing else. It sees one step ahead: rates end up smaller than those
    that are best for a whole run (Wu 2018).

    Args:
      optimizer_factory: `learning_rate -> optax transformation`, for instance `optax.adamw` or
        `lambda lr: optax.sgd(lr, momentum=0.9)`. It is called with a traced scalar and may use it
        anywhere: the derivative is taken by `jax.jvp` through its `update`, exact where the update
        is not linear in the rate (decoupled decay, `momo`).
      learning_rate: the first step's rate, positive.
      hyper_learning_rate: beta below, positive.
      rule: "additive": a <- a - beta dL/da (Baydin eq. 6). beta has the units of rate squared over
        loss, and good values span many orders of magnitude. "multiplicative":
        a <- a exp(-beta cos), cos the cosine between grad_t and d update_{t-1}/da. Nothing depends
        on the scale of the loss, a step changes the rate by at most the factor exp(beta), and the
        rate stays positive: take beta = 0.02 to 0.1 first. To first order in beta it is Baydin's
        eq. 8, whose 1 - beta cos turns negative for beta > 1.
      min_learning_rate: the rate stops there. Under the additive rule one large dL/da would make
        it negative, and training would climb. From 0 it gets up again as soon as two gradients in a
        row agree; a positive value also keeps optimisers moving that have no tangent there.

    The state shows `learning_rate` (`optax.tree.get(state, "learning_rate")` finds it in a chain).
    The gradient is the one that arrives here: put clipping before or into the factory, and whatever
    scales the update into the factory, or its effect on the loss is not seen. Extra arguments
    (`value=`, `grad=`, `value_fn=`) reach the optimiser. A rate per layer: one of these per group
    of `optax.partition`. A gradient that is not finite makes the rate so for good, and is not
    hidden: wrap the whole in `optax.apply_if_finite` to skip such steps.

    Cost: no gradient more; one forward derivative of the optimiser's update per step, and one
    vector like the parameters in the state.

    Source: Baydin et al. 2018, eq. 5-8; exact derivatives of the update as in Clarke et al. 2022.

    Raises:
      ValueError: an unknown rule; a rate that is a schedule or not positive; an optimiser whose
        update does not depend on its argument (rates kept in the state, as `optax.rprop` and
        `optax.inject_hyperparams` do), which would never be adapted.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w: jnp.sum((w - 1) ** 2)
    >>> optimizer = hypergradient_descent(optax.adam, 1e-6, 0.1, rule="multiplicative")
    >>> @jax.jit
    ... def step(w, state):
    ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w)
    ...     return optax.apply_updates(w, updates), state
    >>> w = jnp.zeros(3)
    >>> state = optimizer.init(w)
    >>> for _ in range(200):
    ...     w, state = step(w, state)
    >>> bool(loss(w) < 1e-3), bool(state.learning_rate > 1e-3)
    (True, True)
    """
    checks.choice("rule", rule, ("additive", "multiplicative"))
    _check_rate("learning_rate", learning_rate)
    _check_rate("hyper_learning_rate", hyper_learning_rate)
    checks.function("optimizer_factory", optimizer_factory, "learning_rate")
    checks.positive("min_learning_rate", min_learning_rate, zero=True)

    def init(params: Params) -> HypergradientDescentState:
        rate = widen(learning_rate)
        still = jax.tree.map(jnp.zeros_like, params)
        return HypergradientDescentState(rate, still, optimizer_factory(rate).init(params))

    def adapted(rate: jax.Array, grads: Params, tangent: Params) -> jax.Array:
        slope = inner_product(grads, tangent)
        if rule == "additive":
            rate = rate - hyper_learning_rate * slope
        else:
            # before the first step both are zero; a floor inside the root keeps derivatives finite
            tiny = jnp.finfo(slope.dtype).tiny
            sizes = [jnp.maximum(inner_product(x, x), tiny) for x in (grads, tangent)]
            cosine = slope / (jnp.sqrt(sizes[0]) * jnp.sqrt(sizes[1]))
            rate = rate * jnp.exp(-hyper_learning_rate * cosine)
        return jnp.maximum(rate, min_learning_rate)

    def update(
        grads: Params, state: HypergradientDescentState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, HypergradientDescentState]:
        rate = adapted(state.learning_rate, grads, state.tangent).astype(state.learning_rate.dtype)

        def move(rate: jax.Array) -> tuple[Params, State]:
            optimizer = optax.with_extra_args_support(optimizer_factory(rate))
            return optimizer.update(grads, state.optimizer_state, params, **extra)

        # Not at construction: only an update with gradients shows it.
        _refuse_unused_rate(move, rate)
        one = jnp.ones_like(rate)
        updates, tangent, optimizer_state = jax.jvp(move, (rate,), (one,), has_aux=True)
        # A float32 rate promotes bfloat16 updates and moments; a scan needs the dtypes kept.
        updates, tangent = (cast_like(tree, grads) for tree in (updates, tangent))
        optimizer_state = cast_like(optimizer_state, state.optimizer_state)
        return updates, HypergradientDescentState(rate, tangent, optimizer_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_decay(name: str, value: Leaf) -> None:
    if not isinstance(value, jax.core.Tracer) and checks.within(name, value, 0, 1) == 1:
        raise ValueError(f"{name}={value!r} must lie below 1: give 0.9, for instance.")


def _check_rate(name: str, value: Leaf) -> None:
    if callable(value):
        raise ValueError(
            f"{name}={value!r} is a schedule: give its first value. To scale an adapted rate over "
            "time, put optax.scale_by_schedule into optimizer_factory."
        )
    checks.positive_if_known(name, value, "give 0.01, for instance")


def _refuse_unused_rate(move: Callable[[jax.Array], Any], rate: jax.Array) -> None:
    jaxpr = jax.make_jaxpr(lambda rate: move(rate)[0])(rate).jaxpr
    read = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    if not any(v is jaxpr.invars[0] for v in read):
        raise ValueError(
            "optimizer_factory's update does not depend on the learning rate it was given, so the "
            "rate would never be adapted. Rates kept in the optimiser's state (optax.rprop, "
            "optax.inject_hyperparams) are read from there: give a factory that builds the plain "
            "optimiser, as in hypergradient_descent(optax.adam, ...)."
        )


def scale_by_tree(rates: Tree) -> optax.GradientTransformation:
    """Multiplies updates by a tree of rates: per layer, per group or per weight.

    optax scales by one number; here each rate is traced and has its own gradient.

    Args:
      rates: a prefix of the parameters' tree: a leaf stands for the whole subtree below it, and
        broadcasts to each of its arrays (`[]` per layer, the weight's own shape per weight). The
        sign is kept, as in `optax.scale`.

    `optax.chain(optax.adamw(1.0, weight_decay=1e-2), scale_by_tree(rates))` has one learning rate
    per layer; `optax.partition` gives whole groups optimisers of their own.

    Raises:
      ValueError: `rates` is no prefix of the updates, or a leaf does not broadcast.

    >>> import jax.numpy as jnp
    >>> updates = {"body": {"w": jnp.ones(2), "b": jnp.ones(1)}, "head": jnp.ones(2)}
    >>> scale = scale_by_tree({"body": 0.5, "head": jnp.array([2.0, 3.0])})
    >>> scaled, _ = scale.update(updates, scale.init(updates))
    >>> [x.tolist() for x in (scaled["body"]["w"], scaled["body"]["b"], scaled["head"])]
    [[0.5, 0.5], [0.5], [2.0, 3.0]]
    """

    def update(updates: Params, params: Params | None) -> Params:
        del params
        return with_prefix(lambda rate, u: rate * u, "rates", rates, updates)

    return optax.stateless(update)


def decay_by_tree(weight_decay: Tree) -> optax.GradientTransformation:
    """Adds weight decay from a tree of coefficients: per layer, per group or per weight.

    `optax.add_decayed_weights` with a tree in place of its one number; `weight_decay` is a prefix
    of the parameters' tree, as in `scale_by_tree`. Coupled (L2) in front of an optimiser; decoupled
    between its scaling and its learning rate.

    Raises:
      ValueError: `weight_decay` is no prefix of the updates, or a leaf does not broadcast; `update`
        was called without `params`.

    >>> import jax.numpy as jnp
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    >>> decay = decay_by_tree({"body": 0.1, "head": jnp.array([0.0, 0.2])})
    >>> updates, _ = decay.update({"body": jnp.zeros(2), "head": jnp.zeros(2)}, (), params)
    >>> [[round(float(u), 3) for u in updates[name]] for name in ("body", "head")]
    [[0.1, 0.1], [0.0, 0.2]]
    """

    def update(updates: Params, params: Params | None) -> Params:
        if params is None:
            raise ValueError("params=None: decay needs them. Call update(grads, state, params).")
        return with_prefix(
            lambda decay, u, p: u + decay * p, "weight_decay", weight_decay, updates, params
        )

    return optax.stateless(update)


def with_prefix(
    f: Callable[..., jax.Array], name: str, prefix: Tree, tree: Params, *rest: Params
) -> Params:
    """`f(value, leaf, ...)` of every leaf of `tree`, with the value of `prefix` at or above it."""
    for leaf in jax.tree.leaves(prefix) or [prefix]:
        checks.numbers(name, leaf)

    def on_leaf(value: Leaf, leaf: jax.Array, *others: jax.Array) -> jax.Array:
        ours, shape = jnp.shape(value), jnp.shape(leaf)
        pairs = zip(ours[::-1], shape[::-1], strict=False)
        if len(ours) > len(shape) or any(size not in (1, whole) for size, whole in pairs):
            raise ValueError(f"shape {ours} does not broadcast to {shape}")
        return f(value, leaf, *others).astype(leaf.dtype)

    try:
        return jax.tree.map(on_leaf, jax.tree.broadcast(prefix, tree), tree, *rest)
    except ValueError as error:
        raise ValueError(
            f"{name} with leaves {leaf_names(prefix)} does not fit updates with leaves "
            f"{leaf_names(tree)}: {error}. Give a prefix of the parameters' tree, each leaf a "
            "scalar or of a shape that broadcasts to the arrays below it."
        ) from error
