"""inner_gradient against plain jax.grad in every mode, what it refuses, and the memory it saves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.problem.inner_gradient import inner_gradient
from hypergrad.testing import relative_error


def loss(params: Any, hyper: Any, batch: Any, key: Any) -> tuple[jax.Array, Any]:
    """Every part is nonlinear and coupled; aux holds floats, an integer and a boolean."""
    inputs, targets = batch
    noise = jax.random.normal(key, inputs.shape)
    hidden = jnp.tanh((inputs + hyper["noise"] * noise) @ params["w"] + params["b"])
    errors = (hidden.sum(-1) * hyper["scale"][0] - targets) ** 2
    penalty = hyper["l2"] * jnp.sum(jnp.cosh(params["w"])) * params["count"]
    aux = {"mean": hidden.mean(0), "large": jnp.sum(errors > 1), "seen": params["count"]}
    return jnp.mean(errors) + penalty, aux


def plain_gradient(params: Any, hyper: Any, batch: Any, key: Any) -> Any:
    """The same by `jax.grad`, with zeros for integer leaves."""
    floats = {name: leaf for name, leaf in params.items() if name != "count"}
    with_count = lambda p: loss({**p, "count": params["count"]}, hyper, batch, key)  # noqa: E731
    value_aux, grads = jax.value_and_grad(with_count, has_aux=True)(floats)
    return {**grads, "count": jnp.zeros_like(params["count"])}, value_aux


def arguments() -> tuple[Any, Any, Any, jax.Array]:
    keys = jax.random.split(jax.random.key(7), 3)
    params = {
        "w": jax.random.normal(keys[0], (3, 4)),
        "b": jnp.linspace(-1, 1, 4),
        "count": jnp.int32(2),
    }
    hyper = {"l2": jnp.array(0.1), "noise": jnp.array(0.3), "scale": [jnp.array(0.8), 3]}
    return params, hyper, (jax.random.normal(keys[1], (5, 3)), jnp.ones(5)), keys[2]


def train(gradient: Callable[..., Any], hyper: Any, wrap: Any = lambda f: f) -> jax.Array:
    """Three steps in which gradient, value and aux all move the state, then a scalar."""
    params, rest, batch, key = arguments()

    def body(params: Any, t: jax.Array) -> tuple[Any, None]:
        joined = {**rest, "l2": hyper["l2"], "noise": hyper["noise"]}
        grads, (value, aux) = gradient(params, joined, batch, jax.random.fold_in(key, t))
        moved = {
            "w": params["w"] - 0.1 * grads["w"] * value,
            "b": params["b"] - 0.1 * grads["b"] + 0.05 * aux["mean"],
            "count": params["count"] + aux["large"].astype(jnp.int32),
        }
        return moved, None

    end = jax.lax.scan(wrap(body), params, jnp.arange(3))[0]
    return jnp.sum(jnp.sin(end["w"])) + jnp.sum(end["b"] ** 2) * hyper["l2"]


HYPER = {"l2": 0.1, "noise": 0.3}
POPULATION = {"l2": np.array([0.1, 0.2]), "noise": np.array([0.3, 0.5])}
TANGENT = {"l2": 1.0, "noise": -0.7}


def directional(run: Callable[[Any], jax.Array], hyper: Any) -> jax.Array:
    return jax.jvp(run, (hyper,), (jax.tree.map(jnp.asarray, TANGENT),))[1]


MODES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "reverse": lambda g: jax.grad(lambda h: train(g, h))(HYPER),
    "forward": lambda g: jax.jacfwd(lambda h: train(g, h))(HYPER),
    "vmap of reverse": lambda g: jax.vmap(jax.grad(lambda h: train(g, h)))(POPULATION),
    "vmap of forward": lambda g: jax.vmap(lambda h: directional(lambda i: train(g, i), h))(
        POPULATION
    ),
    "checkpoint": lambda g: jax.grad(lambda h: train(g, h, jax.checkpoint))(HYPER),
    "vmap of checkpoint": lambda g: jax.vmap(jax.grad(lambda h: train(g, h, jax.checkpoint)))(
        POPULATION
    ),
    "reverse of vmap": lambda g: jax.grad(
        lambda h: jnp.sum(jax.vmap(lambda s: train(g, {**h, "l2": s * h["l2"]}))(POPULATION["l2"]))
    )(HYPER),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", MODES)
def test_equals_plain_gradient(mode: str) -> None:
    to_float64 = MODES[mode]
    ours = jax.jit(lambda: to_float64(inner_gradient(loss)))()
    plain = jax.jit(lambda: to_float64(plain_gradient))()
    assert relative_error(ours, plain) < 1e-12


def test_primal_values_and_integer_leaves(dtype: Any) -> None:
    grads, (value, aux) = inner_gradient(loss)(*arguments())
    plain_grads, (plain_value, plain_aux) = plain_gradient(*arguments())
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)
    assert relative_error((grads["w"], grads["b"]), (plain_grads["w"], plain_grads["b"])) < 1e-6
    assert grads["w"].dtype == dtype
    assert (grads["count"].dtype, int(grads["count"])) == (jnp.int32, 0)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    np.testing.assert_allclose(aux["mean"], plain_aux["mean"], rtol=1e-5)
    assert jnp.issubdtype(aux["large"].dtype, jnp.integer)
    assert (int(aux["large"]), int(aux["seen"])) == (int(plain_aux["large"]), 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("part", ["grads", "value", "aux"])
def test_cotangents_of_each_output_alone(part: str) -> None:
    """In params and hyper at once, so that no path hides behind another."""
    params, hyper, batch, key = arguments()

    def scalar(gradient: Any, w: jax.Array, l2: jax.Array, noise: jax.Array) -> jax.Array:
        joined = {**hyper, "l2": l2, "noise": noise}
        grads, (value, aux) = gradient({**params, "w": w}, joined, batch, key)
        return {
            "grads": jnp.sum(jnp.sin(grads["w"])) + jnp.sum(grads["b"] ** 2),
            "value": value**2,
            "aux": jnp.sum(aux["mean"] ** 3) + 0 * l2,
        }[part]

    at = (params["w"], hyper["l2"], hyper["noise"])
    used = (0, 2) if part == "aux" else (0, 1, 2)  # the aux does not see l2

    @jax.jit  # one program: one operation after another, each compiled, took ten times as long
    def both(*at: jax.Array) -> Any:
        return [
            [
                transform(lambda *x, g=gradient: scalar(g, *x), used)(*at)
                for gradient in (inner_gradient(loss), plain_gradient)
            ]
            for transform in (jax.grad, jax.jacfwd)
        ]

    for ours, plain in both(*at):
        assert relative_error(ours, plain) < 1e-12


def test_loss_without_aux_and_without_rest() -> None:
    grads, (value, aux) = inner_gradient(lambda w, h: h * w**3)(2.0, 3.0)
    assert (float(grads), float(value), aux) == (36.0, 24.0, ())


def simple(h: jax.Array, w: jax.Array) -> jax.Array:
    gradient = inner_gradient(lambda w, h, x: jnp.sum(jnp.sin(w * h * x)))
    return jnp.sum(gradient(w, h, jnp.ones(3))[0] ** 2)


@pytest.mark.parametrize(
    "twice",
    [
        jax.hessian(simple),
        jax.grad(jax.grad(simple)),
        jax.jacfwd(jax.jacfwd(simple)),
        jax.grad(jax.jacfwd(simple)),
        jax.jacfwd(jax.grad(simple), 1),
        jax.jacrev(jax.grad(simple), 1),
        jax.jacrev(jax.jacfwd(simple), 1),
    ],
    ids=["hessian", "grad-grad", "fwd-fwd", "grad-fwd", "mixed-fr", "mixed-rr", "mixed-rf"],
)
def test_second_order_raises(twice: Any) -> None:
    """Loudly, by whichever of our errors and JAX's comes first; never a wrong number."""
    with pytest.raises((TypeError, ValueError)):
        twice(jnp.float32(0.7), jnp.arange(3.0))


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd])
def test_a_batch_that_depends_on_hyper_is_refused(transform: Any) -> None:
    gradient = inner_gradient(lambda w, h, batch: jnp.sum((w - batch) ** 2) * h)

    def through_batch(h: jax.Array) -> jax.Array:
        return gradient(jnp.ones(2), 1.0, {"x": h * jnp.ones(2)}["x"])[0].sum()

    with pytest.raises(ValueError, match=r"batch or key.*depends on.*inside `hyper`"):
        jax.jit(transform(through_batch))(0.5)
    through_hyper = inner_gradient(lambda w, h: jnp.sum((w - h["x"]) ** 2))
    learned = transform(lambda h: through_hyper(jnp.ones(2), {"x": h * jnp.ones(2)})[0].sum())
    np.testing.assert_allclose(learned(0.5), -4.0)


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd])
def test_a_loss_that_closes_over_hyper_raises(transform: Any) -> None:
    def closed_over(h: jax.Array) -> jax.Array:
        return inner_gradient(lambda w, _: h * w**2)(3.0, 1.0)[0]

    with pytest.raises(jax.errors.UnexpectedTracerError):
        transform(closed_over)(2.0)


