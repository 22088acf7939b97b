"""Programs of a sweep: one for each combination of choices, made and checked once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from hypergrad.data.batches import Minibatches
from hypergrad.data.contents import bad_examples
from hypergrad.data.splits import Splits
from hypergrad.estimators.base import Estimator, Window, require_structure
from hypergrad.estimators.difference import FiniteDifference
from hypergrad.problem.problem import Problem
from hypergrad.problem.structure import StructureError
from hypergrad.space.space import Space
from hypergrad.trees import Hyper
from hypergrad.tuners.population.population import Population
from hypergrad.tuners.population.refine import Refine


class ProblemError(ValueError):
    """A mistake in `make_problem` that every trial would meet: it ends the sweep."""


class Program(NamedTuple):
    """A problem of fixed choices, the space of its active Floats, and what trains its members."""

    problem: Problem
    space: Space
    members: Population


@dataclasses.dataclass(eq=False)
class Programs:
    """Programs by their choices, each made once; `made` is told of choices, problem and values.

    Raises:
      ProblemError: `make_problem` returns no `Problem`, or one that ignores a hyperparameter or
        reads one that the space lacks.
    """

    make_problem: Callable[[dict[str, Any]], Problem]
    space: Space
    data: Splits
    batch_size: int
    refine: Refine | None
    steps_per_update: int
    made: Callable[[dict[str, Any], Problem, Hyper], None] | None = None
    _made: dict[frozenset[tuple[str, Any]], Program] = dataclasses.field(default_factory=dict)
    _plain: dict[frozenset[tuple[str, Any]], Program] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def bad_data(self) -> str:
        """What the splits hold that is not finite, in words; looked for once."""
        found = ((name, bad_examples(split)) for name, split in self.data._asdict().items())
        bad = [f"data.{name}, in examples {where}" for name, where in found if where]
        return f": NaN or infinity in {'; '.join(bad)}" if bad else ""

    def of(self, choices: dict[str, Any]) -> Program:
        """The program of these choices."""
        key = frozenset(choices.items())
        if key not in self._made:
            self._made[key] = self._make(choices)
        return self._made[key]

    def plain(self, choices: dict[str, Any]) -> Program:
        """The same without refinement: hyperparameters stand still."""
        problem, space, _ = program = self.of(choices)
        if self.refine is None:
            return program
        key = frozenset(choices.items())
        if key not in self._plain:
            self._plain[key] = Program(problem, space, self._population(problem, space, None))
        return self._plain[key]

    def _make(self, choices: dict[str, Any]) -> Program:
        problem = self.make_problem(dict(choices))
        if not isinstance(problem, Problem):
            raise ProblemError(
                f"make_problem returned {type(problem).__name__} for {choices}: return a "
                "hypergrad.Problem, such as hypergrad.bilevel makes."
            )
        active = [n for n in self.space.continuous if self.space.is_active(n, choices)]
        space = Space({n: dataclasses.replace(self.space[n], when=None) for n in active})
        self._check(problem, space, choices)
        # Choices under which no Float is active leave nothing to refine.
        refine = self.refine if space.continuous else None
        return Program(problem, space, self._population(problem, space, refine))

    def _population(self, problem: Problem, space: Space, refine: Refine | None) -> Population:
        train, valid, test = self.data
        own = None if refine is None else refine.steps_per_update
        steps = self.steps_per_update if own is None else None
        return Population(
            problem, space, refine, train, valid, self.batch_size, steps_per_update=steps, test=test
        )

    def _check(self, problem: Problem, space: Space, choices: dict[str, Any]) -> None:
        estimator = None if self.refine is None else self.refine.estimator
        if not isinstance(estimator, Estimator):
            # Nothing is differentiated, but a value that the problem ignores is a mistake.
            estimator = FiniteDifference()
        middle = space.from_unit({name: np.float32(0.5) for name in space.continuous})
        batches = Minibatches(self.data.train, self.batch_size, self.steps_per_update)
        window = Window(problem, None, batches, self.data.valid, jax.random.key(0))
        try:
            require_structure(estimator, window, middle)
        except StructureError as error:
            raise ProblemError(f"make_problem({choices}): {error}") from error
        if self.made is not None:
            self.made(choices, problem, middle)
