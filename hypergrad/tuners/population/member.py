"""One member of a population: how it starts, goes on, and what there is to know about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.data.batches import Minibatches
from hypergrad.problem.problem import Problem, validation_loss
from hypergrad.space.space import Space
from hypergrad.trees import all_finite
from hypergrad.tuners.alternating import AlternatingState
from hypergrad.tuners.base import Tuner
from hypergrad.tuners.population.trail import Trail, new_trail, read, record
from hypergrad.tuners.trust import REASONS


class PopulationState(NamedTuple):
    """The members of a population, one per slot; all leaves have a leading axis `[n]`.

    Attributes:
      run: `AlternatingState` under a `Refine`, else `Plain`; `state.run.inner` is the training
        state either way.
      start: where each member began, in unit coordinates.
      trail: where it has been since.
      reasons: int32 `[n, reasons]`, updates by `trust.REASONS`; the first are trusted.
      active: bool, False for a slot that only fills up the width: it is not trained.
    """

    run: Any
    start: Any
    trail: Trail
    reasons: jax.Array
    active: jax.Array


class Report(NamedTuple):
    """What there is to know about each slot; leaves `[n]` or `[n, ...]`, values in user's units.

    Attributes:
      score: the whole validation set's loss at the member's present parameters; NaN where not
        `active`.
      finite: whether score and parameters are.
      active: False for slots that only fill up the width.
      steps: int32, training steps done.
      hyper: the hyperparameters now.
      start: where they began.
      best: `tuner.best`, the weighted mean of the trusted iterates; `hyper` without `Refine`.
      mean: the mean (in unit coordinates) over the second half of the run, up to one block of
        `trail` at its beginning.
      trail: means of the unit coordinates over C equal blocks of updates, as values, `[n, C, ...]`.
      trail_steps: int32 `[n, C]`, training steps done at the end of each block; 0 for one to come.
      refused: int32, updates whose hypergradient was refused.
      reasons: int32 `[n, reasons]`, updates by `trust.REASONS`.
      metrics: `problem.metrics` on the validation set; empty without.
      test_score: the loss on `test`; None without.
      test_metrics: `problem.metrics` on `test`; empty without.
    """

    score: jax.Array
    finite: jax.Array
    active: jax.Array
    steps: jax.Array
    hyper: Any
    start: Any
    best: Any
    mean: Any
    trail: Any
    trail_steps: jax.Array
    refused: jax.Array
    reasons: jax.Array
    metrics: Any
    test_score: jax.Array | None
    test_metrics: Any


class Data(NamedTuple):
    """What members are trained, guided, judged and reported on.

    Attributes:
      train: minibatches of one update.
      guide: what hypergradients are validated on.
      valid: what scores are taken on.
      test: the held-out split, or None.
    """

    train: Minibatches
    guide: Any
    valid: Any
    test: Any


class Member(NamedTuple):
    """What one member does, as pure functions of its own part of a `PopulationState`.

    Attributes:
      start: `(hyper, key, active) -> member`.
      move_on: `(member, num_updates, data) -> member`.
      score: `(member, batch) -> scalar`, the validation loss; NaN where not active.
      describe: `(member, data) -> Report`.
    """

    start: Callable[..., PopulationState]
    move_on: Callable[..., PopulationState]
    score: Callable[..., jax.Array]
    describe: Callable[..., Report]


def member_of(problem: Problem, space: Space, tuner: Tuner, steps: int, blocks: int) -> Member:
    """The member that `tuner` trains, `steps` training steps an update.

    `blocks` is the length of its trail.
    """

    def start(hyper: Any, key: jax.Array, active: jax.Array) -> PopulationState:
        run = tuner.init(hyper, key)
        unit = unit_of(space, run)
        reasons = jnp.zeros(len(REASONS), jnp.int32)
        return PopulationState(run, unit, new_trail(unit, blocks), reasons, active)

    def move_on(member: PopulationState, num_updates: jax.Array, data: Data) -> PopulationState:
        def update(_: Any, member: PopulationState) -> PopulationState:
            run, info = tuner.update(member.run, data.train, data.guide)
            return member._replace(
                run=run,
                trail=record(member.trail, unit_of(space, run)),
                reasons=member.reasons.at[info.refused].add(1),
            )

        num_updates = jnp.where(member.active, num_updates, 0)
        return jax.lax.fori_loop(0, num_updates, update, member)

    def score(member: PopulationState, batch: Any) -> jax.Array:
        run = member.run
        params, hyper = run.inner.params, hyper_of(space, run)
        loss = validation_loss(problem, params, hyper, batch, run.key, 0)
        return jnp.where(member.active, loss, jnp.nan)

    def metrics(member: PopulationState, batch: Any) -> Any:
        if problem.metrics is None or batch is None:
            return {}
        run = member.run
        return problem.metrics(run.inner.params, hyper_of(space, run), batch, run.key)

    def describe(member: PopulationState, data: Data) -> Report:
        values = lambda unit: space.from_unit(space.project(unit))  # noqa: E731
        means, ends, mean = read(member.trail, member.start)
        loss = score(member, data.valid)
        return Report(
            score=loss,
            finite=jnp.isfinite(loss) & all_finite(member.run.inner.params),
            active=member.active,
            steps=steps * member.trail.seen,
            hyper=hyper_of(space, member.run),
            start=values(member.start),
            best=tuner.best(member.run),
            mean=values(mean),
            trail=values(means),
            trail_steps=steps * ends,
            refused=member.reasons[1:].sum(),
            reasons=member.reasons,
            metrics=metrics(member, data.valid),
            test_score=None if data.test is None else score(member, data.test),
            test_metrics=metrics(member, data.test),
        )

    return Member(start, move_on, score, describe)


def unit_of(space: Space, run: Any) -> Any:
    """Where a run's hyperparameters stand, in unit coordinates."""
    return run.now.unit if isinstance(run, AlternatingState) else space.to_unit(run.hyper)


def hyper_of(space: Space, run: Any) -> Any:
    """The same in the user's units."""
    return space.from_unit(run.now.unit) if isinstance(run, AlternatingState) else run.hyper


def moved_to(space: Space, run: Any, unit: Any) -> Any:
    """The run with its hyperparameters at `unit`."""
    if isinstance(run, AlternatingState):
        return run._replace(now=run.now._replace(unit=unit))
    return run._replace(hyper=space.from_unit(unit))
