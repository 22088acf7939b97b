"""The Flax dropouts take a traced rate, keep flax's own calls and add nothing at evaluation."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from hypergrad.nn import LinenDropout, NNXDropout

X = jnp.ones((64, 16))


class AttributeNet(linen.Module):
    """The rate stands in an attribute, traced when the module is built inside the loss."""

    rate: object

    @linen.compact
    def __call__(self, x, train):
        return linen.Dense(4)(LinenDropout(self.rate, deterministic=not train)(x))


class ArgumentNet(linen.Module):
    @linen.compact
    def __call__(self, x, rate, train):
        return linen.Dense(4)(LinenDropout()(x, rate=rate, deterministic=not train))


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("units", [(), (16,)])
def test_linen_rate_has_a_gradient(rate, units):
    variables = ArgumentNet().init(jax.random.key(0), X, 0.1, False)

    def by_argument(rate, key):
        out = ArgumentNet().apply(variables, X, rate, True, rngs={"dropout": key})
        return jnp.mean(out**2)

    def by_attribute(rate, key):
        out = AttributeNet(rate).apply(variables, X, True, rngs={"dropout": key})
        return jnp.mean(out**2)

    keys = jax.random.split(jax.random.key(1), 256)
    at = jnp.full(units, rate)
    first, second = (
        jax.jit(jax.vmap(jax.grad(f), (None, 0)))(at, keys) for f in (by_argument, by_attribute)
    )
    assert jnp.array_equal(first, second)
    # E |W m|^2 / 4 grows with rate / (1 - rate) times the sum of squared weights.
    weights = variables["params"]["Dense_0"]["kernel"]
    wanted = jnp.sum(weights**2) / 4 / (1 - rate) ** 2
    spread = float(first.reshape(256, -1).sum(1).std()) / 16
    assert abs(float(first.reshape(256, -1).sum(1).mean()) - wanted) < 4 * spread + 0.1 * wanted
    assert spread < 0.3 * wanted


def test_linen_evaluation_and_calls_of_flax():
    layer = LinenDropout(rate=0.5)
    assert jnp.array_equal(layer.apply({}, X, deterministic=True), X)
    out = layer.apply({}, X, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert set(jnp.unique(out).tolist()) == {0.0, 2.0}
    assert jnp.array_equal(layer.apply({}, X, False, jax.random.key(3)), layer.apply(
        {}, X, deterministic=False, rng=jax.random.key(3)))  # fmt: skip
    shared = LinenDropout(0.5, broadcast_dims=(0,), deterministic=False)
    rows = shared.apply({}, X, rngs={"dropout": jax.random.key(0)})
    assert jnp.array_equal(rows, jnp.broadcast_to(rows[:1], X.shape))
    assert 0 < float(rows[0].mean()) < 2


def test_linen_errors():
    with pytest.raises(linen.module.errors.InvalidRngError):
        LinenDropout(0.5).apply({}, X, deterministic=False)
    with pytest.raises(ValueError, match="LinenDropout got no rate"):
        LinenDropout().apply({}, X, deterministic=False, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"rate=1\.5"):
        LinenDropout(1.5).apply({}, X, deterministic=False, rngs={"dropout": jax.random.key(0)})


class Model(nnx.Module):
    def __init__(self, rngs, rate=None):
        self.dropout = NNXDropout(rate, rngs=rngs)
        self.dense = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, rate=None, rngs=None):
        return self.dense(self.dropout(x, rate=rate, rngs=rngs))


def test_nnx_rate_has_a_gradient_under_jit():
    graph, state = nnx.split(Model(nnx.Rngs(0)))

    @jax.jit
    def by_key(rate, key):
        return jax.grad(lambda r: jnp.mean(nnx.merge(graph, state)(X, r, key) ** 2))(rate)

    @nnx.jit
    def by_stream(model, rate):
        # nnx.grad, not jax.grad: the stream's counter may not advance inside the latter.
        return nnx.grad(lambda m, r: jnp.mean(m(X, r) ** 2), argnums=1)(model, rate)

    keys = jax.random.split(jax.random.key(1), 256)
    mean = jnp.mean(jnp.stack([by_key(0.3, key) for key in keys]))
    weights = state["dense"]["kernel"][...]
    wanted = jnp.sum(weights**2) / 4 / 0.7**2
    assert abs(mean - wanted) < 0.3 * wanted
    model = Model(nnx.Rngs(0))
    first, second = by_stream(model, 0.3), by_stream(model, 0.3)
    assert float(first) != float(second)
    assert float(jnp.abs(first)) > 1e-3


def test_nnx_attribute_may_hold_an_array():
    model = Model(nnx.Rngs(0), jnp.asarray(0.25))
    graph, state = nnx.split(model)
    out = jax.jit(lambda state: nnx.merge(graph, state)(X))(state)
    assert out.shape == (64, 4)
    assert jnp.array_equal(Model(nnx.Rngs(0), 0.25)(X), model(X))


def test_nnx_evaluation_streams_and_modes():
    layer = NNXDropout(0.5, rngs=nnx.Rngs(0))
    assert not jnp.array_equal(layer(X), layer(X))  # the stream advances
    assert jnp.array_equal(layer(X, deterministic=True), X)
    layer.eval()
    assert jnp.array_equal(layer(X), X)
    layer.train()
    assert set(jnp.unique(layer(X)).tolist()) == {0.0, 2.0}
    key = jax.random.key(5)
    assert jnp.array_equal(layer(X, rngs=key), layer(X, rngs=key))
    assert layer(X, rngs=nnx.Rngs(dropout=1)).shape == X.shape


def test_nnx_errors():
    with pytest.raises(ValueError, match="has no rngs"):
        NNXDropout(0.5)(X)
    with pytest.raises(ValueError, match="NNXDropout got no rate"):
        NNXDropout(rngs=nnx.Rngs(0))(X)
    with pytest.raises(ValueError, match="NNXDropout got no deterministic"):
        NNXDropout(0.5, deterministic=None)(X)
    with pytest.raises(ValueError, match=r"rate=-0\.1"):
        NNXDropout(-0.1)
