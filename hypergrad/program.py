"""A traced program, flat: equations between numbered values, to be cut into parts and run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal


@dataclass(frozen=True, eq=False)  # told apart by identity: arrays have no hash
class Fixed:
    """A value that the program holds."""

    value: Any


_CALLS = ("jit", "remat2", "remat", "checkpoint")
# Of a program: a constant, or a value by its number.
Value = int | Fixed
Known = dict[Any, Any]  # values that were computed, by their numbers


class Equation(NamedTuple):
    """One operation, as JAX has it, on these values, with these results."""

    eqn: Any
    inputs: Sequence[Value]
    outputs: Sequence[int]


class Part(NamedTuple):
    """Some equations, and what they are there for."""

    equations: Sequence[Equation]
    outputs: Sequence[Value]


class Selection(NamedTuple):
    """Where one of several values is taken by a truth: all entries of it, or none."""

    condition: Value
    sides: Sequence[Value]
    shape: tuple[int, ...]


class Flat:
    """A program whose calls stand inlined.

    Attributes:
      equations: in order.
      moving: values that depend on what `moving` held at the start.
      whole: truths that come from what is finite or from how moving numbers compare, and arrays of
        one such truth, to that truth.
      by_finite: those that come from what is finite.
      selections: the selections of floats by such a truth.
      branches: of a `lax.cond` by such a truth, by its first output.
    """

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.moving: set[Value] = set()
        self.whole: dict[Value, Value | None] = {}
        self.by_finite: set[Value] = set()
        self.selections: list[Selection] = []
        self.branches: dict[Value, tuple[Value, Sequence[Part]]] = {}
        self._count = 0
        self._telling: set[Value] = set()
        self._same: dict[Any, Sequence[int]] = {}

    def numbers(self, count: int) -> Sequence[int]:
        """New ones."""
        self._count += count
        return range(self._count - count, self._count)

    def read(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Append the equations of a jaxpr, those of its calls in their place; its outputs."""
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(Fixed, consts), strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)

        def value(x: Any) -> Value:
            return Fixed(x.val) if isinstance(x, Literal) else values[x]

        for eqn in jaxpr.eqns:
            given, called = list(map(value, eqn.invars)), eqn.params.get("jaxpr")
            if eqn.primitive.name in _CALLS:
                inside = getattr(called, "jaxpr", called)  # that of a checkpoint is not closed
                outputs = self.read(inside, getattr(called, "consts", ()), given)
            else:
                outputs = list(self._append(eqn, given))
            values |= zip(eqn.outvars, outputs, strict=True)
        return list(map(value, jaxpr.outvars))

    def _append(self, eqn: Any, given: Sequence[Value]) -> Sequence[int]:
        name = eqn.primitive.name
        floats = any(jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in eqn.outvars)
        of_finite = _tells(eqn, given) or not self.by_finite.isdisjoint(given)
        telling = not (floats or eqn.effects or not eqn.outvars) and (
            of_finite or self._compares(eqn, given) or not self._telling.isdisjoint(given)
        )
        # A condition may be written down anew at each leaf that is selected by it.
        read = [str(x.value) if isinstance(x, Fixed) and not np.ndim(x.value) else x for x in given]
        key = (name, str(eqn.params), *read) if telling else None
        if key in self._same:
            return self._same[key]
        outputs = self.numbers(len(eqn.outvars))
        truth = self.whole.get(given[0]) if name == "cond" else None
        if truth is not None and outputs:
            self.branches[outputs[0]] = truth, self._parts(eqn, given)
        self.equations.append(Equation(eqn, given, outputs))
        if not self.moving.isdisjoint(given):
            self.moving.update(outputs)
        if telling:
            self._same[key] = outputs
            self._telling.update(outputs)
            self.by_finite.update(outputs if of_finite else ())
            self._note_truths(eqn, given, outputs)
        condition = self.whole.get(given[0]) if floats and name == "select_n" else None
        if condition is not None:
            self.selections.append(Selection(condition, given[1:], eqn.outvars[0].aval.shape))
        return outputs

    def is_skip(self, selection: Selection) -> bool:
        """Whether what is not taken may be NaN because of what the condition asks."""
        if selection.condition in self.by_finite:
            return True
        # A comparison, as clipping has one too, whose sides are both made of what is compared.
        before = needed(self.equations, [selection.condition], effects=False)
        made = {x for e in before for x in e.outputs} & self.moving
        for _, inputs, outputs in self.equations:
            if not made.isdisjoint(inputs):
                made.update(outputs)
        return selection.shape != () and sum(x in made for x in selection.sides) == 1

    def _note_truths(self, eqn: Any, given: Sequence[Value], outputs: Sequence[int]) -> None:
        to_number = eqn.primitive.name == "convert_element_type" and given[0] in self.whole
        if eqn.primitive.name == "broadcast_in_dim" or to_number:
            self.whole[outputs[0]] = self.whole.get(given[0])
        else:
            self.whole |= {
                n: n
                for n, x in zip(outputs, eqn.outvars, strict=True)
                if not x.aval.shape and x.aval.dtype == bool
            }

    def _compares(self, eqn: Any, given: Sequence[Value]) -> bool:
        """Whether this is a truth about one moving number, which may be NaN."""
        return (
            eqn.primitive.name in ("lt", "le", "gt", "ge")
            and not eqn.outvars[0].aval.shape
            and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact)
            and not self.moving.isdisjoint(given)
        )

    def _parts(self, eqn: Any, given: Sequence[Value]) -> list[Part]:
        """The branches of a `lax.cond`, whose operands are `given[1:]`."""
        parts = []
        for branch in eqn.params["branches"]:
            inside = Flat()  # what it finds holds inside alone
            inside._count, inside.moving = self._count, self.moving
            outputs = inside.read(branch.jaxpr, branch.consts, given[1:])
            self._count = inside._count
            parts.append(Part(inside.equations, outputs))
        return parts


