"""Programs: what the trials with equal discrete choices share, compiled once."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hypergrad.data.batches import Minibatches
from hypergrad.data.splits import Splits
from hypergrad.estimators.base import Estimator, Window, require_structure
from hypergrad.estimators.difference import FiniteDifference
from hypergrad.problem.problem import Problem
from hypergrad.problem.structure import StructureError
from hypergrad.space.space import Space
from hypergrad.tuners.population.population import Population
from hypergrad.tuners.population.refine import Refine


class ProblemError(ValueError):
    """A mistake in `make_problem` that every trial would meet: it ends the sweep."""


class Program(NamedTuple):
    """A problem of fixed choices, the space of its active Floats, and what trains its members."""

    problem: Problem
    space: Space
    members: Population


def continuous_part(space: Space, choices: Mapping[str, Any]) -> Space:
    """The Floats that are active under `choices`, without their conditions."""
    return Space(
        {
            name: dataclasses.replace(space[name], when=None)
            for name in space.continuous
            if space.is_active(name, choices)
        }
    )


class Programs:
    """Programs by their choices, each made once.

    Raises:
      ProblemError: `make_problem` returns no `Problem`, or one that ignores a hyperparameter or
        reads one that the space lacks.
    """

    def __init__(
        self,
        make_problem: Callable[[dict[str, Any]], Problem],
        space: Space,
        data: Splits,
        batch_size: int,
        refine: Refine | None,
        steps_per_update: int,
    ) -> None:
        self._make_problem, self._space, self._data = make_problem, space, data
        self._batch_size, self._refine, self._steps = batch_size, refine, steps_per_update
        self._made: dict[tuple[Any, ...], Program] = {}

    def of(self, choices: dict[str, Any]) -> Program:
        """The program of these choices."""
        key = tuple(sorted(choices.items(), key=lambda item: item[0]))
        if key not in self._made:
            self._made[key] = self._make(choices)
        return self._made[key]

    def plain(self, choices: dict[str, Any]) -> Program:
        """The same without refinement: hyperparameters stand still."""
        problem, space, _ = program = self.of(choices)
        if self._refine is None:
            return program
        return Program(problem, space, self._population(problem, space, None))

    def _make(self, choices: dict[str, Any]) -> Program:
        problem = self._make_problem(dict(choices))
        if not isinstance(problem, Problem):
            raise ProblemError(
                f"make_problem returned {type(problem).__name__} for {choices}: return a "
                "hypergrad.Problem, such as hypergrad.bilevel makes."
            )
        space = continuous_part(self._space, choices)
        self._check(problem, space, choices)
        # Choices under which no Float is active leave nothing to refine.
        refine = self._refine if space.continuous else None
        return Program(problem, space, self._population(problem, space, refine))

    def _population(self, problem: Problem, space: Space, refine: Refine | None) -> Population:
        return Population(
            problem,
            space,
            refine,
            self._data.train,
            self._data.valid,
            self._batch_size,
            steps_per_update=None if refine is not None else self._steps,
            test=self._data.test,
        )

    def _check(self, problem: Problem, space: Space, choices: dict[str, Any]) -> None:
        # Nothing is differentiated without refinement, but a value that is ignored is a mistake.
        estimator: Estimator = FiniteDifference()
        if self._refine is not None and isinstance(self._refine.estimator, Estimator):
            estimator = self._refine.estimator
        middle = space.from_unit({name: np.float32(0.5) for name in space.continuous})
        batches = Minibatches(self._data.train, self._batch_size, self._steps)
        key = jax.random.key(0)
        try:
            require_structure(
                estimator, Window(problem, None, batches, self._data.valid, key), middle
            )
        except StructureError as error:
            raise ProblemError(f"make_problem({choices}): {error}") from error
