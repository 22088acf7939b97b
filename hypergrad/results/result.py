"""What a sweep found: the best trial, a table, an audit on fresh seeds, pictures."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optuna

from hypergrad.checks import integer
from hypergrad.results.programs import Programs
from hypergrad.study.optuna_private import storage_of
from hypergrad.study.ranking import Best, best_of, ranked, sign_of, states, table
from hypergrad.study.storage import dashboard_command, open_storage, place_of
from hypergrad.study.study import OpenStudy
from hypergrad.tuners.population.member import PopulationReport

# Streams of seeds, far from the trials' own, which are folded in by their numbers.
_AUDIT, _CONFIRM = 2**31, 2**31 + 1
# The study's user attribute that keeps what was confirmed.
_CONFIRMED = "confirmed"


class Audit(NamedTuple):
    """Frozen hyperparameters, retrained on seeds that the sweep has not seen.

    Attributes:
      test_losses: on the test split, one per seed.
      mean: their mean; infinite if one diverged.
      std_error: of the mean.
    """

    test_losses: np.ndarray
    mean: float
    std_error: float


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
    _score: Callable[[PopulationReport], jax.Array] | None
    _num_steps: int
    _seed: int
    interrupted: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        place = place_of(storage_of(self.study))
        study = self.study if place is None else (place, self.study.study_name)
        return _unpickled, (study, self.steps_spent, self._num_steps, self._seed, self.interrupted)

    def __repr__(self) -> str:
        return f"<SweepResult of {self.study.study_name!r}: {states(self.study)}>"

    @property
    def best(self) -> Best:
        """What to take: the trial with the best score among those that trained in full.

        Under `refine` scores are those of values that moved while they trained, so what is taken is
        `confirm()`: frozen values, scored as they will be used. The first access trains it, at the
        cost of nine full runs, and the study keeps it (its user attribute `confirmed`).

        Raises:
          ValueError: no trial did.
        """
        kept = self.study.user_attrs.get(_CONFIRMED, {})
        if self._programs is None or self._programs.refine is None:
            # What was unpickled cannot train, and has what was confirmed before.
            return Best(*kept["best"]) if kept else best_of(self.study)
        trained = len(self.top(len(self.study.trials)))
        if kept.get("of") != trained:
            kept = {"of": trained, "best": list(self.confirm())}
            self.study.set_user_attr(_CONFIRMED, kept)
        return Best(*kept["best"])

    def top(self, count: int = 10) -> list[Best]:
        """The best trials that trained in full, such as to enqueue in a sweep on other data."""
        return ranked(self.study)[: integer("count", count, 0)]

    def table(self, count: int = 10) -> str:
        """The best trials as text, one line each, and how many there are of each state."""
        return table(self.study, count)

    def audit(self, seeds: int = 10, hyper: Mapping[str, Any] | None = None) -> Audit:
        """Values frozen and retrained in full on `seeds` fresh seeds, scored on the test split.

        Args:
          seeds: how many; no trial has used them.
          hyper: all active values, in the user's units, such as an untuned default to compare with;
            None for the best trial's.

        Raises:
          ValueError: the data have no test split; no trial trained in full; values that are not
            all active ones of the space; no seeds.
        """
        values = self.best.hyper if hyper is None else hyper
        opened, _, _ = self._with_problem()
        opened.check(values)
        losses = self._retrained(values, 0, integer("seeds", seeds), _AUDIT).test_score
        if losses is None:
            raise ValueError(
                "data.test=None: an audit is taken on a split that nothing was tuned on."
            )
        found = np.asarray(losses, np.float64)
        # NaN would make a mean that is neither better nor worse than another.
        found = np.where(np.isfinite(found), found, np.inf)
        error = float(found.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else float("nan")
        return Audit(found, float(found.mean()), error)

    def confirm(self, count: int = 3, seeds: int = 2) -> Best:
        """The trial whose frozen values score best on validation when trained again.

        A trial's own score flatters it: it is the best of many, under one seed, and a refined
        trial's values moved while it trained. So the best `count` are retrained in full with their
        values frozen, under `seeds` fresh seeds that `audit` does not use; the mean of their scores
        decides, and is the `score` of what is returned, as the mean of their test losses is its
        `held_out`. Where hypergradients moved a trial, the values that it started from compete with
        those it ended with. Cost: count * seeds full runs, under `refine` half as many again: all
        candidates are trained once, and the better half under the other seeds, too.

        Raises:
          ValueError: no trial trained in full, or none of them again.
        """
        # Where nothing is found, `best_of` raises and says why.
        candidates = self.top(integer("count", count)) or [best_of(self.study)]
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
        best, (scores, tests) = found[0]
        return best._replace(score=float(scores.mean()), held_out=float(tests.mean()))

    def _scores(self, values: Mapping[str, Any], first: int, last: int) -> np.ndarray:
        """(Score, test loss) `[2, seeds]` of values frozen and retrained; NaN where one is lost."""
        report = self._retrained(values, first, last, _CONFIRM)
        scores = np.where(report.finite, self._with_problem()[2](report), np.nan)
        tests = np.full_like(scores, np.nan) if report.test_score is None else report.test_score
        return np.stack([scores, tests]).astype(np.float64)

    def _ordered(self, found: list[tuple[Best, np.ndarray]]) -> list[tuple[Best, np.ndarray]]:
        """By the mean score, the best first; without the lost."""
        sign = sign_of(self.study)
        trained = [(best, scores) for best, scores in found if np.isfinite(scores[0].mean())]
        return sorted(trained, key=lambda pair: sign * pair[1][0].mean())

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
        opened, programs, _ = self._with_problem()
        choices = {n: v for n, v in values.items() if n in opened.space.discrete}
        program = programs.plain(choices)
        count, key = last - first, jax.random.fold_in(jax.random.key(self._seed), stream)
        hypers = program.starts([values] * count)
        keys = jax.random.split(key, last)[first:]
        state = program.members.init(hypers, keys)
        updates = programs.lengths.of(choices).num_steps // program.members.steps_per_update
        return jax.device_get(program.members.report(program.members.advance(state, updates)))

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

    def _with_problem(
        self,
    ) -> tuple[OpenStudy, Programs, Callable[[PopulationReport], jax.Array]]:
        if self._opened is None or self._programs is None or self._score is None:
            raise ValueError(
                "This result was unpickled, and holds neither problem nor data: call "
                "hypergrad.sweep again with the same storage, which trains nothing anew, and use "
                "what it returns."
            )
        return self._opened, self._programs, self._score


def _unpickled(study: optuna.Study | tuple[str, str], steps_spent: int, *rest: Any) -> SweepResult:
    if isinstance(study, tuple):
        place, name = study
        study = optuna.load_study(study_name=name, storage=open_storage(place, read_only=True))
    num_steps, seed, interrupted = rest
    return SweepResult(study, steps_spent, None, None, None, num_steps, seed, interrupted)
