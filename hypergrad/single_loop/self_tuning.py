"""Self-tuning networks: how the parameters answer to hyperparameters, learned beside them."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hypergrad import checks
from hypergrad.data.batches import last_batch, step_inputs
from hypergrad.data.keys import NOISE
from hypergrad.estimators.base import (
    Estimate,
    Estimator,
    Progress,
    Window,
    require_smooth_losses,
    summary,
)
from hypergrad.estimators.conditions import Vector, total_of, vector_of
from hypergrad.linear.base import axpy
from hypergrad.problem.problem import steps_done
from hypergrad.problem.structure import StructureError, reaches
from hypergrad.single_loop.penalty import moving, steps_data
from hypergrad.trees import Batch, Hyper, Key, Scalar, State, norm

Form = Literal["full", "units"]
# "full": one array [|hyper|, *shape] per parameter; "units": ([|hyper|, units], [*shape])
Answer = list[Any]


class ResponseState(NamedTuple):
    """The learned response, its optimiser's state, and the estimates done."""

    answer: Answer
    opt_state: Any
    estimates: jax.Array


@dataclasses.dataclass(frozen=True)
class SelfTuning(Estimator):
    """The hypergradient through a best response that is learned from sampled hyperparameters.

    While training goes on at `hyper`, a linear model R of how its end z answers to a change of
    `hyper` is fitted: at each step, for random directions e, the training gradients at
    (z + R e, hyper + e) and (z - R e, hyper - e) should agree, and their difference, taken by first
    derivatives alone, moves R. Then grad = dE/dhyper + R^T dE/dz.

    Args:
      optimizer: of R, an optax transformation; its gradients are second derivatives of the
        training loss in size, which `optax.adam` does not mind.
      std: of the directions, in the coordinates of `hyper`; in tuners unit coordinates.
      samples: directions per step.
      form: "full": any linear R, |hyper| |params| numbers. "units": the parameters of one unit (of
        one entry of the last axis, as in flax's kernels and biases) answer by one learned
        direction, times a linear function of `hyper`: about 2 |params| numbers at any |hyper|, in
        the place of the layers of the sources.

    The training loss is never differentiated in `hyper`: hard dropout masks, augmentation and other
    paths without a derivative have a hypergradient here. In a tuner, at a bound of the box, half of
    the slope is seen, as there only one of two sides is sampled.

    `info["residual"]` is the last step's difference of gradients over what it is without R: 0 where
    the response is learned, 1 where nothing is; the noise of dropout, and "units", leave some.

    Cost in gradient evaluations: K (1 + 2 samples) and 5, at any |hyper|; the state holds R and its
    optimiser's memory. Bias: of R that lags, of "units", and O(std^2).

    Raises:
      ValueError: a hyperparameter that training does not see through its loss's gradient (a
        learning rate); a problem that judges other parameters than it trains (`evaluate`).

    Source: MacKay et al. 2019 (self-tuning networks: "units" is their row-wise form); Bae and
    Grosse 2020 (Delta-STN: the response is centred at training's own parameters, and linear).

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> train = lambda w, h, batch, key: jnp.mean((w - batch) ** 2) + h["l2"] * w**2
    >>> valid = lambda w, h, batch, key: jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), train, valid, lambda h: optax.sgd(0.2))
    >>> arguments = {"l2": 1.0}, None, jnp.ones((300, 3)), jnp.ones(3), jax.random.key(0)
    >>> estimate = hg.hypergradient(problem, *arguments, hg.SelfTuning(optax.sgd(0.1)))
    >>> round(float(estimate.grad["l2"]), 2)
    0.25
    """

    optimizer: optax.GradientTransformation
    std: float = 0.05
    samples: int = 1
    form: Form = "full"
    perturbs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.optimizer("optimizer", self.optimizer)
        checks.positive("std", self.std, "in the coordinates of hyper, for instance 0.05")
        checks.integer_field(self, "samples")
        checks.choice("form", self.form, get_args(Form))

    def init(self, window: Window, hyper: Hyper) -> State:
        """No response yet."""
        z, _ = vector_of(window.start(hyper), "stationary", 0)
        count = ravel_pytree(hyper)[0].size
        answer: Answer = [jnp.zeros((count, *x.shape), x.dtype) for x in z]
        if self.form == "units":
            answer = [(jnp.zeros((count, *x.shape[-1:]), x.dtype), _direction(x)) for x in z]
        return ResponseState(answer, self.optimizer.init(answer), jnp.int32(0))

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One value and gradient of the validation loss; see the class."""
        start = window.begin(hyper)
        offset = steps_done(start.inner)
        flat, unravel = ravel_pytree(hyper)
        z0, inner_at = vector_of(start.inner, "stationary", offset)
        train_step, data_of = window.one_step(hyper, offset), steps_data(window, offset)
        batch, key = last_batch(window.train, window.key, offset), window.key
        moves = moving(window, inner_at, z0, hyper, batch, key)
        noise = jax.random.fold_in(jax.random.fold_in(window.key, NOISE), state.estimates)

        def slope(answer: Answer, z: Vector, e: jax.Array, batch: Batch, key: Key) -> Vector:
            """The training gradient's derivative along (R e, e), over 2 std to either side."""
            response = answered(answer, e)

            def gradient(side: float) -> Vector:
                there, moved = axpy(side, response, z), unravel(flat + side * e)
                loss = window.problem.train_loss
                return jax.grad(lambda z: loss(inner_at(z).params, moved, batch, key))(there)

            difference = axpy(-1, gradient(-self.std), gradient(self.std))
            return [m * d / (2 * self.std) for m, d in zip(moves, difference, strict=True)]

        def step(carry: tuple[Progress, Answer, Any], x: tuple[jax.Array, Batch]) -> Any:
            progress, answer, opt_state = carry
            z, _ = vector_of(progress.inner, "stationary", offset)
            directions = _directions(noise, x[0] + offset, (self.samples, flat.size), flat.dtype)

            def pull(e: jax.Array) -> Answer:
                _, transpose = jax.vjp(lambda answer: answered(answer, e), answer)
                return transpose(slope(answer, z, e, *data_of(*x)))[0]

            grads = jax.tree.map(lambda g: g.mean(0), jax.vmap(pull)(directions))
            updates, opt_state = self.optimizer.update(grads, opt_state, answer)
            answer = optax.apply_updates(answer, updates)
            return (train_step(progress, x), answer, opt_state), None

        carry = (start, state.answer, state.opt_state)
        (end, answer, opt_state), _ = jax.lax.scan(step, carry, step_inputs(window.train))
        z, _ = vector_of(end.inner, "stationary", offset)

        def error(e: jax.Array) -> Scalar:  # of the validation loss along the response
            there = axpy(1, answered(answer, e), z)
            return window.loss(inner_at(there).params, unravel(flat + e), offset)

        loss, grad = jax.value_and_grad(error)(jnp.zeros_like(flat))
        info = summary(loss, grad, end.first_bad_step)
        t = jnp.int32(window.num_steps - 1)
        e = _directions(noise, t + offset, (1, flat.size), flat.dtype)[0]
        none = jax.tree.map(jnp.zeros_like, answer)
        left, all_ = (slope(r, z, e, *data_of(t, batch)) for r in (answer, none))
        size = norm(all_)
        info["residual"] = norm(left) / jnp.where(size == 0, 1, size)
        state = ResponseState(answer, opt_state, state.estimates + 1)
        return Estimate(loss, unravel(grad), end.inner, info), state

    def check_structure(self, window: Window, hyper: Hyper) -> None:
        """Raises where a gradient would be missing by structure; traces, runs nothing."""
        super().check_structure(window, hyper)
        require_smooth_losses(window, hyper)
        if window.problem.evaluate is not None:
            raise StructureError(
                "SelfTuning knows the trained parameters alone, and the problem judges others "
                "(evaluate=): use Unrolled or Forward."
            )
        start = window.start(hyper)
        z, inner_at = vector_of(start, "stationary", 0)
        batch = last_batch(window.train, window.key, steps_done(start))

        def slope(hyper: Hyper) -> Scalar:
            loss = window.problem.train_loss
            gradient = jax.grad(lambda z: loss(inner_at(z).params, hyper, batch, window.key))
            return total_of(gradient(z))

        def trained(hyper: Hyper) -> Scalar:
            return total_of(window.objective(hyper)[1].inner.params)

        def judged(hyper: Hyper) -> Scalar:
            return window.loss(start.params, hyper, steps_done(start))

        for direct in reaches(judged, hyper):
            if direct.used and (not direct.differentiable or direct.compared_with_noise):
                raise StructureError(
                    f"The hyperparameter {direct.name!r} reaches valid_loss itself by a path "
                    "without a derivative, which SelfTuning does not sample (it samples training): "
                    "use Evolution or FiniteDifference."
                )
        for seen, by_training in zip(reaches(slope, hyper), reaches(trained, hyper), strict=True):
            if by_training.used and not seen.used:
                raise StructureError(
                    f"The hyperparameter {seen.name!r} does not enter the gradient of train_loss, "
                    "and SelfTuning learns how its minimum moves: its hypergradient would be a "
                    "silent zero. What acts through the optimiser or the start (a learning rate, a "
                    "momentum, a decoupled decay) needs Unrolled or Forward."
                )


def answered(answer: Answer, e: jax.Array) -> Vector:
    """R e, for a change e `[|hyper|]` of the hyperparameters."""
    return [
        (e.astype(r[0].dtype) @ r[0]) * r[1]
        if isinstance(r, tuple)
        else jnp.tensordot(e.astype(r.dtype), r, 1)
        for r in answer
    ]


def _direction(x: jax.Array) -> jax.Array:
    # Penalties shrink a weight along itself; what starts at 0 needs some direction to be seen.
    return jnp.where(x == 0, 1, x)


def _directions(
    noise: Key, step: jax.typing.ArrayLike, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(noise, step), shape, dtype)
