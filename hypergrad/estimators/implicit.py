"""Implicit differentiation: of the stationary point of training, or of its update's fixed point."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import checks
from hypergrad.data.batches import Minibatches, last_batch, mix_bits, num_batches, num_steps
from hypergrad.data.keys import SOLVER
from hypergrad.estimators.base import Estimate, Estimator, Window, summary
from hypergrad.estimators.linear import ConjugateGradient, LinearSolver, MatVec, relative_residual
from hypergrad.problem.problem import Problem, judged_params, steps_done
from hypergrad.problem.rules import declared_rules
from hypergrad.problem.structure import StructureError, keeps, reaches
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Scalar,
    State,
    Train,
    Tree,
    inner_product,
    is_inexact,
    norm,
    path_name,
)

Of = Literal["stationary", "fixed_point"]
Batches = Literal["all", "last"]
# z, or a vector of its space: inexact arrays of one dtype of at least float32
Vector = list[jax.Array]
Mask = list[jax.Array]  # booleans of its shapes


@dataclasses.dataclass(frozen=True)
class Implicit(Estimator):
    """Implicit differentiation at the parameters that the K steps lead to.

    Where training has brought a residual F(z, hyper) to 0, z moves with `hyper` by
    dz/dhyper = -(dF/dz)^-1 dF/dhyper, however it got there. So with v = dE/dz,
    (dF/dz)^T x = v,  grad = dE/dhyper - (dF/dhyper)^T x,  at no memory for the way.

    Args:
      solver: how the linear system is solved, see `hypergrad.estimators.linear`.
      of: "stationary": F is the gradient of `train_loss`, z the parameters: for hyperparameters of
        the loss (penalties, data weights), up to millions of them. "fixed_point": F is minus the
        optimiser's update, z the parameters and the optimiser's state, at whatever point training
        stands: for learning rates, momenta and decoupled decays too. Its matrix is not symmetric,
        so `ConjugateGradient` and `Nystrom` are refused; `Neumann(terms, 1.0)` is the paper's.
      batches: where F is taken: "all": the mean over the K batches of `train`, or over the batches
        of one epoch of a `Minibatches` (where the batch size does not divide the examples, the
        first ones fill up the last batch); "last": the last batch alone, a noisy guess of it (SOBA:
        `Richardson(1, step_size)` with "last").

    `info["residual"]` is |(dF/dz)^T x - v| / |v|: small if the system is solved, above 1 if x is
    worse than none. `info["inner_gradient_norm"]` ("update_norm" for a fixed point) is |F| over the
    parameters: 0 at a point where the formula holds. `info["unconverged"]` is |x . F|, the change
    of the validation loss, to first order, if training went on until F = 0, and
    `info["unconverged_share"]` ("stationary" only) its share of `loss`: above some percent the
    formula does not hold here, however small the residual, and where it stays so after long
    training, the training loss has a kink (L1, hinge) at its minimum: see `hypergrad.prox`.
    `info["converged_loss"]` is `loss` after that change, with an error of second order: the value
    for an outer line search, which a loss short of convergence misleads sooner than its gradient
    does. At a point that is not stationary different solvers give different, plausible numbers.

    Entries that training does not move (frozen parameters, batch statistics, the rows of an
    embedding that no batch holds) are found by one derivative along a random direction and left
    out of the system.

    Cost in gradient evaluations: K, and for each batch of `batches` 2 per product of the solver and
    10. Memory: the solver's, and what the backward pass of `train_loss` on those batches stores;
    independent of |hyper| and, under `Minibatches`, of K.

    Raises:
      ValueError: under "stationary", a hyperparameter that the training loss's gradient does not
        depend on (a learning rate): its hypergradient would be a silent 0.

    Source: Bengio 2000, eq. 14; Pedregosa 2016 (conjugate gradients), Lorraine et al. 2020
    (Neumann), Hataya and Yamada 2023 (Nystrom), Dagreou et al. 2022 (warm Richardson); fixed
    point: Clarke et al. 2022, eq. 5-7.

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

    def init(self, window: Window, hyper: Hyper) -> State:
        """What the solver remembers."""
        return self.solver.init(_vector_of(window.start(hyper), self.of, 0)[0])

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One value and gradient of the validation loss; see the class."""
        start = window.begin(hyper)
        offset = steps_done(start.inner)
        end = window.through(hyper, start, offset)
        condition = _condition(self, window, hyper, end.inner, offset)  # F
        z = condition.z

        def error(z: Vector, hyper: Hyper) -> Scalar:
            return window.loss(judged_params(window.problem, condition.inner_at(z)), hyper, offset)

        loss, (v, direct) = jax.value_and_grad(error, (0, 1))(z, hyper)  # dE/dz, dE/dhyper
        value, product = condition.transposed(hyper)  # F, and x -> (dF/dz)^T x
        key = jax.random.fold_in(jax.random.fold_in(window.key, SOLVER), offset)
        moves = condition.moves(hyper, product)
        v, matvec = _only(moves, v), _regular(product, moves, self.solver.krylov)
        x, state = self.solver.solve(matvec, v, key, state)  # (dF/dz)^T x = v
        x = _only(moves, x)
        (indirect,) = jax.vjp(lambda hyper: condition(z, hyper), hyper)[1](x)
        grad = jax.tree.map(jnp.subtract, direct, indirect)  # Bengio eq. 14

        info = summary(loss, grad, end.first_bad_step)
        info["residual"] = relative_residual(matvec, x, v)
        name = "inner_gradient_norm" if self.of == "stationary" else "update_norm"
        # of the parameters alone: the state also holds the last loss, which is never at rest
        info[name] = norm(condition.inner_at(_only(moves, value)).params)
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
        condition = _condition(self, window, hyper, start, steps_done(start))
        if condition.rules and self.solver.symmetric:
            raise StructureError(
                f"solver={self.solver} needs a symmetric matrix, which the second derivative of a "
                f"train_loss that calls {', '.join(condition.rules)}, a function with a derivative "
                "rule of its own, need not be. Use GMRES, Neumann or Richardson."
            )

        def stationarity(hyper: Hyper) -> Scalar:
            return _total(condition(condition.z, hyper))

        def trained(hyper: Hyper) -> Scalar:
            return _total(window.objective(hyper)[1].inner.params)

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


@dataclasses.dataclass(frozen=True)
class _Condition:
    """F(z, hyper), which training brings to 0.

    Attributes:
      problem: what is trained.
      of: "stationary": F is the gradient of the training loss; "fixed_point": minus the update.
      z: where training stands.
      inner_at: puts a z back into the training state.
      batches: leaves `[n, batch, ...]`: F is the mean over them.
      keys: of their steps, `[n]`.
      rules: the functions with a derivative of their own that the training loss calls.
    """

    problem: Problem
    of: Of
    z: Vector
    inner_at: Callable[[Vector], InnerState]
    batches: Batch
    keys: Key
    rules: list[str]

    def __call__(self, z: Vector, hyper: Hyper) -> Vector:
        """F."""
        if self.of == "stationary":
            return self._gradient(z, hyper)
        return self._minus_update(z, hyper)

    def transposed(self, hyper: Hyper) -> tuple[Vector, MatVec]:
        """F at z, and x -> (dF/dz)^T x."""
        if self.of == "stationary" and not self.rules:
            # a Hessian is its own transpose, and forward over reverse is the cheaper product
            return jax.linearize(lambda z: self(z, hyper), self.z)
        value, pull_back = jax.vjp(lambda z: self(z, hyper), self.z)
        return value, lambda x: pull_back(x)[0]

    def moves(self, hyper: Hyper, product: MatVec) -> Mask:
        """Which entries of z training moves, and for "stationary" the training loss depends on.

        Frozen parameters, batch statistics, the rows of an embedding that no batch holds: they do
        not answer to `hyper`, and with them the matrix is singular, or that of another problem.
        """
        batch, key = jax.tree.map(lambda x: x[0], (self.batches, self.keys))
        kept = keeps(self._stepped, self.z, hyper, batch, key)
        # Along a random direction the derivative of what no batch touches is exactly 0. That of the
        # update alone would not do: in float32 a small learning rate vanishes beside the parameter.
        t = [_scattered(x, seed) for seed, x in enumerate(self.z)]

        def answers(f: Callable[[Vector, Hyper], Vector]) -> Mask:
            if self.rules:  # which may have no forward mode; columns tell as well as rows
                return [d != 0 for d in jax.vjp(lambda z: f(z, hyper), self.z)[1](t)[0]]
            return [d != 0 for d in jax.jvp(lambda z: f(z, hyper), (self.z,), (t,))[1]]

        if self.of == "stationary":
            used = [d != 0 for d in product(t)]
        else:
            used, moved = answers(self._gradient), answers(self._minus_update)
            used = [a | b for a, b in zip(used, moved, strict=True)]
        return [(not still) & flag for still, flag in zip(kept, used, strict=True)]

    def _gradient(self, z: Vector, hyper: Hyper) -> Vector:
        def gradient(batch: Batch, key: Key) -> Vector:
            loss = self.problem.train_loss
            return jax.grad(lambda z: loss(self.inner_at(z).params, hyper, batch, key))(z)

        return self._mean(gradient)

    def _minus_update(self, z: Vector, hyper: Hyper) -> Vector:
        mean = self._mean(lambda batch, key: self._stepped(z, hyper, batch, key))
        return jax.tree.map(jnp.subtract, z, mean)

    def _stepped(self, z: Vector, hyper: Hyper, batch: Batch, key: Key) -> Vector:
        return _vector_of(self.problem.step(self.inner_at(z), hyper, batch, key), self.of, 0)[0]

    def _mean(self, f: Callable[[Batch, Key], Vector]) -> Vector:
        examples = (self.batches, self.keys)
        if self.keys.shape[0] == 1:
            return f(*jax.tree.map(lambda x: x[0], examples))
        # Summed up on the way: a mean over n stacked vectors would hold n of them.
        zeros = jax.tree.map(jnp.zeros_like, self.z)
        add = lambda total, x: (jax.tree.map(jnp.add, total, f(*x)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, zeros, examples)
        return jax.tree.map(lambda x: x / self.keys.shape[0], total)


def _condition(
    estimator: Implicit,
    window: Window,
    hyper: Hyper,
    inner: InnerState,
    offset: jax.typing.ArrayLike,
) -> _Condition:
    """F around the training state `inner`, on the batches that the estimator takes it on."""
    z, inner_at = _vector_of(inner, estimator.of, offset)
    batches, keys = _examples(window.train, window.key, offset, estimator.batches)
    batch, key = jax.tree.map(lambda x: x[0], (batches, keys))
    rules = declared_rules(window.problem.train_loss, inner.params, hyper, batch, key)
    return _Condition(window.problem, estimator.of, z, inner_at, batches, keys, rules)


def _vector_of(
    inner: InnerState, of: Of, offset: jax.typing.ArrayLike
) -> tuple[Vector, Callable[[Vector], InnerState]]:
    """Z of a training state, and the function that puts a z back into it."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(inner)
    chosen = [
        is_inexact(leaf) and (of == "fixed_point" or path_name(path[:1]) == "params")
        for path, leaf in paths_and_leaves
    ]
    # At the count of the window's start: a tuner may let training stand still after it.
    leaves = [
        jnp.asarray(offset) if path_name(path[:1]) == "step" else leaf
        for path, leaf in paths_and_leaves
    ]
    floats = [leaf for flag, leaf in zip(chosen, leaves, strict=True) if flag]
    dtype = jnp.result_type(jnp.float32, *floats)

    def inner_at(z: Vector) -> InnerState:
        supply = iter(z)
        return treedef.unflatten(
            next(supply).astype(jnp.result_type(leaf)) if flag else leaf
            for flag, leaf in zip(chosen, leaves, strict=True)
        )

    return [jnp.asarray(f, dtype) for f in floats], inner_at


