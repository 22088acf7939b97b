"""The estimator that "auto" stands for: the cheapest exact one that fits the memory."""

import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.data.batches import num_batches
from hypergrad.estimators.base import Estimate, Estimator, ValidateAt, Window, compiled_estimate
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.implicit import Implicit
from hypergrad.estimators.memory import device_bytes, temporary_bytes
from hypergrad.estimators.recompute import repetitions
from hypergrad.estimators.unrolled import Checkpoint, Unrolled
from hypergrad.linear.krylov import ConjugateGradient
from hypergrad.problem.structure import NoForwardModeError
from hypergrad.trees import Hyper, State, strong

_log = logging.getLogger("hypergrad")

# Gradient evaluations per training step, as timed by `python -m benchmarks.choice` ("step": by
# `benchmarks.speed`, 1.08 times "none").
_UNROLLED: dict[Checkpoint, float] = {"none": 3.3, "step": 3.6, "sqrt": 5.0, "log": 4.3}
_FORWARD, _TANGENT = 2.8, 1.2
# Beyond, forward mode costs more than anything else, and its basis alone would fill memory.
_MAX_TANGENTS = 100
_PRODUCTS = 20
CG = Implicit(ConjugateGradient(_PRODUCTS, tolerance=1e-3))


class Choice(NamedTuple):
    """An estimator and why it was chosen."""

    estimator: Estimator
    reason: str


@dataclasses.dataclass(frozen=True)
class Auto(Estimator):
    """The estimator that `estimator="auto"` stands for in a tuner: chosen by shapes when traced.

    Only structure and memory are looked at, as a traced program has no values to probe: see
    `choose_estimator` for the whole examination. What it chose is logged at each compilation
    (logger "hypergrad", level INFO).

    Args:
      validate_at: as in `Unrolled`.
      memory_limit: bytes; None for half of the device's memory.
    """

    validate_at: ValidateAt = "last"
    memory_limit: int | None = None

    def resolve(self, window: Window, hyper: Hyper) -> Estimator:
        """The cheapest exact estimator that fits."""
        limit = device_bytes() if self.memory_limit is None else self.memory_limit
        choice = cheapest_exact(window, strong(hyper), self.validate_at, limit)
        _log.info('estimator="auto": %s, as %s', choice.estimator, choice.reason)
        return choice.estimator

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """By the estimator that `resolve` names."""
        return self.resolve(window, hyper).estimate(window, hyper, state)


class NothingFitsError(ValueError):
    """No exact estimator fits the memory."""


def cheapest_exact(window: Window, hyper: Hyper, validate_at: ValidateAt, limit: int) -> Choice:
    """From shapes alone: traced values will do."""
    count, steps = count_of(hyper), window.num_steps
    exact: list[Estimator] = [Unrolled(None, mode, validate_at) for mode in _UNROLLED]
    if count <= _MAX_TANGENTS:
        exact.append(Forward(validate_at=validate_at))
    costs = {e: evaluations_of(e, window, hyper) / steps for e in exact}
    # From the cheapest up, as each one asked about is compiled: the first that fits ends it.
    needed = {}
    for estimator in sorted(costs, key=lambda e: costs[e]):
        try:
            needed[estimator] = temporary_bytes(compiled_estimate(estimator, window, hyper))
        except NoForwardModeError:
            continue
        if needed[estimator] <= limit:
            what = f"{count} hyperparameter{'s' * (count > 1)} over {steps} steps"
            cost = f"{costs[estimator]:.1f} gradient evaluations a step"
            memory = f"{needed[estimator] / 2**20:.1f} of {limit / 2**20:.0f} MiB"
            return Choice(estimator, f"{what}; the cheapest exact one that fits: {cost}, {memory}")
    sizes = ", ".join(f"{e}: {size}" for e, size in needed.items())
    raise NothingFitsError(
        f"memory_limit={limit} bytes is too little for every exact estimator ({sizes}). Take fewer "
        "steps or smaller batches, a window (Unrolled(window=...)), Forward(chunk=...), or "
        "Implicit for hyperparameters of the loss."
    )


def evaluations_of(estimator: Estimator, window: Window, hyper: Hyper) -> float:
    """Gradient evaluations of one estimate, by what was measured on digits."""
    steps = window.num_steps
    if isinstance(estimator, Unrolled):
        again = repetitions(steps) if estimator.checkpoint == "log" else 0
        return (_UNROLLED[estimator.checkpoint] + again) * steps
    if isinstance(estimator, Implicit):
        return steps + (2 * _PRODUCTS + 10) * num_batches(window.train)
    return (_FORWARD + _TANGENT * count_of(hyper)) * steps


def count_of(hyper: Hyper) -> int:
    """How many numbers `hyper` holds."""
    return sum(int(jnp.size(leaf)) for leaf in jax.tree.leaves(hyper))
