"""Proximal steps: fixed points and their derivatives against optimality conditions, in NumPy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.testing import relative_error

RNG = np.random.default_rng(0)
N, P = 40, 8
X, XV = RNG.normal(size=(2, N, P))
TRUTH = np.array([2.0, -1.5, 1.0, 0.8, 0.0, 0.0, 0.1, -0.1])
Y, YV = X @ TRUTH + RNG.normal(size=N), XV @ TRUTH + RNG.normal(size=N)
A, B = X.T @ X / N, X.T @ Y / N
KEY = jax.random.key(0)

Solution = Callable[[dict[str, Any], np.ndarray], np.ndarray]


def on_support(h: dict[str, Any], w: np.ndarray) -> np.ndarray:
    """L1 and elastic net: A w + l2 w + l1 sign(w) = B where w is not 0."""
    s = w != 0
    out = np.zeros(P, complex)
    left = A[np.ix_(s, s)] + h.get("l2", 0.0) * np.eye(s.sum())
    out[s] = np.linalg.solve(left, B[s] - h["l1"] * np.sign(w[s]))
    return out


def in_box(h: dict[str, Any], w: np.ndarray) -> np.ndarray:
    at_low, at_high = w <= np.real(h["low"]), w >= np.real(h["high"])
    free = ~(at_low | at_high)
    out = np.where(at_low, h["low"], np.where(at_high, h["high"], 0j))
    right = B[free] - A[np.ix_(free, ~free)] @ out[~free]
    out[free] = np.linalg.solve(A[np.ix_(free, free)], right)
    return out


def on_sphere(h: dict[str, Any], w: np.ndarray) -> np.ndarray:
    """Newton's method on (A + mu) w = B, w^T w = radius^2, from where training ended."""
    w, mu = w + 0j, ((B - A @ w) @ w) / (w @ w) + 0j
    for _ in range(8):
        left = np.block([[A + mu * np.eye(P), w[:, None]], [2 * w[None], np.zeros((1, 1))]])
        step = np.linalg.solve(left, np.r_[B - A @ w - mu * w, h["radius"] ** 2 - w @ w])
        w, mu = w + step[:-1], mu + step[-1]
    return w


