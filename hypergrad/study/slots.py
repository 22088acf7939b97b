"""The slots of a sweep: what its trials count as, who runs which, and what the dead leave behind.

A sweep has `num_trials` slots. A slot is a trial that somebody asked for or enqueued, together with
its successors: a trial whose worker died is marked FAIL and one successor with the same parameters
is queued. All marks stand in the trials' system attributes, which no later write can change once
a trial is finished.

Several processes agree without a lock. Optuna gives every trial a number of its own: whether a slot
is still free, and which point of a grid a trial gets, follow from the numbers below its own. Only
one worker can set a running trial's state, and that one queues the successor; one that dies between
the two has left its name in the trial, and the next one queues it in its place. A trial whose error
was written before its worker died has failed for good and gets no successor.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from hypergrad.study.optuna_private import id_of, read_trials
from hypergrad.study.workers import Worker, is_dead, read_workers

# Which workers may hold this trial, one key for each.
_CLAIM = "hypergrad:claim:"
# Written at the end of an ask: what was proposed, and the sampler's random state after it.
ASKED = "hypergrad:asked"
# Which worker declared this trial lost.
_LOST = "hypergrad:lost"
# The number of the first trial of this slot, and how many successors came before and with this one.
_ROOT = "hypergrad:root"
_ATTEMPT = "hypergrad:attempt"
# A known good point that was queued by hand; a finished trial of another study.
_ENQUEUED = "hypergrad:enqueued"
_ADDED = "hypergrad:added"
# A good point of this study that is queued to be run again: of no use without a slot.
_AGAIN = "hypergrad:again"
# Made by mistake in a race, with the reason; it never ran.
_CANCELLED = "hypergrad:cancelled"
# User attributes: why a trial failed, by the traceback and in a line.
ERROR, REASON = "error", "reason"


class TrialCounts(NamedTuple):
    """How far a sweep is: numbers of trials; `finished` is `complete + pruned + failed`.

    Lost trials are counted by their successors, trials added from other studies not at all.
    """

    finished: int
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int


def trial_counts(study: optuna.Study) -> TrialCounts:
    """Count the trials that count."""
    states = [trial.state for trial in counted(study)]
    ended = [states.count(s) for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)]
    going = [states.count(s) for s in (TrialState.RUNNING, TrialState.WAITING)]
    return TrialCounts(sum(ended), *ended, *going)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that count: none lost, cancelled, or added from another study."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if not _is_lost(trial) and trial.system_attrs.keys().isdisjoint((_CANCELLED, _ADDED))
    ]


def _is_lost(trial: FrozenTrial) -> bool:
    """Say whether a trial ended only because its worker died."""
    failed = trial.state == TrialState.FAIL
    return failed and _LOST in trial.system_attrs and ERROR not in trial.user_attrs


def lineage(trial: FrozenTrial) -> tuple[int, int]:
    """Return the number of the slot's first trial, and which attempt at it this trial is."""
    return trial.system_attrs.get(_ROOT, trial.number), trial.system_attrs.get(_ATTEMPT, 0)


def _begins_slot(trial: FrozenTrial) -> bool:
    """Say whether a trial is the first one of a slot."""
    return trial.system_attrs.keys().isdisjoint((_ROOT, _ADDED, _CANCELLED))


