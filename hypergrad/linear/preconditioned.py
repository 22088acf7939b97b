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
    """`solver` on S A S y = S b, with x = S y, for a diagonal S that evens out the rows of A.

    Where the curvatures of single parameters differ by orders of magnitude (embeddings beside
    normalisations, inputs in different units), the scaled matrix has a smaller condition number:
    conjugate gradients need fewer products, and a series may take one step size for all. With
    `Neumann` and `Richardson` it is the preconditioned iteration x <- x - step_size S^2 (A x - b),
    with `Identity` x = S^2 b.

    Args:
      solver: any other one. Its damping is added to the scaled matrix, so that it means damping
        S^-2, and its step size is that of the scaled matrix, too.
      diagonal: "probes": S such that the rows of S A S have a norm of 1, from products with random
        signs; at once for a diagonal A, and else a range r of units shrinks to its square root in
        each round. "adam": S^-2 is the root of the second moments of the gradients that Adam and
        its kin keep, with a mean of 1: no products; under `Implicit(of="stationary")` alone. Near
        Fisher's diagonal for a log-likelihood with one example a batch, and no more than a guess at
        larger ones.
      probes: products per round.
      rounds: how often S is improved.
      floor: rows of a norm below this times the mean are taken for one of that, in each round.

    It does not help where A is far from diagonal in any units (a rotated ellipse): S is then near a
    multiple of the identity, and its products are lost.

    Cost: `solver`'s, and with "probes" rounds * probes products more; memory 2 |b| more.

    Source: Bradley and Murray 2011 (equilibration by products); Choe et al. 2023, section 3 (SAMA:
    `Preconditioned(Identity(), "adam")`, there with the whole derivative of Adam's update).

    >>> from hypergrad import ConjugateGradient
    >>> a = jnp.array([1e-2, 1.0, 1e2])
    >>> solver = Preconditioned(ConjugateGradient(1), probes=1)
    >>> solver.solve(lambda x: a * x, jnp.ones(3), jax.random.key(0), ())[0].round(4).tolist()
    [100.0, 1.0, 0.009999999776482582]
    """

    solver: LinearSolver
    diagonal: Diagonal = "probes"
    probes: int = 4
    rounds: int = 3
    floor: float = 1e-3

    def __post_init__(self) -> None:
        checks.instance("solver", self.solver, LinearSolver, "one such as ConjugateGradient()")
        checks.choice("diagonal", self.diagonal, get_args(Diagonal))
        checks.integer_field(self, "probes")
        checks.integer_field(self, "rounds")
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

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        """Probes are products."""
        return self.solver.multiplies or self.diagonal == "probes"

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
        return self.solve_scaled(self._evened(matvec, b, key), matvec, b, key, state)

    def solve_scaled(
        self, scale: Tree, matvec: MatVec, b: Tree, key: Key, state: State
    ) -> tuple[Tree, State]:
        """`solve`, with S given: like b, and positive."""
        times = lambda x: jax.tree.map(jnp.multiply, x, scale)  # noqa: E731
        over = lambda x: jax.tree.map(jnp.divide, x, scale)  # noqa: E731
        inside = _on_both_sides(matvec, scale)
        y, state = self.solver.solve(inside, times(b), key, map_solution(over, state))
        return times(y), map_solution(times, state)

    def scale_of(self, diagonal: Tree) -> Tree:
        """S for a matrix of this diagonal, of entries of any sign, before the floor."""
        sizes = jax.tree.map(jnp.abs, diagonal)
        count = sum(x.size for x in jax.tree.leaves(sizes))
        mean = sum(jnp.sum(x) for x in jax.tree.leaves(sizes)) / count
        # of a matrix that is 0 nothing is learned
        least = jnp.where(mean == 0, 1, self.floor * mean)
        return jax.tree.map(lambda x: jnp.maximum(x, least.astype(x.dtype)) ** -0.5, sizes)

    def _evened(self, matvec: MatVec, b: Tree, key: Key) -> Tree:
        def improved(scale: Tree, key: Key) -> tuple[Tree, None]:
            inside = _on_both_sides(matvec, scale)
            squares = lambda key: jax.tree.map(jnp.square, inside(_signs(key, b)))  # noqa: E731
            every = jax.lax.map(squares, jax.random.split(key, self.probes))
            rows = jax.tree.map(lambda x: jnp.sqrt(jnp.mean(x, 0)), every)
            return jax.tree.map(jnp.multiply, scale, self.scale_of(rows)), None

        ones = jax.tree.map(jnp.ones_like, b)
        return jax.lax.scan(improved, ones, jax.random.split(key, self.rounds))[0]


def _on_both_sides(matvec: MatVec, scale: Tree) -> MatVec:
    times = lambda x: jax.tree.map(jnp.multiply, x, scale)  # noqa: E731
    return each_product(matvec, lambda product: lambda y: times(product(times(y))))


def _signs(key: Key, like: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )
