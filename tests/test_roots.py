"""`custom_root` and `custom_fixed_point`: any solver, differentiated, against closed forms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import hypergrad as hg

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(20, 4)), RNG.normal(size=20)
L2 = 0.3
ZEROS = np.zeros(4)
# On a matrix with eigenvalues in (0, 3), and exact within four unknowns where they can be.
SOLVERS = [
    hg.ConjugateGradient(),
    hg.GMRES(),
    hg.BiCGSTAB(),
    hg.Cholesky(),
    hg.Nystrom(4, 1e-12),
    hg.Neumann(200, 0.5),
    hg.Richardson(200, 0.5),
    hg.Preconditioned(hg.ConjugateGradient()),
    hg.Preconditioned(hg.Neumann(200, 0.5)),
]


def ridge_gradient(w: Any, l2: Any, x: Any = X) -> Any:
    return x.T @ (x @ w - Y) / 20 + l2 * w


def descend(gradient: Any) -> Any:
    """Gradient descent to rounding, by a loop of unknown length: no reverse mode passes it."""

    def solve(init: Any, *args: Any) -> Any:
        def on(carry: Any) -> Any:
            return (jnp.linalg.norm(gradient(carry[0], *args)) > 1e-14) & (carry[1] < 5000)

        def step(carry: Any) -> Any:
            return carry[0] - 0.3 * gradient(carry[0], *args), carry[1] + 1

        return jax.lax.while_loop(on, step, (jnp.asarray(init), 0))[0]

    return solve


def ridge(l2: Any) -> Any:
    return jnp.linalg.solve(X.T @ X / 20 + l2 * jnp.eye(4), X.T @ Y / 20)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_ridge_by_every_solver(solver: Any) -> None:
    solve = hg.custom_root(ridge_gradient, solver)(descend(ridge_gradient))
    found = jax.jit(jax.grad(lambda l2: solve(ZEROS, l2) @ np.arange(4.0)))(L2)
    np.testing.assert_allclose(found, np.arange(4.0) @ jax.jacobian(ridge)(L2), rtol=1e-8)


def test_forward_and_reverse_jacobians_under_vmap() -> None:
    solve = hg.custom_root(ridge_gradient)(descend(ridge_gradient))
    rates = jnp.array([L2, 0.7])
    for jacobian in (jax.jacrev, jax.jacfwd):
        found = jax.jit(jax.vmap(jacobian(lambda l2: solve(ZEROS, l2))))(rates)
        np.testing.assert_allclose(found, jax.vmap(jax.jacobian(ridge))(rates), rtol=1e-8)


def test_second_derivatives_see_the_root_move() -> None:
    solve = hg.custom_root(ridge_gradient)(descend(ridge_gradient))
    expected = jax.hessian(ridge)(L2)
    for outer in (jax.jacfwd, jax.jacrev):
        found = jax.jit(outer(jax.jacrev(solve, 1), 1))(ZEROS, L2)
        np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_logistic_regression_against_its_explicit_matrices() -> None:
    labels = (Y > 0).astype(float)

    def loss(w: Any, weights: Any, l2: Any) -> Any:
        margins = X @ w * (2 * labels - 1)
        return jnp.mean(weights * jnp.logaddexp(0, -margins)) + 0.5 * l2 * jnp.sum(w**2)

    gradient = jax.grad(loss)
    solve = hg.custom_root(gradient)(descend(gradient))
    weights = jnp.linspace(0.5, 1.5, 20)
    found = jax.jit(jax.jacobian(solve, (1, 2)))(ZEROS, weights, L2)
    w = np.asarray(solve(ZEROS, weights, L2))
    signs = 2 * labels - 1
    p = 1 / (1 + np.exp(X @ w * signs))
    hessian = (X.T * (weights * p * (1 - p))) @ X / 20 + L2 * np.eye(4)
    cross = -(X.T * (p * signs)) / 20
    np.testing.assert_allclose(found[0], -np.linalg.solve(hessian, cross), rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(found[1], -np.linalg.solve(hessian, w), rtol=1e-8)


def test_lasso_by_its_proximal_step() -> None:
    """On the support S, w = A_SS^-1 (b_S - l1 sign), and 0 off it."""
    l1 = 0.5 * float(np.sort(np.abs(X.T @ Y / 20))[-1])

    def step(w: Any, l1: Any) -> Any:
        return hg.prox.l1(l1)(w - 0.3 * ridge_gradient(w, 0.0), 0.3)

    @hg.custom_fixed_point(step)
    def lasso(init: Any, l1: Any) -> Any:
        return jax.lax.fori_loop(0, 3000, lambda _, w: step(w, l1), init)

    w = lasso(jnp.zeros(4), l1)
    on = np.asarray(w) != 0
    assert 0 < on.sum() < 4
    expected = np.zeros(4)
    a = X.T @ X / 20
    expected[on] = -np.linalg.solve(a[np.ix_(on, on)], np.sign(np.asarray(w)[on]))
    for jacobian in (jax.jacrev, jax.jacfwd):
        np.testing.assert_allclose(jax.jit(jacobian(lasso, 1))(jnp.zeros(4), l1), expected, 1e-8)


def test_a_quadratic_in_a_box() -> None:
    """Free entries F solve A_FF x_F = b_F - A_FB x_B; others stand at a bound, and follow it."""
    a, b = X.T @ X / 20, jnp.array([3.0, 0.2, -0.1, -2.0])

    def step(x: Any, b: Any, high: Any) -> Any:
        return jnp.clip(x - 0.3 * (a @ x - b), -0.5, high)

    @hg.custom_fixed_point(step, hg.BiCGSTAB())
    def bounded(init: Any, b: Any, high: Any) -> Any:
        return jax.lax.fori_loop(0, 2000, lambda _, x: step(x, b, high), init)

    x = np.asarray(bounded(jnp.zeros(4), b, 0.6))
    at_high, free = x == 0.6, (x > -0.5) & (x < 0.6)
    assert at_high.sum() and 0 < free.sum() < 4
    inverse = np.linalg.inv(a[np.ix_(free, free)])
    by_b, by_high = np.zeros((4, 4)), at_high.astype(float)
    by_b[np.ix_(free, free)] = inverse
    by_high[free] = -inverse @ a[np.ix_(free, at_high)].sum(1)
    found = jax.jit(jax.jacrev(bounded, (1, 2)))(jnp.zeros(4), b, 0.6)
    np.testing.assert_allclose(found[0], by_b, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found[1], by_high, rtol=1e-8, atol=1e-12)


class Layer(NamedTuple):
    w: Any
    bias: Any
    steps: Any


def test_an_equilibrium_layer_over_pytrees_and_batches() -> None:
    """With D = 1 - z^2, dz/db = (I - D W)^-1 D for z = tanh(W z + x + b); integers come along."""
    layer = Layer(0.4 * RNG.normal(size=(3, 3)) / np.sqrt(3), np.full(3, 0.1), np.int32(7))

    def step(state: Any, layer: Any, x: Any) -> Any:
        return {"z": jnp.tanh(layer.w @ state["z"] + x + layer.bias), "seen": state["seen"]}

    @hg.custom_fixed_point(step, hg.BiCGSTAB())
    def equilibrium(init: Any, layer: Any, x: Any) -> Any:
        def on(carry: Any) -> Any:
            new = step(carry, layer, x)
            return jnp.max(jnp.abs(new["z"] - carry["z"])) > 1e-15

        return jax.lax.while_loop(
            on, lambda c: {**step(c, layer, x), "seen": c["seen"] + layer.steps}, init
        )

    init = {"z": jnp.zeros(3), "seen": jnp.int32(0)}
    inputs = jnp.asarray(RNG.normal(size=(2, 3)))

    def total(bias: Any, inputs: Any) -> Any:
        ends = jax.vmap(lambda x: equilibrium(init, layer._replace(bias=bias), x))(inputs)
        return jnp.sum(ends["z"][:, 0]), ends["seen"]

    grad, seen = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(layer.bias), inputs)
    assert np.all(np.asarray(seen) >= 7)
    expected = np.zeros(3)
    for x in inputs:
        z = np.asarray(equilibrium(init, layer, x)["z"])
        d = np.diag(1 - z**2)
        expected += (np.linalg.inv(np.eye(3) - d @ layer.w) @ d)[0]
    np.testing.assert_allclose(grad, expected, rtol=1e-8)


def test_what_is_closed_over_has_a_derivative_too() -> None:
    def first(l2: Any) -> Any:
        gradient = lambda w: ridge_gradient(w, l2)  # noqa: E731
        return hg.custom_root(gradient)(descend(gradient))(ZEROS)[0]

    np.testing.assert_allclose(jax.grad(first)(L2), jax.jacobian(ridge)(L2)[0], rtol=1e-8)


def test_a_solver_that_jax_cannot_trace() -> None:
    @hg.custom_root(ridge_gradient)
    def by_scipy(init: Any, l2: Any, method: str) -> Any:
        found = scipy.optimize.root(
            lambda w: np.asarray(ridge_gradient(w, float(l2))), init, tol=1e-14
        )
        assert method == "hybr"
        return jnp.asarray(found.x)

    gradient = lambda w, l2, method: ridge_gradient(w, l2)  # noqa: E731
    solve = hg.custom_root(gradient)(by_scipy.__wrapped__)
    found = jax.grad(lambda l2: solve(ZEROS, l2, "hybr")[0])(L2)
    np.testing.assert_allclose(found, jax.jacobian(ridge)(L2)[0], rtol=1e-8)


def test_a_hyperparameter_inside_of_a_larger_program() -> None:
    """A tuned penalty inside a network's loss: the chain rule goes through the root, and around."""

    def outer(theta: Any) -> Any:
        features = jnp.tanh(X * theta["scale"])
        gradient = lambda w, x, l2: ridge_gradient(w, l2, x)  # noqa: E731
        solve = hg.custom_root(gradient)(descend(gradient))
        w = solve(ZEROS, features, jnp.exp(theta["log_l2"]))
        return jnp.mean((features @ w - jnp.sin(Y)) ** 2)

    theta = {"scale": jnp.float64(0.8), "log_l2": jnp.float64(-1.0)}
    grad = jax.jit(jax.grad(outer))(theta)
    for name in theta:
        up, down = (outer({**theta, name: theta[name] + d}) for d in (1e-5, -1e-5))
        np.testing.assert_allclose(grad[name], (up - down) / 2e-5, rtol=1e-6)


