"""What a sweep found: the best trial, its network, a table, an audit on fresh seeds, pictures."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optuna

from hypergrad.checks import checked_seed, integer
from hypergrad.optim.schedules import Schedule
from hypergrad.population.member import PopulationReport, PopulationState, on_test
from hypergrad.problem.problem import judged_params
from hypergrad.results.programs import Program, Programs
from hypergrad.results.saved import Saved, checked_folder, write
from hypergrad.study.optuna_private import storage_of
from hypergrad.study.ranking import (
    Best,
    best_of,
    confirmed,
    keep_confirmed,
    ranked,
    sign_of,
    states,
    table,
)
from hypergrad.study.remarks import keep_audit
from hypergrad.study.storage import dashboard_command, open_storage, place_of
from hypergrad.study.study import OpenStudy
from hypergrad.trees import InnerState, Key

# Streams of seeds, far from the trials' own, which are folded in by their numbers.
_AUDIT, _CONFIRM, _RETRAIN = 2**31, 2**31 + 1, 2**31 + 2


class Audit(NamedTuple):
    """Frozen hyperparameters, retrained on seeds that the search has not seen.

    Attributes:
      test_losses: on the test split, one per seed.
      mean: their mean; infinite if one diverged.
      std_error: of the mean.
      metrics: `problem.metrics` on the test split, by name, one per seed each.
    """

    test_losses: np.ndarray
    mean: float
    std_error: float
    metrics: Mapping[str, np.ndarray]


def audit_of(losses: Any, metrics: Mapping[str, Any]) -> Audit:
    """The audit of losses `[seeds]`, of which those that are not finite are infinite."""
    found = np.asarray(losses, np.float64)
    # NaN would make a mean that is neither better nor worse than another.
    found = np.where(np.isfinite(found), found, np.inf)
    named = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
    return Audit(found, *mean_and_error(found), named)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error; NaN of one value."""
    many = len(values) > 1
    with np.errstate(invalid="ignore"):  # of infinite ones
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if many else float("nan")
    return float(values.mean()), error


@dataclasses.dataclass(frozen=True, repr=False)
class SweepResult:
    """What `sweep` returns.

    It can be pickled: the study with it where that is in memory; else its storage is opened again,
    to be read, and a database's URL is in the pickle. Problem and data are left out, so that what
    was unpickled cannot be audited.

    Attributes:
      study: the Optuna study: its plots, its dashboard and its storages work.
      steps_spent: training steps of this call.
      interrupted: whether Ctrl-C ended it before all trials had.
    """

    study: optuna.Study
    steps_spent: int
    _opened: OpenStudy | None
    _programs: Programs | None
    _num_steps: int
    _seed: int
    interrupted: bool = False
    # At most one, with what was asked for.
    _retrained_last: list[tuple[Any, Saved]] = dataclasses.field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        place = place_of(storage_of(self.study))
        study = self.study if place is None else (place, self.study.study_name)
        return _unpickled, (study, self.steps_spent, self._num_steps, self._seed, self.interrupted)

    def __repr__(self) -> str:
        return f"<SweepResult of {self.study.study_name!r}: {states(self.study)}>"

    @property
    def best(self) -> Best:
        """What to take: what `confirm` found, or the trial with the best score.

        Under `refine` scores are those of values that moved while they trained, so the first access
        confirms: frozen values, scored as they will be used, at the cost of nine full runs. Of
        values that stood still it is the best trial in full, until `confirm` says otherwise. The
        study keeps what was confirmed, for as long as no other trial has trained in full.

        Raises:
          ValueError: no trial did.
        """
        kept = confirmed(self.study)
        if kept and (kept[1] == 0 or self._programs is None):
            # What was unpickled cannot train, and has what was confirmed before.
            return kept[0]
        if self._programs is None or self._programs.refine is None:
            return best_of(self.study)
        return self.confirm()

    def top(self, count: int = 10) -> list[Best]:
        """The best trials that trained in full, such as to enqueue in a sweep on other data."""
        return ranked(self.study)[: integer("count", count, 0)]

    def table(self, count: int = 10) -> str:
        """The best trials as text, one line each, and how many there are of each state."""
        return table(self.study, count)

    def audit(self, seeds: int = 10, hyper: Mapping[str, Any] | None = None) -> Audit:
        """Values frozen and retrained in full on `seeds` fresh seeds, scored on the test split.

        The study keeps it, for the table and the report.

        Args:
          seeds: how many; no trial has used them.
          hyper: all active values, in the user's units, such as an untuned default to compare with;
            None for the best trial's.

        Raises:
          ValueError: the data have no test split; no trial trained in full; values that are not
            all active ones of the space; no seeds.
        """
        values = self.best.hyper if hyper is None else hyper
        opened, _ = self._with_problem()
        opened.check(values)
        report = self._retrained(values, 0, integer("seeds", seeds), _AUDIT)
        if report.test_score is None:
            raise ValueError(
                "data.test=None: an audit is taken on a split that nothing was tuned on, so give "
                "hypergrad.Splits(train, valid, test); result.confirm() trains again on `valid`."
            )
        audit = audit_of(report.test_score, dict(report.test_metrics or {}))
        discrete = opened.space.discrete
        plain = {n: v if n in discrete else float(v) for n, v in values.items()}
        metrics = {name: mean_and_error(found) for name, found in audit.metrics.items()}
        keep_audit(self.study, plain, audit.test_losses.tolist(), audit.std_error, metrics)
        return audit

    def confirm(self, count: int = 3, seeds: int = 2) -> Best:
        """The trial whose frozen values score best on validation when trained again.

        A trial's own score flatters it: it is the best of many, under one seed, and a refined
        trial's values moved while it trained. So the best `count` are retrained in full with their
        values frozen, under `seeds` fresh seeds that `audit` does not use; the mean of their scores
        decides, and is the `score` of what is returned, as that of their scores on test is its
        `held_out`; what breaks a constraint in the mean ranks behind the others. Where
        hypergradients moved a trial, the values that it started from compete with those it ended
        with. Cost: count * seeds full runs, under `refine` half as many again: all
        candidates are trained once, and the better half under the other seeds, too.

        Raises:
          ValueError: no trial trained in full, or none of them again.
        """
        # Where nothing is found, `best_of` raises and says why.
        candidates = self.top(integer("count", count)) or [best_of(self.study)]
        # What breaks a constraint stands for want of others only.
        candidates = [best for best in candidates if not best.excess] or candidates
        seeds = integer("seeds", seeds)
        kept = len(candidates)
        candidates += [start for best in candidates if (start := self._start_of(best))]
        first = 1 if len(candidates) > kept else seeds
        found = [(best, self._scores(best.hyper, 0, first)) for best in candidates]
        found = self._ordered(found)[:kept]
        if first < seeds:
            rest = [self._scores(best.hyper, first, seeds) for best, _ in found]
            pairs = zip(found, rest, strict=True)
            found = self._ordered([(b, np.concatenate([x, more], 1)) for (b, x), more in pairs])
        if not found:
            raise ValueError(
                f"None of the best {count} trials trains again with its values frozen: see "
                "result.table(), and give a larger count."
            )
        best, runs = found[0]
        score, held_out = float(runs[0].mean()), float(runs[1].mean())
        best = best._replace(
            score=score, held_out=held_out, moved=False, values=(), excess=_excess(runs)
        )
        keep_confirmed(self.study, best)
        return best

    def retrain(self, hyper: Mapping[str, Any] | None = None, seed: int = 0) -> InnerState:
        """The training state of a full run whose values stand still: `.params` are the network's.

        Args:
          hyper: all active values, in the user's units; None for the best's.
          seed: of the run; no trial, audit or confirmation has used it.

        Cost: a full run, and where nothing was trained one at a time before, a compilation.

        Raises:
          ValueError: no trial trained in full; values that are not all active ones of the space.
          FloatingPointError: the run diverges.
        """
        return self._network(hyper, seed)[1].state

    def save(
        self,
        folder: str | os.PathLike[str],
        hyper: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> Path:
        """Saves the network of `retrain(hyper, seed)` in `folder`, for `hypergrad.load`.

        What was retrained last is not trained again. Also writes `hyper.toml`, the values and the
        network's validation score for people. Returns the folder.

        Raises:
          ValueError: as `retrain`; a folder that cannot be made.
          OSError: the folder cannot be written.
        """
        checked_folder(folder)
        return write(folder, self._network(hyper, seed)[1])

    def _network(self, hyper: Mapping[str, Any] | None, seed: int) -> tuple[Any, Saved]:
        """The network of these values, trained unless it was the last one to be."""
        opened, programs = self._with_problem()
        values = self.best.hyper if hyper is None else hyper
        opened.check(values)
        values = dict(values)
        asked = (sorted((name, repr(value)) for name, value in values.items()), checked_seed(seed))
        if self._retrained_last and self._retrained_last[0][0] == asked:
            return self._retrained_last[0]
        key = jax.random.fold_in(jax.random.key(self._seed), _RETRAIN)
        program, run, report = self._full_runs(values, jax.random.fold_in(key, seed)[None])
        if not report.finite[0]:
            raise FloatingPointError(
                f"The full run under {values} diverges: give other values, or another seed than "
                f"{seed}."
            )
        inner = jax.tree.map(lambda x: x[0], run.run.inner)
        floats = {n: jnp.asarray([values[n]], jnp.float32) for n in program.space.continuous}
        params = judged_params(program.problem, inner)
        network = Saved(
            params,
            inner,
            values,
            Schedule(floats, self._length(values)),
            float(programs.goals.score(report)[0]),
        )
        self._retrained_last[:] = [(asked, network)]
        return self._retrained_last[0]

    def _scores(self, values: Mapping[str, Any], first: int, last: int) -> np.ndarray:
        """Of values frozen and retrained `[2 + constraints, seeds]`; NaN where one is lost.

        Scores, those on test, and by how much each constraint's metric is above its bound.
        """
        report = self._retrained(values, first, last, _CONFIRM)
        goals = self._with_problem()[1].goals
        scores = np.where(report.finite, goals.score(report), np.nan)
        tested = on_test(report)
        tests = np.full_like(scores, np.nan) if tested is None else goals.score(tested)
        above = [list(goals.excess(report, i).values()) for i in range(len(scores))]
        return np.concatenate([np.stack([scores, tests]), np.array(above).T]).astype(np.float64)

    def _ordered(self, found: list[tuple[Best, np.ndarray]]) -> list[tuple[Best, np.ndarray]]:
        """By the mean score, the best first, what breaks constraints last; without the lost."""
        sign = sign_of(self.study)
        trained = [(best, runs) for best, runs in found if np.isfinite(runs[0].mean())]
        return sorted(trained, key=lambda pair: (_excess(pair[1]), sign * pair[1][0].mean()))

    def _start_of(self, best: Best) -> Best | None:
        """The values that a trial started from; None where they stood still."""
        if self._with_problem()[1].refine is None:
            return None
        trial = self.study.trials[best.number]
        start = trial.user_attrs.get("start")
        if not start:
            return None
        return best._replace(hyper=best.hyper | {n: start[n] for n in start if n in best.hyper})

    def _retrained(
        self, values: Mapping[str, Any], first: int, last: int, stream: int
    ) -> PopulationReport:
        """Reports of full runs under frozen values and seeds `first` to `last` of a stream."""
        key = jax.random.fold_in(jax.random.key(self._seed), stream)
        return self._full_runs(values, jax.random.split(key, last)[first:])[2]

    def _length(self, values: Mapping[str, Any]) -> int:
        """Training steps of a full run under these values."""
        opened, programs = self._with_problem()
        choices = {n: v for n, v in values.items() if n in opened.space.discrete}
        return programs.lengths.of(choices).num_steps

    def _full_runs(
        self, values: Mapping[str, Any], keys: Key
    ) -> tuple[Program, PopulationState, PopulationReport]:
        """Full runs under frozen values, one for each of `keys` `[n]`."""
        opened, programs = self._with_problem()
        choices = {n: v for n, v in values.items() if n in opened.space.discrete}
        program = programs.plain(choices)
        state = program.members.init(program.starts([values] * len(keys)), keys)
        updates = self._length(values) // program.members.steps_per_update
        state = program.members.advance(state, updates)
        return program, state, jax.device_get(program.members.report(state))

    def save_pictures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes pictures of the sweep into `folder` as PNG; returns their paths.

        Scores by trial, parallel coordinates, importance, and the refined trials' trajectories;
        `hypergrad.plotting.sweeps` draws each of them alone. Needs matplotlib (extra `plots`).

        Raises:
          ValueError: no trial has a score.
        """
        # Loaded on use, as a sweep needs no matplotlib.
        from hypergrad.plotting.sweeps import save_pictures

        return save_pictures(self.study, folder)

    def dashboard_command(self) -> str:
        """The shell command that opens optuna-dashboard (extra `dashboard`) on the storage.

        Raises:
          ValueError: a storage that no other process can open, such as memory.
        """
        return dashboard_command(storage_of(self.study))

    def _with_problem(self) -> tuple[OpenStudy, Programs]:
        if self._opened is None or self._programs is None:
            raise ValueError(
                "This result was unpickled, and holds neither problem nor data: call "
                "hypergrad.sweep again with the same storage, which trains nothing anew, and use "
                "what it returns."
            )
        return self._opened, self._programs


def _excess(runs: np.ndarray) -> float:
    """By how much runs of `_scores` break constraints in the mean, in all."""
    return float(np.maximum(runs[2:].mean(axis=1), 0.0).sum())


def _unpickled(study: optuna.Study | tuple[str, str], steps_spent: int, *rest: Any) -> SweepResult:
    if isinstance(study, tuple):
        place, name = study
        study = optuna.load_study(study_name=name, storage=open_storage(place, read_only=True))
    num_steps, seed, interrupted = rest
    return SweepResult(study, steps_spent, None, None, num_steps, seed, interrupted)
