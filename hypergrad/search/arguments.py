"""What a sweep is given, refused by name where it cannot be."""

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from hypergrad.checks import function, instance
from hypergrad.data.splits import check_splits
from hypergrad.population.refine import Refine
from hypergrad.problem.problem import Problem
from hypergrad.search.schedulers import Scheduler
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates


def checked_points(enqueue: Iterable[Mapping[str, Any]], space: Space) -> list[Mapping[str, Any]]:
    """The points of `enqueue`, each seen to lie in the space."""
    instance("enqueue", enqueue, Iterable, "a list of points, dicts by name")
    if isinstance(enqueue, Mapping | str):
        raise TypeError(f"enqueue={enqueue!r} is one point: give a list of them, [{enqueue!r}].")
    points = list(enqueue)
    for i, point in enumerate(points):
        Coordinates(space).check(point, f"enqueue[{i}]", complete=False)
    return points


def check_types(make_problem: Any, space: Any, data: Any, refine: Any, scheduler: Any) -> None:
    """Refuse arguments of a wrong type."""
    if isinstance(make_problem, Problem):
        raise TypeError("make_problem is a Problem: give a function, lambda choices: problem.")
    function("make_problem", make_problem, "choices")
    with contextlib.suppress(ValueError):  # of what has no signature
        try:
            inspect.signature(make_problem).bind({})
        except TypeError as error:
            raise TypeError(
                f"make_problem cannot be called with the choices alone ({error}): give a function "
                "choices -> Problem."
            ) from None
    schedulers = "SuccessiveHalving, Hyperband, ASHA, LearningCurves, PopulationBasedTraining"
    for name, value, kinds, remedy in (
        ("space", space, Space, "a hypergrad.Space"),
        ("refine", refine, Refine | None, "a hypergrad.Refine, or None"),
        ("scheduler", scheduler, Scheduler | None, f"one of {schedulers}, or None"),
    ):
        if not isinstance(value, kinds):
            raise TypeError(f"{name} is a {type(value).__name__}: give {remedy}.")
    check_splits(data, "data")
