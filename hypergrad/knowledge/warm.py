"""Points from earlier sweeps, on other data or of another space, that are worth a first try.

A portfolio (Feurer 2015's plainest relative): each earlier study says of any point how it would
rank there, by its nearest trials; points are taken one after the other so that for each study at
least one of them ranks high.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.storages import BaseStorage

from hypergrad.checks import WrongTypeError
from hypergrad.knowledge.positions import mean_square_distance
from hypergrad.space.dimensions import Categorical, Float, Int
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates
from hypergrad.study.optuna_private import storage_of
from hypergrad.study.ranking import ranked
from hypergrad.study.storage import open_storage, place_of

_log = logging.getLogger("hypergrad")

# Candidates of each study, and trials that a prediction is an average of.
_BEST, _NEIGHBOURS = 10, 3
# Points nearer than this, in ranges squared, say the same.
_SAME = 0.02**2


class _Earlier(NamedTuple):
    """What a study knows: points in this space, parameters by name, and their ranks in [0, 1]."""

    points: list[dict[str, Any]]
    ranks: np.ndarray


def warm_studies(warm_from: Any) -> list[tuple[str, optuna.Study]]:
    """The studies that `warm_from` means, each with where it stands there.

    Raises ValueError for what is neither a study nor a storage that holds one.
    """
    if isinstance(warm_from, str | Mapping) or not isinstance(warm_from, Iterable):
        raise WrongTypeError(f"warm_from={warm_from!r}: give a list of storages or studies.")
    found: list[tuple[str, optuna.Study]] = []
    for i, source in enumerate(warm_from):
        label, study = f"warm_from[{i}]", getattr(source, "study", source)
        if isinstance(study, optuna.Study):
            found.append((label, study))
            continue
        if study is None:
            raise WrongTypeError(f"{label} is None: give a storage or a study.")
        try:
            kept = isinstance(study, BaseStorage)
            storage = study if kept else open_storage(study, read_only=True)
        except (OSError, TypeError, ValueError) as error:
            kind = ValueError if isinstance(error, FileNotFoundError) else type(error)
            said = str(error).rstrip(".")
            raise kind(f"{label}: {said}; it must be one that a sweep has used.") from None
        names = optuna.get_all_study_names(storage)
        if not names:
            raise ValueError(f"{label}={source!r} holds no study: give one that a sweep has used.")
        found += [(label, optuna.load_study(study_name=n, storage=storage)) for n in names]
    return found


def warm_points(
    studies: Sequence[tuple[str, optuna.Study]], space: Space, own: optuna.Study, count: int
) -> list[dict[str, Any]]:
    """Up to `count` points for `own`, a study of `space`, in the order in which to try them.

    What a point leaves out (a hyperparameter that is new, a choice that is gone) is to be proposed.
    Raises ValueError for a study without a common hyperparameter.
    """
    coordinates = Coordinates(space)
    earlier = []
    for label, study in studies:
        if _is_same(study, own):
            continue
        known = _known(label, study, coordinates)
        if known is not None:
            earlier.append(known)
    distributions = {p: d for _, p, d in coordinates.parameters()}
    candidates = [point for known in earlier for point in known.points[:_BEST]]
    predicted = np.array(
        [[_predicted(known, point, distributions) for known in earlier] for point in candidates]
    )
    chosen: list[int] = []
    covered = np.ones(len(earlier))
    while len(chosen) < count:
        left = [
            i
            for i, point in enumerate(candidates)
            if all(
                mean_square_distance(distributions, point, candidates[j]) > _SAME for j in chosen
            )
        ]
        if not left:
            break
        gain = [(np.minimum(covered, predicted[i]).sum(), predicted[i].mean()) for i in left]
        chosen.append(left[min(range(len(left)), key=gain.__getitem__)])
        covered = np.minimum(covered, predicted[chosen[-1]])
    return [coordinates.from_study(candidates[i]) for i in chosen]


def fitted(values: Mapping[str, Any], coordinates: Coordinates) -> dict[str, Any]:
    """What of `values` this space can hold: numbers cut to their bounds, without the inactive."""
    space, result = coordinates.space, dict[str, Any]()
    for name in coordinates.order:
        if name not in values or not _may_be_active(space, name, result):
            continue
        dimension, value = space[name], values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(dimension, Categorical):
            if dimension.admits(value):
                result[name] = value
        elif not is_number:
            continue
        elif isinstance(dimension, Int):
            step = dimension.step or 1
            cut = min(max(round(value), dimension.low), dimension.high)
            result[name] = dimension.low + round((cut - dimension.low) / step) * step
        elif isinstance(dimension, Float) and dimension.low is not None:
            assert dimension.high is not None
            result[name] = dimension.on_grid(min(max(float(value), dimension.low), dimension.high))
    return result


def _may_be_active(space: Space, name: str, known: Mapping[str, Any]) -> bool:
    """Whether a hyperparameter is active beside what is known, or may come to be."""
    try:
        return space.is_active(name, {n: v for n, v in known.items() if n in space.discrete})
    except ValueError:  # a parent is open
        return True


def _known(label: str, study: optuna.Study, coordinates: Coordinates) -> _Earlier | None:
    """What a study says about points of this space; None where nothing has trained in full."""
    best = _ranked(study)
    if not best:
        _log.warning(f"{label}: the study {study.study_name!r} has no trial that trained in full.")
        return None
    names = {name for values in best for name in values}
    if names.isdisjoint(coordinates.space):
        raise ValueError(
            f"{label}: the study {study.study_name!r} holds {sorted(names)}, and this space "
            f"{list(coordinates.space)}: give a study with a common hyperparameter."
        )
    points = [coordinates.to_study(fitted(values, coordinates)) for values in best]
    return _Earlier(points, np.arange(len(points)) / len(points))


def _ranked(study: optuna.Study) -> list[dict[str, Any]]:
    """Values of a study's full trials, the best first; of one that no sweep made its parameters."""
    try:
        return [best.hyper for best in ranked(study)]
    except ValueError:
        sign = -1 if study.directions[0].name == "MAXIMIZE" else 1
        trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        return [dict(t.params) for t in sorted(trials, key=lambda t: sign * (t.values or [0])[0])]


def _predicted(
    known: _Earlier, point: Mapping[str, Any], distributions: Mapping[str, Any]
) -> float:
    """How a point would rank in a study, 0 the best: by its nearest trials there."""
    far = np.array([mean_square_distance(distributions, point, other) for other in known.points])
    nearest = np.argsort(far, kind="stable")[:_NEIGHBOURS]
    weights = 1 / (far[nearest] + _SAME)
    return float(np.sum(weights * known.ranks[nearest]) / weights.sum())


def _is_same(study: optuna.Study, other: optuna.Study) -> bool:
    if study.study_name != other.study_name:
        return False
    places = [place_of(storage_of(s)) for s in (study, other)]
    same = storage_of(study) is storage_of(other)
    return same or (places[0] is not None and places[0] == places[1])
