"""SABA and F2SA: the contract, their laws on closed forms, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.testing import EstimatorContract, ridge


def whole_batch(batches: Any) -> Any:
    """The one batch that all are, as data of one block."""
    arrays = jax.tree.map(lambda a: a[0], batches)
    examples, steps = (jax.tree.leaves(x)[0].shape[0] for x in (arrays, batches))
    return hg.Minibatches(arrays, examples, steps)


class TestSABA(EstimatorContract):
    estimator = hg.SABA(0.2, blocks=1, steps=200)
    oracle = staticmethod(ridge)
    as_train = staticmethod(whole_batch)


class TestF2SA(EstimatorContract):
    estimator = hg.F2SA(0.2, multiplier=1000.0)
    oracle = staticmethod(ridge)
    float32_tolerance = 5e-3  # a bias of 1 / multiplier, and rounding that grows with it


def quadratic(blocks: int = 8, dim: int = 3) -> Any:
    """Blocks of one example: w'A_i w / 2 + w'B_i h + c_i'w, judged by |w - e|^2 / 2 + |h|^2 / 2."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(blocks, dim, dim)) / np.sqrt(dim)
    a = np.einsum("nij,nkj->nik", root, root) + np.eye(dim)
    b, c, e = rng.normal(size=(blocks, dim, dim)), *rng.normal(size=(2, blocks, dim))

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        a, b, c = batch
        bent = 0.5 * jnp.einsum("i,nij,j->n", w, a, w)
        return jnp.mean(bent + jnp.einsum("i,nij,j->n", w, b, hyper["h"]) + c @ w)

    def valid_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        gap = jnp.sum((w - batch) ** 2, -1)
        return 0.5 * jnp.mean(gap) + 0.5 * jnp.sum(hyper["h"] ** 2)

    problem = hg.bilevel(
        lambda key: jnp.zeros(dim), train_loss, valid_loss, lambda hyper: optax.sgd(0.1)
    )
    am, bm, cm, em = (x.mean(0) for x in (a, b, c, e))

    def exact(h: np.ndarray, pull: float = 0.0) -> np.ndarray:
        """The hypergradient; with pull = 1 / multiplier, that of the penalty method."""
        z = -np.linalg.solve(am, bm @ h + cm)
        if pull:
            y = np.linalg.solve(am + pull * np.eye(dim), pull * em - bm @ h - cm)
            return h + bm.T @ (y - z) / pull
        return h - bm.T @ np.linalg.solve(am, z - em)

    arrays = tuple(map(jnp.asarray, (a, b, c)))
    return problem, hg.Minibatches(arrays, 1), hg.Minibatches(jnp.asarray(e), 1), exact


def rounds(estimator: Any, count: int, outer_rate: float) -> tuple[Any, Any]:
    """Hyperparameters after single-loop rounds of one step, one product and one outer step."""
    problem, train, valid, exact = quadratic()
    key, hyper = jax.random.key(0), {"h": jnp.ones(3)}
    inner = problem.init(hyper, key)
    memory = estimator.init(hg.Window(problem, inner, None, None, key), hyper)

    def one(carry: Any, _: None) -> Any:
        hyper, inner, memory = carry
        estimate, memory = estimator.estimate(
            hg.Window(problem, inner, train, valid, key), hyper, memory
        )
        hyper = jax.tree.map(lambda h, g: h - outer_rate * g, hyper, estimate.grad)
        return (hyper, estimate.inner, memory), estimate.grad["h"]

    run = jax.jit(lambda carry: jax.lax.scan(one, carry, length=count))
    (hyper, *_), grads = run((hyper, inner, memory))
    return np.asarray(hyper["h"]), (np.asarray(grads), exact)


@pytest.mark.usefixtures("x64")
def test_saba_converges_linearly_where_soba_ends_in_noise() -> None:
    h, (_, exact) = rounds(hg.SABA(0.1, blocks=8, valid_blocks=8), 4000, 0.03)
    assert np.sum(exact(h) ** 2) < 1e-20
    soba = hg.Implicit(hg.Richardson(1, 0.1), batches="last")
    h, (_, exact) = rounds(soba, 4000, 0.03)
    assert np.sum(exact(h) ** 2) > 1e-6


@pytest.mark.usefixtures("x64")
def test_sabas_hypergradient_is_that_of_all_blocks() -> None:
    """At fixed hyperparameters it goes to the closed form itself, not to a noisy guess of it."""
    _, (grads, exact) = rounds(hg.SABA(0.1, blocks=8, valid_blocks=8), 4000, 0.0)
    np.testing.assert_allclose(grads[-1], exact(np.ones(3)), rtol=1e-8)
    assert np.linalg.norm(grads[20] - exact(np.ones(3))) > 1e-2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("multiplier", [10.0, 20.0])
