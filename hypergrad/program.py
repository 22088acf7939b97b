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


class Flat:
    """A program whose calls stand inlined.

    Attributes:
      equations: in order.
      moving: values that depend on what `moving` held at the start.
      whole: truths that come from what is finite, and arrays of one such truth, to that truth.
      conditions: those of them by which floats are selected.
    """

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.moving: set[Value] = set()
        self.whole: dict[Value, Value | None] = {}
        self.conditions: list[Value] = []
        self._count = 0
        self._of_finite: set[Value] = set()
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
        floats = any(jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in eqn.outvars)
        of_finite = not floats and (_tells(eqn, given) or not self._of_finite.isdisjoint(given))
        # A condition may be written down anew at each leaf that is selected by it.
        read = [str(x.value) if isinstance(x, Fixed) and not np.ndim(x.value) else x for x in given]
        key = (eqn.primitive.name, str(eqn.params), *read) if of_finite else None
        if key in self._same:
            return self._same[key]
        outputs = self.numbers(len(eqn.outvars))
        self.equations.append(Equation(eqn, given, outputs))
        if of_finite:
            self._same[key] = outputs
            self._of_finite.update(outputs)
        if not self.moving.isdisjoint(given):
            self.moving.update(outputs)
        if of_finite and eqn.primitive.name == "broadcast_in_dim":
            self.whole[outputs[0]] = self.whole.get(given[0])
        elif of_finite:
            self.whole |= {
                n: n for n, x in zip(outputs, eqn.outvars, strict=True) if not x.aval.shape
            }
        if floats and eqn.primitive.name == "select_n":
            condition = self.whole.get(given[0])
            if condition is not None and condition not in self.conditions:
                self.conditions.append(condition)
        return outputs


def _tells(eqn: Any, given: Sequence[Value]) -> bool:
    """Whether this asks what is finite, or no NaN."""
    is_nan = eqn.primitive.name in ("ne", "eq") and given[0] == given[1]
    return is_nan or eqn.primitive.name == "is_finite"


def needed(equations: Sequence[Equation], outputs: Iterable[Value]) -> list[Equation]:
    """Those that the outputs depend on, and those with an effect."""
    wanted, kept = set(outputs), []
    for equation in reversed(equations):
        if equation.eqn.effects or not wanted.isdisjoint(equation.outputs):
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
