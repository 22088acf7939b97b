"""How long a run is: K training steps for each of so many updates."""

import logging

from hypergrad.checks import integer
from hypergrad.data.streams import is_fixed, steps_of
from hypergrad.trees import Train
from hypergrad.tuners.alternating import horizon

_log = logging.getLogger("hypergrad")


def lengths(
    train: Train, num_updates: int | None, num_steps: int | None, steps_per_update: int | None
) -> tuple[int, int]:
    """(K, updates) of a run."""
    if (num_updates is None) == (num_steps is None):
        raise ValueError(
            f"num_updates={num_updates} and num_steps={num_steps}: give one of them, the length of "
            "the run in updates or in training steps."
        )
    if num_updates is not None:
        return steps_of(train, steps_per_update), integer("num_updates", num_updates)
    num_steps = integer("num_steps", num_steps)
    if steps_per_update is None and not is_fixed(train):
        steps_per_update = horizon(num_steps)
    steps = steps_of(train, steps_per_update)
    if num_steps < steps:
        raise ValueError(f"num_steps={num_steps} is less than one update of K={steps} steps.")
    if num_steps % steps:
        _log.warning(
            f"num_steps={num_steps} is no multiple of K={steps}: the last {num_steps % steps} "
            "steps are not trained."
        )
    return steps, num_steps // steps
