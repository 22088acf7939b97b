"""Implicit differentiation: of the stationary point of training, or of its update's fixed point."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.data.keys import SOLVER
from hypergrad.estimators.base import Estimate, Estimator, Window, summary
from hypergrad.estimators.conditions import (
    Batches,
    Of,
    Vector,
    condition_of,
    moments_of,
    only,
    regular,
    total_of,
    vector_of,
)
from hypergrad.linear.base import LinearSolver, relative_residual
from hypergrad.linear.krylov import ConjugateGradient
from hypergrad.linear.preconditioned import Preconditioned
from hypergrad.problem.problem import judged_params, steps_done
from hypergrad.problem.structure import StructureError, reaches
from hypergrad.trees import Hyper, Scalar, State, inner_product, norm


@dataclasses.dataclass(frozen=True)
class Implicit(Estimator):
    """Implicit differentiation at the parameters that the K steps lead to.

    Where training has brought a residual F(z, hyper) to 0, z moves with `hyper` by
    dz/dhyper = -(dF/dz)^-1 dF/dhyper, however it got there. So with v = dE/dz,
    (dF/dz)^T x = v,  grad = dE/dhyper - (dF/dhyper)^T x,  at no memory for the way.

    Args:
      solver: how the linear system is solved, see `hypergrad.linear`.
      of: "stationary": F is the gradient of `train_loss`, z the parameters: for hyperparameters of
        the loss (penalties, data weights), up to millions of them. "fixed_point": F is minus the
        optimiser's update, z the parameters and the optimiser's state, at whatever point training
        stands: for learning rates, momenta and decoupled decays too. Its matrix is not symmetric,
        so `ConjugateGradient` and `Nystrom` are refused; `Neumann(terms, 1.0)` is the paper's.
      batches: where F is taken: "all": the mean over the K batches of `train`, or over the batches
        of one epoch of a `Minibatches` (where the batch size does not divide the examples, the
        first ones fill up the last batch); "last": the last batch alone, a noisy guess of it (SOBA:
        `Richardson(1, step_size)` with "last"); "fresh": another batch for each product, for
        `Neumann` and `Richardson`, so that the error of n products does not add up but averages
        out (AmIGO: `Richardson(n, step_size)` with "fresh" and training that goes on).

    `info["residual"]` is |(dF/dz)^T x - v| / |v|: small if the system is solved, above 1 if x is
    worse than none; `Identity`, which solves nothing, has no such entry.
    `info["inner_gradient_norm"]` ("update_norm" for a fixed point) is |F| over the parameters: 0 at
    a point where the formula holds. `info["unconverged"]` is |x . F|, the change of the validation
    loss, to first order, if training went on until F = 0, and `info["unconverged_share"]`
    ("stationary" only) its share of `loss`: above some percent the formula does not hold here,
    however small the residual, and where it stays so after long training, the training loss has a
    kink (L1, hinge) at its minimum: see `hypergrad.prox`.
    `info["converged_loss"]` is `loss` after that change, with an error of second order: the value
    for an outer line search, which a loss short of convergence misleads sooner than its gradient
    does. At a point that is not stationary different solvers give different, plausible numbers.

    Entries that training does not move (frozen parameters, batch statistics, the rows of an
    embedding that no batch holds) are found by one derivative along a random direction and left
    out of the system; with `Identity` the first two alone, by the program, at no cost.

    Cost in gradient evaluations: K, and for each batch of `batches` 2 per product of the solver (3
    if "fresh") and 10 (3 with `Identity`). Memory: the solver's, and what the backward pass of
    `train_loss` on those batches stores; independent of |hyper| and, under `Minibatches`, of K.

    Raises:
      ValueError: under "stationary", a hyperparameter that the training loss's gradient does not
        depend on (a learning rate): its hypergradient would be a silent 0.

    Source: Bengio 2000, eq. 14; Pedregosa 2016 (conjugate gradients), Lorraine et al. 2020
    (Neumann), Hataya and Yamada 2023 (Nystrom), Dagreou et al. 2022 (warm Richardson), Arbel and
    Mairal 2022, algorithm 1 (AmIGO); fixed point: Clarke et al. 2022, eq. 5-7.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> train = lambda w, h, batch, key: jnp.mean((w - batch) ** 2) + h["l2"] * w**2
    >>> valid = lambda w, h, batch, key: jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), train, valid, lambda h: optax.sgd(0.2))
    >>> arguments = {"l2": 1.0}, None, jnp.ones((50, 3)), jnp.ones(3), jax.random.key(0)
    >>> estimate = hg.hypergradient(problem, *arguments, hg.Implicit())
    >>> round(float(estimate.grad["l2"]), 4)  # w = 1 / (1 + l2), so 2 (w - 1) dw/dl2 = 1/4
    0.25
    """

    solver: LinearSolver = ConjugateGradient()  # noqa: RUF009  frozen, so safe to share
    of: Of = "stationary"
    batches: Batches = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise ValueError(
                f"solver={self.solver!r} is no solver: give one such as ConjugateGradient(), an "
                "object and not its class or name."
            )
        checks.choice("of", self.of, get_args(Of))
        checks.choice("batches", self.batches, get_args(Batches))
        if self.of == "fixed_point" and self.solver.symmetric:
            raise ValueError(
                f"solver={self.solver} needs a symmetric matrix, which that of an update's fixed "
                "point is not. Use GMRES, Neumann or Richardson."
            )
        if self.batches == "fresh" and not self.solver.fresh:
            raise ValueError(
                f"solver={self.solver} needs the same matrix in each of its products, which "
                "batches='fresh' changes. Use Neumann or Richardson, or batches='all'."
            )
        adam = isinstance(self.solver, Preconditioned) and self.solver.diagonal == "adam"
        if adam and self.of == "fixed_point":
            raise ValueError(
                "solver.diagonal='adam' scales the parameters, and a fixed point's system holds "
                "the optimiser's state too. Use diagonal='probes', or of='stationary'."
            )

    def init(self, window: Window, hyper: Hyper) -> State:
        """What the solver remembers."""
        return self.solver.init(vector_of(window.start(hyper), self.of, 0)[0])

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One value and gradient of the validation loss; see the class."""
        start = window.begin(hyper)
        offset = steps_done(start.inner)
        end = window.trained(hyper, start, offset)
        condition = condition_of(self.of, self.batches, window, hyper, end.inner, offset)  # F
        z = condition.z

        def error(z: Vector, hyper: Hyper) -> Scalar:
            return window.loss(judged_params(window.problem, condition.inner_at(z)), hyper, offset)

        loss, (v, direct) = jax.value_and_grad(error, (0, 1))(z, hyper)  # dE/dz, dE/dhyper
        value, product = condition.transposed(hyper)  # F, and x -> (dF/dz)^T x
        key = jax.random.fold_in(jax.random.fold_in(window.key, SOLVER), offset)
        moves = condition.moves(hyper, product if self.solver.multiplies else None)
        product = product if condition.fresh is None else condition.fresh_products(hyper)
        v, matvec = only(moves, v), regular(product, moves, self.solver.krylov)
        if isinstance(self.solver, Preconditioned) and self.solver.diagonal == "adam":
            scale = self.solver.scale_of(moments_of(end.inner))
            x, state = self.solver.solve_scaled(scale, matvec, v, key, state)
        else:
            x, state = self.solver.solve(matvec, v, key, state)  # (dF/dz)^T x = v
        x = only(moves, x)
        (indirect,) = jax.vjp(lambda hyper: condition(z, hyper), hyper)[1](x)
        grad = jax.tree.map(jnp.subtract, direct, indirect)  # Bengio eq. 14

        info = summary(loss, grad, end.first_bad_step)
        if self.solver.multiplies:
            info["residual"] = relative_residual(matvec, x, v)
        name = "inner_gradient_norm" if self.of == "stationary" else "update_norm"
        # of the parameters alone: the state also holds the last loss, which is never at rest
        info[name] = norm(condition.inner_at(only(moves, value)).params)
        gain = inner_product(x, value)
        info["unconverged"] = jnp.abs(gain)
        if self.of == "stationary":  # the other formula is meant for points on the way, too
            info["unconverged_share"] = jnp.abs(gain) / jnp.where(gain == 0, 1, jnp.abs(loss))
        info["converged_loss"] = loss - gain.astype(loss.dtype)
        return Estimate(loss, grad, end.inner, info), state

    def check_structure(self, window: Window, hyper: Hyper) -> None:
        """Raises where a gradient would be missing by structure; traces, runs nothing."""
        super().check_structure(window, hyper)
        if self.of == "fixed_point":
            return
        if window.problem.evaluate is not None:
            raise StructureError(
                "Implicit(of='stationary') knows the trained parameters alone, and the problem "
                "judges others (evaluate=): use of='fixed_point', Unrolled or Forward."
            )
        start = window.start(hyper)
        condition = condition_of(self.of, self.batches, window, hyper, start, steps_done(start))
        if condition.rules and self.solver.symmetric:
            raise StructureError(
                f"solver={self.solver} needs a symmetric matrix, which the second derivative of a "
                f"train_loss that calls {', '.join(condition.rules)}, a function with a derivative "
                "rule of its own, need not be. Use GMRES, Neumann or Richardson."
            )

        def stationarity(hyper: Hyper) -> Scalar:
            return total_of(condition(condition.z, hyper))

        def trained(hyper: Hyper) -> Scalar:
            return total_of(window.objective(hyper)[1].inner.params)

        for direct, by_training in zip(
            reaches(stationarity, hyper), reaches(trained, hyper), strict=True
        ):
            if by_training.differentiable and not direct.differentiable:
                raise StructureError(
                    f"The hyperparameter {direct.name!r} does not enter the gradient of "
                    "train_loss, so the stationary point does not move with it and its "
                    "hypergradient would be a silent zero. What acts through the optimiser or the "
                    "start (a learning rate, a momentum, a decoupled decay) needs "
                    "Implicit(solver, of='fixed_point'), Unrolled or Forward."
                )
