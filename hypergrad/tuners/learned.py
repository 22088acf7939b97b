"""What a run learned, as a schedule to keep: replayed by the library or by plain optax."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.checks import WrongTypeError, having, instance, integer
from hypergrad.data.batches import step_inputs
from hypergrad.optim.schedules import Schedule
from hypergrad.problem.problem import Problem, steps_done, training_steps
from hypergrad.space.space import Space
from hypergrad.trees import Hyper, InnerState, Key, Train, leaf_names
from hypergrad.tuners.refusals import refusals_in

_log = logging.getLogger("hypergrad")


def learned_schedule(history: Sequence[Any], steps_per_update: int) -> Schedule:
    """The schedule of an `alternating` run, from the `info.hyper` of its updates in order.

    >>> schedule = learned_schedule([{"lr": jnp.float32(0.1)}] * 8, steps_per_update=10)
    >>> round(float(schedule(25)["lr"]), 3)
    0.1
    """
    having(
        "history", history, ("__len__", "__getitem__"), "the info.hyper of each update, in order"
    )
    if not len(history):
        raise ValueError("history=[] holds no update: give the info.hyper of each, in order.")
    values = jax.tree.map(lambda *x: jnp.stack(x), *history)
    return Schedule(values, integer("steps_per_update", steps_per_update))


def settled_schedule(space: Space, history: Sequence[Any], steps_per_update: int) -> Schedule:
    """The schedule of an `alternating` run without its way from the start.

    While the first half is trained, the values are still travelling from wherever they started: a
    transient that a new run need not repeat. Here they stand, for that half, at the mean (in unit
    coordinates) of the third quarter, where they had settled; then the schedule goes on as learned.
    Better than `learned_schedule` from a bad start and under label noise, slightly worse where the
    start was good (docs/benchmarks.md).

    Args:
      space: the tuner's space.
      history: the `info.hyper` of the run's updates, in order; or the infos themselves (the
        `history` of `fit`), which know what was refused: above a third a warning is logged.
      steps_per_update: K, the training steps of one update.

    Raises:
      ValueError: fewer than 4 updates.
    """
    instance("space", space, Space, "the tuner's hypergrad.Space")
    having(
        "history", history, ("__len__", "__getitem__"), "the info.hyper of each update, in order"
    )
    if hasattr(history, "history"):
        raise WrongTypeError(
            f"history is a {type(history).__name__}: give its records, result.history."
        )
    if len(history) < 4:
        raise ValueError(f"history has {len(history)} updates; settling needs at least 4.")
    if hasattr(history[0], "refused"):
        refused = refusals_in([int(info.refused or 0) for info in history])
        if refused is not None:
            _log.warning(f"settled_schedule: this run {refused}")
        history = [info.hyper for info in history]
    # The last quarter is left out of the mean: there values anneal towards the run's own end.
    half, last = len(history) // 2, 3 * len(history) // 4
    unit = space.to_unit(learned_schedule(history, steps_per_update).values)

    def settle(u: jax.Array) -> jax.Array:
        return u.at[:half].set(u[half:last].mean(0))

    learned = space.from_unit(space.project(jax.tree.map(settle, unit)))
    return Schedule(learned, integer("steps_per_update", steps_per_update))


def replay(problem: Problem, schedule: Schedule, inner: InnerState, train: Train, key: Key) -> Any:
    """The training state after the K steps of `train` under a schedule, from `inner`.

    As `rollout`, with step t of the run under `schedule(t)`.
    """
    start = steps_done(inner)

    def body(inner: InnerState, x: Any) -> tuple[Any, None]:
        hyper = schedule(x[0] + start)
        return training_steps(problem, hyper, train, key, start)(inner, *x), None

    return jax.lax.scan(body, inner, step_inputs(train))[0]


def remarks(space: Space, values: Hyper) -> tuple[str, ...]:
    """What is odd about the way that hyperparameters went: a sentence for each odd one.

    Args:
      space: the tuner's space.
      values: in the user's units, one per update, leaves `[updates, ...]`; continuous ones only.
    """
    units = jax.device_get(space.to_unit(values))
    found = []
    for name, way in zip(leaf_names(units), jax.tree.leaves(units), strict=True):
        way = np.asarray(way, np.float64).reshape(len(way), -1)
        for side, ends in (("lower", way[-1] < 1e-3), ("upper", way[-1] > 1 - 1e-3)):
            if ends.any() and len(way) > 1 and np.ptp(way, 0)[ends].max() > 0:
                found.append(
                    f"{name} ended on the {side} bound of its range{_share(ends)}: the best value "
                    "may lie beyond it, or the horizon is too short to see what it is good for (a "
                    "longer one: more steps per update)."
                )
        moves = np.diff(way, axis=0)
        net, path = np.abs(moves.sum(0)), np.abs(moves).sum(0)
        inside = (way[-1] > 1e-3) & (way[-1] < 1 - 1e-3)
        drifts = inside & (net > 0.3) & (net > 0.9 * path)
        # One that settled has made its way in the first half.
        drifts &= np.abs(moves[len(moves) // 2 :].sum(0)) > net / 3
        if len(way) >= 8 and drifts.any():
            found.append(
                f"{name} moved one way through the whole run{_share(drifts)} and has not settled: "
                "go on from where it ended, or see whether the horizon is too short."
            )
    return tuple(found)


def _share(which: np.ndarray) -> str:
    return "" if which.size == 1 else f" ({which.sum()} of its {which.size} numbers)"
