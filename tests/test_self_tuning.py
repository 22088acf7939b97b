"""SelfTuning: the contract, responses that are known in closed form, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.testing import EstimatorContract, ridge
from tests.test_single_loop import quadratic


class TestSelfTuning(EstimatorContract):
    estimator = hg.SelfTuning(optax.sgd(0.2), std=0.01)
    oracle = staticmethod(ridge)
    float32_tolerance = 2e-3  # differences of gradients over .02


def learned(problem: hg.Problem, hyper: Any, train: Any, valid: Any, estimator: Any) -> Any:
    """The estimate, and the response it comes from."""
    key = jax.random.key(0)
    inner = problem.init(hyper, key)

    @jax.jit
    def run(hyper: Any) -> Any:
        window = hg.Window(problem, inner, train, valid, key)
        return estimator.estimate(window, hyper, estimator.init(window, hyper))

    estimate, state = run(hyper)
    return estimate, state.answer


@pytest.mark.usefixtures("x64")
def test_the_response_is_the_closed_forms_derivative() -> None:
    """dw/dh = -A^-1 B in every column, and the hypergradient with it."""
    problem, train, valid, exact = quadratic()
    a, b, _ = (np.mean(x, 0) for x in train.arrays)
    whole = hg.Minibatches(train.arrays, 8, 3000)
    estimate, (answer,) = learned(
        problem, {"h": jnp.ones(3)}, whole, valid.arrays, hg.SelfTuning(optax.sgd(0.1))
    )
    np.testing.assert_allclose(answer.T, -np.linalg.solve(a, b), rtol=1e-8)
    np.testing.assert_allclose(estimate.grad["h"], exact(np.ones(3)), rtol=1e-8)
    assert float(estimate.info["residual"]) < 1e-8


def outputs(frozen: bool = False) -> Any:
    """Ridge regression on 3 outputs, kernel [4, 3]; its response to `l2` and a frozen bias."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 3)) + 1

    def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        x, y = batch
        return 0.5 * jnp.sum((x @ params["w"]["kernel"] + params["b"] - y) ** 2) / len(x)

    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        penalty = jnp.sum(params["w"]["kernel"] ** 2) + jnp.sum((params["b"] - 1) ** 2)
        return valid_loss(params, hyper, batch, key) + 0.5 * hyper["l2"] * penalty

    start = {"w": {"kernel": jnp.ones((4, 3))}, "b": jnp.zeros(3)}
    problem = hg.bilevel(
        lambda key: start,
        train_loss,
        valid_loss,
        lambda hyper: optax.sgd(0.2),
        trainable="w" if frozen else None,
    )
    inverse = np.linalg.inv(x.T @ x / 30 + 0.3 * np.eye(4))
    return problem, (jnp.asarray(x), jnp.asarray(y)), -inverse @ inverse @ (x.T @ y / 30)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["full", "units"])
def test_frozen_parameters_do_not_answer(form: Any) -> None:
    """With one hyperparameter a direction per unit is no restriction: both forms are exact."""
    problem, data, response = outputs(frozen=True)
    train = jax.tree.map(lambda x: jnp.broadcast_to(x, (1500, *x.shape)), data)
    rule = optax.adam(optax.cosine_decay_schedule(0.03, 1500))
    estimator = hg.SelfTuning(rule, 0.01, form=form)
    _, answer = learned(problem, {"l2": jnp.asarray(0.3)}, train, data, estimator)
    if form == "units":
        answer = [u[..., None, :] * r for u, r in answer]
    bias, kernel = (np.asarray(r)[0].reshape(-1, 3) for r in answer)
    assert not bias.any()
    np.testing.assert_allclose(kernel, response, rtol=1e-3)


