"""What a run has to say against itself: bad data, a training loss of NaN, refusals, bounds."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from hypergrad.data.batches import Minibatches
from hypergrad.data.contents import bad_examples
from hypergrad.data.streams import is_fixed
from hypergrad.training.history import History, Record
from hypergrad.trees import Batch, State, Train
from hypergrad.tuners.base import Tuner
from hypergrad.tuners.learned import remarks
from hypergrad.tuners.refusals import refusals_in
from hypergrad.tuners.trust import LATELY

_log = logging.getLogger("hypergrad")


class Doubts:
    """Looks at each record; says once where data are not finite, and at the end what was not.

    Data are looked at when an update was not finite, not before.
    """

    def __init__(self, train: Train, valid: Batch, steps: int) -> None:
        self._data, self._steps = {"train": train, "valid": valid}, steps
        self._cause: str | None = None
        self._seen = self._lost = 0

    def see(self, record: Record, has_train_loss: bool, positions: dict[str, Any]) -> None:
        """Take the next record, whose update left streams of data at `positions`."""
        self._seen += 1
        finite = np.isfinite(record.loss) if record.finite is None else record.finite
        if finite:
            self._lost += has_train_loss and not np.isfinite(record.train_loss)
        elif self._cause is None:
            self._cause = self._cause_of(record, positions)
            if self._cause:
                _log.warning(self._cause)

    def cause(self) -> str:
        """Why updates were not finite, as far as the data tell; empty where they do not."""
        return self._cause or ""

    def say(self) -> None:
        """What a run that ended by itself should not be believed in."""
        if self._lost:
            _log.warning(
                f"The training loss was not finite in {self._lost} of {self._seen} updates, though "
                "hypergradients were: what was trained there is not to be relied on. Look for NaN "
                "in the data, or for a loss that reads none of the parameters there."
            )

    def _cause_of(self, record: Record, positions: dict[str, Any]) -> str:
        step = record.first_bad_step
        at = f"Update {record.update} (its training step {step})"
        at = at if step not in (None, -1) else f"Update {record.update}"
        bad = []
        for name, data in self._data.items():
            arrays = data.arrays if isinstance(data, Minibatches) else data
            stacked = name == "train" and not isinstance(data, Minibatches)
            where = bad_examples(arrays, axes=1 + stacked) if is_fixed(data) else None
            if where:
                bad.append(f"{name}, in {'steps and ' * stacked}examples {where}")
        if bad:
            return (
                f"{at} is not finite, and the data are the reason: NaN or infinity in "
                f"{'; '.join(bad)}. Leave these out; an update that meets them is lost."
            )
        read = {n: p["read"] for n, p in positions.items()}
        if "train" in read:
            last = read["train"]
            return (
                f"{at} is not finite. It read batches {last - self._steps + 1} to {last} of "
                "train: NaN in them is one reason, divergence another."
            )
        return ""


def remarks_of(tuner: Tuner, state: State, history: History) -> tuple[str, ...]:
    """What is odd about a run that has ended, a sentence each; the log is warned of them."""
    if not len(history):
        return ()
    refused = refusals_in([int(record.refused or 0) for record in history[-LATELY:]])
    found = [] if refused is None else [f"What the run leaves behind {refused}"]
    # A run whose hyperparameters stand still has none.
    if tuner.space is not None and isinstance(history.hypers, Mapping) and hasattr(state, "now"):
        moved = {n: v for n, v in history.hypers.items() if n in tuner.space.continuous}
        found += remarks(tuner.space, moved)
    for remark in found:
        _log.warning(remark, extra={"remark": True})
    return tuple(found)
