"""Programs of a sweep: one for each combination of choices, made and checked once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.data.batches import Minibatches
from hypergrad.data.contents import bad_examples
from hypergrad.data.splits import Splits, check_splits
from hypergrad.estimators.auto import Auto
from hypergrad.estimators.base import Estimator, Window, require_structure
from hypergrad.estimators.difference import FiniteDifference
from hypergrad.estimators.hypergradient import as_estimator
from hypergrad.knowledge.lengths import Length, Lengths
from hypergrad.population.held import WEIGHTS, given
from hypergrad.population.population import Population
from hypergrad.population.refine import Refine
from hypergrad.problem.mistakes import metrics_of
from hypergrad.problem.problem import Problem, judged_params
from hypergrad.problem.structure import StructureError
from hypergrad.results.goals import Goals
from hypergrad.space.space import Space
from hypergrad.trees import Batch, Hyper, Key

MakeProblem = Callable[[dict[str, Any]], Problem | tuple[Problem, Splits]]


class ProblemError(ValueError):
    """A mistake in `make_problem` that every trial would meet: it ends the sweep."""


class Program(NamedTuple):
    """A problem of fixed choices, the space of its active Floats, and what trains its members.

    `data` are the splits it is trained on, `held` the active traced Ints, `batch_size` examples per
    step; `weighted` where members follow a weighted sum of several objectives.
    """

    problem: Problem
    space: Space
    members: Population
    data: Splits
    held: tuple[str, ...]
    batch_size: int
    weighted: bool = False

    def starts(self, points: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """What members start from, leaves `[points]`: Floats, traced Ints, objectives' weights."""
        kinds: dict[str, type] = dict.fromkeys(self.space.continuous, np.float32)
        kinds |= dict.fromkeys(self.held, np.int32)
        kinds |= {WEIGHTS: np.float32} if self.weighted else {}
        return {n: np.asarray([p[n] for p in points], kind) for n, kind in kinds.items()}


