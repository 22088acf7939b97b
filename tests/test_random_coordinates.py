"""The estimator of docs/adding_an_estimator.md: the contract, and what is special about it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad.testing

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from random_coordinates import RandomCoordinates, main


class TestRandomCoordinates(hypergrad.testing.EstimatorContract):
    # As many as the contract's problems have, or more: exact.
    estimator = RandomCoordinates(8)


def test_draws_are_unbiased() -> None:
    """Two of six entries, three times as long; each drawn as often as the others."""
    oracle, estimator, draws = hypergrad.testing.momentum_quadratic(), RandomCoordinates(2), 300

    def grad(state: jax.Array) -> jax.Array:
        inner = oracle.problem.init(oracle.hyper, oracle.key)
        window = hypergrad.Window(oracle.problem, inner, oracle.train, oracle.valid, oracle.key)
        return ravel_pytree(estimator.estimate(window, oracle.hyper, state)[0].grad)[0]

    grads = np.asarray(jax.jit(lambda: jax.lax.map(grad, jnp.arange(draws)))())
    exact = np.asarray(ravel_pytree(oracle.grad)[0])
    assert exact.size == 6 and np.all(exact != 0)
    drawn = grads != 0
    np.testing.assert_array_equal(drawn.sum(axis=1), 2)
    np.testing.assert_allclose(grads[drawn], np.broadcast_to(3 * exact, grads.shape)[drawn], 1e-4)
    # A third of the draws each, within four standard deviations.
    assert np.all(np.abs(drawn.mean(axis=0) - 1 / 3) < 4 * np.sqrt(2 / 9 / draws))


def test_the_state_counts_estimates() -> None:
    oracle, estimator = hypergrad.testing.momentum_quadratic(3), RandomCoordinates(1)
    window = hypergrad.Window(oracle.problem, None, oracle.train, oracle.valid, oracle.key)
    state = estimator.init(window, oracle.hyper)
    assert int(state) == 0
    assert int(jax.jit(estimator.estimate)(window, oracle.hyper, state)[1]) == 1


def test_a_refused_update_draws_other_coordinates() -> None:
    """A tuner takes the state back then, the count in it too, but never the step."""
    oracle, estimator = hypergrad.testing.momentum_quadratic(3), RandomCoordinates(1)
    inner = oracle.problem.init(oracle.hyper, oracle.key)
    drawn, estimate = set(), jax.jit(estimator.estimate)
    for step in range(0, 24, 3):
        window = hypergrad.Window(
            oracle.problem, inner._replace(step=step), oracle.train, oracle.valid, oracle.key
        )
        grad = estimate(window, oracle.hyper, jnp.int32(1))[0].grad
        drawn.add(int(np.flatnonzero(ravel_pytree(grad)[0])[0]))
    assert len(drawn) > 2


def test_no_coordinate_is_refused() -> None:
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        RandomCoordinates(0)


def test_the_example_tunes(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    loss = float(capsys.readouterr().out.split()[2].rstrip(";"))
    # .27 under the rates it starts from
    assert np.isfinite(loss) and loss < 0.01
