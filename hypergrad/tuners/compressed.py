"""A run of fewer steps that goes through the same decay as a whole one."""

import jax
import optax

from hypergrad.problem.problem import Problem
from hypergrad.trees import Batch, Hyper, InnerState, Key, State

# What counts steps for a schedule's sake. Adam's own count, for one, corrects a bias: it must stay.
_COUNTERS = (optax.ScaleByScheduleState,)


def compressed(problem: Problem, stride: int) -> Problem:
    """`problem` whose optax schedules pass `stride` times as fast.

    A run of a quarter of the steps, under a stride of 4, warms up and decays as the whole one does;
    ended early instead, it would never see its low rates. Schedules of the user's own that read
    anything but the optimiser's count pass as they are.
    """
    if stride == 1:
        return problem

    def step(inner: InnerState, hyper: Hyper, batch: Batch, key: Key) -> InnerState:
        after = problem.step(inner, hyper, batch, key)
        if not hasattr(after, "opt_state"):
            return after
        return after._replace(opt_state=_faster(inner.opt_state, after.opt_state, stride))

    return problem._replace(step=step)


def _faster(before: State, after: State, stride: int) -> State:
    """`after` with every schedule's count `stride` times as far from where it stood `before`.

    From the difference, as a step may have been skipped or gathered (`optax.MultiSteps`).
    """

    def counts(node: object) -> bool:
        return isinstance(node, _COUNTERS)

    def further(old: State, new: State) -> State:
        if not counts(new):
            return new
        return new._replace(count=old.count + stride * (new.count - old.count))

    return jax.tree.map(further, before, after, is_leaf=counts)
