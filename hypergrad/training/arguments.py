"""What `fit` is given, refused by name where it cannot be."""

from typing import Any

import jax

from hypergrad.trees import State, Train
from hypergrad.tuners.base import Tuner


def check_types_of_run(tuner: Any, state: State, train: Train) -> None:
    """Refuse arguments of a wrong type."""
    if not isinstance(tuner, Tuner):
        raise TypeError(
            f"tuner is a {type(tuner).__name__}: give what hypergrad.alternating or restarting "
            "returns."
        )
    try:
        jax.eval_shape(tuner.best, state)
    except (AttributeError, KeyError, TypeError) as error:
        raise TypeError(
            f"state is a {type(state).__name__} that this tuner does not know: give "
            "tuner.init(hyper, key), or the state of an earlier result."
        ) from error
    if callable(train) and not hasattr(train, "__iter__"):
        raise TypeError(f"train is the function {train!r}: call it, or give what it returns.")
