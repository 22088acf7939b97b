"""Implicit differentiation: of the stationary point of training, or of its update's fixed point."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.estimators.base import Estimate, Estimator, summary
from hypergrad.linear import ConjugateGradient, LinearSolver, relative_residual
from hypergrad.minibatches import Minibatches
from hypergrad.problem import (
    Problem,
    last_batch,
    num_steps,
    step_inputs,
    steps_done,
    validation_loss,
)
from hypergrad.structure import reaches
from hypergrad.trees import inner_product, norm, split_inexact, widen
from hypergrad.window import begin, one_step


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
      batches: where F is taken: "all": the mean over the K batches of `train` (over all its
        examples for a `Minibatches`); "last": the last batch alone, as an unbiased guess of it
        (SOBA: `Richardson(1, step_size)` with "last").

    `info["residual"]` is |(dF/dz)^T x - v| / |v|: small if the system is solved, above 1 if x is
    worse than none. `info["inner_gradient_norm"]` ("update_norm" for a fixed point) is |F|: 0 at a
    point where the formula holds. `info["unconverged"]` is |x . F|, the change of the validation
    loss, to first order, if training went on until F = 0: set it against `loss`. At a point that is
    not stationary different solvers give different, plausible numbers.

    Cost in gradient evaluations: K, 2 per product of the solver, and 6. Memory: the solver's, and
    what the backward pass of `train_loss` on those batches stores; independent of |hyper| and,
    under `Minibatches`, of K.

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
        z, _ = _point(inner, self.of)
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
        advance = one_step(problem, hyper, train, key, offset)
        end = jax.lax.scan(lambda p, x: (advance(p, x), None), end, step_inputs(train))[0]
        z, inner_at = _point(end.inner, self.of)
        examples = _examples(train, key, offset, self.batches)

        def judged(z: list[jax.Array], hyper: Any) -> jax.Array:
            params = inner_at(z).params
            return validation_loss(problem, params, hyper, valid, key, offset + steps)

        def residual(z: list[jax.Array], hyper: Any) -> list[jax.Array]:
            return _residual(problem, self.of, inner_at, z, hyper, examples)

        loss, (v, direct) = jax.value_and_grad(judged, (0, 1))(z, hyper)
        if self.of == "stationary":
            v = _trained_part(problem, inner_at, hyper, examples, v)
            # a Hessian is its own transpose, and forward over reverse is the cheaper product
            value, product = jax.linearize(lambda z: residual(z, hyper), z)
        else:
            value, pull_back = jax.vjp(lambda z: residual(z, hyper), z)
            product = lambda x: pull_back(x)[0]  # noqa: E731
        x, state = self.solver.solve(product, v, jax.random.fold_in(key, offset), state)
        (indirect,) = jax.vjp(lambda hyper: residual(z, hyper), hyper)[1](x)
        grad = jax.tree.map(jnp.subtract, direct, indirect)
        info = summary(loss, grad, end.first_bad_step)
        info["residual"] = relative_residual(product, x, v)
        info["inner_gradient_norm" if self.of == "stationary" else "update_norm"] = norm(value)
        info["unconverged"] = jnp.abs(inner_product(x, value))
        return Estimate(loss, grad, end.inner, info), state

    def check_structure(
        self, problem: Problem, hyper: Any, inner: Any, train: Any, valid: Any, key: jax.Array
    ) -> None:
        """Raises where a gradient would be missing by structure; traces, runs nothing."""
        super().check_structure(problem, hyper, inner, train, valid, key)
        if self.of == "fixed_point":
            return
        start = problem.init(hyper, key) if inner is None else inner
        z, inner_at = _point(start, self.of)
        examples = _examples(train, key, steps_done(start), self.batches)

        def seen(hyper: Any) -> jax.Array:
            value = _residual(problem, self.of, inner_at, z, hyper, examples)
            direct = validation_loss(problem, start.params, hyper, valid, key, 0)
            return sum((jnp.sum(x) for x in value), start=direct)

        for reach in reaches(seen, hyper):
            if not reach.differentiable:
                raise ValueError(
                    f"The hyperparameter {reach.name!r} does not enter the gradient of train_loss, "
                    "so the stationary point does not move with it and its hypergradient would be "
                    "a silent zero. What acts through the optimiser or the start (a learning rate, "
                    "a momentum, a decoupled decay) needs Implicit(solver, of='fixed_point'), "
                    "Unrolled or Forward."
                )


# z, at least float32, and the function that makes of it a training state, or what has its params
Point = tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]
# batches with a leading axis [n], and the keys of their steps [n]
Examples = tuple[Any, jax.Array]


class _Judged(NamedTuple):
    params: Any


def _point(inner: Any, of: str) -> Point:
    inner = _Judged(inner.params) if of == "stationary" else inner
    floats, join = split_inexact(inner)

    def inner_at(z: list[jax.Array]) -> Any:
        return join([x.astype(jnp.result_type(f)) for x, f in zip(z, floats, strict=True)])

    return [widen(f) for f in floats], inner_at


def _examples(train: Any, key: jax.Array, offset: jax.typing.ArrayLike, batches: str) -> Examples:
    steps = num_steps(train)
    if batches == "last":
        data = last_batch(train, key, offset)
    elif isinstance(train, Minibatches):
        data = train.arrays
    else:
        keys = jax.vmap(lambda t: jax.random.fold_in(key, offset + t))(jnp.arange(steps))
        return train, keys
    one = jax.random.fold_in(key, offset + steps - 1)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], data), one[None]


def _mean_over(examples: Examples, f: Callable[[Any, jax.Array], list[jax.Array]]) -> Any:
    if examples[1].shape[0] == 1:
        return f(*jax.tree.map(lambda x: x[0], examples))
    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.lax.map(lambda x: f(*x), examples))


def _residual(
    problem: Problem, of: str, inner_at: Any, z: list[jax.Array], hyper: Any, examples: Examples
) -> list[jax.Array]:
    """F(z, hyper): the gradient of the training loss, or minus the update."""
    if of == "stationary":

        def gradient(batch: Any, key: jax.Array) -> list[jax.Array]:
            loss = lambda z: problem.train_loss(inner_at(z).params, hyper, batch, key)  # noqa: E731
            return jax.grad(loss)(z)

        return _mean_over(examples, gradient)

    def stepped(batch: Any, key: jax.Array) -> list[jax.Array]:
        return split_inexact(problem.step(inner_at(z), hyper, batch, key))[0]

    return [x - widen(y) for x, y in zip(z, _mean_over(examples, stepped), strict=True)]


def _trained_part(
    problem: Problem, inner_at: Any, hyper: Any, examples: Examples, v: list[jax.Array]
) -> list[jax.Array]:
    """`v` with zeros where the training loss does not depend on z (batch statistics).

    The Hessian is 0 there, so that no x solves the system, and none is needed.
    """
    batch, key = jax.tree.map(lambda x: x[0], examples)
    loss = lambda z: problem.train_loss(inner_at(z).params, hyper, batch, key)  # noqa: E731
    flags = [reach.differentiable for reach in reaches(loss, v)]
    return [x if flag else jnp.zeros_like(x) for x, flag in zip(v, flags, strict=True)]