def _examples(
    train: Train, key: Key, offset: jax.typing.ArrayLike, batches: Batches
) -> tuple[Batch, Key]:
    """Batches with a leading axis [n], and the keys of their steps [n]."""
    steps = num_steps(train)
    if batches == "last":
        data = jax.tree.map(lambda x: jnp.asarray(x)[None], last_batch(train, key, offset))
        return data, jax.random.fold_in(key, offset + steps - 1)[None]
    count = num_batches(train)
    data = train
    if isinstance(train, Minibatches):
        size = jax.tree.leaves(train.arrays)[0].shape[0]
        rows = (np.arange(count * train.batch_size) % size).reshape(count, -1)
        data = jax.tree.map(lambda x: jnp.asarray(x)[rows], train.arrays)
    return data, jax.vmap(lambda t: jax.random.fold_in(key, offset + t))(jnp.arange(count))


def _only(moves: Mask, x: Vector) -> Vector:
    return jax.tree.map(lambda m, x: jnp.where(m, x, 0), moves, x)


def _regular(product: MatVec, moves: Mask, krylov: bool) -> MatVec:
    """`product` on the entries that training moves, the identity elsewhere: a regular matrix."""

    def matvec(x: Vector) -> Vector:
        # Combinations of v and of products are 0 elsewhere by themselves, which spares a Krylov
        # solver a pass over all parameters.
        inside = product(x if krylov else _only(moves, x))
        return jax.tree.map(lambda m, y, x: jnp.where(m, y, x), moves, inside, x)

    return matvec


def _scattered(like: jax.Array, seed: int) -> jax.Array:
    """Numbers in [0.5, 1.5] without pattern; threefry's would take several times their memory."""
    bits = mix_bits(jnp.arange(like.size, dtype=jnp.uint32), seed)
    return (0.5 + bits.astype(like.dtype) / 2.0**32).reshape(like.shape)


def _total(tree: Tree) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if is_inexact(x)]
    return sum((jnp.sum(x) for x in floats), start=jnp.zeros(()))