def _tells(eqn: Any, given: Sequence[Value]) -> bool:
    """Whether this asks what is finite, or no NaN."""
    is_nan = eqn.primitive.name in ("ne", "eq") and given[0] == given[1]
    return is_nan or eqn.primitive.name == "is_finite"


def interpolated(jaxpr: Any) -> set[Any]:
    """The whole parts of numbers whose fractions are taken too: where an interpolation stands."""
    whole = {e.outvars[0]: e.invars[0] for e in jaxpr.eqns if e.primitive.name == "floor"}
    rests = [e.invars for e in jaxpr.eqns if e.primitive.name == "sub" and whole]
    return {part for x, part in rests if not isinstance(part, Literal) and whole.get(part) is x}


def by_number(jaxpr: Any) -> tuple[list[int], list[Equation], list[Value]]:
    """The numbers of a program's inputs (constants first), its equations, and its outputs."""
    numbers: dict[Any, int] = {}
    number = lambda v: numbers.setdefault(v, len(numbers))  # noqa: E731
    value = lambda x: Fixed(x.val) if isinstance(x, Literal) else number(x)  # noqa: E731
    inputs = [number(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    equations = [
        Equation(e, list(map(value, e.invars)), list(map(number, e.outvars))) for e in jaxpr.eqns
    ]
    return inputs, equations, list(map(value, jaxpr.outvars))


def needed(
    equations: Sequence[Equation], outputs: Iterable[Value], effects: bool = True
) -> list[Equation]:
    """Those that the outputs depend on, and with `effects` those that have one."""
    wanted, kept = set(outputs), []
    for equation in reversed(equations):
        if (effects and equation.eqn.effects) or not wanted.isdisjoint(equation.outputs):
            kept.append(equation)
            wanted.update(equation.inputs)
    return kept[::-1]


def evaluate(equations: Sequence[Equation], outputs: Iterable[Value], known: Known) -> list[Any]:
    """The outputs, from the values that are known."""
    known = dict(known)

    def value(x: Value) -> Any:
        return x.value if isinstance(x, Fixed) else known[x]

    for eqn, inputs, results in equations:
        with eqn.ctx.manager:
            params = eqn.primitive.get_bind_params(eqn.params)
            found = eqn.primitive.bind(*map(value, inputs), **params)
        known |= zip(results, found if eqn.primitive.multiple_results else [found], strict=True)
    return list(map(value, outputs))