def test_low_precision_keeps_its_dtype_and_single_precision_its_digits() -> None:
    def gradient(w: Any, l2: Any) -> Any:
        return ridge_gradient(w, l2, X.astype(np.float32)).astype(w.dtype)

    def solve(init: Any, l2: Any) -> Any:
        return ridge(l2).astype(init.dtype)

    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        root = hg.custom_root(gradient)(solve)
        found = jax.jit(jax.jacrev(root, 1))(jnp.zeros(4, dtype), dtype(L2))
        assert found.dtype == dtype
        error = np.linalg.norm(np.asarray(found, float) - jax.jacobian(ridge)(L2))
        assert error < tolerance * np.linalg.norm(jax.jacobian(ridge)(L2))


def test_an_unsolved_system_is_nan_and_no_plausible_number() -> None:
    a = 2 * np.eye(4) + RNG.normal(size=(4, 4))

    def make(solver: Any, **limit: Any) -> Any:
        root = hg.custom_root(lambda x, b: a @ x - b, solver, **limit)
        solve = root(lambda init, b: jnp.linalg.solve(a, b))
        return jax.jit(jax.jacrev(solve, 1))(None, jnp.ones(4))

    assert np.all(np.isnan(make(hg.ConjugateGradient())))  # not symmetric
    assert np.all(np.isnan(make(hg.Neumann(3, 1e-3))))  # too few terms
    np.testing.assert_allclose(make(hg.BiCGSTAB()), np.linalg.inv(a), rtol=1e-8)
    np.testing.assert_array_equal(make(hg.Identity(), max_residual=None), np.eye(4))