def _is_duplicate(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Say whether an earlier trial is the same successor of the same slot.

    Two workers that find the same dead one may, in a narrow race, both queue a successor.
    """
    return _ROOT in trial.system_attrs and any(
        lineage(other) == lineage(trial)
        and _ROOT in other.system_attrs
        and _CANCELLED not in other.system_attrs
        for other in trials[: trial.number]
    )


class _Ledger:
    """Counts slots in time that grows with the unfinished trials only.

    Every method takes all trials of the study, in the order of their numbers.
    """

    def __init__(self) -> None:
        # The trials before this number are all finished and will not change.
        self._settled = 0
        self._slots = 0
        self._drawn = 0

    def waiting(self, trials: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
        """Go through the queued trials, oldest first."""
        self._settle(trials)
        return (t for t in trials[self._settled :] if t.state == TrialState.WAITING)

    def count(self, trials: Sequence[FrozenTrial], before: int | None = None) -> tuple[int, int]:
        """Count the slots whose first trial's number is below `before`.

        Then those of them that were not enqueued by hand: the grid's place.
        """
        self._settle(trials)
        start, slots, drawn = self._settled, self._slots, self._drawn
        if before is not None and before < start:
            # The first trial of a successor that waited long is among the settled ones.
            start = slots = drawn = 0
        more = [t for t in trials[start:before] if _begins_slot(t)]
        return slots + len(more), drawn + sum(_ENQUEUED not in t.system_attrs for t in more)

    def _settle(self, trials: Sequence[FrozenTrial]) -> None:
        while self._settled < len(trials) and trials[self._settled].state.is_finished():
            trial = trials[self._settled]
            if _begins_slot(trial):
                self._slots += 1
                self._drawn += _ENQUEUED not in trial.system_attrs
            self._settled += 1


class Slots:
    """What `worker` does with whole trials of `study`: takes, queues again and gives them back.

    At most `num_trials` are run in all, or the grid's `points`; one whose worker died is queued
    again at most `max_retries` times.
    """

    def __init__(
        self,
        study: optuna.Study,
        worker: Worker,
        num_trials: int | None,
        points: Sequence[dict[str, Any]] | None,
        max_retries: int | None,
    ) -> None:
        self._study, self._worker, self._storage = study, worker, worker.storage
        self._num_trials, self.points, self._max_retries = num_trials, points, max_retries
        self._ledger, self._claim = _Ledger(), _CLAIM + worker.id

    def take(self, wanted: Mapping[str, Any]) -> int | None:
        """Return the id of a trial that is ours to run now; None where nothing is left.

        Of the queued trials only those are taken that agree with the parameters `wanted`.
        """
        trials = read_trials(self._study)
        trial_id = self._take_waiting(trials, wanted)
        return self._create(trials) if trial_id is None else trial_id

    def point(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the grid's point for a trial, the same one for all its successors."""
        assert self.points is not None
        trials = self._study.get_trials(deepcopy=False)
        return self.points[self._ledger.count(trials, lineage(trial)[0])[1]]

    def _take_waiting(self, trials: list[FrozenTrial], wanted: Mapping[str, Any]) -> int | None:
        """Make one queued trial ours, or return None."""
        for trial in self._ledger.waiting(trials):
            asked = trial.system_attrs.get("fixed_params", {})
            if any(name in wanted and asked[name] != wanted[name] for name in asked):
                continue
            trial_id = id_of(trial)
            slots, _ = self._ledger.count(trials, lineage(trial)[0])
            if self._num_trials is not None and slots >= self._num_trials:
                # A point queued by hand may wait for a larger num_trials. One queued again was
                # queued by two processes; a successor had no right to its slot: its worker died
                # before it could cancel the first trial.
                if not _begins_slot(trial) or _AGAIN in trial.system_attrs:
                    self.cancel(trial_id, "every slot is taken")
                continue
            if _is_duplicate(trial, trials):
                self.cancel(trial_id, "its slot has a successor already")
                continue
            with suppress(UpdateFinishedTrialError):
                # Before the state, so that there is no moment at which a running trial is nobody's.
                self._storage.set_trial_system_attr(trial_id, self._claim, True)
                if self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
                    return trial_id
        return None

    def _create(self, trials: list[FrozenTrial]) -> int | None:
        """Make a new trial that is ours from its first moment, or return None."""
        if self._is_over(*self._ledger.count(trials)):
            return None
        template = create_trial(state=TrialState.RUNNING, system_attrs={self._claim: True})
        trial_id = self._storage.create_new_trial(self._worker.study_id, template_trial=template)
        # Others may have created trials in the meantime. Numbers are unique, so all agree on who
        # came too late.
        trials = read_trials(self._study)
        number = self._storage.get_trial(trial_id).number
        if self._is_over(*self._ledger.count(trials, number)):
            self.cancel(trial_id, "another process took the last slot")
            return None
        return trial_id

    def _is_over(self, slots: int, drawn: int) -> bool:
        full = self._num_trials is not None and slots >= self._num_trials
        return full or (self.points is not None and drawn >= len(self.points))

    def cancel(self, trial_id: int, reason: str) -> None:
        """Take a trial out that must not run, and that nobody runs."""
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_system_attr(trial_id, _CANCELLED, reason)
            self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)

    def enqueue(self, params: dict[str, Any], again: bool) -> bool:
        """Queue a point by its parameters; False where it was queued before and not `again`."""
        attrs = {"fixed_params": params, _ENQUEUED: True}
        trials = () if again else self._study.get_trials(deepcopy=False)
        # A subset, as one that was queued `again` has a mark more and is the same point.
        if any(attrs.items() <= trial.system_attrs.items() for trial in trials):
            return False
        attrs |= {_AGAIN: True} if again else {}
        self._study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attrs))
        return True

    def add(self, trial: FrozenTrial) -> bool:
        """Add a finished trial, which takes no slot; False where it was added before."""
        for other in self._study.get_trials(deepcopy=False):
            known = _ADDED in other.system_attrs
            if known and (other.params, other.value) == (trial.params, trial.value):
                return False
        trial.system_attrs = {_ADDED: True}
        self._study.add_trial(trial)
        return True

    def recover(self, held: set[int]) -> list[int]:
        """Queue again what dead workers ran; `held` are the numbers of our own running trials."""
        workers = read_workers(self._storage, self._worker.study_id)
        trials = self._study.get_trials(deepcopy=False)
        succeeded = {(root, attempt - 1) for root, attempt in map(lineage, trials) if attempt}

        def gone(worker: str) -> bool:
            # A trial that we claim and do not hold is one whose ask has failed.
            return worker == self._worker.id or is_dead(worker, workers.get(worker))

        found = []
        for trial in trials:
            marks = trial.system_attrs
            if trial.state == TrialState.RUNNING and trial.number not in held:
                claims = [key.removeprefix(_CLAIM) for key in marks if key.startswith(_CLAIM)]
                # Without a claim it is Optuna's own, of somebody whose death nobody could tell.
                is_left = bool(claims) and all(map(gone, claims)) and self.lose(trial)
            else:
                # Whoever declared it lost was to queue its successor, and may be about to.
                is_orphan = _is_lost(trial) and lineage(trial) not in succeeded
                is_left = is_orphan and gone(marks[_LOST])
            if is_left and self.queue_successor(trial):
                found.append(trial.number)
        return found

    def give_back(self, held: set[int]) -> None:
        """Queue again our own running trials, as we are about to end."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in held and self.lose(trial):
                self.queue_successor(trial)

    def lose(self, trial: FrozenTrial) -> bool:
        """Mark a running trial as lost; False where somebody was faster or it has failed."""
        trial_id = id_of(trial)
        with suppress(UpdateFinishedTrialError):
            # The mark before the state: nothing can be written afterwards.
            self._storage.set_trial_system_attr(trial_id, _LOST, self._worker.id)
            if self._max_retries is not None and lineage(trial)[1] >= self._max_retries:
                error = f"its process died {self._max_retries + 1} times while it ran"
                self._storage.set_trial_user_attr(trial_id, ERROR, error)
            if self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL):
                # Read again: a worker that was only slow may have written an error meanwhile.
                return _is_lost(self._storage.get_trial(trial_id))
        return False

    def queue_successor(self, trial: FrozenTrial) -> bool:
        """Queue a lost trial again; False where it had its retries."""
        root, attempt = lineage(trial)
        # Again, as whoever lost the trial may have allowed more retries than we do.
        if self._max_retries is not None and attempt >= self._max_retries:
            return False
        attrs: dict[str, Any] = {_ROOT: root, _ATTEMPT: attempt + 1}
        fixed = dict(trial.system_attrs.get("fixed_params", {}))
        # An ask that was cut short is done again: the sampler's state is that from before it.
        if ASKED in trial.system_attrs:
            fixed |= trial.params | trial.system_attrs[ASKED].get("params", {})
        if fixed:
            attrs["fixed_params"] = fixed
        self._study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attrs))
        return True
