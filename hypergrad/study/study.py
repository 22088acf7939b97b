"""One Optuna study of a space: proposals, results, and what survives `kill -9`.

`open_study` gives an `OpenStudy`, through which a sweep asks and tells. The study itself stays an
ordinary Optuna study: its plots, its dashboard and its storages work.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from hypergrad import checks
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates
from hypergrad.study.optuna_private import (
    FixedChoices,
    fix,
    frozen,
    id_of,
    note,
    propose,
    suggest,
)
from hypergrad.study.sampler import SavedRandomness, make_sampler
from hypergrad.study.signature import check_same, checked_directions, grid_seed
from hypergrad.study.slots import ASKED, ERROR, REASON, Slots, TrialCounts, trial_counts
from hypergrad.study.storage import open_storage
from hypergrad.study.workers import Worker, others_alive

_log = logging.getLogger("hypergrad")

# A traceback's end says what went wrong; databases limit a text's length.
_LONGEST_ERROR, _LONGEST_REASON = 8000, 500


@dataclass(frozen=True)
class Proposal:
    """One trial to run: active discrete `choices`, and a `start` for each active Float.

    Values are in the user's own units. `recorded` says whether the study already holds the starts
    as the trial's parameters; if not, `finish` and `prune` record what they were refined to.
    `unrecorded` are those starts as parameters of the study, before any rounding between units.
    """

    trial: optuna.Trial
    choices: dict[str, Any]
    start: dict[str, float]
    recorded: bool
    unrecorded: dict[str, Any]

    @property
    def number(self) -> int:
        """The trial's number in the study."""
        return self.trial.number


