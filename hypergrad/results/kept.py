"""Training states of unfinished trials in a folder, from which their successors go on."""

import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from hypergrad.population.member import PopulationState
from hypergrad.results.saved import checked_folder
from hypergrad.study.optuna_private import frozen
from hypergrad.study.slots import lineage
from hypergrad.study.study import Proposal
from hypergrad.training.arrays import (
    TornError,
    cannot_now,
    put_back,
    read_checkpoint,
    saved_updates,
    take_apart,
    write_checkpoint,
)

_log = logging.getLogger("hypergrad")

# Seconds of training that a run between two rungs may lose.
_OFTEN = 30.0


class Keeper:
    """Keeps the states of a study's unfinished trials in `folder`, one folder for each attempt.

    A trial that is queued again (its process died, or handed it back) is the next attempt at its
    slot, and goes on from what any attempt before it has kept. Several processes may share the
    folder. A state that cannot be written costs a warning; what cannot be read is trained anew.

    Raises ValueError for a folder that cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], study: str) -> None:
        try:
            path = checked_folder(folder)
        except ValueError as error:
            raise ValueError(f"checkpoint: {error}") from None
        # A name that is one part of a path, whatever the study is called.
        self._place = path / quote(study, safe="")
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether much would be lost by now."""
        return time.monotonic() - self._last > _OFTEN

    def keep(self, state: PopulationState, proposals: Sequence[Proposal]) -> None:
        """Write the states of these trials, which stand in the first slots."""
        arrays = take_apart(state)
        steps = np.asarray(state.trail.seen)
        for i, proposal in enumerate(proposals):
            folder = self._folder(*lineage(frozen(proposal.trial)))
            before = saved_updates(folder)
            # Several times at one rung only where it was gone on from.
            if before and before[0] >= steps[i]:
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_checkpoint(folder, int(steps[i]), [x[i] for x in arrays], {})
            except Exception as error:
                found = cannot_now(error, folder)
                if found is None:
                    raise
                _log.warning(f"#{proposal.number} is not kept: {found}")
                continue
            for old in before:
                shutil.rmtree(folder / str(old), ignore_errors=True)
        self._last = time.monotonic()

    def restored(self, state: PopulationState, proposals: Sequence[Proposal]) -> PopulationState:
        """The state with what is kept of these trials in their slots."""
        arrays = [np.array(x) for x in take_apart(state)]
        found = False
        for i, proposal in enumerate(proposals):
            kept = self._newest(proposal, [x[i] for x in arrays])
            if kept is not None:
                found = True
                for array, value in zip(arrays, kept, strict=True):
                    array[i] = value
        return put_back(arrays, state) if found else state

    def forget(self, proposals: Iterable[Proposal]) -> None:
        """Remove what is kept of trials that have ended."""
        for proposal in proposals:
            root, attempt = lineage(frozen(proposal.trial))
            for one in range(attempt + 1):
                shutil.rmtree(self._folder(root, one), ignore_errors=True)

    def _folder(self, root: int, attempt: int) -> Path:
        return self._place / f"{root}-{attempt}"

    def _newest(self, proposal: Proposal, like: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """The longest trained state of any attempt before this one that can be read."""
        root, attempt = lineage(frozen(proposal.trial))
        kept = [
            (updates, folder)
            for folder in (self._folder(root, one) for one in range(attempt))
            for updates in saved_updates(folder)
        ]
        for updates, folder in sorted(kept, reverse=True):
            try:
                arrays, _ = read_checkpoint(folder, updates)
            except (TornError, OSError) as error:
                _log.warning(f"#{proposal.number}: {folder}/{updates} cannot be used ({error}).")
                continue
            same = [(x.shape, x.dtype) for x in arrays] == [(x.shape, x.dtype) for x in like]
            if same:
                _log.info(f"#{proposal.number} goes on from update {updates} of #{root}.")
                return arrays
            _log.warning(f"#{proposal.number}: {folder}/{updates} is of another program.")
        return None
