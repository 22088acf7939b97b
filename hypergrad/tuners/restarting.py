"""Hyperparameters tuned over whole runs, each from fresh parameters."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from hypergrad import checks
from hypergrad.data.batches import num_steps
from hypergrad.estimators.base import Estimate, Estimator, Window
from hypergrad.estimators.hypergradient import as_estimator
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.optim.transforms import norm_adam
from hypergrad.problem.eager import compiled_outside_jit
from hypergrad.problem.problem import Problem, judged_params, validation_loss
from hypergrad.space.space import Space
from hypergrad.trees import Batch, Hyper, Key, Scalar, State, Train, Unit, norm, select, widen
from hypergrad.tuners.base import Info, Position, Tuner, TunerState, refuse_wrong
from hypergrad.tuners.estimates import shorten, unit_estimate, unit_state
from hypergrad.tuners.refusals import warning
from hypergrad.tuners.trust import (
    NOT_LEARNED,
    Trust,
    first_state,
    include,
    info_of,
    judge,
    next_state,
    outer_update,
)


def restarting(
    problem: Problem,
    space: Space,
    estimator: Estimator | Literal["auto"] = Unrolled(),  # noqa: B008  frozen, so safe to share
    outer_optimizer: optax.GradientTransformation | None = None,
    num_seeds: int = 1,
    *,
    fresh_seeds: bool = False,
    max_move: float = 0.2,
    trust: Trust = Trust(),  # noqa: B008
) -> Tuner:
    """Tunes over whole runs: each update trains from fresh parameters and takes one outer step.

    `tuner.update(state, train, valid)` trains over the whole of `train` (K steps, best given as
    `Minibatches`) under `num_seeds` seeds at once, and differentiates the validation loss through
    all of it, the start included.

    Args:
      problem: what is trained and judged.
      space: the ranges; only its continuous hyperparameters are tuned.
      estimator: `Unrolled(checkpoint="sqrt")` for long runs. "auto": the cheapest exact one that
        fits the device's memory (for one seed), chosen by shapes when the update is compiled, and
        logged.
      outer_optimizer: any optax optimiser over unit coordinates; None for `norm_adam(0.1)`.
      num_seeds: runs per update, in one program. Their hypergradients are averaged after each is
        scaled down to at most their median norm, so that one outlier does not own the mean; seeds
        that are not finite are left out, and count against trust.
      fresh_seeds: draw new seeds in every update. False keeps them (common random numbers): the
        loss falls smoothly, on these seeds; True follows the expected loss, noisily.
      max_move: the most a unit coordinate moves in one update.
      trust: when a hypergradient is refused, a run that learned too little included. A refused
        update returns to the last trusted hyperparameters, see `Trust`.

    Cost per update: that of the estimator, times `num_seeds`; 3 K gradient evaluations with the
    default. Memory: the estimator's.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> tuner = hg.restarting(problem, hg.Space({"lr": hg.Float(1e-3, 1.0, scale="log")}))
    >>> state = tuner.init({"lr": 1e-2}, jax.random.key(0))
    >>> update = jax.jit(tuner.update)
    >>> losses = []
    >>> for _ in range(5):
    ...     state, info = update(state, jnp.ones((20, 3)), jnp.ones(3))
    ...     losses.append(float(info.loss))
    >>> losses[-1] < 0.1 * losses[0]
    True
    """
    num_seeds = checks.integer("num_seeds", num_seeds)
    checks.flag("fresh_seeds", fresh_seeds)
    refuse_wrong(problem, space, outer_optimizer, trust, max_move)
    estimator = as_estimator(estimator)
    optimizer = norm_adam(0.1) if outer_optimizer is None else outer_optimizer

    def init(hyper: Hyper, key: Key) -> TunerState:
        checks.random_key("key", key)
        hyper = space.validate(hyper)
        unit = space.to_unit(hyper)
        state_of = lambda key: unit_state(estimator, problem, space, unit, None, key)  # noqa: E731
        memory = jax.vmap(state_of)(_seeds(key, num_seeds))
        return first_state(trust, Position(unit, optimizer.init(unit), (), memory), key)

    def update(state: TunerState, train: Train, valid: Batch) -> tuple[TunerState, Info]:
        now, steps = state.now, num_steps(train)
        hyper = space.from_unit(now.unit)
        key = jax.random.fold_in(state.key, state.updates) if fresh_seeds else state.key
        chosen = estimator.resolve(Window(problem, None, train, valid, key), hyper)

        def run(key: Key, memory: State) -> tuple[Estimate, State, Scalar]:
            start = problem.init(hyper, key)
            untrained = validation_loss(
                problem, judged_params(problem, start), hyper, valid, key, 0
            )
            window = shorten(Window(problem, None, train, valid, key), state.trust)
            estimate, memory = unit_estimate(chosen, window, space, now.unit, memory)
            return estimate._replace(inner=()), memory, untrained

        # One seed is no batch of one: vmap would run both sides of a shortened run's condition.
        many = jax.vmap(run) if num_seeds > 1 else _batch_of_one(run)
        estimates, memory, untrained = many(_seeds(key, num_seeds), now.estimator_state)
        grad, agreement = combine(estimates.grad)
        loss = jnp.median(widen(estimates.loss))
        about = {name: _worst(name, value) for name, value in estimates.info.items()}
        refused = judge(trust, state.trust, norm(grad), about)
        # A network that diverged and died has a small, calm gradient: only its loss gives it away.
        learned = loss <= trust.max_loss * jnp.median(untrained)
        whole = state.trust.shortened == 0
        refused = jnp.where((refused == 0) & whole & ~learned, NOT_LEARNED, refused)
        # Not again at the same place: it would cost a whole run, under the same seeds for nothing.
        outer = outer_update(optimizer, space, max_move, state, grad, refused, steps, retries=False)
        ahead = Position(outer.unit, outer.outer_state, (), memory)
        back = select(outer.moves_on, ahead, state.trusted)
        new = next_state(trust, state, outer, ahead, now, back)
        about |= {"agreement": agreement, "shortened": state.trust.shortened}
        return new, info_of(loss, hyper, grad, refused, outer, about)

    def best(state: TunerState) -> Hyper:
        # The position reached counts as one more iterate: nothing after it could distrust it.
        average = include(state.average, state.now.unit, state.trust.seen > 0)
        return space.from_unit(space.project(average.unit))

    return Tuner(init, compiled_outside_jit(update), warning(compiled_outside_jit(best)), space)


def combine(grads: Unit) -> tuple[Unit, Scalar]:
    """Seeds' gradients `[seeds, ...]` as one, and their agreement in [0, 1].

    Each is scaled down to at most the median norm of the finite ones. Agreement is the norm of the
    mean over the mean of the norms: 1 for one seed, about seeds^-1/2 for pure noise. Where more
    than half are not finite, so is the result.
    """
    norms = jax.vmap(norm)(grads)
    finite = jnp.isfinite(norms)
    middle = jnp.nanmedian(jnp.where(finite, norms, jnp.nan))
    middle = jnp.where(2 * jnp.sum(finite) >= finite.size, middle, jnp.nan)
    scaled = jnp.minimum(norms, middle)
    # where on the gradient too: 0 * NaN is NaN
    weight = jnp.where(finite, scaled / jnp.where(norms == 0, 1, norms), 0) / jnp.sum(finite)

    def mean(g: jax.Array) -> jax.Array:
        w = weight.reshape(-1, *[1] * (g.ndim - 1)).astype(g.dtype)
        return jnp.sum(jnp.where(w == 0, 0, w * g), 0) + (0 * middle).astype(g.dtype)

    grad = jax.tree.map(mean, grads)
    spread = jnp.sum(jnp.where(finite, scaled, 0)) / jnp.sum(finite)
    return grad, norm(grad) / jnp.where(spread == 0, 1, spread)


def _seeds(key: Key, num_seeds: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_seeds))


def _batch_of_one(run: Callable[..., Any]) -> Callable[..., Any]:
    def single(keys: Key, memory: State) -> Any:
        first = jax.tree.map(lambda x: x[0], memory)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], run(keys[0], first))

    return single


def _worst(name: str, values: jax.Array) -> jax.Array:
    """Several seeds' info as one: the worst counts for flags and steps, the median for sizes."""
    if name == "finite":
        # as in `combine`: trusted while at least half are finite
        return 2 * jnp.sum(values) >= values.size
    if name == "first_bad_step":
        return jnp.max(values)
    return jnp.median(values)
