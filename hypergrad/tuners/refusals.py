"""What is said of a run whose hypergradients were mostly refused."""

import functools
import logging
from collections.abc import Callable, Sequence

import jax

from hypergrad.trees import Hyper
from hypergrad.tuners.base import TunerState
from hypergrad.tuners.trust import LATELY, REASONS

_log = logging.getLogger("hypergrad")


def refusals_in(refused: Sequence[int]) -> str | None:
    """Where more than a third of the last updates were refused, a sentence that says so and why.

    `refused` are the indices into `REASONS` of a run's updates, in order. The sentence lacks its
    subject: what is not to be trusted.
    """
    last = list(refused)[-LATELY:]
    reasons = [reason for reason in last if reason]
    # Of two or three updates a share says nothing.
    if len(last) < 4 or 3 * len(reasons) <= len(last):
        return None
    most = max(set(reasons), key=reasons.count)
    return (
        f"is not to be trusted: {len(reasons)} of the last {len(last)} updates were refused, "
        f"mostly because {REASONS[most]}. Start from a lower learning rate, or let hypergrad.tune "
        "look for a start."
    )


def warning(best: Callable[[TunerState], Hyper]) -> Callable[[TunerState], Hyper]:
    """`best`, with a warning where more than a third of the last updates were refused."""

    @functools.wraps(best)
    def warned(state: TunerState) -> Hyper:
        # Inside of a program nobody reads the log.
        if not isinstance(state.trust.refusals, jax.core.Tracer | jax.ShapeDtypeStruct):
            _warn_of(state)
        return best(state)

    return warned


def _warn_of(state: TunerState) -> None:
    bits, updates = int(state.trust.refusals), int(state.updates)
    last = [bits >> i & 1 for i in range(min(updates, LATELY))]
    if len(last) >= 4 and 3 * sum(last) > len(last):
        _log.warning(
            f"best: {sum(last)} of the last {len(last)} updates were refused (info.refused says "
            "why), so that the values to keep are not to be trusted. Start from a lower learning "
            "rate, or let hypergrad.tune look for a start."
        )
