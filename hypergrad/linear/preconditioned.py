"""A solver on a system scaled by a diagonal, so that its eigenvalues lie closer together."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.linear.base import LinearSolver, MatVec, each_product, map_solution
from hypergrad.trees import Key, State, Tree

Diagonal = Literal["probes", "adam"]


@dataclasses.dataclass(frozen=True)
class Preconditioned(LinearSolver):
    """`solver` on D^-1/2 A D^-1/2 y = D^-1/2 b, with x = D^-1/2 y, for a diagonal D near that of A.

    Where the curvatures of single parameters differ by orders of magnitude (embeddings beside
    normalisations, inputs in different units), the scaled matrix has a smaller condition number:
    conjugate gradients need fewer products, and a series may take one step size for all. With
    `Neumann` and `Richardson` it is the preconditioned iteration x <- x - step_size D^-1 (A x - b),
    with `Identity` x = D^-1 b.

    Args:
      solver: any other one. Its damping is added to the scaled matrix, so that it means damping D,
        and its step size is that of the scaled matrix, too.
      diagonal: "probes": the diagonal of A itself, by the mean of z * A z over random signs z:
        exact for a diagonal A, off by the root of the other entries' sum of squares for one probe.
        "adam": the root of the second moments of the gradients that Adam and its kin keep, with a
        mean of 1: no products; under `Implicit(of="stationary")` alone. Near Fisher's diagonal for
        a log-likelihood with one example a batch, and no more than a guess at larger ones.
      probes: products for D.
      floor: entries of D below this times their mean are raised to it.

    It does not help where A is far from diagonal (a rotated ellipse): D is then near a multiple of
    the identity, and its products are lost.

    Cost: `solver`'s, and with "probes" `probes` products more; memory 2 |b| more.

    Source: Jacobi's preconditioner; Bekas et al. 2007 (probes); Choe et al. 2023, section 3 (SAMA:
    `Preconditioned(Identity(), "adam")`, there with the whole derivative of Adam's update).

    >>> from hypergrad import ConjugateGradient
    >>> a = jnp.array([1e-3, 1.0, 1e3])
    >>> solver = Preconditioned(ConjugateGradient(1), probes=1)
    >>> solver.solve(lambda x: a * x, jnp.ones(3), jax.random.key(0), ())[0].round(4).tolist()
    [1000.0, 1.0, 0.0010000000474974513]
    """

    solver: LinearSolver
    diagonal: Diagonal = "probes"
    probes: int = 10
    floor: float = 1e-3

    def __post_init__(self) -> None:
        checks.instance("solver", self.solver, LinearSolver, "one such as ConjugateGradient()")
        checks.choice("diagonal", self.diagonal, get_args(Diagonal))
        checks.integer_field(self, "probes")
        checks.positive("floor", self.floor)

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """As `solver`: the scaled matrix is symmetric where A is."""
        return self.solver.symmetric

    @property
    def krylov(self) -> bool:  # type: ignore[override]
        """A probe is no combination of b and products."""
        return self.solver.krylov and self.diagonal == "adam"

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        """As `solver`."""
        return self.solver.fresh

    def init(self, b: Tree) -> State:
        """What `solver` remembers, its solution in the coordinates of x."""
        return self.solver.init(b)

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        if self.diagonal == "adam":
            raise ValueError(
                "diagonal='adam' is read from a training state, which only "
                "Implicit(of='stationary') has: use diagonal='probes'."
            )
        return self.solve_with(self._probed(matvec, b, key), matvec, b, key, state)

    def solve_with(
        self, diagonal: Tree, matvec: MatVec, b: Tree, key: Key, state: State
    ) -> tuple[Tree, State]:
        """`solve`, with D given: like b, its entries of any sign and scale."""
        root = jax.tree.map(jnp.sqrt, self._floored(diagonal))
        over = lambda x: jax.tree.map(jnp.divide, x, root)  # noqa: E731
        times = lambda x: jax.tree.map(jnp.multiply, x, root)  # noqa: E731
        around = each_product(matvec, lambda product: lambda y: over(product(over(y))))
        y, state = self.solver.solve(around, over(b), key, map_solution(times, state))
        return over(y), map_solution(over, state)

    def _probed(self, matvec: MatVec, b: Tree, key: Key) -> Tree:
        leaves, treedef = jax.tree.flatten(b)

        def probe(key: Key) -> Tree:
            keys = jax.random.split(key, len(leaves))
            pairs = zip(keys, leaves, strict=True)
            signs = treedef.unflatten(
                [jax.random.rademacher(k, x.shape, x.dtype) for k, x in pairs]
            )
            return jax.tree.map(jnp.multiply, signs, matvec(signs))

        every = jax.lax.map(probe, jax.random.split(key, self.probes))
        return jax.tree.map(lambda x: jnp.mean(x, 0), every)

    def _floored(self, diagonal: Tree) -> Tree:
        sizes = jax.tree.map(jnp.abs, diagonal)
        count = sum(x.size for x in jax.tree.leaves(sizes))
        mean = sum(jnp.sum(x) for x in jax.tree.leaves(sizes)) / count
        # of a matrix without a diagonal nothing is learned
        least = jnp.where(mean == 0, 1, self.floor * mean)
        return jax.tree.map(lambda x: jnp.maximum(x, least.astype(x.dtype)), sizes)
