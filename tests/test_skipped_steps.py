"""A step that was not taken contributes exactly nothing, in every mode: no 0 times NaN."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.problem.skips import skipping
from hypergrad.testing import relative_error

K, BAD = 5, 2
X = np.array(jax.random.normal(jax.random.key(0), (K, 8, 3)))
Y = X @ np.arange(3.0, dtype="f")
VALID = X[0].copy(), Y[0].copy()
X[BAD, 1, 0] = np.nan
KEY = jax.random.key(0)


def loss(w: jax.Array, h: Any, b: Any, key: Any) -> jax.Array:
    return jnp.mean((b[0] @ w - b[1]) ** 2)


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.tanh(g),))


def by_value(step: Any, value: Any = None, **extra: Any) -> jax.Array:
    return jnp.isfinite(value)


def branch(inner: Any) -> Any:
    """A user's own lax.cond."""

    def update(g: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        go = lambda _: inner.update(g, state, params)  # noqa: E731
        stay = lambda _: (jnp.zeros_like(g), state)  # noqa: E731
        return jax.lax.cond(jnp.isfinite(g).all(), go, stay, None)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def where(inner: Any) -> Any:
    """As loss scaling is often written, the condition anew at each leaf."""

    def update(g: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return jax.tree.map(
            lambda new, old: jnp.where(jnp.isfinite(g).all(), new, old),
            inner.update(g, state, params),
            (jnp.zeros_like(g), state),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 9),
    "conditionally_mask": lambda inner: optax.conditionally_mask(inner, by_value, True),
    "conditionally_transform": lambda inner: optax.chain(
        optax.conditionally_transform(inner, by_value, True), optax.zero_nans()
    ),
    "lax.cond": branch,
    "where": where,
}


def gradients(wrapper: str, train_loss: Any = loss) -> Callable[..., Any]:
    problem = hg.bilevel(
        lambda key: jnp.full(3, 0.1),
        train_loss,
        loss,
        lambda h: WRAPPERS[wrapper](optax.adam(h["lr"], b1=h["b1"])),
    )

    def run(hyper: Any, estimator: Any) -> Any:
        arguments = None, (X, Y), VALID, KEY
        return hg.hypergradient(problem, hyper, *arguments, estimator=estimator).grad

    return run


HYPER = {"lr": jnp.array([0.03, 0.05]), "b1": jnp.array([0.9, 0.8])}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_reverse_forward_and_differences_agree(wrapper: str) -> None:
    run = gradients(wrapper)

    @jax.jit
    def all_of_them() -> Any:
        several = jax.tree.map(jnp.float64, HYPER)
        one = jax.tree.map(lambda x: x[0], several)
        estimators = hg.Unrolled(checkpoint="sqrt"), hg.Forward(), hg.FiniteDifference(1e-6)
        return [run(one, e) for e in estimators], jax.vmap(lambda h: run(h, hg.Unrolled()))(several)

    (reverse, forward, differences), several = all_of_them()
    assert relative_error(reverse, forward) < 1e-12
    assert relative_error(reverse, differences) < 1e-6
    assert relative_error(jax.tree.map(lambda x: x[0], several), reverse) < 1e-12
    assert abs(float(reverse["lr"])) > 0.1


@pytest.mark.usefixtures("x64")
def test_a_loss_with_a_rule_of_its_own() -> None:
    with_rule = lambda w, h, b, key: loss(clipped(w), h, b, key)  # noqa: E731
    run = gradients("apply_if_finite", with_rule)
    one = jax.tree.map(lambda x: jnp.float64(x[0]), HYPER)
    reverse, forward = jax.jit(lambda: [run(one, e) for e in (hg.Unrolled(), hg.Forward())])()
    assert abs(float(reverse["lr"])) > 0.1
    assert relative_error(reverse, forward) < 1e-12


def as_on_flax_page(inner: Any, new: Any, value: Any, g: Any) -> Any:
    finite = ~jnp.isnan(jnp.sum(g))
    pick = lambda a, b: jax.lax.select(jnp.broadcast_to(finite, a.shape), a, b)  # noqa: E731
    return jax.tree.map(pick, new(g), (inner.params, inner.opt_state))


def by_its_norm(inner: Any, new: Any, value: Any, g: Any) -> Any:
    small = optax.global_norm(g) < 1e3
    pick = lambda a, b: jnp.where(small, a, b)  # noqa: E731
    return jax.tree.map(pick, new(g), (inner.params, inner.opt_state))


def by_both_truths(inner: Any, new: Any, value: Any, g: Any) -> Any:
    """Which was a KeyError."""
    bad, (params, opt_state) = jnp.isnan(value), new(g)
    jax.lax.cond(bad, lambda: jax.debug.callback(lambda: None), lambda: None)
    take = lambda new, old: jnp.where(~bad, new, old)  # noqa: E731
    keep = lambda new, old: jnp.where(bad, old, new)  # noqa: E731
    return take(params, inner.params), jax.tree.map(keep, opt_state, inner.opt_state)


def by_a_branch(inner: Any, new: Any, value: Any, g: Any) -> Any:
    old = inner.params, inner.opt_state
    return jax.lax.cond(jnp.isfinite(value), lambda: new(g), lambda: old)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("skip", [as_on_flax_page, by_its_norm, by_a_branch, by_both_truths])
def test_a_whole_state_selected_after_a_plain_gradient(skip: Callable[..., Any]) -> None:
    """In a hand-filled step. By a norm and by a branch, reverse mode was NaN."""
    begun = hg.bilevel(lambda key: jnp.full(3, 0.1), loss, loss, lambda h: optax.adam(h["lr"]))

    def step(inner: Any, h: Any, b: Any, key: Any) -> Any:
        value, g = jax.value_and_grad(loss)(inner.params, h, b, key)

        def new(g: Any) -> Any:
            adam = optax.adam(h["lr"], b1=h["b1"], eps=1e-3)
            updates, opt_state = adam.update(g, inner.opt_state)
            return optax.apply_updates(inner.params, updates), opt_state

        params, opt_state = skip(inner, new, value, g)
        return inner._replace(params=params, opt_state=opt_state, step=inner.step + 1, loss=value)

    problem = begun._replace(step=step)
    one = jax.tree.map(lambda x: jnp.float64(x[0]), HYPER)

    @jax.jit
    def run(hyper: Any) -> Any:
        arguments = None, (X, Y), VALID, KEY
        return [
            hg.hypergradient(problem, hyper, *arguments, estimator=e).grad
            for e in (hg.Unrolled(), hg.Forward(), hg.FiniteDifference(1e-6))
        ]

    reverse, forward, differences = run(one)
    assert relative_error(reverse, forward) < 1e-12
    assert relative_error(reverse, differences) < 1e-6
    assert abs(float(reverse["lr"])) > 0.1


def test_clipping_is_no_skipped_step() -> None:
    """A selection whose two sides are both made of the gradient leaves the program as it is."""

    def step(w: jax.Array, h: jax.Array) -> jax.Array:
        g = jax.grad(loss)(w, h, (X[0], Y[0]), None)
        return optax.clip_by_global_norm(1.0).update(g, optax.EmptyState())[0] * h

    program = jax.make_jaxpr(skipping(step))(jnp.ones(3), jnp.float32(0.1))
    assert str(program) == str(jax.make_jaxpr(step)(jnp.ones(3), jnp.float32(0.1)))


def test_tuning_goes_on_across_a_nan_example() -> None:
    problem = hg.bilevel(
        lambda key: jnp.zeros(3),
        loss,
        loss,
        lambda h: optax.apply_if_finite(optax.adam(h["lr"]), 9),
    )
    tuner = hg.alternating(problem, hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")}))
    state, update = tuner.init({"lr": 0.003}, KEY), jax.jit(tuner.update)
    for _ in range(10):
        state, info = update(state, (X, Y), VALID)
        assert int(info.refused) == 0
    assert float(info.hyper["lr"]) > 0.01


def test_nan_is_no_zero_where_the_step_was_taken() -> None:
    problem = hg.bilevel(lambda key: jnp.zeros(3), loss, loss, lambda h: optax.sgd(h["lr"]))
    estimate = hg.hypergradient(problem, {"lr": 0.1}, None, (X, Y), VALID, KEY)
    assert jnp.isnan(estimate.grad["lr"]) and not bool(estimate.info["finite"])
