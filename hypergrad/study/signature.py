"""What a study was made for, written into it, so that another space or direction is refused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna

from hypergrad.checks import choice
from hypergrad.space.description import fingerprint, first_difference, space_of
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates

# User attributes of the study.
_SPACE = "hypergrad:space"
_RECIPE = "hypergrad:recipe"
_GRID = "hypergrad:grid"


def checked_directions(direction: str | Sequence[str]) -> list[Any]:
    """The directions of a study with one objective or several."""
    if isinstance(direction, str) or not isinstance(direction, Sequence) or not direction:
        direction = [direction]  # type: ignore[list-item]
    return [choice("direction", way, ("minimize", "maximize")) for way in direction]


def check_same(study: optuna.Study, coordinates: Coordinates, wanted: Sequence[str]) -> None:
    """Refuse a study that was made for something else; sign one that is new.

    Raises ValueError naming the direction, or the name and range that differ.
    """
    directions = [d.name.lower() for d in study.directions]
    other = "open it as it was made, or give another name or storage"
    if directions != list(wanted):
        raise ValueError(
            f"direction={' and '.join(wanted)!r}, but the study {study.study_name!r} in this "
            f"storage was made to {' and '.join(directions)}: {other}."
        )
    now = fingerprint(coordinates.space)
    stored = study.user_attrs.get(_SPACE)
    if stored is not None:
        difference = first_difference(stored, now)
        if difference:
            raise ValueError(
                f"The study {study.study_name!r} in this storage was made for another space: "
                f"{difference}. To go on, {other}."
            )
        return
    # Made by Optuna alone: its trials must be of this space.
    ours = {coordinates.names[n]: d for n, d in coordinates.distributions.items()}
    for trial in study.get_trials(deepcopy=False):
        for name, distribution in trial.distributions.items():
            if name in ours and distribution != ours[name]:
                raise ValueError(
                    f"The study {study.study_name!r} in this storage has {name!r} as "
                    f"{distribution!r} and this space as {ours[name]!r}: {other}."
                )
    study.set_user_attr(_SPACE, now)


def check_recipe(study: optuna.Study, **recipe: Any) -> None:
    """Refuse to go on with what makes scores incomparable; sign a study that is new.

    Raises ValueError naming what differs.
    """
    stored = study.user_attrs.get(_RECIPE)
    if stored is None:
        study.set_user_attr(_RECIPE, recipe)
        return
    for name in [n for n in recipe if n in stored]:
        # A study signed by an earlier version may lack a name, and is not refused for that.
        for path, before, now in _differing(name, stored[name], recipe[name]):
            raise ValueError(
                f"{path}={now!r}, but the trials of the study {study.study_name!r} in this storage "
                f"have {path}={before!r}, so that their scores are of another kind: go on as it "
                "began, or give another name or storage."
            )


def recipe_of(study: optuna.Study) -> dict[str, Any]:
    """What a sweep has signed its study with; empty for a study of somebody else's."""
    return study.user_attrs.get(_RECIPE, {})


def _differing(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two entries, by its path."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(n for n in now if n not in before)]:
            # A digest says nothing across versions of JAX.
            if (name in before and name in now) or " under JAX " not in name:
                yield from _differing(f"{path}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield path, before, now


def grid_seed(study: optuna.Study, points: int, seed: int | None) -> int | None:
    """The seed of the grid's order, the same whenever and by whomever a study is opened.

    A study of an earlier version has its first opener's, who must be followed by equals. Raises
    ValueError for another number of points.
    """
    stored = study.user_attrs.get(_GRID)
    if stored is None:
        if study.get_trials(deepcopy=False):
            return seed
        study.set_user_attr(_GRID, points)
    elif stored != points:
        raise ValueError(
            f"grid_points={points}, but the grid of the study {study.study_name!r} in this storage "
            f"has {stored}: go on with these, or give another name or storage."
        )
    return 0


def stored_space(study: optuna.Study) -> Space:
    """Return the space that a study was made for, as it is written in the study.

    Raises ValueError for a study that no sweep has opened.
    """
    stored = study.user_attrs.get(_SPACE)
    if stored is None:
        raise ValueError(
            f"The study {study.study_name!r} says nothing of its space: only studies that "
            "hypergrad.sweep has opened do."
        )
    try:
        return space_of(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The study {study.study_name!r} describes its space as {str(stored)[:80]!r}, which "
            f"cannot be read ({type(error).__name__}: {error})."
        ) from None
