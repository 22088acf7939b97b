"""Who proposes: samplers by their names, the one for a space, and what is tried before any."""

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from hypergrad.checks import choice
from hypergrad.knowledge.priors import prior_point, with_priors
from hypergrad.knowledge.warm import warm_points
from hypergrad.space.dimensions import Categorical
from hypergrad.space.space import Space
from hypergrad.study.sampler import SAMPLERS, make_sampler

# Trials up to which a Gaussian process is worth its time, and from which evolution is.
_FEW, _MANY = 100, 1000


def sampler_of(
    sampler: str | BaseSampler, space: Space, num_trials: int, seed: int
) -> tuple[str | BaseSampler, int | None]:
    """What `open_study` is given: a sampler, or its name, and the seed if that is still to be used.

    "auto" is the one of `advised`. Where the space has priors, the sampler follows them.
    """
    if isinstance(sampler, str):
        choice("sampler", sampler, (*SAMPLERS, "auto"), "or give a sampler of Optuna")
        sampler = advised(space, num_trials) if sampler == "auto" else sampler
    elif not isinstance(sampler, BaseSampler):
        make_sampler(sampler, None)  # refuses it
    if sampler == "grid":
        return sampler, seed
    made = make_sampler(sampler, seed if isinstance(sampler, str) else None)
    believing = with_priors(made, space, seed)
    if believing is not made:
        return believing, None
    return (sampler, seed) if isinstance(sampler, str) else (sampler, None)


def advised(space: Space, num_trials: int) -> str:
    """The name of the sampler for a space and so many trials.

    "tpe" wherever there are choices or conditions; among numbers alone "gp" for up to 100 trials
    of up to 20 hyperparameters and "cmaes" for 1,000 trials and more, where their packages are
    installed.
    """
    plain = all(d.when is None and not isinstance(d, Categorical) for d in space.values())
    if plain and num_trials <= _FEW and len(space) <= 20 and _installed("torch"):
        return "gp"
    if plain and num_trials >= _MANY and len(space) >= 2 and _installed("cmaes"):
        return "cmaes"
    return "tpe"


def first_points(
    space: Space,
    sampler: str | BaseSampler,
    enqueue: Iterable[Mapping[str, Any]],
    earlier: list[tuple[str, optuna.Study]],
    own: optuna.Study,
    num_trials: int,
) -> list[Mapping[str, Any]]:
    """What is tried before anything is proposed: known points, what is believed, earlier sweeps'.

    Of the latter a fifth of the trials, at most eight; earlier sweeps are read for a new study
    only, as they may have gone on since.
    """
    points: list[Mapping[str, Any]] = list(enqueue)
    believed = prior_point(space)
    if believed and sampler != "grid":
        points.append(believed)
    if earlier and not own.get_trials(deepcopy=False):
        points += warm_points(earlier, space, own, max(1, min(8, num_trials // 5)))
    return points


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
