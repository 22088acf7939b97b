"""Schedulers that wait for nobody: each trial is judged by what the study knows by then."""

from collections.abc import Callable, Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hypergrad.results.standings import Standing
from hypergrad.search.curves import FEWEST_POINTS, extrapolated
from hypergrad.search.schedulers import ASHA, LearningCurves, Scheduler

# Of the trials at a rung, the numbers of those that go on.
Judge = Callable[[int, Sequence[Standing]], set[int]]


def judge_of(
    scheduler: Scheduler | None, study: optuna.Study, sign: int, num_steps: int
) -> Judge | None:
    """What judges trials one by one; None for a scheduler whose trials are ranked together."""
    if isinstance(scheduler, ASHA):
        eta = scheduler.eta
        return lambda steps, standings: _best_of_all(steps, standings, _reports(study), sign, eta)
    if isinstance(scheduler, LearningCurves):
        least = scheduler.probability
        return lambda steps, standings: _hopeful(steps, standings, study, sign, num_steps, least)
    return None


def _best_of_all(
    steps: int, standings: Sequence[Standing], reports: list[FrozenTrial], sign: int, eta: int
) -> set[int]:
    """Those among the best 1/eta of all that have been at this rung so far, in any process."""
    own = {s.proposal.number: sign * s.score for s in standings}
    broken = {s.proposal.number for s in standings if s.is_broken}
    others = [
        sign * t.intermediate_values[steps]
        for t in reports
        if t.number not in own and np.isfinite(t.intermediate_values.get(steps, np.nan))
    ]
    # Of those that break a constraint none takes a place.
    scores = [*others, *(score for number, score in own.items() if number not in broken)]
    places = max(1, (len(scores) + len(broken)) // eta)
    return {
        number
        for number, score in own.items()
        if number not in broken and sum(other < score for other in scores) < places
    }


def _hopeful(
    steps: int,
    standings: Sequence[Standing],
    study: optuna.Study,
    sign: int,
    num_steps: int,
    least: float,
) -> set[int]:
    """Those that beat the best full run with at least this probability, by their curves."""
    trials = {t.number: t for t in _reports(study)}
    ended = [t.values[0] for t in trials.values() if t.state == TrialState.COMPLETE and t.values]
    if not ended:
        return {s.proposal.number for s in standings}
    best = min(sign * value for value in ended)
    going = set()
    for standing in standings:
        before = trials[standing.proposal.number].intermediate_values
        curve = {**before, steps: standing.score}
        known = sorted((at, sign * value) for at, value in curve.items() if np.isfinite(value))
        if len(known) < FEWEST_POINTS:
            going.add(standing.proposal.number)
            continue
        later = extrapolated([at for at, _ in known], [y for _, y in known], num_steps)
        if later.probability_below(best) >= least:
            going.add(standing.proposal.number)
    return going


def _reports(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False)