@dataclasses.dataclass(eq=False)
class Programs:
    """Programs by their choices, each made once; `made` is told of choices, problem and values.

    Raises:
      ProblemError: `make_problem` returns no `Problem`, or one that ignores a hyperparameter or
        reads one that the space lacks.
    """

    make_problem: MakeProblem
    space: Space
    data: Splits
    lengths: Lengths
    refine: Refine | None
    goals: Goals = Goals()  # noqa: RUF009  frozen
    made: Callable[[dict[str, Any], Program, Hyper], None] | None = None
    _made: dict[Any, Program] = dataclasses.field(default_factory=dict)
    _plain: dict[Any, Program] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def bad_data(self) -> str:
        """What the splits hold that is not finite, in words; looked for once."""
        found = ((name, bad_examples(split)) for name, split in self.data._asdict().items())
        bad = [f"data.{name}, in examples {where}" for name, where in found if where]
        return f": NaN or infinity in {'; '.join(bad)}" if bad else ""

    def of(self, choices: dict[str, Any]) -> Program:
        """The program of these choices."""
        key = self._key(choices)
        if key not in self._made:
            self._made[key] = self._make(choices)
        return self._made[key]

    def static(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The choices that a program is made for: all but the traced ones."""
        return {name: v for name, v in choices.items() if name not in self.space.traced}

    def shared(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """The choices that members of one team have in common."""
        reads = self.lengths.reads
        return {n: v for n, v in choices.items() if n in reads or n not in self.space.traced}

    def _key(self, choices: Mapping[str, Any]) -> Any:
        length = self.lengths.of(choices)
        static = frozenset(self.static(choices).items())
        return static, length.batch_size, length.steps_per_update

    def plain(self, choices: dict[str, Any]) -> Program:
        """The same without refinement: hyperparameters stand still."""
        program = self.of(choices)
        if self.refine is None:
            return program
        key = self._key(choices)
        if key not in self._plain:
            members = self._population(program, self.lengths.of(choices), None)
            self._plain[key] = program._replace(members=members, weighted=False)
        return self._plain[key]

    def _make(self, choices: dict[str, Any]) -> Program:
        static, length = self.static(choices), self.lengths.of(choices)
        problem, data = self._with_data(self.make_problem(dict(static)), static)
        active = [n for n in self.space.continuous if self.space.is_active(n, static)]
        space = Space({n: dataclasses.replace(self.space[n], when=None) for n in active})
        held = tuple(n for n in self.space.traced if n in choices)
        program = Program(problem, space, None, data, held, length.batch_size)  # type: ignore[arg-type]
        self._check(program, length, choices)
        # Choices under which no Float is active leave nothing to refine.
        refine = self.refine if space.continuous else None
        weighted = self.goals.several and refine is not None
        if refine is not None and (held or weighted):
            _refuse_auto(refine)
        members = self._population(program, length, refine)
        return program._replace(members=members, weighted=weighted)

    def _with_data(self, made: Any, choices: dict[str, Any]) -> tuple[Problem, Splits]:
        """What `make_problem` returned, as a problem and the splits that it is trained on."""
        own = isinstance(made, tuple) and not isinstance(made, Problem) and len(made) == 2
        problem, data = made if own else (made, self.data)
        if not isinstance(problem, Problem):
            raise ProblemError(
                f"make_problem returned {type(problem).__name__} for {choices}: return a "
                "hypergrad.Problem, such as hypergrad.bilevel makes, or (problem, splits)."
            )
        if own:
            check_splits(data, f"make_problem({choices}): data")
            data = Splits(*(jax.tree.map(jnp.asarray, split) for split in data))
        return problem, data

    def _population(self, program: Program, length: Length, refine: Refine | None) -> Population:
        train, valid, test = program.data
        own = None if refine is None else refine.steps_per_update
        return Population(
            program.problem,
            program.space,
            refine,
            train,
            valid,
            length.batch_size,
            steps_per_update=length.steps_per_update if own is None else None,
            test=test,
            held=program.held,
            followed=self.goals.scalarised if self.goals.several and refine else None,
        )

    def _check(self, program: Program, length: Length, choices: dict[str, Any]) -> None:
        problem, space = program.problem, program.space
        estimator = None if self.refine is None else self.refine.estimator
        if not isinstance(estimator, Estimator):
            # Nothing is differentiated, but a value that the problem ignores is a mistake.
            estimator = FiniteDifference()
        middle = space.from_unit({name: np.float32(0.5) for name in space.continuous})
        values = {name: jnp.int32(choices[name]) for name in program.held}
        seen = given(problem, values) if values else problem
        batches = Minibatches(program.data.train, length.batch_size, length.steps_per_update)
        window = Window(seen, None, batches, program.data.valid, jax.random.key(0))
        try:
            require_structure(estimator, window, middle)
        except StructureError as error:
            raise ProblemError(f"make_problem({choices}): {error}") from error
        known = _judged(problem, program.data, {**middle, **values})
        if unknown := self.goals.unknown(known):
            raise ProblemError(unknown)
        if self.made is not None:
            self.made(choices, program, {**middle, **values})


def _judged(problem: Problem, data: Splits, hyper: Hyper) -> dict[str, Any]:
    """The problem's metrics, traced with its loss on both splits, before anything is trained."""

    def judge(hyper: Hyper, batch: Batch, key: Key) -> tuple[Any, dict[str, Any]]:
        params = judged_params(problem, problem.init(hyper, key))
        loss = problem.valid_loss(params, hyper, batch, key)
        return loss, metrics_of(problem.metrics, params, hyper, batch, key)

    key = jax.random.key(0)
    known = jax.eval_shape(judge, hyper, data.valid, key)[1]
    if data.test is not None:
        try:
            jax.eval_shape(judge, hyper, data.test, key)
        except Exception as error:
            raise ValueError(
                f"valid_loss or metrics fail on data.test alone: {type(error).__name__}: {error}"
            ) from error
    return known


def _refuse_auto(refine: Refine) -> None:
    """Refuses what compiles the problem by itself, which here has values of the program around."""
    if isinstance(as_estimator(refine.estimator), Auto):
        raise ProblemError(
            f"refine={refine!r} chooses its estimator by what compiles, which traced Ints and "
            "several objectives exclude: name one, such as hypergrad.Unrolled()."
        )
