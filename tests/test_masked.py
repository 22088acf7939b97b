"""Layers of a traced width against the narrow network, value by value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import hypergrad as hg
from hypergrad.nn import MaskedDense, masked_dense, masked_kernel, unit_mask

MOST, INPUTS = 8, 3
X = jax.random.normal(jax.random.key(1), (16, INPUTS))
Y = jnp.sin(2 * X.sum(-1, keepdims=True))


class Masked(linen.Module):
    """Up to three layers of up to eight units; an activation that is not 0 at 0."""

    @linen.compact
    def __call__(self, x: Any, width: Any, depth: Any) -> Any:
        x = linen.softplus(MaskedDense(MOST)(x, width))
        for i in range(1, 3):
            deeper = linen.softplus(MaskedDense(MOST)(x, width, width))
            x = jnp.where(i < depth, deeper, x)
        return MaskedDense(1)(x, None, width)


class Small(linen.Module):
    width: int
    depth: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = linen.softplus(linen.Dense(self.width)(x))
        return linen.Dense(1)(x)


def narrowed(params: Any, width: int, depth: int) -> Any:
    """The part of the masked network's parameters that the small one has."""
    result = {}
    for i in range(depth + 1):
        layer = params[f"MaskedDense_{3 if i == depth else i}"]
        rows, columns = INPUTS if i == 0 else width, 1 if i == depth else width
        result[f"Dense_{i}"] = {
            "kernel": layer["kernel"][:rows, :columns],
            "bias": layer["bias"][:columns],
        }
    return result


def mse(outputs: Any, y: Any) -> jax.Array:
    return jnp.mean((outputs - y) ** 2)


def optimizer(hyper: Any) -> Any:
    return optax.adamw(hyper["rate"], weight_decay=hyper["decay"])


def masked_problem() -> hg.Problem:
    def problem(hyper: Any) -> hg.Problem:
        shape = hyper["width"], hyper["depth"]

        def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
            shape = hyper["width"], hyper["depth"]
            squares = jnp.sum(params["MaskedDense_3"]["bias"] ** 2)
            for i, ends in enumerate([(shape[0], None), *[(shape[0],) * 2] * 2, (None, shape[0])]):
                kernel = masked_kernel(params[f"MaskedDense_{i}"], *ends)
                squares += jnp.where((i < shape[1]) | (i == 3), jnp.sum(kernel**2), 0.0)
            outputs = Masked().apply({"params": params}, batch[0], *shape)
            return mse(outputs, batch[1]) + hyper["decay"] * squares

        start = lambda key: Masked().init(key, X, *shape)["params"]  # noqa: E731
        return hg.bilevel(start, loss, loss, optimizer)

    first = problem({"width": MOST, "depth": 3})
    return first._replace(init=lambda hyper, key: problem(hyper).init(hyper, key))


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (3, 2)])
def test_a_masked_network_is_the_narrow_one(x64: None, width: int, depth: int) -> None:
    """Value, gradient, three steps of AdamW under a penalty, and their hypergradient."""
    x, y = X.astype(float), Y.astype(float)
    hyper = {"rate": jnp.float64(0.02), "decay": jnp.float64(1e-2)}
    shape = {"width": jnp.int32(width), "depth": jnp.int32(depth)}
    wide, key = masked_problem(), jax.random.key(0)
    given = wide._replace(
        init=lambda hyper, key: wide.init(hyper | shape, key),
        step=lambda s, hyper, batch, key: wide.step(s, hyper | shape, batch, key),
        train_loss=lambda p, hyper, batch, key: wide.train_loss(p, hyper | shape, batch, key),
        valid_loss=lambda p, hyper, batch, key: wide.valid_loss(p, hyper | shape, batch, key),
    )
    begun = jax.tree.map(lambda a: a.astype(float), jax.jit(given.init)(hyper, key).params)

    def narrow_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        squares = sum(jnp.sum(layer["kernel"] ** 2) for layer in params.values())
        squares += jnp.sum(params[f"Dense_{depth}"]["bias"] ** 2)
        outputs = Small(width, depth).apply({"params": params}, batch[0])
        return mse(outputs, batch[1]) + hyper["decay"] * squares

    narrow = hg.bilevel(
        lambda key: narrowed(begun, width, depth), narrow_loss, narrow_loss, optimizer
    )
    gradient = jax.jit(jax.grad(given.train_loss))(begun, hyper, (x, y), key)
    small = narrowed(begun, width, depth)
    expected = jax.jit(jax.grad(narrow.train_loss))(small, hyper, (x, y), key)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)  # noqa: E731
    jax.tree.map(close, narrowed(gradient, width, depth), expected)
    inside = sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(expected))
    everywhere = sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(gradient))
    assert inside == pytest.approx(everywhere, rel=1e-12) and inside > 0.1
    if (width, depth) != (3, 2):
        return  # one hypergradient is enough, and takes its time to compile
    started = hg.bilevel(lambda key: begun, given.train_loss, given.valid_loss, optimizer)
    train = jax.tree.map(lambda a: jnp.broadcast_to(a, (3, *a.shape)), (x, y))
    runs = [hg.hypergradient(p, hyper, None, train, (x, y), key) for p in (started, narrow)]
    # What is off moves by the 1e-16 of `nonzero_gradient`.
    np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=1e-7)
    for name, grad in runs[1].grad.items():
        assert abs(grad) > 1e-4
        np.testing.assert_allclose(runs[0].grad[name], grad, rtol=1e-5)


