"""Solvers against dense linear algebra, and the laws by which their errors fall."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks.solvers import measure
from hypergrad.linear.base import FreshProducts, relative_residual

KEY = jax.random.key(0)


def system(dim: int = 12, low: float = 0.5, high: float = 4.0) -> tuple[Any, np.ndarray, Any]:
    """A symmetric positive definite matrix with eigenvalues from `low` to `high`, b, and A."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    a = basis @ np.diag(np.linspace(low, high, dim)) @ basis.T
    b = rng.normal(size=dim)
    dtype = jnp.result_type(float)
    matrix = jnp.asarray(a, dtype)

    def matvec(tree: Any) -> Any:
        flat = matrix @ jnp.concatenate([tree["p"], tree["q"].ravel()])
        return as_tree(flat)

    return matvec, b, a


def as_tree(flat: Any) -> Any:
    flat = jnp.asarray(flat, jnp.result_type(float))
    return {"p": flat[:2], "q": flat[2:].reshape(2, -1)}


def flatten(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree["p"]), np.asarray(tree["q"]).ravel()])


def solve(solver: Any, matvec: Any, b: np.ndarray) -> np.ndarray:
    tree = as_tree(b)
    return flatten(jax.jit(lambda b: solver.solve(matvec, b, KEY, solver.init(b))[0])(tree))


def error(x: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "solver", [hg.ConjugateGradient(12), hg.GMRES(12), hg.BiCGSTAB(12), hg.Cholesky()]
)
def test_krylov_solvers_are_exact_within_dim_products(solver: Any) -> None:
    matvec, b, a = system()
    assert error(solve(solver, matvec, b), np.linalg.solve(a, b)) <= 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "solver",
    [
        hg.ConjugateGradient(12, damping=0.3),
        hg.GMRES(12, damping=0.3),
        hg.BiCGSTAB(12, damping=0.3),
        hg.Cholesky(damping=0.3),
    ],
)
def test_damping_is_added_to_the_diagonal(solver: Any) -> None:
    matvec, b, a = system()
    damped = np.linalg.solve(a + 0.3 * np.eye(12), b)
    assert error(solve(solver, matvec, b), damped) <= 1e-8


@pytest.mark.usefixtures("x64")
def test_gmres_and_bicgstab_need_no_symmetry() -> None:
    rng = np.random.default_rng(1)
    a = 3 * np.eye(8) + rng.normal(size=(8, 8))
    b = rng.normal(size=8)
    for solver in (hg.GMRES(8), hg.BiCGSTAB(9)):
        x, _ = solver.solve(lambda x: jnp.asarray(a) @ x, jnp.asarray(b), KEY, ())
        assert error(np.asarray(x), np.linalg.solve(a, b)) <= 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_newer_solvers_do_not_depend_on_the_scale(scale: float) -> None:
    for solver in (hg.BiCGSTAB(60), hg.Cholesky(), hg.Preconditioned(hg.ConjugateGradient(60))):
        residual, _ = measure(lambda _, solver=solver: solver, "float64", 10.0, scale)
        assert residual < 1e-9, solver


@pytest.mark.usefixtures("x64")
def test_bicgstab_stands_still_on_a_rotation_and_the_residual_says_so() -> None:
    turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    x, _ = hg.BiCGSTAB(50).solve(lambda x: turn @ x, jnp.array([1.0, 2.0]), KEY, ())
    assert not float(relative_residual(lambda x: turn @ x, x, jnp.array([1.0, 2.0]))) < 0.1


@pytest.mark.usefixtures("x64")
def test_cholesky_refuses_what_it_cannot_factorise() -> None:
    indefinite = jnp.array([1.0, -1.0])
    x, _ = hg.Cholesky().solve(lambda x: indefinite * x, jnp.ones(2), KEY, ())
    assert np.all(np.isnan(x))
    with pytest.raises(ValueError, match=r"20000 x 20000 entries.*use ConjugateGradient"):
        hg.Cholesky().solve(lambda x: x, jnp.ones(20_000), KEY, ())


