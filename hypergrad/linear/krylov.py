"""Solvers in Krylov spaces: conjugate gradients, BiCGSTAB, generalised minimal residuals."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg, gmres

from hypergrad import checks
from hypergrad.linear.base import LinearSolver, MatVec, axpy, in_float32, scaled, size_or_one
from hypergrad.trees import Key, State, Tree, inner_product, norm, select, zeros


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients on A + damping I, for a symmetric positive definite A.

    Exact within |b| products; the error falls by (sqrt(k) - 1) / (sqrt(k) + 1) per product, k the
    condition number. A Hessian with negative eigenvalues, away from a minimum, breaks it: damp it,
    or take `GMRES`.

    Args:
      max_steps: products at most.
      damping: rho, added to the diagonal; biases the solution by about rho / (lambda + rho) in the
        direction of an eigenvalue lambda.
      tolerance: stop at a residual of this times |b|.
      warm_start: go on from the last solution, kept in the state, as HOAG does; it pays where the
        system changes little between calls. False starts at zero.

    Cost: up to max_steps products, and one more if warm; memory 4 |b|, and |b| of state if warm.
    Under `vmap` all members go on until the last one has converged.

    Source: Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, algorithm 1.

    >>> x, _ = ConjugateGradient().solve(lambda x: 4 * x, jnp.array([2.0]), None, ())
    >>> round(float(x[0]), 4)
    0.5
    """

    max_steps: int = 20
    damping: float = 0.0
    tolerance: float = 1e-10
    warm_start: bool = False
    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer_field(self, "max_steps")
        checks.positive("damping", self.damping, zero=True)
        checks.positive("tolerance", self.tolerance, zero=True)
        checks.flag("warm_start", self.warm_start)

    def init(self, b: Tree) -> State:
        """Zeros like `b` if warm."""
        return zeros(b) if self.warm_start else ()

    @in_float32
    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        damped = lambda x: axpy(self.damping, x, matvec(x))  # noqa: E731
        size = size_or_one(b)
        start = scaled(1 / size, state) if self.warm_start else None
        x, _ = cg(damped, scaled(1 / size, b), start, tol=self.tolerance, maxiter=self.max_steps)
        x = scaled(size, x)
        return x, x if self.warm_start else state