@pytest.mark.parametrize(
    ("fan", "init", "expected"),
    [
        ("in", linen.initializers.he_normal(), 2 / 40),
        ("out", linen.initializers.variance_scaling(1.0, "fan_out", "normal"), 1 / 100),
        ("avg", linen.initializers.glorot_uniform(), 2 / 140),
    ],
)
def test_what_is_on_starts_at_the_narrow_layers_scale(fan: Any, init: Any, expected: float) -> None:
    layer = MaskedDense(200, kernel_init=init, fan=fan)
    kernel = layer.init(jax.random.key(0), jnp.ones((1, 300)), 100, 40)["params"]["kernel"]
    variance = float(jnp.var(kernel[:40, :100]))
    # Of 4,000 draws: the standard error is 2.2%.
    assert variance == pytest.approx(expected, rel=0.08)
    assert not kernel[40:].any() and not kernel[:, 100:].any()


def test_one_program_for_all_widths_and_what_is_ignored() -> None:
    params = {"kernel": jnp.ones((4, 5))}
    traced = jax.jit(masked_dense)
    for units, inputs in ((1, 4), (5, 2)):
        x = jnp.where(jnp.arange(4) < inputs, 1.0, 7.0)[None]
        expected = np.where(np.arange(5) < units, inputs, 0.0)
        np.testing.assert_array_equal(traced(params, x, units, inputs)[0], expected)
    assert traced._cache_size() == 1
    for wrong in (0, 1.5, "3", None):
        with pytest.raises(ValueError, match="most"):
            unit_mask(1, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fan='both'"):
        MaskedDense(3, fan="both").init(jax.random.key(0), X)  # type: ignore[arg-type]


def test_a_sweep_over_widths_and_depths_compiles_one_program() -> None:
    made = []

    def make(choices: dict[str, Any]) -> hg.Problem:
        made.append(choices)
        return masked_problem()

    space = hg.Space(
        {
            "width": hg.Int(1, MOST, traced=True),
            "depth": hg.Int(1, 3, traced=True),
            "rate": hg.Float(1e-3, 0.3, scale="log"),
            "decay": hg.Float(1e-6, 1e-1, scale="log"),
        }
    )
    data = hg.Splits((X[:10], Y[:10]), (X[10:], Y[10:]))
    result = hg.sweep(
        make,
        space,
        data,
        num_trials=5,
        num_steps=4,
        batch_size=5,
        sampler="random",
        progress=False,
    )
    assert made == [{}]
    shapes = {(t.params["width"], t.params["depth"]) for t in result.study.trials}
    assert len(shapes) >= 4
    assert all(t.state.name == "COMPLETE" for t in result.study.trials)
