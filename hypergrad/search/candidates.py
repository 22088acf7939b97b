"""What `tune` chooses among: runs of several kinds, each by `fit`, counted and judged alike."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.data.batches import Minibatches, num_examples
from hypergrad.data.splits import Splits
from hypergrad.estimators.ahead import Ahead
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.optim.schedules import Schedule
from hypergrad.population.refine import plain, replaying
from hypergrad.problem.eager import compiled_for_each
from hypergrad.problem.problem import Inner, Problem, judged_params, validation_loss
from hypergrad.space.space import Space
from hypergrad.training.fit import FitResult, fit
from hypergrad.trees import Batch, Hyper, InnerState, Params
from hypergrad.tuners.alternating import alternating, horizon, steady_adam
from hypergrad.tuners.averaged import Averaged, averaging
from hypergrad.tuners.base import Tuner
from hypergrad.tuners.compressed import compressed
from hypergrad.tuners.learned import settled_schedule
from hypergrad.tuners.restarting import restarting

_log = logging.getLogger("hypergrad")

# Parts of the validation split, whose spread gives the error of a single network's loss.
_PARTS = 10
# Outer steps of an alternating run, and their size. Of these half as many as by default, and longer
# ones, see more of a decay; no number is best everywhere (docs/experiments.md).
UPDATES = (20, 40)
_RATES = {20: 0.05, 40: 0.04}
# The validation gradients of one alternating run may cost so much of a plain run.
_GUIDANCE = 0.1
# A stream of seeds for runs that are no candidates.
_FRESH = 2**31
# Bytes of training states that a whole run may hold for its way back; beyond it recomputes.
_HELD = 1 << 28


class Candidate(NamedTuple):
    """One trained network, and what it was trained with.

    Attributes:
      kind: "untuned", "alternating", "ahead" (an alternating run whose hypergradients look beyond
        their windows), "frozen" (values of another run, retrained), "settled" (a learned schedule,
        retrained) or "whole runs" (values by whole-run steps, retrained).
      start: where the run that found its values began, in the user's units.
      horizon: training steps between two outer steps of that run; 0 where nothing was tuned.
      score: the validation loss of the network that was kept of this run: its last weights or
        their running mean, whichever has the lower one; infinite if it diverged.
      std_error: of the score, from the spread over parts of the validation split.
      evaluations: gradient evaluations of this training and, in it, of its hypergradients.
      hyper: the values it was trained with; of a schedule those of its run's `best`.
      schedule: the same as a schedule, without what is too large for a history
        (`hypergrad.training.history.LARGE` numbers).
      last: the validation loss of the last weights.
    """

    kind: str
    start: Hyper
    horizon: int
    score: float
    std_error: float
    evaluations: float
    hyper: Hyper
    schedule: Schedule
    last: float

    @property
    def is_averaged(self) -> bool:
        """Whether the network that was kept is the running mean of its weights."""
        return self.score < self.last

    @property
    def is_constant(self) -> bool:
        """Whether the hyperparameters stood still."""
        return {x.shape[0] for x in jax.tree.leaves(self.schedule.values)} == {1}


@dataclasses.dataclass
class Workshop:
    """Trains candidates, and keeps their count, their cost and the best network.

    Attributes:
      problem, space, data, num_steps, batch_size, seed, progress: as of `tune`.
      folder: where each run has its checkpoints, or None.
      spent: gradient evaluations so far.
      candidates: in the order in which they were trained.
      best: the training state of the lowest score.
      remarks: what was odd about the run of the best network, see `FitResult.remarks`.
    """

    problem: Problem
    space: Space
    data: Splits
    num_steps: int
    batch_size: int
    seed: int
    progress: bool = True
    folder: Path | None = None
    spent: float = 0.0
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    best: InnerState | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._lowest = np.inf
        self._stages = 0
        try:
            self._tuners = _shared_tuners(self.problem, self.space, self.num_steps)
        except TypeError:  # a problem of callables that have no hash
            self._tuners = {}
        self._judge = compiled_for_each(self.problem, "tune", _losses)
        size = num_examples(self.data.valid)
        updates = self.num_steps // self.horizon(UPDATES[-1])
        affordable = int(_GUIDANCE * self.num_steps * self.batch_size / updates)
        self._guide: Batch = self.data.valid
        self._guide_size = min(size, max(affordable, self.batch_size))
        if self._guide_size < size:
            self._guide = Minibatches(self.data.valid, self._guide_size)

    def lowest_constant(self) -> Candidate:
        """Of the networks trained under constant values, the best by its last weights."""
        return min((c for c in self.candidates if c.is_constant), key=lambda c: c.last)

    def plain_run(self, hyper: Hyper, seed: int) -> InnerState:
        """The training state of a whole run under constant values; no candidate."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _FRESH), seed)
        tuner, steps = self._plain()
        train = Minibatches(self.data.train, self.batch_size, steps)
        updates, start = self.num_steps // steps, tuner.init(hyper, key)
        return fit(tuner, start, train, self._guide, updates, progress=False).state.inner

    def cost(self, steps: int, updates: int = 0) -> float:
        """Gradient evaluations of a run of so many steps with so many hypergradients through all.

        A training step counts 1, its way back 2, a validation gradient by its examples.
        """
        return steps * (3 if updates else 1) + updates * self._guide_size / self.batch_size

    def horizon(self, updates: int = UPDATES[0], stride: int = 1) -> int:
        """K of an alternating run with about so many updates, of a `stride`-th of the steps."""
        return horizon(max(self.num_steps // stride, 8), updates, 5)

    def plain_cost(self) -> float:
        """Of a whole run under values that stand still, or under a schedule."""
        return self.cost(self.num_steps)

    def alternating_cost(
        self, updates: int = UPDATES[0], stride: int = 1, ahead: bool = False
    ) -> float:
        """Of an alternating run with about so many updates, of a `stride`-th of the steps.

        One that looks ahead takes each step in two windows and goes on by one of its own.
        """
        steps = self.num_steps // stride
        cost = self.cost(steps, steps // self.horizon(updates, stride))
        return cost + 4 * steps if ahead else cost

    def whole_runs_cost(self, stride: int, updates: int) -> float:
        """Of so many whole-run steps on runs of a `stride`-th of the steps."""
        return updates * self.cost(self.num_steps // stride, 1)

    def train(self, kind: str, hyper: Hyper, start: Hyper, k: int = 0) -> Candidate:
        """A whole run under constant values, as a candidate."""
        tuner, steps = self._plain()
        result = self._fit(tuner, hyper, steps, self.num_steps // steps)
        schedule = constant(hyper, self.num_steps)
        return self._add(kind, start, k, self.plain_cost(), hyper, schedule, result)

    def replay(self, schedule: Schedule, hyper: Hyper, start: Hyper) -> Candidate:
        """A whole run under a learned schedule, as a candidate."""
        steps = schedule.steps_per_update
        tuner = self._tuner("replay", lambda: self._averaging(replaying(self.problem, self.space)))
        result = self._fit(tuner, schedule.values, steps, self.num_steps // steps)
        cost = self.plain_cost()
        return self._add("settled", start, steps, cost, hyper, schedule, result)

    def alternate(
        self, start: Hyper, updates: int = UPDATES[0], stride: int = 1, ahead: bool = False
    ) -> "Found | None":
        """An alternating run from `start`; a candidate where it is a whole one, `stride` 1.

        With `ahead` each window is judged as much later as it is long.
        """
        steps, k = self.num_steps // stride, self.horizon(updates, stride)

        def make() -> Tuner:
            rate = _RATES[updates]
            problem, outer = compressed(self.problem, stride), steady_adam(rate)
            how: Any = Ahead(Unrolled(validate_at=0.3), k) if ahead else Unrolled(validate_at=0.8)
            tuner = alternating(problem, self.space, how, outer, max_move=2 * rate)
            return tuner if stride > 1 else self._averaging(tuner)

        tuner = self._tuner(("alternating", updates, stride, ahead), make)
        result = self._fit(tuner, start, k, steps // k)
        cost = self.alternating_cost(updates, stride, ahead)
        if stride > 1:
            self.spent += cost
        else:
            hyper, schedule = start, constant(start, self.num_steps)
            if result is not None:
                hyper, schedule = result.hyper, result.schedule
            kind = "ahead" if ahead else "alternating"
            self._add(kind, start, k, cost, hyper, schedule, result)
        if result is None:
            return None
        settled, history = None, [record.hyper for record in result.history]
        # A short run's is never replayed, and of fewer than four updates there is none.
        complete = set(result.schedule.values) == set(result.hyper)
        if stride == 1 and complete and len(history) >= 4:
            settled = settled_schedule(self.space, history, k)
        return Found(result.hyper, settled, k)

    def whole_runs(self, start: Hyper, stride: int, updates: int) -> Hyper | None:
        """The values after whole-run steps on runs of a `stride`-th of the steps."""
        steps = self.num_steps // stride

        def make() -> Tuner:
            problem = compressed(self.problem, stride)
            inner = jax.eval_shape(problem.init, start, jax.random.key(0))
            held = steps * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(inner))
            how: Any = "none" if held < _HELD else "sqrt"
            estimator = Unrolled(checkpoint=how, validate_at=min(10, steps))
            return restarting(problem, self.space, estimator, fresh_seeds=True)

        result = self._fit(self._tuner(("whole", stride), make), start, steps, updates)
        self.spent += self.whole_runs_cost(stride, updates)
        if result is None:
            return None
        return jax.device_get(self.space.from_unit(self.space.project(result.state.now.unit)))

    def _plain(self) -> tuple[Tuner, int]:
        """Training under constant values, and the steps of one of its updates."""
        # Twenty or more, that a mean over them says something.
        longest = min(100, max(1, self.num_steps // UPDATES[0]))
        steps = max(n for n in range(1, longest + 1) if self.num_steps % n == 0)
        return self._tuner("plain", lambda: self._averaging(plain(self.problem, self.space))), steps

    def _averaging(self, tuner: Tuner) -> Tuner:
        """`tuner` with a mean of its weights, unless the problem says itself what is judged."""
        return tuner if self.problem.evaluate is not None else averaging(tuner)

    def _tuner(self, name: Any, make: Callable[[], Tuner]) -> Tuner:
        if name not in self._tuners:
            self._tuners[name] = make()
        return self._tuners[name]

    def _fit(self, tuner: Tuner, start: Any, steps: int, updates: int) -> FitResult | None:
        """One run; None if it diverged, which is a result like any other."""
        self._stages += 1
        key = jax.random.fold_in(jax.random.key(self.seed), self._stages)
        train = Minibatches(self.data.train, self.batch_size, steps)
        folder = None if self.folder is None else self.folder / f"{self._stages:02}"
        # Of most runs only the values are kept: what is odd about them confuses, and is kept apart.
        _log.addFilter(_no_remark)
        try:
            return fit(
                tuner,
                tuner.init(start, key),
                train,
                self._guide,
                updates,
                checkpoint=folder,
                progress=self.progress,
            )
        except FloatingPointError as error:
            self._say(f"run {self._stages} diverged: {error}")
            return None
        finally:
            _log.removeFilter(_no_remark)

    def _add(
        self,
        kind: str,
        start: Hyper,
        k: int,
        cost: float,
        hyper: Hyper,
        schedule: Schedule,
        result: FitResult | None,
    ) -> Candidate:
        self.spent += cost
        last, score, error = np.inf, np.inf, np.nan
        if result is not None:
            # What is too large for a history is not in the schedule.
            values = {**hyper, **jax.tree.map(lambda x: x[-1], schedule.values)}
            networks = [result.state.inner]
            if isinstance(result.state, Averaged) and isinstance(result.state.inner, Inner):
                networks.append(result.state.averaged)
            scored = [(*self._scored(judged_params(self.problem, n), values), n) for n in networks]
            last = scored[0][0]
            score, error, network = min(scored, key=lambda entry: entry[0])
            if score < self._lowest:
                self._lowest, self.best, self.remarks = score, network, result.remarks
        found = Candidate(kind, start, k, score, error, cost, hyper, schedule, last)
        self.candidates.append(found)
        self._say(f"{kind}: validation loss {score:.4g}, {self.spent / self.num_steps:.2f} runs")
        return found

    def _say(self, line: str) -> None:
        """A line to the log; to standard error where none is set up and somebody watches."""
        if _log.hasHandlers():
            _log.info(line)
        elif self.progress:
            sys.stderr.write(f"{line}\n")

    def _scored(self, params: Params, hyper: Hyper) -> tuple[float, float]:
        whole, parts = jax.device_get(self._judge(params, hyper, self.data.valid))
        score = float(whole) if np.isfinite(whole) else np.inf
        if len(parts) < 2:
            return score, float("nan")
        return score, float(np.std(parts, ddof=1) / np.sqrt(len(parts)))


def _losses(
    problem: Problem, params: Params, hyper: Hyper, valid: Batch
) -> tuple[jax.Array, jax.Array]:
    """The loss on the whole split, and on each of up to ten parts of it."""
    size = num_examples(valid)
    count = min(_PARTS, size)
    split = lambda x: x[: size // count * count].reshape(count, -1, *x.shape[1:])  # noqa: E731

    def loss(batch: Batch) -> jax.Array:
        return validation_loss(problem, params, hyper, batch, jax.random.key(0), 0)

    return loss(valid), jax.lax.map(loss, jax.tree.map(split, valid))


# Two and not all: a compiled update keeps its tuner alive, and what the problem closes over.
@functools.lru_cache(maxsize=2)
def _shared_tuners(problem: Problem, space: Space, num_steps: int) -> dict[Any, Tuner]:
    """The tuners of one problem, by name: other calls of `tune` need not compile theirs anew."""
    del problem, space, num_steps
    return {}


class Found(NamedTuple):
    """What an alternating run leaves beside its network.

    Attributes:
      hyper: its `best`, the values to keep.
      settled: its settled schedule; None of a short run, and where a hyperparameter is too large
        for a history.
      horizon: K.
    """

    hyper: Hyper
    settled: Schedule | None
    horizon: int


def _no_remark(record: logging.LogRecord) -> bool:
    return not getattr(record, "remark", False)


def constant(hyper: Hyper, num_steps: int) -> Schedule:
    """The schedule that never changes."""
    return Schedule(jax.tree.map(lambda x: jnp.asarray(x)[None], hyper), num_steps)
