"""One member of a population: how it starts, goes on, and what there is to know about it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.data.batches import Minibatches
from hypergrad.population.held import Runs
from hypergrad.problem.mistakes import metrics_of
from hypergrad.problem.problem import Problem, judged_params, validation_loss
from hypergrad.trees import Batch, Hyper, Key, Scalar, State, Tree, Unit, all_finite
from hypergrad.tuners.trust import REASONS


class Trail(NamedTuple):
    """Where a member's hyperparameters have been, in a fixed number C of equal blocks of updates.

    When all blocks are full they are merged by twos, so that any run fits into memory that does not
    grow.

    Attributes:
      sums: of the unit coordinates after each update of a block, leaves `[C, ...]`.
      width: int32, updates per block.
      seen: int32, updates recorded.
    """

    sums: Unit
    width: jax.Array
    seen: jax.Array


def new_trail(unit: Unit, blocks: int) -> Trail:
    """A trail of `blocks` blocks, all still to come, for coordinates like `unit`."""
    sums = jax.tree.map(lambda u: jnp.zeros((blocks, *u.shape), u.dtype), unit)
    return Trail(sums, jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32))


def record(trail: Trail, unit: Unit) -> Trail:
    """The trail after one more update, which led to `unit`."""

    def merged(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x[0::2] + x[1::2], jnp.zeros_like(x[0::2])])

    blocks = _blocks(trail)
    full = trail.seen == blocks * trail.width
    width = jnp.where(full, 2 * trail.width, trail.width)
    sums = jax.tree.map(
        lambda x, u: jnp.where(full, merged(x), x).at[trail.seen // width].add(u), trail.sums, unit
    )
    return Trail(sums, width, trail.seen + 1)


def read(trail: Trail, start: Unit) -> tuple[Unit, jax.Array, Unit]:
    """(Means of the blocks, updates done at the end of each or 0, mean of the second half)."""
    first = jnp.arange(_blocks(trail)) * trail.width
    last = jnp.minimum(first + trail.width, trail.seen)
    inside = jnp.maximum(last - first, 0)
    # A block that straddles the middle counts by its later part; its mean is all that is known.
    late = jnp.maximum(last - jnp.maximum(first, trail.seen // 2), 0)

    def means(x: jax.Array) -> jax.Array:
        return x / jnp.maximum(inside, 1).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def second_half(x: jax.Array, u: jax.Array) -> jax.Array:
        weight = (late / jnp.maximum(late.sum(), 1)).astype(x.dtype)
        return jnp.where(trail.seen == 0, u, jnp.tensordot(weight, means(x), 1))

    blocks = jax.tree.map(means, trail.sums)
    mean = jax.tree.map(second_half, trail.sums, start)
    return blocks, jnp.where(inside > 0, last, 0), mean


def _blocks(trail: Trail) -> int:
    leaves = jax.tree.leaves(trail.sums)
    # Without hyperparameters nothing is recorded, and any even number does.
    return leaves[0].shape[0] if leaves else 2


class PopulationState(NamedTuple):
    """The members of a population, one per slot; all leaves have a leading axis `[n]`.

    Attributes:
      run: `TunerState` under a `Refine`, else `Plain`; `state.run.inner` is the training
        state either way.
      start: where each member began, in unit coordinates.
      trail: where it has been since.
      reasons: int32 `[n, reasons]`, updates by `trust.REASONS`; the first are trusted.
      active: bool, False for a slot that only fills up the width: it is not trained.
    """

    run: State
    start: Unit
    trail: Trail
    reasons: jax.Array
    active: jax.Array


class PopulationReport(NamedTuple):
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
    hyper: Hyper
    start: Hyper
    best: Hyper
    mean: Hyper
    trail: Hyper
    trail_steps: jax.Array
    refused: jax.Array
    reasons: jax.Array
    metrics: Tree
    test_score: jax.Array | None
    test_metrics: Tree


def on_test(report: PopulationReport) -> PopulationReport | None:
    """The report with the held-out split in the place of validation; None without one."""
    if report.test_score is None:
        return None
    return report._replace(score=report.test_score, metrics=report.test_metrics)


class Data(NamedTuple):
    """What members are trained, guided, judged and reported on.

    Attributes:
      train: minibatches of one update.
      guide: what hypergradients are validated on.
      valid: what scores are taken on.
      test: the held-out split, or None.
    """

    train: Minibatches
    guide: Batch
    valid: Batch
    test: Batch | None


@dataclasses.dataclass(frozen=True)
class Member:
    """What one member does, as pure functions of its own part of a `PopulationState`.

    Attributes:
      problem: what is trained.
      runs: how it is trained.
      steps: training steps of an update.
      blocks: the length of its trail.
    """

    problem: Problem
    runs: Runs
    steps: int
    blocks: int

    def start(self, hyper: Hyper, key: Key, active: jax.Array) -> PopulationState:
        """A member that begins at `hyper`, in the user's units."""
        run = self.runs.tuner.init(hyper, key)
        unit = self.runs.unit(run)
        reasons = jnp.zeros(len(REASONS), jnp.int32)
        return PopulationState(run, unit, new_trail(unit, self.blocks), reasons, active)

    def advance(
        self, member: PopulationState, num_updates: jax.Array, data: Data
    ) -> PopulationState:
        """The member after `num_updates` updates; as it was where not active."""

        def update(_: jax.Array, member: PopulationState) -> PopulationState:
            run, info = self.runs.tuner.update(member.run, data.train, data.guide)
            return member._replace(
                run=run,
                trail=record(member.trail, self.runs.unit(run)),
                reasons=member.reasons.at[info.refused].add(1),
            )

        # No turns at all, instead of a mask on the result: mapped, an empty slot costs no time.
        num_updates = jnp.where(member.active, num_updates, 0)
        return jax.lax.fori_loop(0, num_updates, update, member)

    def score(self, member: PopulationState, batch: Batch) -> Scalar:
        """The loss on `batch` at the present parameters; NaN where not active."""
        run = member.run
        params, hyper = judged_params(self.problem, run.inner), self.runs.hyper(run)
        # As of step 0 at any time: a score must not change by the noise of the loss alone.
        loss = validation_loss(self.problem, params, hyper, batch, run.key, 0)
        return jnp.where(member.active, loss, jnp.nan)

    def report(self, member: PopulationState, data: Data) -> PopulationReport:
        """What there is to know about the member."""
        blocks, ends, mean = read(member.trail, member.start)
        loss = self.score(member, data.valid)
        return PopulationReport(
            score=loss,
            finite=jnp.isfinite(loss) & all_finite(member.run.inner.params),
            active=member.active,
            steps=self.steps * member.trail.seen,
            hyper=self.runs.hyper(member.run),
            start=self._values(member.start),
            best=self.runs.tuner.best(member.run),
            mean=self._values(mean),
            trail=self._values(blocks),
            trail_steps=self.steps * ends,
            refused=member.reasons[1:].sum(),
            reasons=member.reasons,
            metrics=self._metrics(member, data.valid),
            test_score=None if data.test is None else self.score(member, data.test),
            test_metrics=self._metrics(member, data.test),
        )

    def _metrics(self, member: PopulationState, batch: Batch | None) -> Tree:
        if batch is None:
            return {}
        run = member.run
        params = judged_params(self.problem, run.inner)
        return metrics_of(self.problem.metrics, params, self.runs.hyper(run), batch, run.key)

    def _values(self, unit: Unit) -> Hyper:
        space = self.runs.space
        return space.from_unit(space.project(unit))