def test_a_loss_that_is_no_scalar_is_named() -> None:
    def per_example(w: jax.Array, hyper: Any, batch: jax.Array) -> jax.Array:
        return (w - batch) ** 2

    with pytest.raises(ValueError, match=r"per_example returned an array of shape \(4,\)"):
        inner_gradient(per_example)(1.0, None, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(4,\), not a scalar"):
        inner_gradient(lambda *a: (per_example(*a), {}))(1.0, None, jnp.zeros(4))


def test_reverse_stores_nothing_of_the_inner_backward_pass() -> None:
    """Temporary memory of 50 steps; the plain rule keeps every step's activations."""
    batch = jnp.ones((64, 8))

    def deep(w: jax.Array, h: jax.Array, batch: jax.Array) -> jax.Array:
        x = batch
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2) + h * jnp.sum(w**2)

    def run(gradient: Callable[..., jax.Array], h: jax.Array) -> jax.Array:
        step = lambda w, _: (w - 0.1 * gradient(w, h, batch), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, jnp.eye(8), None, length=50)[0])

    def temporary(gradient: Callable[..., jax.Array]) -> int:
        compiled = jax.jit(jax.grad(lambda h: run(gradient, h))).lower(0.1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary(lambda w, h, x: inner_gradient(deep)(w, h, x)[0])
    assert 50 * 8 * 8 * 4 <= ours < temporary(jax.grad(deep)) / 4
