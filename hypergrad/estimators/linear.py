"""Solvers of A x = b for a matrix that is only known by its products: inverse-Hessian products.

Each takes `matvec`, a linear map from pytrees to pytrees of the same structure, and `b`, such a
pytree. None sees a problem or a hyperparameter, so each is usable alone.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg, gmres

from hypergrad import checks
from hypergrad.trees import Key, State, Tree, norm, select

MatVec = Callable[[Tree], Tree]


class LinearSolver(abc.ABC):
    """Base of all solvers: subclass it as a frozen dataclass and write `solve`.

    What a solver remembers between calls (a warm start) lives in the `state` that `init` makes and
    `solve` returns.
    """

    # Whether A must be symmetric; if so, the fixed point of an update is out of reach.
    symmetric: ClassVar[bool] = False
    # Whether it multiplies A with nothing but combinations of b and earlier products.
    krylov: ClassVar[bool] = True

    def init(self, b: Tree) -> State:
        """The state before the first solve, from a pytree like `b`; `()` without memory."""
        return ()

    @abc.abstractmethod
    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """An approximate solution of matvec(x) = b, and the new state."""


@dataclasses.dataclass(frozen=True)
class Identity(LinearSolver):
    """x = b: the matrix taken for the identity. No products.

    For hypergradients this is the one-step rule, T1-T2 (Luketina et al. 2016): the right direction
    where the Hessian is near a multiple of the identity, its length wrong by that multiple.

    >>> Identity().solve(lambda x: 4 * x, jnp.array([2.0]), None, ())[0]
    Array([2.], dtype=float32)
    """

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        return b, state


@dataclasses.dataclass(frozen=True)
class Neumann(LinearSolver):
    """x = a sum_{j < terms} (I - a A)^j b, with a = `step_size`.

    Converges where every eigenvalue of I - a A has a modulus below 1; for a symmetric A, where
    0 < a < 2 / lambda_max. The error then falls as (1 - a mu)^terms, mu the smallest eigenvalue. A
    step size that is too large diverges: `info["residual"]` of `Implicit` is then above 1.

    Cost: terms - 1 products; memory 2 |b|.

    Source: Lorraine et al. 2020, eq. 6 and algorithm 3.

    >>> x, _ = Neumann(terms=50, step_size=0.2).solve(lambda x: 4 * x, jnp.array([2.0]), None, ())
    >>> round(float(x[0]), 4)
    0.5
    """

    terms: int = 10
    step_size: float = 1.0

    def __post_init__(self) -> None:
        checks.integer_field(self, "terms")
        checks.positive("step_size", self.step_size)

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""

        def add_term(carry: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], None]:
            term, total = carry
            term = _axpy(-self.step_size, matvec(term), term)
            return (term, _axpy(1, total, term)), None

        (_, total), _ = jax.lax.scan(add_term, (b, b), length=self.terms - 1)
        return jax.tree.map(lambda x: self.step_size * x, total), state


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
        return jax.tree.map(jnp.zeros_like, b) if self.warm_start else ()

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        damped = lambda x: _axpy(self.damping, x, matvec(x))  # noqa: E731
        size = _size_or_one(b)
        start = _scaled(1 / size, state) if self.warm_start else None
        x, _ = cg(damped, _scaled(1 / size, b), start, tol=self.tolerance, maxiter=self.max_steps)
        x = _scaled(size, x)
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

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        damped = lambda x: _axpy(self.damping, x, matvec(x))  # noqa: E731
        size = _size_or_one(b)
        # The thresholds of jax's gmres are absolute, for A as for b.
        scale = _size_or_one(damped(_scaled(1 / size, b)))
        unit = self._cycle(lambda x: _scaled(1 / scale, damped(x)), size)
        x = _scaled(1 / scale, unit(b))

        def refined(carry: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], None]:
            x, residual = carry
            closer = _axpy(1, _scaled(1 / scale, unit(residual)), x)
            left = _axpy(-1, damped(closer), b)
            better = norm(left) < norm(residual)
            return select(better, (closer, left), (x, residual)), None

        if self.cycles > 1:
            begun = (x, _axpy(-1, damped(x), b))
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
            own = _size_or_one(b)
            x, _ = gmres(
                opaque,
                _scaled(1 / own, b),
                tol=self.tolerance * size / own,
                restart=min(self.max_steps, sum(x.size for x in jax.tree.leaves(b))),
                maxiter=1,
                solve_method="incremental",
            )
            return _scaled(own, x)

        return solve


@dataclasses.dataclass(frozen=True)
class Nystrom(LinearSolver):
    """x = (A_k + rho I)^-1 b, with A_k the Nystrom approximation of A from `rank` columns K of A.

    With C = A[K, :] and M = C[:, K], A_k = C^T M^+ C. The paper's Woodbury form,
    x = b / rho - C^T (M + C C^T / rho)^-1 C b / rho^2, loses digits by cancellation in float32, so
    (for a positive semidefinite A) the same x is computed in an orthonormal basis, C^T = Q R:
    x = Q (R M^+ R^T + rho I)^-1 Q^T b + (b - Q Q^T b) / rho.
    At full rank it is (A + rho I)^-1 b.

    Not iterative, so it cannot diverge where A is positive semidefinite; an eigenvalue near -rho
    makes it large. Good where A is near low rank, as Hessians of networks are.

    Args:
      rank: columns, one drawn from each of `rank` equal stretches of the flattened b.
      damping: rho; biases as in `ConjugateGradient`, and sets how directions that the columns do
        not span are treated: there x = b / rho.

    Cost: rank products and a QR factorisation; memory 2 rank |b|.

    Source: Hataya and Yamada 2023, eq. 6 and algorithm 1.

    >>> solver = Nystrom(rank=1, damping=1e-3)
    >>> x, _ = solver.solve(lambda x: 4 * x, jnp.array([2.0]), jax.random.key(0), ())
    >>> round(float(x[0]), 4)
    0.4999
    """

    rank: int = 10
    damping: float = 1e-2
    symmetric: ClassVar[bool] = True
    krylov: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.integer_field(self, "rank")
        checks.positive("damping", self.damping)

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        flat, unravel = ravel_pytree(b)
        rank, rho = min(self.rank, flat.size), self.damping
        chosen = _draw(key, flat.size, rank)
        column = lambda i: ravel_pytree(matvec(unravel(jnp.zeros_like(flat).at[i].set(1))))[0]  # noqa: E731
        c = jax.lax.map(column, chosen)  # [rank, |b|]
        q, r = jnp.linalg.qr(c.T)
        core = r @ _pseudo_inverse(c[:, chosen]) @ r.T
        inside = q.T @ flat
        solved = jnp.linalg.solve(core + rho * jnp.eye(rank, dtype=core.dtype), inside)
        outside = flat - q @ inside
        # Again: divided by a small rho, the rounding of the first projection is the answer.
        for _ in range(2):
            outside -= q @ (q.T @ outside)
        return unravel(q @ solved + outside / rho), state


@dataclasses.dataclass(frozen=True)
class Richardson(LinearSolver):
    """x <- x - step_size (A x - b), `steps` times, from the last call's x if `warm_start`.

    Warm, with one step per call and a fresh minibatch in A and b each time, this is SOBA: the
    solution is tracked while the parameters move, and costs one product per call. Cold, n steps
    equal `Neumann(n)`.

    Args:
      steps: products per call.
      step_size: below 2 / lambda_max for a symmetric A.
      warm_start: go on from the last solution, kept in the state; False starts at zero.

    Cost: `steps` products; memory 2 |b|, and |b| of state if warm.

    Source: Dagreou et al. 2022, algorithm 2 (SOBA), eq. 5.

    >>> x, _ = Richardson(50, 0.2).solve(lambda x: 4 * x, jnp.array([2.0]), None, jnp.zeros(1))
    >>> round(float(x[0]), 4)
    0.5
    """

    steps: int = 1
    step_size: float = 1.0
    warm_start: bool = True

    def __post_init__(self) -> None:
        checks.integer_field(self, "steps")
        checks.positive("step_size", self.step_size)
        checks.flag("warm_start", self.warm_start)

    def init(self, b: Tree) -> State:
        """Zeros like `b` if warm."""
        return jax.tree.map(jnp.zeros_like, b) if self.warm_start else ()

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""

        def step(x: Tree, _: None) -> tuple[Tree, None]:
            return _axpy(-self.step_size, _axpy(-1, b, matvec(x)), x), None

        start = state if self.warm_start else jax.tree.map(jnp.zeros_like, b)
        x, _ = jax.lax.scan(step, start, length=self.steps)
        return x, x if self.warm_start else ()


def relative_residual(matvec: MatVec, x: Tree, b: Tree) -> jax.Array:
    """|matvec(x) - b| / |b|: 0 for a solution, 1 for x = 0, above 1 for worse than none."""
    # 0 / 0 for b = 0, which x = 0 solves; a NaN stays
    return norm(_axpy(-1, b, matvec(x))) / _size_or_one(b)


def _size_or_one(b: Tree) -> jax.Array:
    size = norm(b)
    return jnp.where(size == 0, 1, size)


def _scaled(factor: jax.Array, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)


def _axpy(a: float, x: Tree, y: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.asarray(a, y.dtype) * x + y, x, y)


def _pseudo_inverse(m: jax.Array) -> jax.Array:
    """Of a symmetric matrix, that rounding may have left a little asymmetric."""
    return jnp.linalg.pinv((m + m.T) / 2, hermitian=True)


def _draw(key: Key, size: int, rank: int) -> jax.Array:
    """`rank` different indices below `size`, one from each of `rank` equal stretches."""
    edges = np.arange(rank + 1) * size // rank
    share = jax.random.uniform(key, (rank,)) * np.diff(edges)
    return jnp.asarray(edges[:-1]) + jnp.minimum(share.astype(int), np.diff(edges) - 1)
