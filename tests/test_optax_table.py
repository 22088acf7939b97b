"""Hypergradients through optax's optimisers with default arguments; all rows in the benchmark."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.optimizers import ROWS, TARGET, error, float32_error, hypergradient, small_problem

# Only the benchmark measures these, to keep the tests short: twins of a tested row, rarely used
# ones, and those that test_estimators.py holds more strictly against differences of such a network.
TWINS = {
    "adagrad",
    "adam",
    "adamw",
    "lamb",
    "lion",
    "sgd, momentum",
    "acprop",
    "adopt",
    "cocob",
    "dog",
    "nadam",
    "optimistic_gradient_descent",
    "sgd, nesterov",
    "nadamw",
    "adamaxw",
    "momo_adam",
    "simplified_ademamix",
    "galore",
    "optimistic_adam_v2",
    "dadapt_adamw",
    "schedule_free_adamw",
    "dowg",
    "lars",
    "rmsprop",
    "sgd",
}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in TWINS])
def test_hypergradient_equals_differences(name: str) -> None:
    """Float64; each number's gradient is finite, and its difference is not zero."""
    assert error(ROWS[name]) < TARGET


def run(optimizer: Any, hyper: dict[str, float], done: int = 0) -> hg.Estimate:
    problem, train, valid = small_problem(optimizer)
    key, inner = jax.random.key(2), None
    if done:
        before = hg.Minibatches(train.arrays, train.batch_size, done)
        inner = hg.rollout(problem, hyper, problem.init(hyper, key), before, key)
    return jax.jit(lambda: hg.hypergradient(problem, hyper, inner, train, valid, key))()


@pytest.mark.parametrize(
    "optimizer, number",
    [(optax.lion, "b1"), (optax.lion, "b2"), (optax.signum, "beta")],
)
def test_numbers_behind_a_sign_are_refused(optimizer: Any, number: str) -> None:
    with pytest.raises(ValueError, match=f"{number!r} reaches the validation loss only through"):
        run(lambda h: optimizer(0.01, **h), {number: 0.9})


def test_a_rate_that_lives_in_the_state_is_refused() -> None:
    """Rprop reads its rate at the start alone: none of a later window's steps depends on it."""
    row = ROWS["rprop"]
    with pytest.raises(ValueError, match="'learning_rate' never reaches the validation loss"):
        run(row.make, row.hyper, done=2)


def test_what_radam_gives_is_reported_or_right() -> None:
    """Its unused branch takes the root of a negative number in steps 2 to 4.

    A `where` keeps that NaN out of the update, but not out of the derivative. A window that starts
    later is right (the table's row).
    """
    assert not bool(run(ROWS["radam"].make, ROWS["radam"].hyper).info["finite"])
    root = lambda x: jnp.where(x > 0, jnp.sqrt(x), 1.0)  # noqa: E731
    assert jnp.isnan(jax.grad(root)(-1.0)) and root(-1.0) == 1.0


def test_what_prodigy_gives_in_float32_is_reported() -> None:
    """It scales gradients by 1e-6 before it squares them.

    The floor of 1e-16 under zero gradients then becomes 1e-44, which float32 has not, and the root
    is taken of zero again.
    """
    row = ROWS["prodigy"]
    assert not bool(run(row.make, row.hyper).info["finite"])


def test_adafactor_in_float32_needs_a_larger_eps() -> None:
    """The derivative v^-1.5 / 2 of its rsqrt overflows at the default eps=1e-30, not at 1e-24."""
    row = ROWS["adafactor"]
    assert not bool(run(row.make, row.hyper).info["finite"])
    assert jnp.isinf(jax.grad(jax.lax.rsqrt)(jnp.float32(1e-30)))
    mended = row._replace(make=lambda h: optax.adafactor(h["learning_rate"], eps=1e-24))
    assert float32_error(mended) < 1e-3


@pytest.mark.usefixtures("x64")
def test_yogi_was_right_and_the_difference_wrong() -> None:
    """Near one, b2's difference needs a step far below 1 - b2 = 1e-3: its error falls as step^2."""
    grad, differences = hypergradient(ROWS["yogi"])
    b2 = sorted(ROWS["yogi"].hyper).index("b2")
    errors = np.abs(differences[:, b2] / grad[b2] - 1)
    assert errors[0] > 3e-6 and errors[0] / errors[1] > 30
