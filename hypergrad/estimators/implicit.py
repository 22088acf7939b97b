"""Implicit differentiation: of the stationary point of training, or of its update's fixed point."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.data.batches import Minibatches, last_batch, mix_bits, num_batches, num_steps
from hypergrad.data.keys import SOLVER
from hypergrad.estimators.base import Estimate, Estimator, summary
from hypergrad.estimators.linear import ConjugateGradient, LinearSolver, relative_residual
from hypergrad.problem.problem import Problem, steps_done, validation_loss
from hypergrad.problem.structure import StructureError, keeps, reaches
from hypergrad.problem.window import begin, objective, through
from hypergrad.trees import inner_product, is_inexact, norm, path_name


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
    worse than none. `info["inner_gradient_norm"]` ("update_norm" for a fixed point) is |F| over
    the parameters: 0 at a point where the formula holds. `info["unconverged"]` is |x . F|, the
    change of the validation loss, to first order, if training went on until F = 0: set it against
    `loss`. `info["converged_loss"]` is `loss` after that change, with an error of second order: the
    value for an outer line search, which a loss short of convergence misleads sooner than its
    gradient does. At a point that is not stationary different solvers give different, plausible
    numbers.

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
    of: Literal["stationary", "fixed_point"] = "stationary"
    batches: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise ValueError(
                f"solver={self.solver!r} is no solver: give one such as ConjugateGradient(), an "
                "object and not its class or name."
            )
        if self.of not in ("stationary", "fixed_point"):
            raise ValueError(f"of={self.of!r} is unknown: choose 'stationary' or 'fixed_point'.")
        if self.batches not in ("all", "last"):
            raise ValueError(f"batches={self.batches!r} is unknown: choose 'all' or 'last'.")
        if self.of == "fixed_point" and self.solver.symmetric:
            raise ValueError(
                f"solver={self.solver} needs a symmetric matrix, which that of an update's fixed "
                "point is not. Use GMRES, Neumann or Richardson."
            )

    def init(self, problem: Problem, hyper: Any, inner: Any, key: jax.Array) -> Any:
        """What the solver remembers."""
        inner = problem.init(hyper, key) if inner is None else inner
        z, _ = _point(inner, self.of, 0)
        return self.solver.init(z)

    def estimate(
        self,
        problem: Problem,
        hyper: Any,
        inner: Any,
        train: Any,
        valid: Any,
        key: jax.Array,
        state: Any,
    ) -> tuple[Estimate, Any]:
        """One value and gradient of the validation loss; see the class."""
        steps = num_steps(train)
        end = begin(problem, hyper, inner, key, 1)
        offset = steps_done(end.inner)
        end = through(problem, hyper, end, train, key, offset)
        z, inner_at = _point(end.inner, self.of, offset)
        examples = _examples(train, key, offset, self.batches)

        def judged(z: list[jax.Array], hyper: Any) -> jax.Array:
            params = inner_at(z).params
            return validation_loss(problem, params, hyper, valid, key, offset + steps)

        def residual(z: list[jax.Array], hyper: Any) -> list[jax.Array]:
            return _RESIDUALS[self.of](problem, inner_at, z, hyper, examples)

        loss, (v, direct) = jax.value_and_grad(judged, (0, 1))(z, hyper)
        if self.of == "stationary":
            # a Hessian is its own transpose, and forward over reverse is the cheaper product
            value, product = jax.linearize(lambda z: residual(z, hyper), z)
        else:
            value, pull_back = jax.vjp(lambda z: residual(z, hyper), z)
            product = lambda x: pull_back(x)[0]  # noqa: E731
        solver_key = jax.random.fold_in(jax.random.fold_in(key, SOLVER), offset)
        trained = _trained(problem, inner_at, z, hyper, examples, self.of, product)
        only = lambda x: jax.tree.map(lambda m, x: jnp.where(m, x, 0), trained, x)  # noqa: E731

        def product_of_trained(x: list[jax.Array]) -> list[jax.Array]:
            # The identity elsewhere, so that the matrix stays regular. Combinations of v and of
            # products are 0 there by themselves, which spares a pass over all parameters.
            inside = product(x if self.solver.krylov else only(x))
            return jax.tree.map(lambda m, y, x: jnp.where(m, y, x), trained, inside, x)

        v = only(v)
        x, state = self.solver.solve(product_of_trained, v, solver_key, state)
        x = only(x)
        (indirect,) = jax.vjp(lambda hyper: residual(z, hyper), hyper)[1](x)
        grad = jax.tree.map(jnp.subtract, direct, indirect)
        info = summary(loss, grad, end.first_bad_step)
        info["residual"] = relative_residual(product_of_trained, x, v)
        name = "inner_gradient_norm" if self.of == "stationary" else "update_norm"
        # of the parameters alone: the state also holds the last loss, which is never at rest
        info[name] = norm(inner_at(only(value)).params)
        gain = inner_product(x, value)
        info["unconverged"] = jnp.abs(gain)
        info["converged_loss"] = loss - gain.astype(loss.dtype)
        return Estimate(loss, grad, end.inner, info), state

    def check_structure(
        self, problem: Problem, hyper: Any, inner: Any, train: Any, valid: Any, key: jax.Array
    ) -> None:
        """Raises where a gradient would be missing by structure; traces, runs nothing."""
        super().check_structure(problem, hyper, inner, train, valid, key)
        if self.of == "fixed_point":
            return
        start = problem.init(hyper, key) if inner is None else inner
        offset = steps_done(start)
        z, inner_at = _point(start, self.of, offset)
        examples = _examples(train, key, offset, self.batches)

        def stationarity(hyper: Any) -> jax.Array:
            return _total(_gradient(problem, inner_at, z, hyper, examples))

        def trained(hyper: Any) -> jax.Array:
            return _total(objective(problem, hyper, inner, train, valid, key)[1].inner.params)

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


# z, in one dtype of at least float32, and the function that puts it back into the training state
Point = tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]
# batches with a leading axis [n], and the keys of their steps [n]
Examples = tuple[Any, jax.Array]


def _point(inner: Any, of: str, offset: jax.typing.ArrayLike) -> Point:
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

    def inner_at(z: list[jax.Array]) -> Any:
        supply = iter(z)
        return treedef.unflatten(
            next(supply).astype(jnp.result_type(leaf)) if flag else leaf
            for flag, leaf in zip(chosen, leaves, strict=True)
        )

    return [jnp.asarray(f, dtype) for f in floats], inner_at


def _examples(train: Any, key: jax.Array, offset: jax.typing.ArrayLike, batches: str) -> Examples:
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


def _mean_over(examples: Examples, f: Callable[[Any, jax.Array], list[jax.Array]]) -> Any:
    if examples[1].shape[0] == 1:
        return f(*jax.tree.map(lambda x: x[0], examples))
    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.lax.map(lambda x: f(*x), examples))


def _gradient(
    problem: Problem, inner_at: Any, z: list[jax.Array], hyper: Any, examples: Examples
) -> list[jax.Array]:
    """F of the stationary point: the gradient of the training loss."""

    def gradient(batch: Any, key: jax.Array) -> list[jax.Array]:
        loss = lambda z: problem.train_loss(inner_at(z).params, hyper, batch, key)  # noqa: E731
        return jax.grad(loss)(z)

    return _mean_over(examples, gradient)


def _minus_update(
    problem: Problem, inner_at: Any, z: list[jax.Array], hyper: Any, examples: Examples, of: str
) -> list[jax.Array]:
    def stepped(batch: Any, key: jax.Array) -> list[jax.Array]:
        return _point(problem.step(inner_at(z), hyper, batch, key), of, 0)[0]

    return jax.tree.map(jnp.subtract, z, _mean_over(examples, stepped))


# F(z, hyper), by what it is the residual of
_RESIDUALS: dict[str, Callable[..., list[jax.Array]]] = {
    "stationary": _gradient,
    "fixed_point": functools.partial(_minus_update, of="fixed_point"),
}


def _trained(
    problem: Problem,
    inner_at: Any,
    z: list[jax.Array],
    hyper: Any,
    examples: Examples,
    of: str,
    product: Callable[[list[jax.Array]], list[jax.Array]],
) -> list[jax.Array]:
    """Which entries of z training moves, and for "stationary" the training loss depends on.

    Frozen parameters, batch statistics, the rows of an embedding that no batch holds: they do not
    answer to `hyper`, and with them the matrix is singular, or that of another problem.
    """
    data, step_keys = jax.tree.map(lambda x: x[0], examples)

    def step(z: list[jax.Array], hyper: Any, batch: Any, key: jax.Array) -> list[jax.Array]:
        return _point(problem.step(inner_at(z), hyper, batch, key), of, 0)[0]

    def gradient(z: list[jax.Array]) -> list[jax.Array]:
        return _gradient(problem, inner_at, z, hyper, examples)

    def update(z: list[jax.Array]) -> list[jax.Array]:
        return _minus_update(problem, inner_at, z, hyper, examples, of)

    trained = [not kept for kept in keeps(step, z, hyper, data, step_keys)]
    # Along a random direction the derivative of what no batch touches is exactly 0. That of the
    # update alone would not do: in float32 a small learning rate vanishes beside the parameter.
    t = [_scattered(x, seed) for seed, x in enumerate(z)]
    if of == "stationary":
        used = [d != 0 for d in product(t)]
    else:
        used = [d != 0 for d in jax.jvp(gradient, (z,), (t,))[1]]
        moved = [d != 0 for d in jax.jvp(update, (z,), (t,))[1]]
        used = [a | b for a, b in zip(used, moved, strict=True)]
    return [flag & mask for flag, mask in zip(trained, used, strict=True)]


def _scattered(like: jax.Array, seed: int) -> jax.Array:
    """Numbers in [0.5, 1.5] without pattern; threefry's would take several times their memory."""
    bits = mix_bits(jnp.arange(like.size, dtype=jnp.uint32), seed)
    return (0.5 + bits.astype(like.dtype) / 2.0**32).reshape(like.shape)


def _total(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if is_inexact(x)]
    return sum((jnp.sum(x) for x in floats), start=jnp.zeros(()))