@dataclasses.dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals on A + damping I, for any A that is not singular.

    Exact within |b| products, and the only solver here with a guarantee for the fixed point of an
    update, whose matrix is not symmetric.

    Args:
      max_steps: products at most, per cycle.
      damping: added to the diagonal.
      tolerance: stop at a residual of this times |b|.
      cycles: a further one solves for the residual that the last one left, and is taken where it
        makes it smaller: it goes on from too few steps, and mends what rounding cost.

    The residual does not depend on the scale of A or of b.

    Cost: up to cycles (min(max_steps, |b|) + 4) products; memory max_steps |b|.

    Source: Saad and Schultz 1986; Blondel et al. 2022 for hypergradients.

    >>> x, _ = GMRES().solve(lambda x: 4 * x, jnp.array([2.0]), None, ())
    >>> round(float(x[0]), 4)
    0.5
    """

    max_steps: int = 20
    damping: float = 0.0
    tolerance: float = 1e-10
    cycles: int = 1

    def __post_init__(self) -> None:
        checks.integer_field(self, "max_steps")
        checks.integer_field(self, "cycles")
        checks.positive("damping", self.damping, zero=True)
        checks.positive("tolerance", self.tolerance, zero=True)

    @in_float32
    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        damped = lambda x: axpy(self.damping, x, matvec(x))  # noqa: E731
        size = size_or_one(b)
        # The thresholds of jax's gmres are absolute, for A as for b.
        scale = size_or_one(damped(scaled(1 / size, b)))
        unit = self._cycle(lambda x: scaled(1 / scale, damped(x)), size)
        x = scaled(1 / scale, unit(b))

        def refined(carry: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], None]:
            x, residual = carry
            closer = axpy(1, scaled(1 / scale, unit(residual)), x)
            left = axpy(-1, damped(closer), b)
            better = norm(left) < norm(residual)
            return select(better, (closer, left), (x, residual)), None

        if self.cycles > 1:
            begun = (x, axpy(-1, damped(x), b))
            (x, _), _ = jax.lax.scan(refined, begun, length=self.cycles - 1)
        return x, state

    def _cycle(self, matvec: MatVec, size: jax.Array) -> Callable[[Tree], Tree]:
        """One cycle for a right-hand side, to a residual of the tolerance times `size`."""

        # gmres transposes its matrix in advance, for derivatives that nobody takes here, and not
        # every map has a transpose. NaN, so that one who did take them would see it.
        def no_transpose(_: MatVec, x: Tree) -> Tree:
            return jax.tree.map(lambda x: x * jnp.nan, x)

        def opaque(x: Tree) -> Tree:
            solve = lambda _, x: matvec(x)  # noqa: E731
            return jax.lax.custom_linear_solve(lambda x: x, x, solve, no_transpose)

        def solve(b: Tree) -> Tree:
            own = size_or_one(b)
            x, _ = gmres(
                opaque,
                scaled(1 / own, b),
                tol=self.tolerance * size / own,
                restart=min(self.max_steps, sum(x.size for x in jax.tree.leaves(b))),
                maxiter=1,
                solve_method="incremental",
            )
            return scaled(own, x)

        return solve


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(LinearSolver):
    """Stabilised biconjugate gradients on A + damping I, for any A, in little memory.

    Where `GMRES` keeps a basis of max_steps vectors, this keeps seven, whatever the number of
    steps. It has no guarantee: the residual may rise on the way, and the steps stand still on a
    matrix that is nearly a rotation (skew-symmetric); the residual shows both.

    Args:
      max_steps: steps at most, of two products each.
      damping: added to the diagonal.
      tolerance: stop at a residual of this times |b|.

    Where the recurrence breaks down it begins anew from the residual that is left.

    Cost: up to 2 max_steps + 1 products; memory 7 |b|. Under `vmap` all members go on until the
    last one has converged.

    Source: van der Vorst 1992.

    >>> x, _ = BiCGSTAB().solve(lambda x: 4 * x, jnp.array([2.0]), None, ())
    >>> round(float(x[0]), 4)
    0.5
    """

    max_steps: int = 20
    damping: float = 0.0
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        checks.integer_field(self, "max_steps")
        checks.positive("damping", self.damping, zero=True)
        checks.positive("tolerance", self.tolerance, zero=True)

    @in_float32
    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        damped = lambda x: axpy(self.damping, x, matvec(x))  # noqa: E731
        size = size_or_one(b)
        b = scaled(1 / size, b)

        def unsolved(way: _Way) -> jax.Array:
            return (way.steps < self.max_steps) & (norm(way.r) > self.tolerance)

        begun = _Way(zeros(b), b, b, b, inner_product(b, b), jnp.int32(0))
        end = jax.lax.while_loop(unsolved, lambda way: _stabilised(damped, way), begun)
        return scaled(size, end.x), state


class _Way(NamedTuple):
    x: Tree
    r: Tree  # b - A x
    shadow: Tree
    p: Tree  # the direction
    rho: jax.Array  # shadow . r
    steps: jax.Array


def _stabilised(matvec: MatVec, way: _Way) -> _Way:
    """One step: along p, then along what is left."""
    v = matvec(way.p)
    alpha = _ratio(way.rho, inner_product(way.shadow, v))
    s = axpy(-alpha, v, way.r)
    t = matvec(s)
    omega = _ratio(inner_product(t, s), inner_product(t, t))
    x = axpy(omega, s, axpy(alpha, way.p, way.x))
    r = axpy(-omega, t, s)
    rho = inner_product(way.shadow, r)
    beta = _ratio(rho * alpha, way.rho * omega)
    p = axpy(beta, axpy(-omega, v, way.p), r)
    # A shadow that has turned at a right angle to the residual leads nowhere.
    lost = jnp.abs(rho) <= jnp.finfo(rho.dtype).eps * norm(way.shadow) * norm(r)
    shadow, p = select(lost, (r, r), (way.shadow, p))
    return _Way(x, r, shadow, p, jnp.where(lost, inner_product(r, r), rho), way.steps + 1)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
