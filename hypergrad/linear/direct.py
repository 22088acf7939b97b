"""Solvers that factorise: a whole small matrix, or some columns of a large one."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hypergrad import checks
from hypergrad.linear.base import LinearSolver, MatVec, in_float32
from hypergrad.trees import Key, State, Tree

# Unknowns of a matrix that is written out.
_LARGEST = 10_000


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

    @in_float32
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


def _pseudo_inverse(m: jax.Array) -> jax.Array:
    """Of a symmetric matrix, that rounding may have left a little asymmetric."""
    return jnp.linalg.pinv((m + m.T) / 2, hermitian=True)


def _draw(key: Key, size: int, rank: int) -> jax.Array:
    """`rank` different indices below `size`, one from each of `rank` equal stretches."""
    edges = np.arange(rank + 1) * size // rank
    share = jax.random.uniform(key, (rank,)) * np.diff(edges)
    return jnp.asarray(edges[:-1]) + jnp.minimum(share.astype(int), np.diff(edges) - 1)


@dataclasses.dataclass(frozen=True)
class Cholesky(LinearSolver):
    """The exact solution of (A + damping I) x = b by a factorisation, for a small matrix.

    For a symmetric positive definite A, which is written out column by column. One that is not
    positive definite gives NaN; the asymmetric part of one that is not symmetric is dropped, which
    the residual shows.

    Args:
      damping: rho, added to the diagonal; biases as in `ConjugateGradient`.

    Cost: |b| products, |b|^3 / 3 operations; memory |b|^2, and that of 32 products at once.

    Raises:
      ValueError: |b| above 10,000 (400 MB in float32).

    >>> x, _ = Cholesky().solve(lambda x: 4 * x, jnp.array([2.0]), None, ())
    >>> round(float(x[0]), 4)
    0.5
    """

    damping: float = 0.0
    symmetric: ClassVar[bool] = True
    krylov: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.positive("damping", self.damping, zero=True)

    @in_float32
    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        flat, unravel = ravel_pytree(b)
        if flat.size > _LARGEST:
            raise ValueError(
                f"Cholesky stores a matrix of {flat.size} x {flat.size} entries, and takes "
                f"{_LARGEST} unknowns at most: use ConjugateGradient, or Nystrom."
            )
        identity = jnp.eye(flat.size, dtype=flat.dtype)
        column = lambda e: ravel_pytree(matvec(unravel(e)))[0]  # noqa: E731
        a = jax.lax.map(column, identity, batch_size=32)  # [|b|, |b|]
        factor = jax.scipy.linalg.cho_factor((a + a.T) / 2 + self.damping * identity)
        return unravel(jax.scipy.linalg.cho_solve(factor, flat)), state
