"""A run's mean of weights: the formula, training untouched, what `tune` makes of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.population.refine import plain
from hypergrad.tuners.averaged import averaging

SPACE = hg.Space({"rate": hg.Float(1e-3, 2.0, scale="log")})


def _square(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((params["w"].astype(jnp.float32) - batch) ** 2)


def _problem(dtype: Any, **options: Any) -> hg.Problem:
    def init(key: Any) -> Any:
        return {"w": jnp.ones(3, dtype), "seen": jnp.zeros((), jnp.int32), "key": key}

    return hg.bilevel(
        init, _square, _square, lambda h: optax.sgd(h["rate"]), trainable=["w"], **options
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_late_weights_count_by_their_number(dtype: Any, tolerance: float) -> None:
    alone = plain(_problem(dtype), SPACE)
    both = averaging(alone)
    run = alone.init({"rate": 0.3}, jax.random.key(0))
    state = both.init({"rate": 0.3}, jax.random.key(0))
    rng, weights = np.random.default_rng(0), []
    for _ in range(8):
        train = rng.normal(size=(2, 4, 3)).astype(np.float32)
        run, _ = alone.update(run, train, train[0])
        state, _ = both.update(state, train, train[0])
        np.testing.assert_array_equal(run.inner.params["w"], state.inner.params["w"])
        weights.append(np.asarray(run.inner.params["w"], np.float64))
    # of update t in 0, 1, ...: its share, times what later ones left of it
    shares = np.arange(1.0, 9.0)
    expected = np.tensordot(shares / shares.sum(), weights, 1)
    mean = state.averaged.params
    assert mean["w"].dtype == dtype and state.mean["w"].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(mean["w"], np.float64), expected, rtol=tolerance)
    assert np.max(np.abs(expected - weights[-1])) > 0.01
    assert mean["seen"] == 0 and mean["key"] == state.inner.params["key"]


def test_the_network_of_a_noisy_run_is_its_mean() -> None:
    # At a rate this high the last weights are noise of the last batches.
    rng = np.random.default_rng(1)
    data = hg.Splits(
        rng.normal(size=(400, 3)).astype(np.float32), np.zeros((50, 3), np.float32), None
    )
    result = hg.tune(
        _problem(jnp.float32),
        SPACE,
        data,
        {"rate": 1.0},
        num_steps=100,
        batch_size=4,
        budget=1,
        progress=False,
    )
    found = result.best
    assert found.is_averaged and found.score < 0.5 * found.last
    assert "mean of its weights" in result.table()
    for params in (result.params, result.state.params):
        np.testing.assert_allclose(np.mean(np.square(params["w"])), result.score, rtol=1e-5)


def test_a_problem_that_says_what_is_judged_is_not_averaged() -> None:
    problem = _problem(jnp.float32, evaluate=lambda params, opt_state: params)
    data = hg.Splits(np.ones((8, 3), np.float32), np.ones((4, 3), np.float32), None)
    result = hg.tune(problem, SPACE, data, num_steps=20, batch_size=4, budget=1, progress=False)
    assert not result.best.is_averaged and result.best.last == result.score