@pytest.mark.usefixtures("x64")
def test_a_diagonal_takes_the_units_out_of_a_system() -> None:
    """Condition 1e8 by units alone, 8 within: CG was lost there."""
    _, b, a = system()
    units = np.geomspace(1e-4, 1.0, 12)
    scaled, exact = units[:, None] * a * units, np.linalg.solve(units[:, None] * a * units, b)
    product = lambda x: jnp.asarray(scaled) @ x  # noqa: E731
    plain, better, series = (
        jax.jit(lambda b, s=s: s.solve(product, b, KEY, s.init(b))[0])(jnp.asarray(b))
        for s in (
            hg.ConjugateGradient(12),
            hg.Preconditioned(hg.ConjugateGradient(20), rounds=8),
            hg.Preconditioned(hg.Neumann(400, 0.5), rounds=8),
        )
    )
    assert error(np.asarray(plain), exact) > 0.1
    assert error(np.asarray(better), exact) < 1e-6
    assert error(np.asarray(series), exact) < 1e-6


@pytest.mark.usefixtures("x64")
def test_a_preconditioned_warm_start_is_kept_in_the_coordinates_of_x() -> None:
    a, b = jnp.geomspace(1e-2, 1e2, 12), jnp.ones(12)
    solver = hg.Preconditioned(hg.Richardson(1, 0.5), probes=1)
    state = solver.init(b)
    for n in (1, 2, 3):
        x, state = solver.solve(lambda x: a * x, b, jax.random.key(n), state)
        np.testing.assert_allclose(x, (1 - 0.5**n) / a, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_a_step_size_that_decays_counts_the_products_of_all_calls() -> None:
    solver = hg.Richardson(2, lambda t: 1 / (t + 2.0))
    state = solver.init(jnp.ones(1))
    for _ in range(2):
        x, state = solver.solve(lambda x: x, jnp.ones(1), KEY, state)
    # 1 - x shrinks by 1 - 1/2, 2/3, 3/4, 4/5
    np.testing.assert_allclose(x, 1 - 1 / 5, rtol=1e-12)
    assert int(state.products) == 4
    cold = hg.Richardson(2, lambda t: 1 / (t + 2.0), warm_start=False)
    assert (
        error(np.asarray(cold.solve(lambda x: x, jnp.ones(1), KEY, ())[0]), np.array([2 / 3]))
        < 1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", [hg.Neumann(3, 0.5), hg.Richardson(2, 0.5, warm_start=False)])
def test_each_product_may_have_a_matrix_of_its_own(solver: Any) -> None:
    matrices = jnp.array([1.0, 0.5, 0.25])
    x, _ = solver.solve(FreshProducts(lambda i, x: matrices[i] * x), jnp.ones(1), KEY, ())
    if isinstance(solver, hg.Neumann):
        expected = 0.5 * (1 + 0.5 + 0.5 * 0.75)
    else:
        expected = 0.5 + 0.5 * (1 - 0.5 * 0.5)
    np.testing.assert_allclose(x, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_more_cycles_of_gmres_go_on() -> None:
    matvec, b, a = system()
    exact = np.linalg.solve(a, b)
    one, three = (error(solve(hg.GMRES(4, cycles=n), matvec, b), exact) for n in (1, 3))
    assert three < 0.1 * one


@pytest.mark.usefixtures("x64")
def test_neumann_error_falls_by_the_slowest_direction() -> None:
    """(1 - a mu)^terms: the slope of the log error, over terms where that direction has won."""
    matvec, b, a = system(low=0.5)
    step, exact = 0.2, np.linalg.solve(a, b)
    errors = [error(solve(hg.Neumann(n, step), matvec, b), exact) for n in (30, 60)]
    slope = np.log(errors[1] / errors[0]) / 30
    assert slope == pytest.approx(np.log(1 - step * 0.5), rel=0.05)


@pytest.mark.usefixtures("x64")
def test_nystrom_at_full_rank_is_exact_to_the_damping() -> None:
    matvec, b, a = system()
    x = solve(hg.Nystrom(rank=12, damping=0.1), matvec, b)
    assert error(x, np.linalg.solve(a + 0.1 * np.eye(12), b)) <= 1e-10
    assert error(x, np.linalg.solve(a, b)) > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_full_rank_nystrom_keeps_its_digits_in_float32(scale: float) -> None:
    """The rounding of a projection, divided by a damping of 1e-8, was the answer."""
    for damping in (1e-2, 1e-4, 1e-6, 1e-8):
        make = lambda scale, damping=damping: hg.Nystrom(50, damping * scale)  # noqa: E731
        assert measure(make, "float32", 10.0, scale)[1] < 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_gmres_does_not_depend_on_the_scale_of_the_matrix(scale: float) -> None:
    """Its thresholds were absolute: 5e-6 of |b| at a scale of 1e6, and worse with two cycles."""
    one, two = (
        measure(lambda _, c=c: hg.GMRES(50, cycles=c), "float64", 1.1, scale) for c in (1, 2)
    )
    assert one[0] < 1e-10 and two[0] <= one[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_further_cycle_of_gmres_is_never_worse(dtype: str) -> None:
    residuals = [
        measure(lambda _, c=c: hg.GMRES(20, cycles=c), dtype, 1e6, 1e4)[0] for c in (1, 2, 3)
    ]
    assert residuals == sorted(residuals, reverse=True)


@pytest.mark.usefixtures("x64")
def test_nystrom_is_exact_on_a_low_rank_matrix() -> None:
    rng = np.random.default_rng(2)
    factor, b = rng.normal(size=(3, 20)), rng.normal(size=20)
    a = factor.T @ factor
    solver = hg.Nystrom(rank=6, damping=0.1)
    x, _ = solver.solve(lambda x: jnp.asarray(a) @ x, jnp.asarray(b), KEY, ())
    assert error(np.asarray(x), np.linalg.solve(a + 0.1 * np.eye(20), b)) <= 1e-6


@pytest.mark.usefixtures("x64")
def test_nystrom_is_the_papers_woodbury_form() -> None:
    """At partial rank on a full-rank matrix, where the approximation is no identity of anything."""
    _, b, a = system()
    columns: list[int] = []

    def matvec(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda i: columns.append(int(i)), jnp.argmax(x))
        return jnp.asarray(a) @ x

    x, _ = hg.Nystrom(rank=5, damping=0.1).solve(matvec, jnp.asarray(b), KEY, ())
    jax.effects_barrier()
    assert len(set(columns)) == 5
    c = a[columns]
    inner = c[:, columns] + c @ c.T / 0.1
    woodbury = b / 0.1 - c.T @ np.linalg.solve(inner, c @ b) / 0.1**2
    assert error(np.asarray(x), woodbury) <= 1e-8


def test_nystrom_in_float32() -> None:
    matvec, b, a = system()
    x = solve(hg.Nystrom(rank=12, damping=1e-2), matvec, b)
    # what rounding leaves outside the columns' span is divided by the damping
    assert error(x, np.linalg.solve(a + 1e-2 * np.eye(12), b)) <= 1e-4


@pytest.mark.usefixtures("x64")
def test_warm_conjugate_gradients_go_on_for_another_right_hand_side() -> None:
    matvec, b, a = system()
    cold, warm = hg.ConjugateGradient(5), hg.ConjugateGradient(5, warm_start=True)
    assert cold.solve(matvec, as_tree(b), KEY, cold.init(as_tree(b)))[1] == ()
    first, state = warm.solve(matvec, as_tree(b), KEY, warm.init(as_tree(b)))
    assert error(flatten(first), solve(cold, matvec, b)) < 1e-12
    other = 1.01 * b  # the state is of the system, not of the scaled one that is solved
    second, _ = warm.solve(matvec, as_tree(other), KEY, state)
    reference = np.linalg.solve(a, other)
    assert error(flatten(second), reference) < 0.1 * error(solve(cold, matvec, other), reference)


@pytest.mark.usefixtures("x64")
def test_cold_richardson_is_neumann_and_warm_goes_on() -> None:
    matvec, b, a = system()
    ten = solve(hg.Neumann(10, 0.2), matvec, b)
    assert error(solve(hg.Richardson(10, 0.2, warm_start=False), matvec, b), ten) < 1e-12
    warm, tree = hg.Richardson(5, 0.2), as_tree(b)
    state = warm.init(tree)
    for _ in range(2):
        x, state = warm.solve(matvec, tree, KEY, state)
    assert error(flatten(x), ten) < 1e-12
    assert error(flatten(x), np.linalg.solve(a, b)) > 1e-3


@pytest.mark.parametrize("solver", [hg.ConjugateGradient(12), hg.GMRES(12), hg.BiCGSTAB(12)])
def test_small_right_hand_sides_are_solved(solver: Any) -> None:
    """Thresholds inside are absolute: float32 GMRES gave 0 for |b| below 1e-7."""
    matvec, b, _ = system()
    assert error(1e12 * solve(solver, matvec, 1e-12 * b), solve(solver, matvec, b)) < 1e-4


@pytest.mark.parametrize(
    "solver", [hg.ConjugateGradient(3), hg.GMRES(3), hg.Nystrom(3), hg.BiCGSTAB(3)]
)
def test_zero_has_the_solution_zero(solver: Any) -> None:
    matvec, b, _ = system()
    x = solver.solve(matvec, as_tree(0 * b), KEY, ())[0]
    np.testing.assert_array_equal(flatten(x), 0)
    assert float(relative_residual(matvec, x, as_tree(0 * b))) == 0


ALL = [
    hg.Identity(),
    hg.Neumann(5, 0.2),
    hg.ConjugateGradient(5),
    hg.GMRES(5),
    hg.Nystrom(5, 0.1),
    hg.Richardson(5, 0.2),
    hg.Richardson(5, lambda t: 0.2 / (t + 1)),
    hg.BiCGSTAB(5),
    hg.Cholesky(),
    hg.Preconditioned(hg.ConjugateGradient(5)),
]


@pytest.mark.parametrize("solver", ALL)
def test_vmap_keeps_members_apart(solver: Any) -> None:
    matvec, b, _ = system()
    many = jnp.stack([jnp.asarray(b, jnp.float32), 2 * jnp.asarray(b, jnp.float32) - 1])

    def one(b: jax.Array) -> Any:
        tree = as_tree(b)
        return solver.solve(matvec, tree, KEY, solver.init(tree))[0]

    together = jax.vmap(one)(many)
    for i in range(2):
        member = flatten(jax.tree.map(lambda x, i=i: x[i], together))
        assert error(member, flatten(one(many[i]))) < 1e-5


EXACT = [
    hg.ConjugateGradient(6, warm_start=True),
    hg.GMRES(6),
    hg.BiCGSTAB(6),
    hg.Cholesky(),
    hg.Nystrom(3, 1e-6),
    hg.Preconditioned(hg.ConjugateGradient(6)),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("solver", EXACT, ids=lambda solver: type(solver).__name__)
def test_half_precision_keeps_its_dtype(solver: Any, dtype: str) -> None:
    """Conjugate gradients gave NaN, factorisations a KeyError of JAX's."""
    a = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 4.0]], dtype)
    b = jnp.array([1.0, -2.0, 0.5], dtype)
    x, state = solver.solve(lambda x: a @ x, b, KEY, solver.init(b))
    assert {leaf.dtype for leaf in jax.tree.leaves((x, state))} == {b.dtype}
    exact = jnp.linalg.solve(a.astype(float), b.astype(float))
    np.testing.assert_allclose(np.asarray(x, float), exact, atol=0.02)


@pytest.mark.parametrize("solver", EXACT[:-1], ids=lambda solver: type(solver).__name__)
def test_nothing_to_solve(solver: Any) -> None:
    b = {"w": jnp.zeros((0, 2))}
    assert solver.solve(lambda x: x, b, KEY, solver.init(b))[0]["w"].shape == (0, 2)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"terms=0 must be at least 1"):
        hg.Neumann(0)
    with pytest.raises(ValueError, match=r"step_size=-1 must be positive"):
        hg.Richardson(1, -1)
    with pytest.raises(ValueError, match=r"damping=0.0 must be positive"):
        hg.Nystrom(5, 0.0)
    with pytest.raises(ValueError, match=r"damping=-1 must be 0 or positive"):
        hg.ConjugateGradient(5, damping=-1)
    with pytest.raises(ValueError, match=r"max_steps=0 must be at least 1"):
        hg.GMRES(0)
    with pytest.raises(ValueError, match=r"diagonal='jacobi' is unknown"):
        hg.Preconditioned(hg.GMRES(), "jacobi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"only Implicit"):
        hg.Preconditioned(hg.GMRES(), "adam").solve(lambda x: x, jnp.ones(1), KEY, ())