def on_simplex(h: dict[str, Any], w: np.ndarray) -> np.ndarray:
    s = w > 0
    n = s.sum()
    left = np.block([[A[np.ix_(s, s)], np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    out = np.zeros(P, complex)
    out[s] = np.linalg.solve(left, np.r_[B[s], h["total"]])[:-1]
    return out


CASES: dict[str, tuple[Callable[[Any], Any], dict[str, float], Solution]] = {
    "l1": (lambda h: hg.prox.l1(h["l1"]), {"l1": 0.2}, on_support),
    "elastic net": (
        lambda h: hg.prox.elastic_net(h["l1"], h["l2"]),
        {"l1": 0.2, "l2": 0.1},
        on_support,
    ),
    "box": (lambda h: hg.prox.box(h["low"], h["high"]), {"low": -0.7, "high": 0.9}, in_box),
    "ball": (lambda h: hg.prox.ball(h["radius"]), {"radius": 1.3}, on_sphere),
    "simplex": (lambda h: hg.prox.simplex(h["total"]), {"total": 1.5}, on_simplex),
    "a function": (
        lambda h: (
            lambda params, step: jax.tree.map(
                lambda p: jnp.sign(p) * jnp.maximum(jnp.abs(p) - step * h["l1"], 0), params
            )
        ),
        {"l1": 0.2},
        on_support,
    ),
}


def problem(penalty: Callable[[Any], Any], optimizer: Callable[[Any], Any]) -> hg.Problem:
    """Least squares; the parameters stand in two leaves, which ball and simplex join."""

    def squares(x: np.ndarray, y: np.ndarray) -> Callable[..., jax.Array]:
        return lambda p, h, b, key: jnp.mean((x @ jnp.concatenate(p) - y) ** 2) / 2

    return hg.bilevel(
        lambda key: (jnp.full(3, 0.1), jnp.full(P - 3, 0.1)),
        squares(X, Y),
        squares(XV, YV),
        lambda h: hg.prox(optimizer(h), penalty(h)),
    )


def derivative(solution: Solution, hyper: dict[str, float], w: np.ndarray) -> dict[str, float]:
    """Of the validation loss, by complex steps: exact to rounding."""

    def loss(name: str) -> float:
        moved = solution({**hyper, name: hyper[name] + 1e-30j}, w)
        return float(np.imag(np.sum((XV @ moved - YV) ** 2) / N / 2) / 1e-30)

    return {name: loss(name) for name in hyper}


@pytest.mark.usefixtures("x64")
# The step size, which momentum changes, is read in the same way for all penalties.
@pytest.mark.parametrize(
    ("name", "momentum"), [*((name, 0.0) for name in CASES), ("l1", 0.7), ("ball", 0.7)]
)
def test_fixed_points_and_their_hypergradients(name: str, momentum: float) -> None:
    penalty, hyper, solution = CASES[name]
    sgd = lambda h: optax.sgd(0.2, momentum=momentum or None)  # noqa: E731
    task = problem(penalty, sgd)

    @jax.jit
    def run() -> Any:
        end = hg.rollout(task, hyper, task.init(hyper, KEY), jnp.zeros((2000, 1)), KEY)
        estimator = hg.Implicit(hg.GMRES(20, cycles=2), of="fixed_point")
        batches = jnp.zeros((1, 1)), jnp.zeros(())
        return end.params, hg.hypergradient(task, hyper, end, *batches, KEY, estimator=estimator)

    params, estimate = run()
    w = np.concatenate(params)
    assert np.abs(solution(hyper, w) - w).max() < 1e-12
    assert 0 < (w == 0).sum() < P or name in ("ball", "box")
    want = derivative(solution, hyper, w)
    assert all(abs(g) > 1e-3 for g in want.values())
    assert relative_error(estimate.grad, want) < 1e-10


@pytest.mark.usefixtures("x64")
def test_through_the_steps() -> None:
    """Unrolled, Forward and differences, in a rate as well."""
    task = problem(lambda h: hg.prox.l1(h["l1"]), lambda h: optax.sgd(h["lr"], momentum=h["m"]))
    hyper, arguments = (
        {"l1": 0.2, "lr": 0.1, "m": 0.5},
        (None, jnp.zeros((6, 1)), jnp.zeros(()), KEY),
    )
    estimators = hg.Unrolled(), hg.Forward(), hg.FiniteDifference()
    reverse, forward, differences = (
        hg.hypergradient(task, hyper, *arguments, estimator=e).grad for e in estimators
    )
    assert relative_error(reverse, forward) < 1e-12
    assert relative_error(reverse, differences) < 1e-6


def updates(optimizer: Any, **options: Any) -> Any:
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    return optimizer.update(params, optimizer.init(params), params, **options)[0]


def test_step_sizes_that_cannot_be_read_are_refused() -> None:
    for optimizer in (optax.adam(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))):
        with pytest.raises(ValueError, match=r"step size cannot be read.*optax.sgd"):
            updates(hg.prox(optimizer, hg.prox.l1(0.1)))
    rates = hg.scale_by_tree({"a": 0.5, "b": 0.1})
    uneven = updates(hg.prox(optax.chain(rates, optax.sgd(0.1)), hg.prox.l1(0.1)))
    assert jnp.isnan(uneven["a"]).all()
    sgd = hg.prox(optax.sgd(0.1), hg.prox.l1(0.1))
    with pytest.raises(ValueError, match="params=None: prox"):
        sgd.update(jnp.ones(2), sgd.init(jnp.ones(2)))


def test_penalties_take_a_strength_per_layer() -> None:
    moved = updates(hg.prox(optax.sgd(0.5), hg.prox.l1({"a": 0.0, "b": 1.0})))
    assert jnp.allclose(moved["a"], -0.5) and jnp.allclose(moved["b"], -1.0)
    with pytest.raises(ValueError, match="l1 with leaves"):
        updates(hg.prox(optax.sgd(0.5), hg.prox.l1({"a": 0.0})))


def test_parameters_keep_their_dtype(dtype: Any) -> None:
    optimizer = hg.prox(optax.sgd(0.1), hg.prox.ball(1.0))
    params = jnp.ones(2, jnp.bfloat16)
    assert optimizer.update(params, optimizer.init(params), params)[0].dtype == jnp.bfloat16
    assert updates(optimizer)["a"].dtype == dtype
