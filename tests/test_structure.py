"""What reaches what: each way a gradient can be cut, and each way it only looks so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.scipy.ndimage import map_coordinates

import hypergrad as hg
from hypergrad.problem.inner_gradient import inner_gradient
from hypergrad.problem.structure import reaches, require_reach

stop_gradient = jax.lax.stop_gradient


@jax.custom_jvp
def doubled(x: jax.Array) -> jax.Array:
    return 2 * x


doubled.defjvps(lambda t, out, x: 2 * t)


@jax.custom_vjp
def straight_through_sign(x: jax.Array) -> jax.Array:
    return jnp.sign(x)


straight_through_sign.defvjp(lambda x: (jnp.sign(x), None), lambda _, c: (c,))


def loop(body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda a: jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, body(s[1])), (0, a)
    )[1]


def linearized(a: jax.Array) -> jax.Array:
    return jax.linearize(jax.jit(lambda x: jnp.sin(a * x)), 1.0)[1](2.0)


SMOOTH: dict[str, Callable[[jax.Array], jax.Array]] = {
    "square": lambda a: a**2,
    "straight-through": lambda a: a + stop_gradient(jnp.round(a) - a),
    "masked by another": lambda a: jnp.where(jnp.arange(3.0) > 1, a, 0).sum(),
    "one of two paths": lambda a: jnp.sign(a) + 1e-3 * a,
    "scan carry": lambda a: jax.lax.scan(lambda c, _: (c * a, None), 1.0, None, 3)[0],
    "scan output": lambda a: jax.lax.scan(lambda c, x: (c, x * 2), 0.0, a[None])[1].sum(),
    "late in a scan": lambda a: jax.lax.scan(
        lambda c, _: ((c[1], c[2], c[2]), None), (0.0, 0.0, a), None, 3
    )[0][0],
    "while": loop(lambda x: 2 * x),
    "sign in a loop that may run no step": loop(jnp.sign),
    "cond": lambda a: jax.lax.cond(jnp.bool_(True), jnp.sin, jnp.sign, a),
    "jit": jax.jit(jnp.sin),
    "checkpoint": jax.checkpoint(jnp.sin),
    "custom_jvp": doubled,
    "custom_vjp": straight_through_sign,
    "inner_gradient": lambda a: inner_gradient(lambda w, h: h * w**2)(3.0, a)[0],
    "linearize": linearized,
    "vmap": lambda a: jax.vmap(lambda x: x * a)(jnp.ones(2)).sum(),
    "clip": lambda a: jnp.clip(a, 0, 1),
    "narrower float": lambda a: a.astype(jnp.bfloat16),
}

CUT: dict[str, tuple[Callable[[jax.Array], jax.Array], str]] = {
    "sign": (jnp.sign, "sign"),
    "round": (lambda a: jnp.round(a) * 2, "round"),
    "stop_gradient": (stop_gradient, "stop_gradient"),
    "mask": (lambda a: jnp.where(jnp.arange(3.0) < a, 1.0, 0.0).sum(), "a comparison"),
    "integer": (lambda a: a.astype(jnp.int32) * 1.5, "an integer"),
    "scan": (lambda a: jax.lax.scan(lambda c, _: (c + jnp.sign(a), None), 0.0, None, 3)[0], "sign"),
    "while condition": (
        lambda a: jax.lax.while_loop(lambda s: s < a, lambda s: s + 1, 0.0),
        "a comparison",
    ),
    "cond predicate": (lambda a: jax.lax.cond(a > 0, lambda: 1.0, lambda: 2.0), "a comparison"),
    "jit": (jax.jit(jnp.sign), "sign"),
    "checkpoint": (jax.checkpoint(jnp.sign), "sign"),
    "inner_gradient": (
        lambda a: inner_gradient(lambda w, h: jnp.sign(h) * w**2)(3.0, a)[0],
        "sign",
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_paths(name: str) -> None:
    (reach,) = reaches(lambda h: SMOOTH[name](h["a"]), {"a": jnp.float32(0.3)})
    assert (reach.name, reach.used, reach.differentiable) == ("a", True, True)


@pytest.mark.parametrize("name", CUT)
def test_cut_paths(name: str) -> None:
    function, cut = CUT[name]
    (reach,) = reaches(lambda h: function(h["a"]), {"a": jnp.float32(0.3)})
    assert (reach.used, reach.differentiable) == (True, False)
    assert reach.cut_by == (cut,)
    with pytest.raises(ValueError, match=rf"'a' reaches .* only through .*{cut}.*silent zero"):
        require_reach(lambda h: function(h["a"]), {"a": jnp.float32(0.3)})


@pytest.mark.parametrize(
    "unused",
    [
        lambda h: h["a"] ** 2,
        lambda h: jax.lax.scan(
            lambda c, _: ((c[0] * h["a"], c[1] + h["b"]), None), (1.0, 0.0), None, 3
        )[0][0],
        lambda h: inner_gradient(lambda w, h: h["a"] * w + h["b"])(1.0, h)[0],
        lambda h: jax.jit(lambda a, b: a)(h["a"], h["b"]),
        lambda h: jax.checkpoint(lambda a, b: (jnp.sin(a), b))(h["a"], h["b"])[0],
    ],
    ids=["plain", "scan", "inner_gradient", "jit", "checkpoint"],
)
def test_unused_is_named_and_the_used_one_is_not(unused: Any) -> None:
    hyper = {"a": jnp.float32(0.3), "b": jnp.float32(0.2)}
    assert [(r.used, r.differentiable) for r in reaches(unused, hyper)] == [
        (True, True),
        (False, False),
    ]
    with pytest.raises(ValueError, match=r"'b' never reaches the validation loss"):
        require_reach(unused, hyper)


def test_integers_are_refused_by_name_and_dtype() -> None:
    hyper = {"layers": [jnp.float32(1.0), jnp.int32(2)]}
    with pytest.raises(ValueError, match=r"'layers/1' is of dtype int32"):
        require_reach(lambda h: h["layers"][0] * h["layers"][1], hyper)


def trained(optimizer: Any, hyper: dict[str, Any], penalty: Any = lambda w, h: 0.0) -> Any:
    """Runs hypergradient's own check on a small problem."""

    def train_loss(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
        return jnp.mean((w - batch) ** 2) + penalty(w, hyper)

    problem = hg.bilevel(
        lambda key: jnp.zeros(2),
        train_loss,
        lambda w, hyper, batch, key: jnp.mean((w - batch) ** 2),
        optimizer,
    )
    train = jnp.ones((3, 2))
    return hg.hypergradient(problem, hyper, None, train, 2 * jnp.ones(2), jax.random.key(0))


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_lions_decay_rates_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' .*the sign of the update \(lion"):
        trained(lambda h: optax.lion(0.1, **h), {name: 0.9})


@pytest.mark.parametrize("optimizer", [optax.lion, optax.adam, optax.sgd])
def test_learning_rates_reach(optimizer: Any) -> None:
    estimate = trained(lambda h: optimizer(h["lr"]), {"lr": 0.1})
    assert float(estimate.grad["lr"]) < -0.1  # far from the optimum: a larger rate is better


def test_a_constant_added_to_the_training_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'shift' never reaches the validation loss"):
        trained(lambda h: optax.sgd(0.1), {"shift": 0.5}, lambda w, h: h["shift"] ** 2)
    with pytest.raises(ValueError, match=r"'shift' .*stop_gradient"):
        trained(
            lambda h: optax.sgd(0.1),
            {"shift": 0.5},
            lambda w, h: stop_gradient(h["shift"]) * w.sum(),
        )
    estimate = trained(lambda h: optax.sgd(0.1), {"l2": 0.5}, lambda w, h: h["l2"] * jnp.sum(w**2))
    assert float(estimate.grad["l2"]) > 0.1


NOISE = jax.random.key(3)
Z = jnp.linspace(-1.0, 1.0, 5)


def uniform(key: jax.Array = NOISE) -> jax.Array:
    return jax.random.uniform(key, (5,))


def kept(a: jax.Array, mask: jax.Array) -> jax.Array:
    return (Z * mask / (1 - a)).sum()


def layers(a: jax.Array) -> jax.Array:
    """Stochastic depth, its rate growing with the layer."""

    def layer(z: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        keep = jax.random.bernoulli(jax.random.fold_in(NOISE, i), 1 - a * i / 3)
        return z + jnp.where(keep, jnp.tanh(z), 0) / (1 - a * i / 3), None

    return jax.lax.scan(layer, Z, jnp.arange(3.0).astype(int))[0].sum()


DICED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bernoulli": lambda a: kept(a, jax.random.bernoulli(NOISE, 1 - a, (5,))),
    "legacy key": lambda a: kept(a, jax.random.bernoulli(jax.random.PRNGKey(0), 1 - a, (5,))),
    "a rate per unit": lambda a: kept(a, jax.random.uniform(NOISE, (5,)) > a * Z),
    "where": lambda a: jnp.where(uniform() < a, 0, Z / (1 - a)).sum(),
    "floor": lambda a: kept(a, jnp.floor(1 - a + uniform())),
    "an integer": lambda a: kept(a, (1 - a + uniform()).astype(int)),
    "sign": lambda a: kept(a, (jnp.sign(uniform() - a) + 1) / 2),
    "difference": lambda a: kept(a, uniform() - a > 0),
    "normal bits": lambda a: kept(a, jax.random.normal(NOISE, (5,)) > a),
    "categorical": lambda a: a * Z[jax.random.categorical(NOISE, a * jnp.arange(5.0))],
    "categorical, beside data": lambda a: a * Z[jax.random.categorical(NOISE, a * Z)],
    "choice": lambda a: a * jax.random.choice(NOISE, Z, p=jax.nn.softmax(a * jnp.arange(5.0))),
    "stochastic depth": layers,
    "jit and remat": jax.jit(
        jax.checkpoint(lambda a: kept(a, jax.random.bernoulli(NOISE, 1 - a, (5,))))
    ),
    "vmap": lambda a: jax.vmap(lambda k: kept(a, uniform(k) > a))(jax.random.split(NOISE, 2)).sum(),
    "cond": lambda a: jax.lax.cond(jax.random.uniform(NOISE) < a, jnp.sin, jnp.cos, a),
}


def straight_through_mask(a: jax.Array) -> jax.Array:
    return a + stop_gradient((uniform() < a) - a)


PIECEWISE: dict[str, Callable[[jax.Array], jax.Array]] = {
    **{
        f"hg.dropout, {form}": lambda a, form=form: hg.dropout(Z, a, NOISE, form).sum()
        for form in ("bernoulli", "gaussian", "relaxed")
    },
    "relu of noise": lambda a: jax.nn.relu(a * uniform() - 0.1).sum(),
    "leaky relu of noise": lambda a: jax.nn.leaky_relu(a * uniform() - 0.1).sum(),
    "where-relu": lambda a: jnp.where(a * Z > 0.1, a * Z, 0.1).sum(),
    "clip of noise": lambda a: jnp.clip(jax.random.normal(NOISE, (5,)) * a, -1, 1).sum(),
    "max": lambda a: jnp.maximum(uniform(), a).sum(),
    "a random shift": lambda a: map_coordinates(
        Z, [jnp.arange(5) + a * jax.random.normal(NOISE)], 1, mode="nearest"
    ).sum(),
    "the hardest of noisy data": lambda a: (Z + a * uniform())[jnp.argmax(Z + a * uniform())],
    "quantile": lambda a: jnp.quantile(Z + uniform(), a),
    "a threshold on noisy data": lambda a: jnp.where(Z + uniform() > a, Z - a, 0).sum(),
    "Huber": lambda a: optax.losses.huber_loss(Z + uniform(), a * Z).sum(),
    "straight-through mask": lambda a: kept(a, straight_through_mask(a)),
    "a mask of another rate": lambda a: (Z * (uniform() < 0.5) * a).sum(),
    "reparametrised": lambda a: (Z + a * jax.random.normal(NOISE, (5,))).sum() ** 2,
    "relaxed choice": lambda a: jax.nn.softmax(a * Z + jax.random.gumbel(NOISE, (5,))).max(),
    "gamma": lambda a: jax.random.gamma(NOISE, a, (5,)).sum(),
    "mixup": lambda a: (Z * jax.random.beta(NOISE, a, a)).sum(),
    "a soft threshold on weights that began as noise": lambda a: jax.lax.fori_loop(
        0, 2, lambda _, w: jnp.where(w > a, w - a, 0), uniform()
    ).sum(),
    "the mask alone is meant": lambda a: kept(a, stop_gradient(1.0 * (uniform() > a))),
}


@pytest.mark.parametrize("name", DICED)
def test_a_comparison_with_random_bits_is_named(name: str) -> None:
    """The other, smooth path would give a gradient that looks plausible."""
    (reach,) = reaches(DICED[name], 0.3)
    assert reach.differentiable and reach.compared_with_noise
    with pytest.raises(ValueError, match=r"compared with random bits.*hypergrad.dropout"):
        require_reach(lambda h: DICED[name](h["rate"]), {"rate": 0.3})


@pytest.mark.parametrize("name", PIECEWISE)
def test_what_is_merely_piecewise_is_not(name: str) -> None:
    require_reach(lambda h: PIECEWISE[name](h["rate"]), {"rate": 0.3})


def test_float16_is_refused() -> None:
    half = lambda a: jnp.sin(a.astype(jnp.float16)).astype(jnp.float32)  # noqa: E731
    with pytest.raises(ValueError, match=r"through float16.*bfloat16"):
        require_reach(half, jnp.float32(0.3))
    require_reach(lambda a: a + stop_gradient(half(a)), jnp.float32(0.3))
