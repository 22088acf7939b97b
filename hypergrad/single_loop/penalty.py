"""First-order hypergradients: a penalty that grows, and no second derivative."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.data.batches import Minibatches, last_batch, step_inputs
from hypergrad.data.keys import SHUFFLE
from hypergrad.estimators.base import Estimate, Estimator, Progress, Window, summary
from hypergrad.estimators.conditions import Vector, vector_of
from hypergrad.estimators.implicit import Implicit
from hypergrad.linear.base import axpy
from hypergrad.linear.krylov import GMRES
from hypergrad.problem.problem import steps_done
from hypergrad.problem.structure import keeps, reaches
from hypergrad.trees import Batch, Hyper, InnerState, Key, Scalar, State, norm


def steps_data(
    window: Window, offset: jax.typing.ArrayLike
) -> Callable[[jax.Array, Batch], tuple[Batch, Key]]:
    """`(t, entry of step_inputs) -> (batch, key)`: what training itself has at step t."""

    def data_of(t: jax.Array, batch: Batch) -> tuple[Batch, Key]:
        if isinstance(window.train, Minibatches):
            batch = window.train.batch(t + offset, jax.random.fold_in(window.key, SHUFFLE))
        return batch, jax.random.fold_in(window.key, t + offset)

    return data_of


def moving(
    window: Window,
    inner_at: Callable[[Vector], InnerState],
    z: Vector,
    hyper: Hyper,
    batch: Batch,
    key: Key,
) -> list[bool]:
    """Which parts of z follow the training loss: not frozen parameters, nor batch statistics."""

    # What the step also reads is passed, not closed over: else all would depend on z alone.
    def stepped(z: Vector, hyper: Hyper, batch: Batch, key: Key) -> Vector:
        return vector_of(window.problem.step(inner_at(z), hyper, batch, key), "stationary", 0)[0]

    def loss(z: Vector) -> Scalar:
        return window.problem.train_loss(inner_at(z).params, hyper, batch, key)

    kept = keeps(stepped, z, hyper, batch, key)
    return [reach.used and not k for reach, k in zip(reaches(loss, z), kept, strict=True)]


class PenaltyState(NamedTuple):
    """The parameters that are pulled towards a low validation loss, and the estimates done."""

    pulled: Vector
    estimates: jax.Array


@dataclasses.dataclass(frozen=True)
class F2SA(Estimator):
    """The hypergradient of a penalty method, by first derivatives alone.

    Beside the parameters z of training, others, y, follow train_loss + valid_loss / multiplier, by
    gradient descent of their own on the same batches. With g the training loss and f the validation
    loss, grad = df/dhyper(y) + multiplier (dg/dhyper(y) - dg/dhyper(z)): what the pull changes in g
    says how g and f trade, without a product of the Hessian.

    Args:
      step_size: of y's gradient descent on train_loss + valid_loss / multiplier.
      multiplier: a number, or an optax schedule of the estimates done. The bias falls as
        1 / multiplier; the noise of minibatches and of rounding grows with it (in float32 its
        square root is about 1e-4 at 1e4), and so does the number of steps until y has followed. A
        schedule that grows slowly, t^(1/3) or slower, has both.

    Where training stands is the problem's own business, but y follows plain gradient descent: an
    optimiser that ends elsewhere (a proximal step, a decoupled decay) leaves a gap between the two
    that no multiplier closes. `info["distance"]` is |y - z|, and `info["pull"]` that times the
    multiplier, which settles where the formula holds; `info["multiplier"]` is the one used.

    Cost in gradient evaluations: 3 K + 2, over K steps; memory 2 |params| and that of one backward
    pass, and |params| of state. No second derivative is taken, so that kernels and backward rules
    that have none are fine.

    Raises:
      ValueError: a hyperparameter that the training loss's gradient does not depend on (a learning
        rate): at convergence its hypergradient is 0.

    Source: Kwon et al. 2023, algorithm 1 (F2SA), eq. 4.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> train = lambda w, h, batch, key: jnp.mean((w - batch) ** 2) + h["l2"] * w**2
    >>> valid = lambda w, h, batch, key: jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), train, valid, lambda h: optax.sgd(0.2))
    >>> arguments = {"l2": 1.0}, None, jnp.ones((50, 3)), jnp.ones(3), jax.random.key(0)
    >>> estimate = hg.hypergradient(problem, *arguments, hg.F2SA(0.2, multiplier=100.0))
    >>> round(float(estimate.grad["l2"]), 2)  # 1/4, and a bias of 1 / multiplier
    0.25
    """

    step_size: float
    multiplier: float | Callable[[jax.Array], Any] = 100.0

    def __post_init__(self) -> None:
        checks.positive("step_size", self.step_size)
        if not callable(self.multiplier):
            checks.positive("multiplier", self.multiplier, "or a schedule, count -> multiplier")

    def init(self, window: Window, hyper: Hyper) -> State:
        """Y where training begins."""
        return PenaltyState(vector_of(window.start(hyper), "stationary", 0)[0], jnp.int32(0))

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One value and gradient of the validation loss; see the class."""
        start = window.begin(hyper)
        offset = steps_done(start.inner)
        given = self.multiplier
        multiplier = jnp.asarray(given(state.estimates) if callable(given) else given)
        _, inner_at = vector_of(start.inner, "stationary", offset)
        train_step = window.one_step(hyper, offset)
        data_of = steps_data(window, offset)
        t = jnp.int32(window.num_steps - 1)
        last = data_of(t, last_batch(window.train, window.key, offset))

        def f(y: Vector, hyper: Hyper) -> Scalar:
            return window.loss(inner_at(y).params, hyper, offset)

        def g(y: Vector, hyper: Hyper, batch: Batch, key: Key) -> Scalar:
            return window.problem.train_loss(inner_at(y).params, hyper, batch, key)

        def step(carry: tuple[Progress, Vector], x: tuple[jax.Array, Batch]) -> Any:
            progress, y = carry
            pull, down = jax.grad(f)(y, hyper), jax.grad(g)(y, hyper, *data_of(*x))
            y = axpy(-self.step_size, axpy(1 / multiplier, pull, down), y)
            progress = train_step(progress, x)
            z, _ = vector_of(progress.inner, "stationary", offset)
            y = [new if moves else old for moves, new, old in zip(follows, y, z, strict=True)]
            return (progress, y), None

        follows = moving(window, inner_at, state.pulled, hyper, *last)
        (end, y), _ = jax.lax.scan(step, (start, state.pulled), step_inputs(window.train))
        z, _ = vector_of(end.inner, "stationary", offset)

        def penalised(hyper: Hyper) -> Scalar:  # Kwon et al. 2023, eq. 4
            return f(y, hyper) + multiplier * (g(y, hyper, *last) - g(z, hyper, *last))

        loss, grad = f(z, hyper), jax.grad(penalised)(hyper)
        info = summary(loss, grad, end.first_bad_step)
        info["multiplier"] = multiplier
        info["distance"] = norm(axpy(-1, z, y))
        info["pull"] = multiplier * info["distance"]
        return Estimate(loss, grad, end.inner, info), PenaltyState(y, state.estimates + 1)

    def check_structure(self, window: Window, hyper: Hyper) -> None:
        """Raises where a gradient would be missing by structure; traces, runs nothing."""
        Implicit(GMRES(), batches="last").check_structure(window, hyper)