def test_f2sa_is_the_penalty_methods_closed_form(multiplier: float) -> None:
    """To rounding; its bias halves with the multiplier doubled."""
    problem, train, valid, exact = quadratic()
    whole, estimator = hg.Minibatches(train.arrays, 8, 1500), hg.F2SA(0.2, multiplier)
    data = whole, valid.arrays, jax.random.key(0), estimator
    estimate = jax.jit(lambda h: hg.hypergradient(problem, {"h": h}, None, *data))(jnp.ones(3))
    np.testing.assert_allclose(estimate.grad["h"], exact(np.ones(3), 1 / multiplier), rtol=1e-8)
    biases = [np.linalg.norm(exact(np.ones(3), 1 / m) - exact(np.ones(3))) for m in (1e2, 2e2)]
    assert 1.9 < biases[0] / biases[1] < 2.1
    assert float(estimate.info["pull"]) == pytest.approx(
        multiplier * float(estimate.info["distance"])
    )


@pytest.mark.usefixtures("x64")
def test_f2sa_leaves_frozen_parameters_where_they_are() -> None:
    """They were pulled towards the validation data, and the pull stood in the hypergradient."""

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        fit = jnp.sum((params["w"] + params["b"] - batch) ** 2)
        return fit + hyper["l2"] * jnp.sum(params["w"] ** 2)

    def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum((params["w"] + params["b"] - batch) ** 2)

    problem = hg.bilevel(
        lambda key: {"w": jnp.zeros(2), "b": jnp.ones(2)},
        loss,
        valid_loss,
        lambda hyper: optax.sgd(0.2),
        trainable="w",
    )
    train, valid = jnp.full((400, 2), 3.0), jnp.full(2, 2.5)
    arguments = {"l2": 0.5}, None, train, valid, jax.random.key(0)
    estimate = hg.hypergradient(problem, *arguments, hg.F2SA(0.2, 1e4))
    w = 2 / 1.5  # (1 + l2) w = 3 - b
    np.testing.assert_allclose(estimate.grad["l2"], 2 * 2 * (w - 1.5) * -w / 1.5, rtol=1e-3)


def test_f2sas_multiplier_follows_its_schedule() -> None:
    problem, train, valid, _ = quadratic()
    estimator = hg.F2SA(0.1, lambda t: 10.0 * (t + 1))
    key, hyper = jax.random.key(0), {"h": jnp.ones(3)}
    window = hg.Window(problem, problem.init(hyper, key), train, valid, key)
    state = estimator.init(window, hyper)
    seen = []
    run = jax.jit(lambda state: estimator.estimate(window, hyper, state))
    for _ in range(2):
        estimate, state = run(state)
        seen.append(float(estimate.info["multiplier"]))
    assert seen == [10.0, 20.0]


def test_what_they_cannot_see_is_refused_by_name() -> None:
    problem, train, valid, _ = quadratic()
    key, hyper = jax.random.key(0), {"h": jnp.ones(3)}

    def estimate(estimator: Any, problem: Any = problem, hyper: Any = hyper, **data: Any) -> None:
        window = {"train": train, "valid": valid} | data
        hg.hypergradient(problem, hyper, None, window["train"], window["valid"], key, estimator)

    saba = hg.SABA(0.1, blocks=8, valid_blocks=8)
    with pytest.raises(ValueError, match="blocks=4 blocks of 1 are not the 8 examples of train"):
        estimate(hg.SABA(0.1, blocks=4, valid_blocks=8))
    with pytest.raises(ValueError, match="valid_blocks=1 blocks of 1 are not the 8 examples"):
        estimate(hg.SABA(0.1, blocks=8))
    with pytest.raises(ValueError, match=r"train is no hypergrad\.Minibatches: SABA remembers"):
        estimate(saba, train=jax.tree.map(lambda x: x[None], train.arrays))
    losses = (lambda key: jnp.zeros(3), problem.train_loss, problem.valid_loss)
    with pytest.raises(ValueError, match="keeps a memory of its own"):
        estimate(saba, hg.bilevel(*losses, lambda hyper: optax.sgd(0.1, momentum=0.9)))
    rates = hg.bilevel(*losses, lambda hyper: optax.sgd(hyper["rate"]))
    for estimator in (saba, hg.F2SA(0.1)):
        with pytest.raises(ValueError, match="'rate' does not enter the gradient of train_loss"):
            estimate(estimator, rates, hyper | {"rate": 0.1})
