"""Relaxed choices: the mixture's derivative, what it finds, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

MIXED = hg.Mixed({"tanh": jnp.tanh, "relu": jax.nn.relu, "zero": jnp.zeros_like})


@pytest.mark.usefixtures("x64")
def test_the_derivative_of_the_mixture_in_closed_form() -> None:
    logits, x = jnp.array([0.3, -0.2, 0.1]), 1.5
    values = np.array([np.tanh(x), x, 0.0])
    weights = np.exp(logits) / np.exp(logits).sum()
    value, grad = jax.value_and_grad(MIXED)(logits, jnp.float64(x))
    np.testing.assert_allclose(value, weights @ values, rtol=1e-12)
    np.testing.assert_allclose(grad, weights * (values - weights @ values), rtol=1e-12)
    cold = hg.Mixed(MIXED.options, temperature=0.01)(logits, jnp.float64(x))
    np.testing.assert_allclose(cold, np.tanh(x), rtol=1e-8)


def test_the_teachers_activation_is_found() -> None:
    """A student of one unit whose teacher is tanh; its logits follow the hypergradient."""
    x = jax.random.normal(jax.random.key(0), (2, 64)) * 2
    y = jnp.tanh(1.3 * x)

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((MIXED(hyper["activation"], w * batch[0]) - batch[1]) ** 2)

    problem = hg.bilevel(lambda key: jnp.ones(()), loss, loss, lambda hyper: optax.sgd(0.3))
    train = (jnp.broadcast_to(x[0], (10, 64)), jnp.broadcast_to(y[0], (10, 64)))
    start = {"activation": MIXED.start()}
    hg.Space({"activation": hg.Float()}).validate(start)

    def step(hyper: Any, _: None) -> Any:
        data = train, (x[1], y[1]), jax.random.key(0)
        grad = hg.hypergradient(problem, hyper, None, *data).grad
        return jax.tree.map(lambda h, g: h - 10.0 * g, hyper, grad), None

    hyper = jax.jit(lambda h: jax.lax.scan(step, h, length=60)[0])(start)
    assert MIXED.choice(hyper["activation"]) == "tanh"
    assert float(MIXED.weights(hyper["activation"])[0]) > 0.8


def test_what_cannot_be_mixed_is_refused_by_name() -> None:
    wider = hg.Mixed({"same": lambda x: x, "twice": lambda x: jnp.concatenate([x, x])})
    with pytest.raises(ValueError, match=r"options\['twice'\] gives shapes \[\(6,\)\] where"):
        wider(wider.start(), jnp.ones(3))
    with pytest.raises(ValueError, match=r"logits is of shape \(2,\): give one number for each"):
        MIXED(jnp.zeros(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"logits is of shape \(4, 3\): a call takes one row"):
        MIXED(jnp.zeros((4, 3)), jnp.ones(3))


def test_a_list_is_named_by_its_functions() -> None:
    assert list(hg.Mixed([jnp.tanh, jnp.sin]).options) == ["tanh", "sin"]
    assert list(hg.Mixed([lambda x: x, jnp.sin]).options) == ["0", "1"]


def test_dtypes_and_trees_are_kept() -> None:
    pairs = hg.Mixed({"a": lambda x: (x, {"b": x}), "b": lambda x: (2 * x, {"b": -x})})
    first, second = pairs(pairs.start(), jnp.ones(2, jnp.bfloat16))
    assert first.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(first, float), 1.5)
    np.testing.assert_allclose(np.asarray(second["b"], float), 0.0)


def test_a_choice_takes_one_row_of_finite_logits() -> None:
    mixed = hg.Mixed({"tanh": jnp.tanh, "sin": jnp.sin})
    with pytest.raises(ValueError, match=r"shape \(3, 2\).*one row"):
        mixed.choice(jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="not finite"):
        mixed.choice(jnp.array([jnp.nan, 1.0]))


def test_what_has_no_value_or_no_mean_is_refused() -> None:
    mixed = hg.Mixed({"tanh": jnp.tanh, "relu": jax.nn.relu})
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(mixed.choice)(mixed.start())
    keys = hg.Mixed({"one": jax.random.key, "two": lambda seed: jax.random.key(seed + 1)})
    with pytest.raises(ValueError, match="options\\['one'\\] gives a PRNG key"):
        keys(keys.start(), 0)