def test_what_only_the_solver_reads_is_refused_by_name() -> None:
    @hg.custom_root(lambda w, l2, rate: ridge_gradient(w, l2))
    def solve(init: Any, l2: Any, rate: Any) -> Any:
        return jax.lax.fori_loop(0, 9, lambda _, w: w - rate * ridge_gradient(w, l2), init)

    first = lambda *args, **rest: solve(ZEROS, *args, **rest)[0]  # noqa: E731
    with pytest.raises(ValueError, match="argument 'rate' enters the solver and not optimality"):
        jax.grad(first, 1)(L2, 0.3)
    with pytest.raises(ValueError, match="argument 'rate/a' enters the solver"):
        jax.grad(
            lambda r: hg.custom_root(lambda w, l2, rate: ridge_gradient(w, l2))(
                lambda init, l2, rate: init - rate["a"] * l2
            )(ZEROS, L2, rate={"a": r})[0]
        )(0.3)
    # held fixed it may stay, and what neither reads has a true zero
    assert float(jax.grad(first)(L2, 0.3)) != 0
    ignored = hg.custom_root(lambda w, h: ridge_gradient(w, h["l2"]))(lambda i, h: ridge(h["l2"]))
    grads = jax.grad(lambda h: ignored(ZEROS, h)[0] + h["other"])({"l2": L2, "other": 1.0})
    assert float(grads["other"]) == 1 and float(grads["l2"]) != 0
    flat = hg.custom_root(lambda w, l2: w - jnp.sign(l2))(lambda init, l2: jnp.sign(l2))
    with pytest.raises(ValueError, match="'l2' enters optimality only through sign"):
        jax.grad(lambda l2: flat(0.0, l2))(L2)