def open_study(
    space: Space,
    storage: str | os.PathLike[str] | BaseStorage | None = None,
    sampler: str | BaseSampler = "tpe",
    direction: str | Sequence[str] = "minimize",
    seed: int | None = None,
    name: str = "hypergrad",
    *,
    num_trials: int | None = None,
    grid_points: int = 5,
    beat_every: float = 10.0,
    grace: float = 60.0,
    max_retries: int | None = None,
) -> "OpenStudy":
    """Make or reopen the study `name` of `space` in `storage`; use the result in a `with` block.

    `storage` is None (memory), a path `"sweep.journal"`, a database's URL or an Optuna storage.
    `sampler` is `"tpe"` and `"random"` (Optuna's, with its defaults), `"grid"` (all values of the
    discrete hyperparameters, `grid_points` values evenly on the scale of each Float and of each
    Int that has more, in an order that no seed changes), or an Optuna sampler. At most
    `num_trials` trials are run over all processes and all times that the study is opened; None is
    no limit.

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
    checks.instance("space", space, Space, "a hypergrad.Space")
    checks.text("name", name)
    if seed is not None:
        checks.checked_seed(seed)
    directions = checked_directions(direction)
    if num_trials is not None:
        num_trials = checks.integer("num_trials", num_trials, remedy="or None for no limit")
    if max_retries is not None:
        max_retries = checks.integer("max_retries", max_retries, 0, "or None for no limit")
    coordinates = Coordinates(space)
    grid_points = checks.integer("grid_points", grid_points, 2)
    # Every process lists the grid for itself: a number is a point, whatever its seed.
    points = coordinates.grid(grid_points, 0) if sampler == "grid" else None
    engine = make_sampler(sampler, seed)
    backend = open_storage(storage)
    study = optuna.create_study(
        storage=backend,
        sampler=engine,
        # What stops a trial early is the sweep's scheduler; Optuna's median would be asked nothing.
        pruner=optuna.pruners.NopPruner(),
        study_name=name,
        directions=directions,  # compared below: Optuna would load one of others without a word
        load_if_exists=True,
    )
    check_same(study, coordinates, directions)
    if points is not None and (first := grid_seed(study, grid_points, seed)) != 0:
        points = coordinates.grid(grid_points, first)
    worker = Worker(backend, backend.get_study_id_from_name(name), beat_every, grace)
    slots = Slots(study, worker, num_trials, points, max_retries)
    randomness = SavedRandomness(engine, seed, worker)
    opened = OpenStudy(study, coordinates, randomness, slots, worker)
    # The worker has signed by now: of two that open at once, at most one finds itself alone.
    randomness.open(worker.is_alone(), study.get_trials(deepcopy=False))
    opened.recover()
    return opened


class OpenStudy:
    """A study that this process works on, made by `open_study`; one thread asks and tells.

    `study` is the Optuna study, `space` the space, `storage` where the study is kept.
    """

    def __init__(
        self,
        study: optuna.Study,
        coordinates: Coordinates,
        randomness: SavedRandomness,
        slots: Slots,
        worker: Worker,
    ) -> None:
        self.study, self.space, self.storage = study, coordinates.space, worker.storage
        self._coordinates, self._randomness = coordinates, randomness
        self._slots, self._worker = slots, worker
        # The numbers of our running trials.
        self._held: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            # What went wrong first is what a person has to know.
            _log.warning(f"running trials could not be given back: {checks.printable(str(error))}")

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
            # Taken over by somebody: `finish` or `prune` will say so.
            self._held.discard(proposal.number)

    def finish(
        self,
        proposal: Proposal,
        value: float | Sequence[float],
        refined: Mapping[str, float] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Record a trial that ran in full; False where it was taken over in the meantime.

        `refined` gives the values of all active Floats that the study shall hold, in the user's
        units, where the proposal is not `recorded`; None is the start. `attrs` become user
        attributes (JSON), beside `start` for a proposal that is not recorded. NaN fails the trial.
        Raises ValueError for `refined` values that are not finite or outside their bounds.
        """
        values = np.ravel(value).astype(float).tolist()
        if any(map(math.isnan, values)):
            return self.fail(proposal, "ValueError: the trial's value is NaN.")
        return self._tell(proposal, TrialState.COMPLETE, values, refined, attrs)

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
        # A pruned trial's value is its last report; Optuna warns of a step that is told twice.
        if step not in frozen(proposal.trial).intermediate_values:
            self.report(proposal, value, step)
        return self._tell(proposal, TrialState.PRUNED, None, refined, attrs)

    def fail(self, proposal: Proposal, error: str, attrs: Mapping[str, Any] | None = None) -> bool:
        """Record that a trial failed for good: attribute `error`, and its last line, `reason`."""
        error = checks.without_passwords(error, urls_only=True)
        reason = checks.printable(error.strip().splitlines()[-1])
        why = {ERROR: error[-_LONGEST_ERROR:], REASON: reason[:_LONGEST_REASON]}
        return self._tell(proposal, TrialState.FAIL, None, None, {**(attrs or {}), **why})

    def enqueue(self, hyper: Mapping[str, Any], *, again: bool = False) -> bool:
        """Queue a known good point; False where the same one was queued before, in any process.

        With `again` it is queued once more, and dropped where no slot is left.

        `hyper` holds values of Floats, Ints and Categoricals in the user's units; what is left out
        is proposed by the sampler. It takes one of the `num_trials` slots. Raises ValueError for
        unknown names, values outside the space and values that are inactive beside the others.
        """
        self._coordinates.check(hyper, "hyper", complete=False)
        return self._slots.enqueue(self._coordinates.to_study(hyper), again)

    def check(self, hyper: Mapping[str, Any]) -> None:
        """Raise ValueError unless `hyper` holds all active values, each within the space."""
        self._coordinates.check(hyper, "hyper", complete=True)

    def add_finished(
        self, hyper: Mapping[str, Any], value: float, attrs: Mapping[str, Any] | None = None
    ) -> bool:
        """Add a finished trial of another study, from which samplers learn; takes no slot.

        `hyper` holds all active values, in the user's units. Samplers rank its `value` beside this
        study's: scale it where the data differ. False where it is in the study already. Raises
        ValueError as `enqueue`, and where an active value is missing.
        """
        self._coordinates.check(hyper, "hyper", complete=True)
        params = self._coordinates.to_study(hyper)
        distributions = {p: d for _, p, d in self._coordinates.parameters() if p in params}
        trial = create_trial(
            params=params,
            distributions=distributions,
            value=float(value),
            user_attrs=dict(attrs or {}),
        )
        return self._slots.add(trial)

    def progress(self) -> TrialCounts:
        """Count finished, running and queued trials of all processes."""
        return trial_counts(self.study)

    def others(self) -> list[str]:
        """Say who else works on the study, each in a few words."""
        return others_alive(self.storage, self._worker.study_id, self._worker.id)

    def recover(self) -> list[int]:
        """Queue again the running trials of dead workers; return their numbers.

        A lost trial becomes FAIL; its successor starts from the same values. Whoever sets the
        state queues the successor; a worker that dies between the two is found by the next one.
        Trials that Optuna was asked for directly are left alone. Cost: one read of all trials.
        """
        return self._slots.recover(self._held)

    def close(self) -> None:
        """Give running trials of this process back to the queue and stop its beats."""
        held, self._held = self._held, set()
        try:
            # Before the worker says that it ended: others would recover the same trials.
            self._slots.give_back(held)
        finally:
            self._worker.close()

    def _fill(self, trial_id: int, wanted: dict[str, Any], record: bool) -> Proposal:
        """Propose the values of a trial that is ours, parents first."""
        sampler, is_grid = self.study.sampler, self._slots.points is not None
        choices: dict[str, Any] = {}
        start: dict[str, float] = {}
        unrecorded: dict[str, Any] = {}
        # Optuna's trial asks the study's sampler when it is made, so this is the way to reach it.
        if wanted and not is_grid:
            self.study.sampler = FixedChoices(wanted, sampler)
        try:
            trial = optuna.Trial(self.study, trial_id)
            # One that is queued again brings its point along, unless its first ask was cut short.
            if is_grid and not frozen(trial).system_attrs.get("fixed_params"):
                fix(trial, self._slots.point(frozen(trial)))
            for name, parameter, distribution in self._coordinates.parameters():
                if not self.space.is_active(name, choices):
                    continue
                if name in self.space.discrete:
                    choices[name] = suggest(trial, parameter, distribution)
                    continue
                value = (suggest if record else propose)(trial, parameter, distribution)
                start[name] = self._coordinates.value(name, value)
                if not record:
                    unrecorded[parameter] = value
        finally:
            self.study.sampler = sampler
        # Not before: a trial whose ask has failed nobody will tell, so `recover` may take it.
        self._held.add(trial.number)
        asked = {"params": unrecorded, "random": self._randomness.place()}
        # Last, and at once: a trial without it is asked for again, from the same random state.
        written = {key: value for key, value in asked.items() if value}
        self.storage.set_trial_system_attr(trial_id, ASKED, written)
        return Proposal(trial, choices, start, record, unrecorded)

    def _tell(
        self,
        proposal: Proposal,
        state: TrialState,
        value: Sequence[float] | None,
        refined: Mapping[str, float] | None,
        attrs: Mapping[str, Any] | None,
    ) -> bool:
        self._check_refined(proposal, refined)
        trial = proposal.trial
        try:
            # The state comes last: nothing can be written to a finished trial.
            if not proposal.recorded:
                attrs = {"start": dict(proposal.start), **(attrs or {})}
            # The Floats that the sampler is to learn from, for which there is one chance.
            params = proposal.unrecorded if refined is None else self._coordinates.to_study(refined)
            note(trial, self._coordinates.internal(params), attrs or {})
            self.study.tell(trial, value, state=state)
        except (UpdateFinishedTrialError, ValueError):
            # Somebody thought that this process was dead, and has queued the trial again: `tell`
            # says so by a ValueError, which may also be about what was told.
            if not self.storage.get_trial(id_of(trial)).state.is_finished():
                raise
            return False
        finally:
            self._held.discard(proposal.number)
        self._randomness.save_if_moved()
        return True

    def _check_refined(self, proposal: Proposal, refined: Mapping[str, float] | None) -> None:
        if refined is None:
            return
        if proposal.recorded:
            raise ValueError(
                f"refined={dict(refined)!r} comes too late: trial {proposal.number} has its start "
                "recorded. Ask with record=False."
            )
        if refined.keys() != proposal.start.keys():
            raise ValueError(
                f"refined holds {sorted(refined)}: give exactly the active Floats "
                f"{sorted(proposal.start)}."
            )
        self._coordinates.check({**proposal.choices, **refined}, "refined", complete=False)
