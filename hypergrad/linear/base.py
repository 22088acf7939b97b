"""Solvers of A x = b for a matrix that is only known by its products: inverse-Hessian products.

Each takes `matvec`, a linear map from pytrees to pytrees of the same structure, and `b`, such a
pytree. None sees a problem or a hyperparameter, so each is usable alone.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.trees import Key, State, Tree, cast_like, norm, widen

MatVec = Callable[[Tree], Tree]


@dataclasses.dataclass(frozen=True)
class FreshProducts:
    """Products with a matrix that differs from one to the next: each on a minibatch of its own.

    at: `(index, x) -> A_index x`. A solver that knows of none multiplies by the first.
    """

    at: Callable[[jax.Array | int, Tree], Tree]

    def __call__(self, x: Tree) -> Tree:
        """A_0 x."""
        return self.at(0, x)


class Warm(NamedTuple):
    """A solution that is gone on from, and how many products led to it."""

    x: Tree
    products: jax.Array


class LinearSolver(abc.ABC):
    """Base of all solvers: subclass it as a frozen dataclass and write `solve`.

    What a solver remembers between calls (a warm start) lives in the `state` that `init` makes and
    `solve` returns.
    """

    # Whether A must be symmetric; if so, the fixed point of an update is out of reach.
    symmetric: ClassVar[bool] = False
    # Whether it multiplies A with nothing but combinations of b and earlier products.
    krylov: ClassVar[bool] = True
    # Whether each product may be with another matrix, all of one mean.
    fresh: ClassVar[bool] = False
    # Whether it multiplies at all. If not, A may be singular, and nobody asks for a residual.
    multiplies: ClassVar[bool] = True

    def init(self, b: Tree) -> State:
        """The state before the first solve, from a pytree like `b`; `()` without memory."""
        return ()

    @abc.abstractmethod
    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """An approximate solution of matvec(x) = b, and the new state."""


def in_float32(solve: Callable[..., tuple[Tree, State]]) -> Callable[..., tuple[Tree, State]]:
    """`solve` for every b: one of fewer digits is solved in float32, one without entries is done.

    The products stay what they are, with all that they round.
    """

    @functools.wraps(solve)
    def wide(
        self: LinearSolver, matvec: MatVec, b: Tree, key: Key, state: State
    ) -> tuple[Tree, State]:
        if not any(jnp.size(x) for x in jax.tree.leaves(b)):
            return b, state
        if all(jnp.finfo(x.dtype).bits >= 32 for x in jax.tree.leaves(b)):
            return solve(self, matvec, b, key, state)
        narrow = lambda x: cast_like(x, b)  # noqa: E731
        more = lambda tree: jax.tree.map(widen, tree)  # noqa: E731
        product = each_product(matvec, lambda matvec: lambda x: more(matvec(narrow(x))))
        x, state = solve(self, product, more(b), key, map_solution(more, state))
        return narrow(x), map_solution(narrow, state)

    return wide


def relative_residual(matvec: MatVec, x: Tree, b: Tree) -> jax.Array:
    """|matvec(x) - b| / |b|: 0 for a solution, 1 for x = 0, above 1 for worse than none."""
    # 0 / 0 for b = 0, which x = 0 solves; a NaN stays
    return norm(axpy(-1, b, matvec(x))) / size_or_one(b)


def numbered(matvec: MatVec, count: int) -> tuple[jax.Array | None, Callable[..., Tree]]:
    """What a loop of `count` products scans along, and `(x, its entry) -> A x`."""
    if isinstance(matvec, FreshProducts):
        return jnp.arange(count), lambda x, index: matvec.at(index, x)
    return None, lambda x, _: matvec(x)


def each_product(matvec: MatVec, change: Callable[[MatVec], MatVec]) -> MatVec:
    """`change(matvec)`, product by product where they differ."""
    if not isinstance(matvec, FreshProducts):
        return change(matvec)
    return FreshProducts(lambda i, x: change(lambda x: matvec.at(i, x))(x))


def map_solution(function: Callable[[Tree], Tree], state: State) -> State:
    """A solver's state with `function` of the solution in it, if it holds one."""
    if isinstance(state, Warm):
        return state._replace(x=function(state.x))
    return function(state) if jax.tree.leaves(state) else state


def size_or_one(b: Tree) -> jax.Array:
    """|b|, or 1 where that is 0."""
    size = norm(b)
    return jnp.where(size == 0, 1, size)


def scaled(factor: jax.Array, tree: Tree) -> Tree:
    """Factor times the tree, in its dtypes."""
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)


def axpy(a: jax.typing.ArrayLike, x: Tree, y: Tree) -> Tree:
    """A x + y, in the dtypes of y."""
    return jax.tree.map(lambda x, y: jnp.asarray(a, y.dtype) * x + y, x, y)
