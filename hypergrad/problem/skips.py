"""Steps that are skipped by `jnp.where`: what is not taken sends nothing back.

`jax.tree.map(partial(jnp.where, finite), new, old)`, as loss scaling is often written, takes `old`
where a gradient is not finite, and reverse mode multiplies the NaN of `new` by a cotangent of zero;
`lax.cond` keeps it out. So the step's traced program is read, and where it selects by one truth
that comes from `isfinite` or `isnan`, it runs as that `lax.cond`; so too by a comparison (of a
gradient's norm, of the loss), where one side is made of what is compared and the other is not. A
`lax.cond` of the user's keeps the NaN out of itself, and not out of a gradient that was taken
before it by plain `jax.grad`: it runs so, too. All others stay what they are.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hypergrad.problem.inner_gradient import OWN, guarded
from hypergrad.problem.rules import function_name
from hypergrad.program import Equation, Fixed, Flat, Known, Part, Value, evaluate, needed
from hypergrad.trees import InnerState, Tree, is_inexact

# Each doubles what is compiled, and a step may have one for every leaf.
_MOST_CONDITIONS = 3
# Steps that were seen to have none, for arguments of such shapes: they are not traced once more.
_plain: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def skipping(step: Callable[..., InnerState]) -> Callable[..., Any]:
    """`step(inner, hyper, *rest)`, which sends nothing back from what a `jnp.where` does not take.

    The same values, at the cost of tracing it once more. Where there is such a condition, what only
    one side needs runs on that side alone, and what the condition comes from (gradients) sends
    nothing back unless something of it was taken.
    """

    def run(inner: InnerState, hyper: Tree, *rest: Any) -> Any:
        args = (inner, hyper, *rest)
        leaves, treedef = jax.tree.flatten(args)
        kind = treedef, *map(jax.typeof, leaves)
        if kind in _plain.get(step, ()):
            return step(*args)
        try:
            closed, like = jax.make_jaxpr(step, return_shape=True)(*args)
        except Exception:  # which the call itself raises, in words of its own
            return step(*args)
        flat = Flat()
        numbers = flat.numbers(len(leaves))
        # What carries a derivative: a batch does not, and may not seem to.
        flat.moving.update(numbers[: len(jax.tree.leaves((inner, hyper)))])
        whole = Part(flat.equations, flat.read(closed.jaxpr, closed.consts, numbers))
        conditions = _conditions(flat)
        if not conditions:
            _plain.setdefault(step, set()).add(kind)
            return step(*args)
        known = dict(zip(numbers, leaves, strict=True))
        out = _branched(flat, whole, known, conditions[:_MOST_CONDITIONS])
        return jax.tree.unflatten(jax.tree.structure(like), out)

    return run


def _conditions(flat: Flat) -> list[Value]:
    """By which steps are skipped, in order."""
    found = [x.condition for x in flat.selections if flat.is_skip(x)]
    # The gradient of `bilevel` sends nothing back where nothing came.
    ruled = [e.eqn for e in flat.equations if e.eqn.primitive.name == "custom_jvp_call"]
    if not any(function_name(e.params["call_jaxpr"].jaxpr).startswith(OWN) for e in ruled):
        found += [condition for condition, _ in flat.branches.values()]
    nots = [e for e in flat.equations if e.eqn.primitive.name == "not"]
    opposites = {x for e in nots for x in e.outputs if e.inputs[0] in found}
    return [x for x in dict.fromkeys(found) if x not in opposites]


def _branched(flat: Flat, side: Part, known: Known, conditions: Sequence[Value]) -> list[Any]:
    """The outputs, from the values that are known, branching by one condition after another."""
    if not conditions:
        return evaluate(needed(*side), side.outputs, known)
    condition, *others = conditions
    before = needed(side.equations, [condition], effects=False)
    known = known | _guarded(flat.moving, before, known)
    done = set(map(id, before))
    after = Part([e for e in side.equations if id(e) not in done], side.outputs)
    sides = [_where(flat, after, condition, truth) for truth in (True, False)]
    read = {x for s in sides for e in needed(*s) for x in e.inputs}
    read.update(x for s in sides for x in s.outputs)

    def branch(side: Part) -> Callable[[Known], list[Any]]:
        return lambda known: _branched(flat, side, known, others)

    operands = {n: known[n] for n in read & set(known)}
    return jax.lax.cond(known[condition], *map(branch, sides), operands)


def _guarded(moving: set[Value], equations: Sequence[Equation], known: Known) -> Known:
    """The results of the equations; of cotangents that are all zero, zero comes out."""
    read = {x for e in equations for x in e.inputs} & set(known)
    floats = {n: known[n] for n in read & moving if is_inexact(known[n])}
    results = [n for e in equations for n in e.outputs]

    def run(floats: Known, known: Known) -> Known:
        found = evaluate(equations, results, known | floats)
        return dict(zip(results, found, strict=True))

    def moved(floats: Known, known: Known) -> Known:
        return {n: value for n, value in run(floats, known).items() if n in moving}

    return run({}, known) | guarded(moved)(floats, known)


def _where(flat: Flat, side: Part, condition: Value, truth: bool) -> Part:
    """What is left of the program where a condition holds, or does not."""
    left: list[Equation] = []
    now: dict[Value, Value] = {}
    truths: dict[Value, bool] = {condition: truth}
    spread: dict[Value, bool] = {}  # over an array, or as a number

    def current(x: Value) -> Value:
        while x in now:
            x = now[x]
        return x

    todo = list(side.equations)[::-1]
    while todo:
        eqn, given, outputs = todo.pop()
        inputs, name = [current(x) for x in given], eqn.primitive.name
        decided = (truths | spread).get(inputs[0]) if inputs else None
        if decided is not None and name in ("broadcast_in_dim", "convert_element_type"):
            spread[outputs[0]] = decided
        if name == "select_n" and decided is not None:
            now[outputs[0]] = inputs[1 + decided]
        elif name == "cond" and decided is not None and outputs and outputs[0] in flat.branches:
            taken = flat.branches[outputs[0]][1][decided]
            todo += taken.equations[::-1]
            now |= zip(outputs, taken.outputs, strict=True)
        else:
            if name == "not" and inputs[0] in truths:
                truths[outputs[0]] = not truths[inputs[0]]
            left.append(Equation(eqn, inputs, outputs))
    constants = {x: Fixed(np.bool_(value)) for x, value in truths.items()}
    settled = lambda xs: [constants.get(y, y) for y in map(current, xs)]  # noqa: E731
    return Part([Equation(e, settled(xs), ys) for e, xs, ys in left], settled(side.outputs))
