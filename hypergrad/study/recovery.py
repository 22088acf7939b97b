"""Trials whose worker died: they fail, and one successor each starts from the same values.

Only one worker can set a running trial's state, and that one queues the successor. A worker that
dies between the two has left its name in the trial, and the next one queues it in its place. A
trial whose error was written before its worker died has failed for good and gets no successor; what
it holds cannot change once its state is set, so that all agree on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from hypergrad.study import ledger
from hypergrad.study.workers import Worker, is_dead, read_workers

__all__ = ["Recovery"]


class Recovery:
    """What the worker `worker` does about trials that nobody will finish."""

    def __init__(self, study: optuna.Study, worker: Worker, max_retries: int | None) -> None:
        self._study = study
        self._storage = study._storage
        self._worker = worker
        self._max_retries = max_retries

    def alone(self) -> bool:
        """Say whether no other worker lives."""
        workers = read_workers(self._storage, self._study._study_id)
        return all(
            worker == self._worker.id or is_dead(worker, record)
            for worker, record in workers.items()
        )

    def recover(self, held: Iterable[int]) -> list[int]:
        """Queue again what dead workers ran; `held` are the numbers of our own running trials."""
        held = set(held)
        workers = read_workers(self._storage, self._study._study_id)
        trials = self._study.get_trials(deepcopy=False)
        succeeded = {
            (root, attempt - 1) for root, attempt in map(ledger.lineage, trials) if attempt
        }

        def gone(worker: str) -> bool:
            return worker == self._worker.id or is_dead(worker, workers.get(worker))

        found = []
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.number not in held:
                claimed = ledger.claimants(trial)
                if not claimed or not all(map(gone, claimed)) or not self.lose(trial):
                    continue
            elif not (
                ledger.is_lost(trial)
                and ledger.lineage(trial) not in succeeded
                and gone(trial.system_attrs[ledger.LOST])
            ):
                continue
            if self.queue_successor(trial):
                found.append(trial.number)
        return found

    def give_back(self, held: Iterable[int]) -> None:
        """Queue again our own running trials, as we are about to end."""
        held = set(held)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in held and self.lose(trial):
                self.queue_successor(trial)

    def lose(self, trial: FrozenTrial) -> bool:
        """Mark a running trial as lost; False where somebody was faster or it has failed."""
        try:
            self._set(trial._trial_id, ledger.LOST, self._worker.id)
            if self._max_retries is not None and ledger.lineage(trial)[1] >= self._max_retries:
                error = f"its process died {self._max_retries + 1} times while it ran"
                self._storage.set_trial_user_attr(trial._trial_id, ledger.ERROR, error)
            if not self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
                return False
            return ledger.is_lost(self._storage.get_trial(trial._trial_id))
        except UpdateFinishedTrialError:
            return False

    def queue_successor(self, trial: FrozenTrial) -> bool:
        """Queue a lost trial again; False where it had its retries."""
        root, attempt = ledger.lineage(trial)
        if self._max_retries is not None and attempt >= self._max_retries:
            return False
        attrs: dict[str, Any] = {ledger.ROOT: root, ledger.ATTEMPT: attempt + 1}
        fixed = dict(trial.system_attrs.get("fixed_params", {}))
        # An ask that was cut short is done again: the sampler's state is that from before it.
        if ledger.ASKED in trial.system_attrs:
            fixed |= trial.params | trial.system_attrs[ledger.ASKED].get("params", {})
        if fixed:
            attrs["fixed_params"] = fixed
        self._study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attrs))
        return True

    def cancel(self, trial_id: int, reason: str) -> None:
        """Take a trial out that must not run, and that nobody runs."""
        with suppress(UpdateFinishedTrialError):
            self._set(trial_id, ledger.CANCELLED, reason)
            self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)

    def _set(self, trial_id: int, key: str, value: Any) -> None:
        self._storage.set_trial_system_attr(trial_id, key, value)
