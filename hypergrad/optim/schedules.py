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
        index = jnp.maximum(jnp.asarray(step) // self.steps_per_update, 0)
        # A sweep of choices alone has no leaf to ask for the length.
        return jax.tree.map(lambda x: x[jnp.minimum(index, x.shape[0] - 1)], self.values)

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
    return _piecewise(values, num_steps, positions, lambda passed: passed)


def piecewise_cosine(
    values: Leaf, num_steps: Leaf | None = None, *, positions: Leaf | None = None
) -> optax.Schedule:
    """Half cosines between knots, flat at each; all else as in `piecewise_linear`.

    `optax.cosine_onecycle_schedule` and the cosine kind of `piecewise_interpolate_schedule` with
    every number traced or not.

    Raises:
      ValueError: as `piecewise_linear`.

    >>> schedule = piecewise_cosine([0.0, 1.0, 0.0], positions=[0, 10, 40])
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 20, 40)]
    [0.0, 0.5, 1.0, 0.75, 0.0]
    """
    return _piecewise(values, num_steps, positions, _eased)


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
    peak: Leaf,
    warmup_steps: Leaf,
    decay_steps: Leaf,
    floor: Leaf = 0.0,
    start: Leaf = 0.0,
    exponent: Leaf | None = None,
) -> optax.Schedule:
    """Linear warm-up from `start` to `peak`, then half a cosine down to `floor`.

    `optax.warmup_cosine_decay_schedule` with all numbers traced or not, lengths included; with
    `warmup_steps=0` its `cosine_decay_schedule`. For restarts (`sgdr_schedule`) hand several to
    `optax.join_schedules`, whose boundaries may be traced.

    Args:
      peak: the value at step `warmup_steps`.
      warmup_steps: at least 0; with 0, step 0 has the peak already.
      decay_steps: the step from which on the value is `floor`: as in optax, it counts from step 0,
        warm-up included. Traced lengths are not checked; with `decay_steps <= warmup_steps` the
        value drops to `floor` where the warm-up ends, and the lengths have no gradient there.
      floor: the last value.
      start: the first value, at step 0.
      exponent: a power of the cosine's share of the way from `floor` to `peak`; None for 1.

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
        down = _eased(down)
        down = down if exponent is None else 1 - _power(1 - down, exponent)
        return _through(jnp.stack([widen(x) for x in (start, peak, floor)]), jnp.stack([up, down]))

    return schedule


def exponential_decay(
    initial: Leaf,
    rate: Leaf,
    transition_steps: Leaf,
    begin: Leaf | None = None,
    end: Leaf | None = None,
    staircase: bool = False,
) -> optax.Schedule:
    """`initial * rate ** ((step - begin) / transition_steps)`, as `optax.exponential_decay`.

    All numbers may be traced. `rate` must be positive and `transition_steps` too; traced ones
    are not checked: at rate 0 the derivative in it is infinite, as it truly is, and transitions
    shorter than 1e-6 steps count as 1e-6. Up to step `begin` the value is `initial`; it stops at
    `end`, where there is one. With `staircase` the exponent is rounded down, and lengths have no
    gradient. For a linear warm-up before it: `optax.join_schedules` with `piecewise_linear`.

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
        # Steps are never negative.
        power = step if begin is None else jnp.maximum(step - begin, 0.0)
        power = power / jnp.maximum(widen(transition_steps), 1e-6)
        value = initial * jnp.power(rate, jnp.floor(power) if staircase else power)
        if end is None:
            return value
        return jnp.where(jnp.asarray(rate) < 1, jnp.maximum(value, end), jnp.minimum(value, end))

    return schedule


def polynomial_decay(
    initial: Leaf, final: Leaf, power: Leaf, num_steps: Leaf, begin: Leaf = 0.0
) -> optax.Schedule:
    """From `initial` at step `begin` to `final` `num_steps` later, as `(1 - share) ** power`.

    `optax.polynomial_schedule` with all five numbers traced or not.

    Raises:
      ValueError: a `power` or `num_steps` that is not positive.

    >>> schedule = polynomial_decay(1.0, 0.0, power=2.0, num_steps=10)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 20)]
    [1.0, 0.25, 0.0, 0.0]
    """
    for name, value in (("initial", initial), ("final", final), ("begin", begin)):
        checks.numbers(name, value)
    checks.positive_if_known("power", power)
    checks.positive_if_known("num_steps", num_steps)

    def schedule(step: Leaf) -> jax.Array:
        return final + (initial - final) * _power(1 - _ramp(step, begin, num_steps), power)

    return schedule


def _piecewise(
    values: Leaf,
    num_steps: Leaf | None,
    positions: Leaf | None,
    ease: Callable[[jax.Array], jax.Array],
) -> optax.Schedule:
    checks.numbers("values", values)
    values = jnp.asarray(values)
    positions = _positions(values, num_steps, positions)

    def schedule(step: Leaf) -> jax.Array:
        # How much of each leg lies behind the step. A knot that has overtaken the one before waits.
        passed = _ramp(step, positions[:-1], positions[1:] - positions[:-1])
        in_order = jax.lax.stop_gradient(jax.lax.cummin(passed))
        return _through(values, ease(jnp.where(passed > in_order, in_order, passed)))

    return schedule


def _eased(share: jax.Array) -> jax.Array:
    return (1 - jnp.cos(jnp.pi * share)) / 2


def _power(share: jax.Array, exponent: Leaf) -> jax.Array:
    """`share ** exponent`; at a share of 0 its derivative is 0, also where a root's is infinite."""
    safe = jnp.where(share > 0, share, 1.0)
    return jnp.where(share > 0, jnp.power(safe, exponent), 0.0)


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
