"""What the trials of a study count as: slots of a sweep, lost with their worker, queued.

A sweep has `num_trials` slots. A slot is a trial that somebody asked for or enqueued, together with
its successors: a trial whose worker died is marked FAIL and one successor with the same parameters
is queued. All marks stand in the trials' system attributes, which no later write can change once
a trial is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from optuna.trial import FrozenTrial, TrialState

__all__ = ["Ledger", "Progress", "claimants", "counted", "is_lost", "lineage", "progress"]

# Which workers may hold this trial, one key for each.
CLAIM = "hypergrad:claim:"
# Written at the end of an ask: what was proposed, and the sampler's random state after it.
ASKED = "hypergrad:asked"
# Which worker declared this trial lost.
LOST = "hypergrad:lost"
# The number of the first trial of this slot, and how many successors came before and with this one.
ROOT = "hypergrad:root"
ATTEMPT = "hypergrad:attempt"
# A known good point that was queued by hand; a finished trial of another study.
ENQUEUED = "hypergrad:enqueued"
ADDED = "hypergrad:added"
# A good point of this study that is queued to be run again: of no use without a slot.
AGAIN = "hypergrad:again"
# Made by mistake in a race, with the reason; it never ran.
CANCELLED = "hypergrad:cancelled"
# A user attribute: why a trial failed.
ERROR = "error"


class Progress(NamedTuple):
    """How far a sweep is: numbers of trials; `finished` is `complete + pruned + failed`.

    Lost trials are counted by their successors, trials added from other studies not at all.
    """

    finished: int
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int


def is_lost(trial: FrozenTrial) -> bool:
    """Say whether a trial ended only because its worker died."""
    return (
        trial.state == TrialState.FAIL
        and LOST in trial.system_attrs
        and ERROR not in trial.user_attrs
    )


def claimants(trial: FrozenTrial) -> list[str]:
    """Return the workers that may hold a trial; none for a trial that was not asked for by us."""
    return [key.removeprefix(CLAIM) for key in trial.system_attrs if key.startswith(CLAIM)]


def lineage(trial: FrozenTrial) -> tuple[int, int]:
    """Return the number of the slot's first trial, and which attempt at it this trial is."""
    attributes = trial.system_attrs
    return attributes.get(ROOT, trial.number), attributes.get(ATTEMPT, 0)


def counted(trials: Sequence[FrozenTrial], added: bool = False) -> list[FrozenTrial]:
    """Return the trials that count: no lost ones, no cancelled ones; others' with `added`."""
    return [
        trial
        for trial in trials
        if not (is_lost(trial) or CANCELLED in trial.system_attrs)
        and (added or ADDED not in trial.system_attrs)
    ]


def is_slot(trial: FrozenTrial) -> bool:
    """Say whether a trial is the first one of a slot."""
    return not any(mark in trial.system_attrs for mark in (ROOT, ADDED, CANCELLED))


def progress(trials: Sequence[FrozenTrial]) -> Progress:
    """Count the trials that count."""
    states = [trial.state for trial in counted(trials)]
    complete, pruned, failed, running, waiting = (
        states.count(state)
        for state in (
            TrialState.COMPLETE,
            TrialState.PRUNED,
            TrialState.FAIL,
            TrialState.RUNNING,
            TrialState.WAITING,
        )
    )
    return Progress(complete + pruned + failed, complete, pruned, failed, running, waiting)


class Ledger:
    """Counts slots in time that grows with the unfinished trials only.

    Every method takes all trials of the study, in the order of their numbers.
    """

    def __init__(self) -> None:
        # The trials before this number are all finished and will not change.
        self._settled = 0
        self._slots = 0
        self._drawn = 0

    def slots(self, trials: Sequence[FrozenTrial], before: int | None = None) -> int:
        """Return the number of slots whose first trial's number is below `before`."""
        return self._count(trials, before)[0]

    def drawn(self, trials: Sequence[FrozenTrial], before: int | None = None) -> int:
        """Return the number of those slots that were not enqueued by hand: the grid's place."""
        return self._count(trials, before)[1]

    def waiting(self, trials: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
        """Go through the queued trials, oldest first."""
        self._settle(trials)
        return (t for t in trials[self._settled :] if t.state == TrialState.WAITING)

    def is_duplicate(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
        """Say whether an earlier trial is the same successor of the same slot.

        Two workers that find the same dead one may, in a narrow race, both queue a successor.
        """
        if ROOT not in trial.system_attrs:
            return False
        return any(
            lineage(other) == lineage(trial)
            and ROOT in other.system_attrs
            and CANCELLED not in other.system_attrs
            for other in trials[: trial.number]
        )

    def _count(self, trials: Sequence[FrozenTrial], before: int | None) -> tuple[int, int]:
        self._settle(trials)
        before = len(trials) if before is None else before
        if before < self._settled:
            slots = [t for t in trials[:before] if is_slot(t)]
            return len(slots), sum(ENQUEUED not in t.system_attrs for t in slots)
        slots = [t for t in trials[self._settled : before] if is_slot(t)]
        drawn = sum(ENQUEUED not in t.system_attrs for t in slots)
        return self._slots + len(slots), self._drawn + drawn

    def _settle(self, trials: Sequence[FrozenTrial]) -> None:
        while self._settled < len(trials) and trials[self._settled].state.is_finished():
            trial = trials[self._settled]
            if is_slot(trial):
                self._slots += 1
                self._drawn += ENQUEUED not in trial.system_attrs
            self._settled += 1
