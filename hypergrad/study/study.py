"""One Optuna study of a space: proposals, results, and what survives `kill -9`.

`open_study` gives an `OpenStudy`, through which a sweep asks and tells. The study itself stays an
ordinary Optuna study: its plots, its dashboard and its storages work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hypergrad.space.space import Space
from hypergrad.study import ledger
from hypergrad.study.distributions import Coordinates
from hypergrad.study.ledger import Progress
from hypergrad.study.randomness import SavedRandomness
from hypergrad.study.recovery import Recovery
from hypergrad.study.sampling import Fixed, Proposal, make_sampler, propose
from hypergrad.study.signature import check_same
from hypergrad.study.slots import Slots
from hypergrad.study.storage import open_storage
from hypergrad.study.workers import Worker

__all__ = ["OpenStudy", "Progress", "Proposal", "open_study"]

_DIRECTIONS = ("minimize", "maximize")
# A traceback's end says what went wrong; databases limit a text's length.
_LONGEST_ERROR = 8000


def open_study(
    space: Space,
    storage: str | os.PathLike[str] | BaseStorage | None = None,
    sampler: str | BaseSampler = "tpe",
    direction: Literal["minimize", "maximize"] = "minimize",
    seed: int | None = None,
    name: str = "hypergrad",
    *,
    num_trials: int | None = None,
    grid_points: int = 5,
    beat_every: float = 10.0,
    grace: float = 60.0,
    max_retries: int | None = None,
) -> OpenStudy:
    """Make or reopen the study `name` of `space` in `storage`; use the result in a `with` block.

    `storage` is None (memory), a path `"sweep.journal"`, a database's URL or an Optuna storage.
    `sampler` is `"tpe"` and `"random"` (Optuna's, with its defaults), `"grid"` (all values of the
    discrete hyperparameters, `grid_points` values evenly on the scale of each Float and of each
    Int that has more), or an Optuna sampler. At most `num_trials` trials are run over all
    processes and all times that the study is opened; None is no limit.

    Several processes may open one study at the same time. The first alone uses `seed`, and its
    random state is kept, so that it goes on where it stopped when it is opened again with the
    same sampler and seed and nobody else has it open; all others draw from the system's entropy.

    Each process beats every `beat_every` seconds. Its running trials go back to the queue when its
    process is gone (same machine) or has not beaten for `grace` seconds (another one): when the
    study is opened, and at every `recover`. A trial is queued again at most `max_retries` times,
    then it fails; None is no limit, as machines that are taken away say nothing about a trial.

    Raises ValueError for a study that was made for another space (naming what differs) or another
    direction, for an unknown sampler and for `num_trials < 1`.

    >>> from hypergrad.space.dimensions import Categorical, Float
    >>> space = Space({"rate": Float(1e-4, 1.0, scale="log"), "width": Categorical([32, 64])})
    >>> with open_study(space, sampler="random", seed=0, num_trials=3) as opened:
    ...     while proposal := opened.ask(record=False):
    ...         refined = {"rate": 2 * proposal.start["rate"]}
    ...         _ = opened.finish(proposal, value=refined["rate"], refined=refined)
    ...     opened.progress().finished
    3
    """
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown: 'minimize' or 'maximize'.")
    if num_trials is not None and num_trials < 1:
        raise ValueError(f"num_trials={num_trials!r} leaves nothing to do: run at least one trial.")
    coordinates = Coordinates(space)
    points = coordinates.grid(grid_points, seed) if sampler == "grid" else None
    engine = make_sampler(sampler, seed)
    backend = open_storage(storage)
    study = optuna.create_study(
        storage=backend,
        sampler=engine,
        # What stops a trial early is the sweep's scheduler; Optuna's median would be asked nothing.
        pruner=optuna.pruners.NopPruner(),
        study_name=name,
        # Compared below: Optuna would load a study of another direction without a word.
        direction=direction,
        load_if_exists=True,
    )
    check_same(study, coordinates, direction)
    worker = Worker(study._storage, study._study_id, beat_every, grace)
    opened = OpenStudy(
        study, coordinates, worker, num_trials=num_trials, points=points, max_retries=max_retries
    )
    opened._randomness.open(opened._recovery.alone(), seed, study.get_trials(deepcopy=False))
    opened.recover()
    return opened


class OpenStudy:
    """A study that this process works on, made by `open_study`; one thread asks and tells.

    `study` is the Optuna study, `space` the space.
    """

    def __init__(
        self,
        study: optuna.Study,
        coordinates: Coordinates,
        worker: Worker,
        *,
        num_trials: int | None,
        points: list[dict[str, Any]] | None,
        max_retries: int | None,
    ) -> None:
        self.study = study
        self.space = coordinates.space
        self._coordinates = coordinates
        self._worker = worker
        self._storage = study._storage
        self._recovery = Recovery(study, worker, max_retries)
        self._slots = Slots(study, worker, self._recovery, num_trials, points)
        self._is_grid = points is not None
        self._randomness = SavedRandomness(study)
        self._held: set[int] = set()

    def __enter__(self) -> OpenStudy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self, fixed_choices: Mapping[str, Any] | None = None, *, record: bool = True
    ) -> Proposal | None:
        """Return the next trial to run, or None where every slot is taken (or the grid used up).

        Queued trials come first (known good points, trials of dead workers), then the sampler's
        proposals. After None other processes may still run trials, and may die: wait while
        `progress().running`, `recover`, and ask again.

        `fixed_choices` asks for another member of a population: values of all active discrete
        hyperparameters that the proposal shall have; queued trials with other ones are left in
        the queue. A grid proposes its points in its own order, equal choices together, whatever
        is asked for: compare `proposal.choices`.

        With `record`, the trial's parameters are recorded at once, as `trial.suggest_float` does,
        and the sampler's proposals are those that Optuna alone makes through the same
        distributions. Without, the starts of Floats come from the sampler in the same way but are
        not recorded: `finish` and `prune` record the refined values instead, once, and the sampler
        learns from those.

        Raises ValueError for `fixed_choices` that are not of this space.
        """
        fixed = dict(fixed_choices or {})
        self._coordinates.check(fixed, "fixed_choices", complete=False)
        wanted = self._coordinates.to_study(fixed)
        trial_id = self._slots.take(wanted)
        return None if trial_id is None else self._fill(trial_id, wanted, record)

    def report(self, proposal: Proposal, value: float, step: int) -> None:
        """Record an intermediate value, in the study's units, after `step` inner steps."""
        try:
            proposal.trial.report(float(value), step)
        except UpdateFinishedTrialError:
            self._held.discard(proposal.number)

    def finish(
        self,
        proposal: Proposal,
        value: float,
        refined: Mapping[str, float] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Record a trial that ran in full; False where it was taken over in the meantime.

        `refined` gives the values of all active Floats that the study shall hold, in the user's
        units, where the proposal is not `recorded`; None is the start. `attrs` become user
        attributes (JSON), beside `start` for a proposal that is not recorded. NaN fails the trial.
        Raises ValueError for `refined` values that are not finite or outside their bounds.
        """
        if math.isnan(value):
            return self.fail(proposal, "ValueError: the trial's value is NaN.")
        return self._tell(proposal, TrialState.COMPLETE, float(value), refined, attrs)

    def prune(
        self,
        proposal: Proposal,
        value: float,
        step: int,
        refined: Mapping[str, float] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Record a trial that was stopped after `step` inner steps with `value`; else as `finish`.

        Its state is PRUNED. Samplers learn from it (TPE ranks it below every complete trial, and
        among pruned ones the longer run before the shorter), `study.best_trial` ignores it.
        """
        if math.isnan(value):
            return self.fail(proposal, "ValueError: the trial's value is NaN.")
        if step not in proposal.trial._cached_frozen_trial.intermediate_values:
            self.report(proposal, value, step)
        return self._tell(proposal, TrialState.PRUNED, None, refined, attrs)

    def fail(self, proposal: Proposal, error: str) -> bool:
        """Record that a trial failed for good, with its traceback as user attribute `error`."""
        attrs = {ledger.ERROR: error[-_LONGEST_ERROR:]}
        return self._tell(proposal, TrialState.FAIL, None, None, attrs)

    def enqueue(self, hyper: Mapping[str, Any], *, again: bool = False) -> bool:
        """Queue a known good point; False where the same one was queued before, in any process.

        With `again` it is queued once more, and dropped where no slot is left.

        `hyper` holds values of Floats, Ints and Categoricals in the user's units; what is left out
        is proposed by the sampler. It takes one of the `num_trials` slots. Raises ValueError for
        unknown names, values outside the space and values that are inactive beside the others.
        """
        self._coordinates.check(hyper, "hyper", complete=False)
        params = self._coordinates.to_study(hyper)
        for trial in () if again else self.study.get_trials(deepcopy=False):
            known = ledger.ENQUEUED in trial.system_attrs
            if known and trial.system_attrs.get("fixed_params") == params:
                return False
        attrs = {"fixed_params": params, ledger.ENQUEUED: True}
        attrs |= {ledger.AGAIN: True} if again else {}
        self.study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attrs))
        return True

    def check(self, hyper: Mapping[str, Any]) -> None:
        """Raise ValueError unless `hyper` holds all active values, each within the space."""
        self._coordinates.check(hyper, "hyper", complete=True)

    def add_finished(
        self,
        hyper: Mapping[str, Any],
        value: float,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Add a finished trial of another study, from which samplers learn; takes no slot.

        `hyper` holds all active values, in the user's units. Samplers rank its `value` beside this
        study's: scale it where the data differ. False where it is in the study already. Raises
        ValueError as `enqueue`, and where an active value is missing.
        """
        self._coordinates.check(hyper, "hyper", complete=True)
        params = self._coordinates.to_study(hyper)
        for trial in self.study.get_trials(deepcopy=False):
            known = ledger.ADDED in trial.system_attrs and trial.params == params
            if known and trial.value == float(value):
                return False
        names = {self._coordinates.names[name]: name for name in hyper}
        self.study.add_trial(
            create_trial(
                params=params,
                distributions={n: self._coordinates.distributions[names[n]] for n in params},
                value=float(value),
                user_attrs=dict(attrs or {}),
                system_attrs={ledger.ADDED: True},
            )
        )
        return True

    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return a trial's parameters by the space's names, in the user's units."""
        return self._coordinates.from_study(trial.params)

    def trials(self, added: bool = False) -> list[FrozenTrial]:
        """Return the trials that count: no lost ones, no cancelled ones; others' with `added`."""
        return ledger.counted(self.study.get_trials(deepcopy=False), added)

    def progress(self) -> Progress:
        """Count finished, running and queued trials of all processes."""
        return ledger.progress(self.study.get_trials(deepcopy=False))

    def beat(self) -> None:
        """Give a sign of life now, beside those of the background thread."""
        self._worker.beat()

    def recover(self) -> list[int]:
        """Queue again the running trials of dead workers; return their numbers.

        A lost trial becomes FAIL; its successor starts from the same values. Whoever sets the
        state queues the successor; a worker that dies between the two is found by the next one.
        Trials that Optuna was asked for directly are left alone. Cost: one read of all trials.
        """
        return self._recovery.recover(self._held)

    def close(self) -> None:
        """Give running trials of this process back to the queue and stop its beats."""
        held, self._held = self._held, set()
        try:
            self._recovery.give_back(held)
        finally:
            self._worker.close()

    def _fill(self, trial_id: int, wanted: dict[str, Any], record: bool) -> Proposal:
        sampler = self.study.sampler
        if wanted and not self._is_grid:
            self.study.sampler = Fixed(wanted, sampler)
        try:
            trial = optuna.Trial(self.study, trial_id)
            self._held.add(trial.number)
            if self._is_grid and not trial._fixed_params:
                trial._fixed_params = self._slots.point(trial._cached_frozen_trial)
            choices: dict[str, Any] = {}
            start: dict[str, float] = {}
            unrecorded: dict[str, Any] = {}
            for name in self._coordinates.order:
                if not self.space.is_active(name, choices):
                    continue
                parameter = self._coordinates.names[name]
                distribution = self._coordinates.distributions[name]
                if name not in self.space.continuous:
                    choices[name] = trial._suggest(parameter, distribution)
                elif record:
                    start[name] = self._coordinates.value(
                        name, trial._suggest(parameter, distribution)
                    )
                else:
                    unrecorded[parameter] = propose(trial, parameter, distribution)
                    start[name] = self._coordinates.value(name, unrecorded[parameter])
        except BaseException:
            # Nobody will tell it: `recover` may take it.
            self._held.difference_update({self._storage.get_trial(trial_id).number})
            raise
        finally:
            self.study.sampler = sampler
        asked: dict[str, Any] = {"params": unrecorded} if unrecorded else {}
        place = self._randomness.place()
        if place is not None:
            asked["random"] = place
        self._storage.set_trial_system_attr(trial_id, ledger.ASKED, asked)
        return Proposal(trial, choices, start, record, unrecorded)

    def _tell(
        self,
        proposal: Proposal,
        state: TrialState,
        value: float | None,
        refined: Mapping[str, float] | None,
        attrs: Mapping[str, Any] | None,
    ) -> bool:
        if proposal.recorded and refined is not None:
            raise ValueError(
                f"refined={dict(refined)!r} comes too late: trial {proposal.number} has its start "
                "recorded. Ask with record=False."
            )
        told: Mapping[str, Any] = proposal.start if refined is None else refined
        if told.keys() != proposal.start.keys():
            raise ValueError(
                f"refined holds {sorted(told)}: give exactly the active Floats "
                f"{sorted(proposal.start)}."
            )
        if refined is not None:
            self._coordinates.check({**proposal.choices, **refined}, "refined", complete=False)
        trial = proposal.trial
        try:
            if not proposal.recorded:
                params = proposal._unrecorded
                if refined is not None:
                    params = self._coordinates.to_study(refined)
                for name in proposal.start:
                    parameter = self._coordinates.names[name]
                    distribution = self._coordinates.distributions[name]
                    internal = distribution.to_internal_repr(params[parameter])
                    self._storage.set_trial_param(
                        trial._trial_id, parameter, internal, distribution
                    )
                attrs = {"start": dict(proposal.start), **(attrs or {})}
            for key, attr in (attrs or {}).items():
                trial.set_user_attr(key, attr)
            self.study.tell(trial, value, state=state)
        except (UpdateFinishedTrialError, ValueError):
            # Somebody thought that this process was dead, and has queued the trial again.
            if not self._storage.get_trial(trial._trial_id).state.is_finished():
                raise
            return False
        finally:
            self._held.discard(proposal.number)
        self._randomness.save_if_moved()
        return True
