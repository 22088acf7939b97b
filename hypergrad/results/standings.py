"""What became of trials: where each stands at a rung, and those whose program raised."""

import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax

from hypergrad.study.study import Proposal

Fate = Literal["goes on", "stopped", "finished", "diverged"]
# The user attribute of a trial that says what it has cost, in gradient evaluations.
EVALUATIONS = "evaluations"


class Standing(NamedTuple):
    """Where one trial stands at a rung.

    Attributes:
      proposal: the trial.
      scores: the objectives, in the study's units; not finite where training diverged.
      refined: the values that the study is told.
      attrs: what is kept beside them.
      fate: whether it trains on, is stopped here, has trained in full, or has no score.
      excess: by how much each constraint is broken; at most 0 is kept to.
    """

    proposal: Proposal
    scores: tuple[float, ...]
    refined: dict[str, float]
    attrs: dict[str, Any]
    fate: Fate = "goes on"
    excess: Mapping[str, float] = MappingProxyType({})

    @property
    def score(self) -> float:
        """The first objective."""
        return self.scores[0]

    @property
    def is_broken(self) -> bool:
        """Whether a constraint is."""
        return any(excess > 0 for excess in self.excess.values())


class Standings(NamedTuple):
    """The trials that have trained for so many steps, and the best finite score among them.

    `why_not_finite` says whether the data are the reason where a trial's score is not finite.
    """

    steps: int
    trials: list[Standing]
    best: float | None
    why_not_finite: str = ""


class Failure(NamedTuple):
    """Trials whose program raised.

    Attributes:
      proposals: the trials.
      error: the traceback; its last line is the reason.
      reason: type and text of the exception, in a line.
      before_training: whether it was raised while a program was made or traced, as every trial of
        the program would meet it, and not by the device.
    """

    proposals: Sequence[Proposal]
    error: str
    reason: str
    before_training: bool


def failure(proposals: Sequence[Proposal], error: Exception) -> Failure:
    """What there is to say about trials whose program raised `error`."""
    told = traceback.TracebackException.from_exception(error)
    # JAX's note about frames that it left out would stand where the reason does.
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK" not in str(note)]
    told.__notes__ = notes or None
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    of_device = isinstance(error, jax.errors.JaxRuntimeError | FloatingPointError)
    lines = "".join(told.format()).splitlines()
    # A text of several lines, or a note, is behind it otherwise.
    lines += [reason] if lines[-1] != reason else []
    return Failure(proposals, "\n".join(lines), reason, not of_device)
