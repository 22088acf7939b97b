"""Local search, the plainest polish: the best point with one coordinate moved, in turn."""

from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution

from hypergrad.knowledge.positions import position, value_at
from hypergrad.knowledge.warm import fitted
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates
from hypergrad.study.ranking import ranked

# The first step, in ranges; it is halved each time that all coordinates have had their turn.
_STEP, _SHRINK = 0.1, 0.5


def neighbour(study: optuna.Study, space: Space, taken: int = 0) -> dict[str, Any] | None:
    """The best point so far with one coordinate moved; None where nothing has trained in full.

    `taken` says which turn it is: coordinates take turns, up and down with them, a choice moves to
    the next one. What becomes active by the move is left to be proposed.
    """
    best = ranked(study)
    if not best:
        return None
    coordinates, values = Coordinates(space), best[0].hyper
    movable = [name for name in values if _others(coordinates, name)]
    if not movable:
        return None
    turn, which = divmod(taken, len(movable))
    name = movable[which]
    moved = {**values, name: _moved(coordinates, name, values[name], turn)}
    return fitted(moved, coordinates)


def _others(coordinates: Coordinates, name: str) -> bool:
    distribution = coordinates.distributions[name]
    return not distribution.single()


def _moved(coordinates: Coordinates, name: str, value: Any, turn: int) -> Any:
    """A value near this one, another one for each turn."""
    distribution = coordinates.distributions[name]
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        # Never by all of them, which would be no move.
        return choices[(choices.index(value) + 1 + turn % (len(choices) - 1)) % len(choices)]
    (parameter,) = coordinates.to_study({name: value}).values()
    place, sign = position(distribution, parameter), 1 if turn % 2 == 0 else -1
    step = _STEP * _SHRINK ** (turn // 2)
    # Back from a bound, where a step beyond it would be none.
    sign = sign if 0 <= place + sign * step <= 1 else -sign
    moved = value_at(distribution, place + sign * step)
    if isinstance(distribution, IntDistribution) and moved == parameter:
        moved = parameter + sign * distribution.step
        moved = moved if distribution.low <= moved <= distribution.high else parameter - sign
    return coordinates.value(name, float(moved) if isinstance(moved, np.floating) else moved)
