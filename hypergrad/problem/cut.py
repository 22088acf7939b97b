"""A training step as its program, cut behind the gradients of the training loss."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from hypergrad.problem.inner_gradient import NAME
from hypergrad.problem.rules import Traced, function_name, inner_programs, rules_within
from hypergrad.program import Known, by_number, evaluate, needed
from hypergrad.trees import Hyper, InnerState, Leaf, Tree, flagged, is_inexact, is_key, row

Step = Callable[[InnerState, Any], InnerState]
MakeStep = Callable[[Hyper], Step]
# The values of a step's inner gradients, and of what its losses gave beside them, if it reads them.
Gradients = Sequence[Leaf]


class Reads(NamedTuple):
    """What a step reads beside the progress: what its function closes over, `hyper`, its inputs.

    Arguments, as a function with a derivative of its own may close over nothing traced. For all
    steps of a scan, probe and inputs are `[length]`.
    """

    consts: Sequence[Leaf]
    hyper: Hyper
    probe: jax.Array
    inputs: Tree

    def at(self, t: jax.typing.ArrayLike) -> "Reads":
        """What step t reads, of what all do."""
        probe, inputs = row((self.probe, self.inputs), t)
        return self._replace(probe=probe, inputs=inputs)


class TracedStep:
    """`make_step(hyper)` as its program, cut behind the gradients of the training loss.

    Attributes:
      consts: what it closes over.
      takes_gradients: whether there is an `inner_gradient` to cut at, whose results are arrays, and
        none inside of another call, which would be taken anew at every update.
    """

    def __init__(self, make_step: MakeStep, hyper: Hyper, progress: InnerState, xs: Tree) -> None:
        def one(hyper: Hyper, progress: InnerState, probe: jax.Array, x: Tree) -> InnerState:
            return make_step(hyper)(progress, (probe, x))

        traced = Traced(one, hyper, progress, *jax.tree.map(lambda x: x[0], xs))
        program, self.consts = traced.program, traced.consts
        self._inputs, self._equations, self._outputs = by_number(program)
        self._treedef = jax.tree.structure(progress)
        first = len(program.constvars) + len(jax.tree.leaves(hyper))
        self._progress = self._inputs[first : first + self._treedef.num_leaves]
        self._floats = [is_inexact(v.aval) for v in program.outvars]
        behind = [e for e in self._equations if not _is_gradient(e.eqn)]
        self._behind = needed(behind, self._outputs, effects=False)
        read = {x for e in self._behind for x in e.inputs} | set(self._outputs)
        gradients = [e for e in self._equations if _is_gradient(e.eqn)]
        results = [x for e in gradients for x in zip(e.outputs, e.eqn.outvars, strict=True)]
        # What no update reads (logits that a loss gives beside its value) may be large.
        at_cut = {n: v for n, v in results if n in read}
        self._cut = list(at_cut)
        fit = not any(is_key(v.aval) for v in at_cut.values())
        fit = fit and not any(_holds_gradient(e.eqn) for e in self._behind)
        self.takes_gradients = bool(at_cut) and fit

    def _known(self, reads: Reads, progress: InnerState) -> Known:
        args = reads.hyper, progress, reads.probe, reads.inputs
        return dict(zip(self._inputs, [*reads.consts, *jax.tree.leaves(args)], strict=True))

    def taken(self, reads: Reads, progress: InnerState) -> Any:
        """The progress after the step."""
        return self.with_gradients(reads, progress)[0]

    def with_gradients(self, reads: Reads, progress: InnerState) -> tuple[InnerState, Gradients]:
        """The progress after the step, and its gradients."""
        wanted = [*self._outputs, *self._cut]
        found = evaluate(self._equations, wanted, self._known(reads, progress))
        count = len(self._outputs)
        return self._treedef.unflatten(found[:count]), found[count:]

    def replayed(self, reads: Reads, progress: InnerState, gradients: Gradients) -> Any:
        """The progress after the step, from its gradients: the update alone."""
        known = self._known(reads, progress) | dict(zip(self._cut, gradients, strict=True))
        return self._treedef.unflatten(evaluate(self._behind, self._outputs, known))

    def _derived(self, reads: Reads, progress: InnerState, gradients: Gradients) -> Any:
        """`replayed`, with the derivatives of `taken`."""
        before = needed(self._equations, self._cut, effects=False)
        found = evaluate(before, self._cut, self._known(reads, progress))
        pairs = zip(gradients, found, strict=True)
        values = [_instead(x, y) if is_inexact(y) else x for x, y in pairs]
        return self.replayed(reads, progress, values)

    def moving(self, at_end: Sequence[bool]) -> list[bool]:
        """Which leaves of the progress have a cotangent, `at_end` or on the way back.

        A cotangent of zeros is not as good as none: what only records may be NaN.
        """
        moving = [a and b for a, b in zip(self._floats, at_end, strict=True)]
        while True:
            wanted = flagged(self._outputs, moving)
            behind = needed(self._equations, wanted, effects=False)
            read = {x for e in behind for x in e.inputs} | set(wanted)
            also = [n in read and f for f, n in zip(self._floats, self._progress, strict=True)]
            more = [a or b for a, b in zip(moving, also, strict=True)]
            if more == moving:
                return moving
            moving = more

    def pulled_back(
        self,
        reads: Reads,
        progress: InnerState,
        gradients: Gradients | None,
        moving: Sequence[bool],
        adjoint: list[Leaf],
    ) -> tuple[Hyper, list[Leaf], jax.Array]:
        """The cotangents of `hyper`, of what is moving before the step, and of its probe."""
        leaves = jax.tree.leaves(progress)

        def after(hyper: Hyper, floats: list[Leaf], probe: jax.Array) -> list[Leaf]:
            supply = iter(floats)
            here = [next(supply) if m else x for m, x in zip(moving, leaves, strict=True)]
            args = reads._replace(hyper=hyper, probe=probe), self._treedef.unflatten(here)
            out = self.taken(*args) if gradients is None else self._derived(*args, gradients)
            return flagged(jax.tree.leaves(out), moving)

        return jax.vjp(after, reads.hyper, flagged(leaves, moving), reads.probe)[1](adjoint)


@jax.custom_jvp
def _instead(value: jax.Array, computed: jax.Array) -> jax.Array:
    """`value`, with the derivative of what was computed: the computation itself is not needed."""
    return value


_instead.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def _is_gradient(eqn: Any) -> bool:
    if eqn.primitive.name != "custom_jvp_call":
        return False
    return function_name(eqn.params["call_jaxpr"].jaxpr) == NAME


def _holds_gradient(eqn: Any) -> bool:
    return any(NAME in rules_within(program) for program in inner_programs(eqn.params))
