"""What a run learned, as a schedule to keep: replayed by the library or by plain optax."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.checks import having, instance, integer
from hypergrad.data.batches import step_inputs
from hypergrad.optim.schedules import Schedule
from hypergrad.problem.problem import Problem, steps_done, training_steps
from hypergrad.space.space import Space
from hypergrad.trees import InnerState, Key, Train


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
      history: the `info.hyper` of the run's updates, in order.
      steps_per_update: K, the training steps of one update.

    Raises:
      ValueError: fewer than 4 updates.
    """
    instance("space", space, Space, "the tuner's hypergrad.Space")
    having(
        "history", history, ("__len__", "__getitem__"), "the info.hyper of each update, in order"
    )
    if len(history) < 4:
        raise ValueError(f"history has {len(history)} updates; settling needs at least 4.")
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
