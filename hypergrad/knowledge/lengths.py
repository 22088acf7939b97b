"""How long a full run of each choice is, in steps and in examples; what runs have in common.

`batch_size` and `num_steps` of a sweep are numbers, names of hyperparameters, or functions of the
choices. What a function depends on is found by calling it with choices that say what is read.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hypergrad.checks import WrongTypeError, integer
from hypergrad.data.batches import FIXES_A_SHAPE
from hypergrad.population.refine import Refine
from hypergrad.space.dimensions import Float
from hypergrad.space.space import Space

Setting = int | str | Callable[[dict[str, Any]], int]

# Different sets of choices that a setting may depend on: each is looked at before anything trains.
_MOST = 10_000


class Length(NamedTuple):
    """A full run: examples per step, training steps, and steps per update, which divide them."""

    batch_size: int
    num_steps: int
    steps_per_update: int


class _UnknownError(LookupError):
    """A choice is read that is still open."""


class _Choices(Mapping[str, Any]):
    """The active choices as a dict, some of them still open: whoever reads one of those is told."""

    def __init__(self, space: Space, known: Mapping[str, Any]) -> None:
        self._space, self._known = space, known

    def __getitem__(self, name: str) -> Any:
        if name not in self._space.discrete or not self._is_active(name):
            raise KeyError(name)
        if name not in self._known:
            raise _UnknownError(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._space.discrete if self._is_active(name))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _is_active(self, name: str) -> bool:
        for parent, admissible in (self._space[name].when or {}).items():
            if not self._is_active(parent):
                return False
            if parent not in self._known:
                raise _UnknownError(parent)
            if self._known[parent] not in admissible:
                return False
        return True


@dataclasses.dataclass(eq=False)
class Lengths:
    """The length of a full run under each choice; `of` says it.

    Attributes:
      batch_size: the largest of all choices.
      num_steps: of a full run with so many examples per step that sees as many examples as the
        longest one: what a rung's number of steps is measured in.
      reads: the hyperparameters that a length depends on.

    Raises:
      ValueError: a name that is no unconditional Int or Categorical of the space, a function that
        fails or gives no positive integer under some choices, steps that are no whole updates.
    """

    space: Space
    batch: Setting
    steps: Setting
    refine: Refine | None

    def __post_init__(self) -> None:
        self.batch = self._checked("batch_size", self.batch)
        self.steps = self._checked("num_steps", self.steps)
        self._all = list(self._outcomes())
        lengths = [length for _, length in self._all]
        self.batch_size = max(length.batch_size for length in lengths)
        most = max(length.batch_size * length.num_steps for length in lengths)
        self.num_steps = -(-most // self.batch_size)
        self.reads = frozenset(name for known, _ in self._all for name in known)

    def of(self, choices: Mapping[str, Any]) -> Length:
        """The length of a full run under these choices."""
        batch_size = self._value("batch_size", self.batch, choices)
        num_steps = self._value("num_steps", self.steps, choices)
        return Length(batch_size, num_steps, self._steps_per_update(num_steps, choices))

    @property
    def steps_per_update(self) -> int:
        """Of all choices, if they agree; else 1, as each rounds for itself."""
        found = {length.steps_per_update for _, length in self._all}
        return found.pop() if len(found) == 1 and not self.reads else 1

    def refuse_larger_than(self, examples: int) -> None:
        """Raise ValueError where a batch holds more than so many examples, under some choices."""
        for known, length in self._all:
            if length.batch_size > examples:
                raise ValueError(
                    f"batch_size={length.batch_size}{_under(known)} exceeds the {examples} "
                    "examples in data.train: choose none that is larger than the data."
                )

    def steps_at(self, length: Length, rung: int) -> int:
        """Steps of a run of this length that has seen as many examples as a rung's steps give.

        In whole updates, at least one, and not beyond its end.
        """
        if rung >= self.num_steps:
            return length.num_steps
        own = rung * self.batch_size // length.batch_size
        whole = own // length.steps_per_update * length.steps_per_update
        return min(max(whole, length.steps_per_update), length.num_steps)

    def describe(self) -> dict[str, Any]:
        """What makes scores comparable, as JSON: the numbers, or a digest of those by choices."""
        digest = hashlib.sha256(repr(sorted(self._all, key=repr)).encode()).hexdigest()[:16]
        settings = {"num_steps": self.steps, "batch_size": self.batch}
        return {n: s if isinstance(s, int) else f"by choice {digest}" for n, s in settings.items()}

    def _outcomes(self) -> Iterator[tuple[dict[str, Any], Length]]:
        """Each set of choices that a length depends on, with the length."""
        # Those of numbers alone take one call, with nothing read.
        ahead: list[dict[str, Any]] = [{}]
        found = 0
        while ahead:
            known = ahead.pop()
            try:
                yield known, self.of(_Choices(self.space, known))
                found += 1
            except _UnknownError as error:
                name = str(error.args[0])
                values = self.space.values_of(name)
                ahead += [{**known, name: value} for value in reversed(values)]
            if found + len(ahead) > _MOST:
                raise ValueError(
                    f"batch_size and num_steps depend on more than {_MOST} sets of choices, as "
                    f"they read {sorted(known)}: read fewer of them, or give an Int a step."
                )

    def _checked(self, name: str, setting: Any) -> Setting:
        if isinstance(setting, str):
            dimension = self.space.dimensions.get(setting)
            if dimension is None:
                raise WrongTypeError(
                    f"{name}={setting!r} names no hyperparameter: give a number, a function of "
                    f"the choices, or one of {list(self.space.discrete)}."
                )
            if isinstance(dimension, Float) or dimension.when is not None:
                raise ValueError(
                    f"{name}={setting!r} names {dimension!r}: name an Int or a Categorical without "
                    "a condition."
                )
        elif not callable(setting):
            return integer(name, setting, remedy=FIXES_A_SHAPE)
        return setting

    def _value(self, name: str, setting: Setting, choices: Mapping[str, Any]) -> int:
        if isinstance(setting, int):
            return setting
        try:
            value = choices[setting] if isinstance(setting, str) else setting(choices)  # type: ignore[arg-type]
        except _UnknownError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{name}(choices) failed{_under(choices)} ({why}): give a function of the one dict "
                f"of choices, which holds {list(self.space.discrete)}."
            ) from error
        return integer(f"{name}{_under(choices)}", value, remedy=FIXES_A_SHAPE)

    def _steps_per_update(self, num_steps: int, choices: Mapping[str, Any]) -> int:
        if self.refine is None:
            # By whole updates: of the usual 10 steps, or of as many as divide a full run.
            return max(k for k in range(1, 11) if num_steps % k == 0)
        steps = self.refine.steps(num_steps)
        if num_steps % steps:
            raise ValueError(
                f"num_steps={num_steps}{_under(choices)} is no multiple of "
                f"steps_per_update={steps}: choose one that is."
            )
        return steps


def _under(choices: Mapping[str, Any]) -> str:
    known = choices._known if isinstance(choices, _Choices) else dict(choices)
    return f" under {known}" if known else ""
