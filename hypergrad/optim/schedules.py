"""Schedules with a gradient in every number, lengths and rates included."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad import checks
from hypergrad.trees import Hyper, Leaf, widen


class Schedule(NamedTuple):
    """Hyperparameters that change every `steps_per_update` training steps.

    Attributes:
      values: the hyperparameters in the user's units, leaves `[updates, ...]`.
      steps_per_update: training steps for which each entry stands.
    """

    values: Hyper
    steps_per_update: int

    def __call__(self, step: jax.typing.ArrayLike) -> Hyper:
        """The hyperparameters of training step `step`, traced or not; after the end, the last."""
        last = jax.tree.leaves(self.values)[0].shape[0] - 1
        index = jnp.clip(jnp.asarray(step) // self.steps_per_update, 0, last)
        return jax.tree.map(lambda x: x[index], self.values)

    def of(self, name: str) -> Callable[[Leaf], Hyper]:
        """The optax schedule of one hyperparameter: `optax.sgd(schedule.of("learning_rate"))`."""
        checks.choice("name", name, self.values)
        return lambda step: self(step)[name]


def piecewise_linear(
    values: Leaf, num_steps: Leaf | None = None, *, positions: Leaf | None = None
) -> optax.Schedule:
    """Straight lines between knots; the first value before the first knot, the last after the last.

    Args:
      values: the knots' values, `[knots]` or `[knots, ...]`; traced or not, as all numbers here.
      num_steps: spreads the knots evenly, the first at step 0, the last at step `num_steps`.
      positions: instead, each knot's step, `[knots]`, not decreasing. Two at one step make a jump.
        Traced ones are not checked: a knot that has overtaken the one before waits for it, which
        keeps the value within the range of `values`, but its position has no gradient there.

    The derivative in `num_steps` or `positions` at a step that lies exactly on a knot is the mean
    of both sides', as a central difference has it. To interpolate rates geometrically, pass logs
    and take `lambda step: jnp.exp(schedule(step))`.

    Raises:
      ValueError: not exactly one of `num_steps` and `positions`; fewer than 2 knots; positions that
        are not one per knot, or decrease; a `num_steps` that is not positive.

    >>> schedule = piecewise_linear([0.0, 1.0, 0.5], num_steps=10)
    >>> [float(schedule(step)) for step in (0, 4, 5, 8, 99)]
    [0.0, 0.800000011920929, 1.0, 0.699999988079071, 0.5]
    """
    checks.numbers("values", values)
    values = jnp.asarray(values)
    positions = _positions(values, num_steps, positions)

    def schedule(step: Leaf) -> jax.Array:
        # How much of each leg lies behind the step. A knot that has overtaken the one before waits.
        passed = _ramp(step, positions[:-1], positions[1:] - positions[:-1])
        in_order = jax.lax.stop_gradient(jax.lax.cummin(passed))
        return _through(values, jnp.where(passed > in_order, in_order, passed))

    return schedule


def piecewise_constant(values: Leaf, steps_each: int) -> Schedule:
    """One value per window of `steps_each` steps; the last one after the end.

    Sharing a rate over windows averages its noisy hypergradient and keeps forward mode cheap: FDS
    (Micaelli and Storkey 2021) tunes a whole schedule so, over whole runs, with steps of the sign
    alone that halve when the sign flips. Here, `hyper["rates"]` being `[windows]`:

        optimizer=lambda hyper: optax.sgd(hg.piecewise_constant(hyper["rates"], 100))
        tuner = hg.restarting(problem, space, hg.Forward(), fds, fresh_seeds=True)

    with `fds = optax.rprop(0.1, eta_minus=0.5, eta_plus=1.0)`: each rate moves by 0.1 of its range
    against its gradient's sign; once the sign flips its step is halved, and steps never grow. In
    optax 0.2.8 a rate rests in the first update and in two at each flip, because `rprop` hands out
    a move only when the next gradient has confirmed its sign.

    Args:
      values: `[windows]` or `[windows, ...]`, traced or not.
      steps_each: a Python integer. A window's length has no gradient, since steps are whole; to
        tune where a schedule turns, use the positions of `piecewise_linear`.

    Raises:
      ValueError: `steps_each` is no positive integer, or is traced; `values` has no axis.

    >>> schedule = piecewise_constant([1.0, 0.5, 0.25], steps_each=10)
    >>> [float(schedule(step)) for step in (0, 9, 10, 99)]
    [1.0, 1.0, 0.5, 0.25]
    """
    remedy = (
        "as a window's length has no gradient. For turning points that have one, use "
        "piecewise_linear(positions=)"
    )
    steps_each = checks.integer("steps_each", steps_each, remedy=remedy)
    checks.numbers("values", values)
    values = jnp.asarray(values)
    if not values.ndim:
        raise ValueError(f"values={values} needs a leading axis of windows: give [{values}].")
    return Schedule(values, steps_each)


def warmup_cosine(
    peak: Leaf, warmup_steps: Leaf, decay_steps: Leaf, floor: Leaf = 0.0, start: Leaf = 0.0
) -> optax.Schedule:
    """Linear warm-up from `start` to `peak`, then half a cosine down to `floor`.

    `optax.warmup_cosine_decay_schedule` with all five numbers traced or not, lengths included.

    Args:
      peak: the value at step `warmup_steps`.
      warmup_steps: at least 0; with 0, step 0 has the peak already.
      decay_steps: the step from which on the value is `floor`: as in optax, it counts from step 0,
        warm-up included. Traced lengths are not checked; with `decay_steps <= warmup_steps` the
        value drops to `floor` where the warm-up ends, and the lengths have no gradient there.
      floor: the last value.
      start: the first value, at step 0.

    Derivatives in a length at a step that lies exactly on it are the mean of both sides'.

    Raises:
      ValueError: a negative `warmup_steps`, or a `decay_steps` that does not exceed it.

    >>> schedule = warmup_cosine(0.1, warmup_steps=10, decay_steps=110)
    >>> [round(float(schedule(step)), 4) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    names = ("peak", "warmup_steps", "decay_steps", "floor", "start")
    for name, value in zip(names, (peak, warmup_steps, decay_steps, floor, start), strict=True):
        checks.numbers(name, value)
    _check_lengths(warmup_steps, decay_steps)

    def schedule(step: Leaf) -> jax.Array:
        up = _ramp(step, 0.0, warmup_steps)
        # negative only where a traced decay ends before the warm-up does
        down = _ramp(step, warmup_steps, decay_steps - warmup_steps)
        down = (1 - jnp.cos(jnp.pi * down)) / 2
        return _through(jnp.stack([widen(x) for x in (start, peak, floor)]), jnp.stack([up, down]))

    return schedule


def exponential_decay(initial: Leaf, rate: Leaf, transition_steps: Leaf) -> optax.Schedule:
    """`initial * rate ** (step / transition_steps)`, as `optax.exponential_decay`.

    All three numbers may be traced. `rate` must be positive and `transition_steps` too; traced ones
    are not checked: at rate 0 the derivative in it is infinite, as it truly is, and transitions
    shorter than 1e-6 steps count as 1e-6.

    Raises:
      ValueError: a `rate` or `transition_steps` that is not positive.

    >>> schedule = exponential_decay(1.0, 0.5, transition_steps=10)
    >>> [float(schedule(step)) for step in (0, 10, 20)]
    [1.0, 0.5, 0.25]
    """
    checks.numbers("initial", initial)
    checks.positive_if_known("rate", rate)
    checks.positive_if_known("transition_steps", transition_steps)

    def schedule(step: Leaf) -> jax.Array:
        power = step / jnp.maximum(widen(transition_steps), 1e-6)
        return initial * jnp.power(rate, power)

    return schedule


def _through(values: jax.Array, passed: jax.Array) -> jax.Array:
    """The point of a path through `values`, leg i passed to the share `passed[i]` in [0, 1].

    A sum of weighted values: exact at the knots, where adding up differences would leave rounding
    of the largest value in the smallest.
    """
    one, zero = jnp.ones_like(passed[:1]), jnp.zeros_like(passed[:1])
    weights = jnp.concatenate([one, passed]) - jnp.concatenate([passed, zero])
    return jnp.tensordot(weights.astype(jnp.result_type(values, weights)), values, 1)


def _ramp(step: Leaf, start: Leaf, length: Leaf) -> jax.Array:
    """From 0 at `start` to 1 at `start + length`; a jump, without derivative, if it has no length.

    At both ends `jnp.clip` has half the inner derivative: the mean of both sides.
    """
    length = widen(length)
    # A division by 0 in the branch that `where` does not take would still make the gradient NaN.
    safe = jnp.where(length > 0, length, 1)
    return jnp.where(length > 0, jnp.clip((step - start) / safe, 0, 1), step >= start)


def _positions(values: jax.Array, num_steps: Leaf | None, positions: Leaf | None) -> jax.Array:
    """The step of each knot, `[knots]`, checked."""
    if (num_steps is None) == (positions is None):
        raise ValueError(
            f"num_steps={num_steps} and positions={positions}: give one of the two, the length of "
            "evenly spread knots or each knot's step."
        )
    knots = values.shape[0] if values.ndim else 0
    if knots < 2:
        raise ValueError(f"values of shape {values.shape} need a leading axis of at least 2 knots.")
    if num_steps is not None:
        checks.positive_if_known("num_steps", num_steps)
        return jnp.linspace(0.0, 1.0, knots) * num_steps
    positions = widen(jnp.asarray(positions))
    if positions.shape != (knots,):
        raise ValueError(
            f"positions of shape {positions.shape} for {knots} knots: give one step per knot."
        )
    if _concrete(positions) and np.any(np.diff(positions) < 0):
        raise ValueError(f"positions={positions} decrease: sort them together with values.")
    return positions


def _check_lengths(warmup_steps: Leaf, decay_steps: Leaf) -> None:
    if _concrete(warmup_steps) and not warmup_steps >= 0:  # NaN is not, either
        raise ValueError(f"warmup_steps={warmup_steps} must be 0 or more.")
    if _concrete(warmup_steps, decay_steps) and not decay_steps > warmup_steps:
        raise ValueError(
            f"decay_steps={decay_steps} must exceed warmup_steps={warmup_steps}: it counts from "
            "step 0, warm-up included."
        )


def _concrete(*values: Leaf) -> bool:
    return not any(isinstance(x, jax.core.Tracer) for x in values)
