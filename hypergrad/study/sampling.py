"""How a trial's values come from an Optuna sampler: fixed, recorded or only proposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler

__all__ = ["Fixed", "Proposal", "make_sampler", "propose"]

_SAMPLERS = ("tpe", "random", "grid")


@dataclass(frozen=True)
class Proposal:
    """One trial to run: active discrete `choices`, and a `start` for each active Float.

    Values are in the user's own units. `recorded` says whether the study already holds the starts
    as the trial's parameters; if not, `finish` and `prune` record what they were refined to.
    """

    trial: optuna.Trial
    choices: dict[str, Any]
    start: dict[str, float]
    recorded: bool
    # The starts as parameters of the study, before any rounding between units.
    _unrecorded: dict[str, Any]

    @property
    def number(self) -> int:
        """The trial's number in the study."""
        return self.trial.number


class Fixed(PartialFixedSampler):
    """Optuna's sampler with some values given, without its warning that it is experimental.

    The others are proposed by their marginal model over all trials, whatever is given.
    """

    def __init__(self, fixed_params: dict[str, Any], base_sampler: BaseSampler) -> None:
        self._fixed_params = fixed_params
        self._base_sampler = base_sampler


def propose(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Do what `trial.suggest_float` does, but record nothing.

    What a trial has recorded cannot be overwritten on databases, and is what samplers learn from.
    """
    if trial._is_fixed_param(name, distribution):
        return trial._fixed_params[name]
    if trial._is_relative_param(name, distribution):
        return trial.relative_params[name]
    return trial.study.sampler.sample_independent(
        trial.study, trial._get_latest_trial(), name, distribution
    )


def make_sampler(sampler: str | BaseSampler, seed: int | None) -> BaseSampler:
    """Return the sampler that a name stands for; a grid needs one for what it leaves open."""
    if isinstance(sampler, BaseSampler):
        if seed is not None:
            raise ValueError(
                f"seed={seed!r} cannot reach a sampler that is made already: give it to "
                f"{type(sampler).__name__}(seed=...) and leave seed=None here."
            )
        return sampler
    if sampler not in _SAMPLERS:
        raise ValueError(
            f"sampler={sampler!r} is unknown: give one of {', '.join(_SAMPLERS)}, or a sampler of "
            "Optuna."
        )
    return TPESampler(seed=seed) if sampler == "tpe" else RandomSampler(seed=seed)