def test_a_hyperparameter_of_the_validation_loss_alone_has_its_own_slope() -> None:
    problem, train, _, _ = quadratic()
    train = hg.Minibatches(train.arrays, 8, 1500)
    priced = problem._replace(valid_loss=lambda w, h, b, key: jnp.sum(w**2) + h["price"] ** 2)
    arguments = {"h": jnp.ones(3), "price": 1.5}, None, train, None, jax.random.key(0)
    estimate = hg.hypergradient(priced, *arguments, hg.SelfTuning(optax.sgd(0.1)))
    np.testing.assert_allclose(estimate.grad["price"], 3.0, rtol=1e-4)
    assert np.all(np.asarray(estimate.grad["h"]) != 0)


def test_a_hard_dropout_mask_has_a_response() -> None:
    """On the inputs of a linear model a mask is a penalty in the mean: its slope is known."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 3))
    y = x @ np.array([1.0, -2.0, 0.5])
    rate, size = 0.3, (x**2).mean(0)

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        x, y = batch
        keep = jax.random.uniform(key, (40, *x.shape)) >= hyper["rate"]
        masked = jnp.where(keep, x / (1 - hyper["rate"]), 0)
        return 0.5 * jnp.mean((masked @ w - y) ** 2)

    def valid_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        x, y = batch
        return 0.5 * jnp.mean((x @ w - y) ** 2)

    a, b = x.T @ x / 64, x.T @ y / 64
    matrix = a + rate / (1 - rate) * np.diag(size)
    w = np.linalg.solve(matrix, b)
    exact = -(a @ w - b) @ np.linalg.solve(matrix, size * w) / (1 - rate) ** 2
    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    problem = hg.bilevel(
        lambda key: jnp.zeros(3), train_loss, valid_loss, lambda hyper: optax.sgd(0.05)
    )
    train = hg.Minibatches(data, 64, 1500)
    estimator = hg.SelfTuning(optax.sgd(optax.linear_schedule(0.1, 0.002, 1500)))
    arguments = {"rate": 0.3}, None, train, data, jax.random.key(0), estimator
    estimate = hg.hypergradient(problem, *arguments)
    assert exact > 0.1
    np.testing.assert_allclose(estimate.grad["rate"], exact, rtol=0.1)


def test_what_it_cannot_see_is_refused_by_name() -> None:
    problem, train, valid, _ = quadratic()
    estimator = hg.SelfTuning(optax.sgd(0.1))
    losses = (lambda key: jnp.zeros(3), problem.train_loss, problem.valid_loss)

    def estimate(problem: hg.Problem, **hyper: Any) -> None:
        hyper = {"h": jnp.ones(3)} | hyper
        hg.hypergradient(problem, hyper, None, train, valid, jax.random.key(0), estimator)

    with pytest.raises(ValueError, match="'rate' does not enter the gradient of train_loss"):
        estimate(hg.bilevel(*losses, lambda hyper: optax.sgd(hyper["rate"])), rate=0.1)
    averaged = hg.bilevel(*losses, lambda h: optax.sgd(0.1), evaluate=lambda p, state: p)
    with pytest.raises(ValueError, match="judges others"):
        estimate(averaged)
    accuracy = problem._replace(valid_loss=lambda w, h, b, key: jnp.mean(jnp.sign(w)))
    with pytest.raises(ValueError, match="valid_loss is piecewise constant"):
        estimate(accuracy)
    cut = lambda w, h, b, key: jnp.sum(w**2) * (1 + (h["cut"] > 0.5))  # noqa: E731
    with pytest.raises(ValueError, match="'cut' reaches valid_loss itself by a path without"):
        estimate(problem._replace(valid_loss=cut), cut=0.3)


def test_it_tunes_inside_alternating() -> None:
    """Judged on what it trains on, a ridge wants no penalty: the loss falls to that of none."""
    problem, data, _ = outputs()
    space = hg.Space({"l2": hg.Float(1e-3, 10.0, scale="log")})
    tuner = hg.alternating(problem, space, hg.SelfTuning(optax.adam(0.02)))
    state = tuner.init({"l2": 5.0}, jax.random.key(0))
    update = jax.jit(tuner.update)
    for _ in range(60):
        state, info = update(state, hg.Minibatches(data, 30, 10), data)
    assert float(info.hyper["l2"]) < 0.1, info