def test_other_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="solver is 'cg'"):
        hg.custom_root(ridge_gradient, "cg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimality returns entries of shapes"):
        hg.custom_root(lambda w, l2: w[:2])(lambda init, l2: init)(ZEROS, L2)
    with pytest.raises(ValueError, match="map returns entries of shapes"):
        hg.custom_fixed_point(lambda w, l2: (w, w))(lambda init, l2: init)(ZEROS, L2)
    with pytest.raises(ValueError, match="complex128"):
        hg.custom_root(lambda w, l2: w)(lambda init, l2: init * 1j)(ZEROS, L2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("argument", [2.0, jnp.array(2.0), jnp.float32(2.0)], ids=str)
def test_python_numbers_keep_their_digits(argument: Any) -> None:
    root = hg.custom_root(lambda w, square: w**2 - square)(lambda init, square: jnp.sqrt(square))
    tolerance = 1e-6 if getattr(argument, "dtype", None) == jnp.float32 else 1e-14
    assert abs(float(root(0.0, argument)) - 2**0.5) < tolerance
    for slope in (jax.grad, jax.jacfwd):
        found = slope(lambda square: root(0.0, square))(argument)
        assert abs(float(found) - 0.5 / 2**0.5) < tolerance
    fixed = hg.custom_fixed_point(lambda w, a: jnp.cos(a * w))(
        lambda init, a: jax.lax.fori_loop(0, 200, lambda i, w: jnp.cos(a * w), init)
    )
    w = fixed(jnp.array(0.5), 1.0)
    exact = -w * jnp.sin(w) / (1 + jnp.sin(w))
    assert abs(float(jax.grad(lambda a: fixed(jnp.array(0.5), a))(1.0) - exact)) < 1e-10
