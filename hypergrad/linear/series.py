"""Solvers that sum or repeat: the identity, Neumann's series, Richardson's iteration."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.linear.base import LinearSolver, MatVec, Warm, axpy, numbered
from hypergrad.trees import Key, State, Tree, zeros


@dataclasses.dataclass(frozen=True)
class Identity(LinearSolver):
    """x = b: the matrix taken for the identity. No products, and no residual.

    For hypergradients this is the one-step rule, T1-T2 (Luketina et al. 2016): the right direction
    where the Hessian is near a multiple of the identity, its length wrong by that multiple.

    >>> Identity().solve(lambda x: 4 * x, jnp.array([2.0]), None, ())[0]
    Array([2.], dtype=float32)
    """

    fresh: ClassVar[bool] = True
    multiplies: ClassVar[bool] = False

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
    fresh: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer_field(self, "terms")
        checks.positive("step_size", self.step_size)

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        numbers, product = numbered(matvec, self.terms - 1)

        def add_term(carry: tuple[Tree, Tree], i: jax.Array | None) -> Any:
            term, total = carry
            term = axpy(-self.step_size, product(term, i), term)
            return (term, axpy(1, total, term)), None

        (_, total), _ = jax.lax.scan(add_term, (b, b), numbers, length=self.terms - 1)
        return jax.tree.map(lambda x: self.step_size * x, total), state


@dataclasses.dataclass(frozen=True)
class Richardson(LinearSolver):
    """x <- x - step_size (A x - b), `steps` times, from the last call's x if `warm_start`.

    Warm, with one step per call and a fresh minibatch in A and b each time, this is SOBA: the
    solution is tracked while the parameters move, and costs one product per call. Cold, n steps
    equal `Neumann(n)`.

    Args:
      steps: products per call.
      step_size: below 2 / lambda_max for a symmetric A. Or an optax schedule, of the products done
        in all calls: on minibatches a constant one ends in noise proportional to it, one that
        decays does not (SOBA's theory wants t^-1/2 or faster).
      warm_start: go on from the last solution, kept in the state; False starts at zero.

    Cost: `steps` products; memory 2 |b|, and |b| of state if warm.

    Source: Dagreou et al. 2022, algorithm 2 (SOBA), eq. 5.

    >>> x, _ = Richardson(50, 0.2).solve(lambda x: 4 * x, jnp.array([2.0]), None, jnp.zeros(1))
    >>> round(float(x[0]), 4)
    0.5
    """

    steps: int = 1
    step_size: float | Callable[[jax.Array], jax.typing.ArrayLike] = 1.0
    warm_start: bool = True
    fresh: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer_field(self, "steps")
        if not callable(self.step_size):
            checks.positive("step_size", self.step_size, "or a schedule, count -> step size")
        checks.flag("warm_start", self.warm_start)

    def init(self, b: Tree) -> State:
        """Zeros like `b` if warm, and under a schedule a count."""
        if not self.warm_start:
            return ()
        x = zeros(b)
        return Warm(x, jnp.int32(0)) if callable(self.step_size) else x

    def solve(self, matvec: MatVec, b: Tree, key: Key, state: State) -> tuple[Tree, State]:
        """See the class."""
        start = state.x if isinstance(state, Warm) else state
        start = start if self.warm_start else zeros(b)
        sizes = self._step_sizes(state)
        constant: Any = self.step_size
        numbers, product = numbered(matvec, self.steps)

        def step(x: Tree, inputs: tuple[Any, Any]) -> tuple[Tree, None]:
            size, number = (constant if sizes is None else inputs[0]), inputs[1]
            return axpy(-size, axpy(-1, b, product(x, number)), x), None

        x, _ = jax.lax.scan(step, start, (sizes, numbers), length=self.steps)
        if isinstance(state, Warm):
            return x, Warm(x, state.products + self.steps)
        return x, x if self.warm_start else ()

    def _step_sizes(self, state: State) -> jax.Array | None:
        """[steps], or None for one that is constant."""
        if not callable(self.step_size):
            return None
        done = state.products if isinstance(state, Warm) else 0
        counts = done + jnp.arange(self.steps)
        return jnp.broadcast_to(jnp.asarray(self.step_size(counts)), (self.steps,))
