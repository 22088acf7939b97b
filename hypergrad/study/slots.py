"""The slots of a sweep: who may run which trial, agreed on by several processes without a lock.

Optuna gives every trial a number of its own. Whether a slot is still free, and which point of a
grid a trial gets, follow from the numbers below its own, so that all processes agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from hypergrad.study import ledger
from hypergrad.study.ledger import Ledger
from hypergrad.study.recovery import Recovery
from hypergrad.study.workers import Worker

__all__ = ["Slots"]


class Slots:
    """Takes trials of `study` for `worker`: at most `num_trials` in all, or the grid's `points`."""

    def __init__(
        self,
        study: optuna.Study,
        worker: Worker,
        recovery: Recovery,
        num_trials: int | None,
        points: Sequence[dict[str, Any]] | None,
    ) -> None:
        self._study = study
        self._storage = study._storage
        self._worker = worker
        self._recovery = recovery
        self._num_trials = num_trials
        self._points = points
        self._ledger = Ledger()

    def take(self, wanted: Mapping[str, Any]) -> int | None:
        """Return the id of a trial that is ours to run now; None where nothing is left.

        Of the queued trials only those are taken that agree with the parameters `wanted`.
        """
        # As in Study.ask: trials are read from the storage once for an ask.
        self._study._thread_local.cached_all_trials = None
        trials = self._study._get_trials(deepcopy=False, use_cache=True)
        trial_id = self._take_waiting(trials, wanted)
        return self._create(trials) if trial_id is None else trial_id

    def point(self, trial: FrozenTrial) -> dict[str, Any] | None:
        """Return the grid's point for a trial, the same one for all its successors."""
        if self._points is None:
            return None
        trials = self._study.get_trials(deepcopy=False)
        return self._points[self._ledger.drawn(trials, ledger.lineage(trial)[0])]

    def _take_waiting(self, trials: list[FrozenTrial], wanted: Mapping[str, Any]) -> int | None:
        """Make one queued trial ours, or return None."""
        for trial in self._ledger.waiting(trials):
            asked = trial.system_attrs.get("fixed_params", {})
            if any(name in wanted and asked[name] != wanted[name] for name in asked):
                continue
            if self._is_over(self._ledger.slots(trials, ledger.lineage(trial)[0])):
                # A point queued by hand may wait for a larger num_trials. One queued again was
                # queued by two processes; a successor had no right to its slot: its worker died
                # before it could cancel the first trial.
                if not ledger.is_slot(trial) or ledger.AGAIN in trial.system_attrs:
                    self._recovery.cancel(trial._trial_id, "every slot is taken")
                continue
            if self._ledger.is_duplicate(trial, trials):
                self._recovery.cancel(trial._trial_id, "its slot has a successor already")
                continue
            try:
                # Before the state, so that there is no moment at which a running trial is nobody's.
                self._storage.set_trial_system_attr(
                    trial._trial_id, ledger.CLAIM + self._worker.id, True
                )
                if not self._storage.set_trial_state_values(
                    trial._trial_id, state=TrialState.RUNNING
                ):
                    continue
            except UpdateFinishedTrialError:
                continue
            return trial._trial_id
        return None

    def _create(self, trials: list[FrozenTrial]) -> int | None:
        """Make a new trial that is ours from its first moment, or return None."""
        if self._is_over(self._ledger.slots(trials)) or self._grid_ends(self._ledger.drawn(trials)):
            return None
        template = create_trial(
            state=TrialState.RUNNING, system_attrs={ledger.CLAIM + self._worker.id: True}
        )
        trial_id = self._storage.create_new_trial(self._study._study_id, template_trial=template)
        # Others may have created trials in the meantime. Numbers are unique, so all agree on who
        # came too late.
        self._study._thread_local.cached_all_trials = None
        trials = self._study._get_trials(deepcopy=False, use_cache=True)
        number = self._storage.get_trial(trial_id).number
        if self._is_over(self._ledger.slots(trials, number)) or self._grid_ends(
            self._ledger.drawn(trials, number)
        ):
            self._recovery.cancel(trial_id, "another process took the last slot")
            return None
        return trial_id

    def _is_over(self, slots: int) -> bool:
        return self._num_trials is not None and slots >= self._num_trials

    def _grid_ends(self, drawn: int) -> bool:
        return self._points is not None and drawn >= len(self._points)
