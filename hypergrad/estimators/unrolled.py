"""Reverse mode through the training steps: full or truncated, checkpointed, mixed-mode."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.data.batches import step_inputs
from hypergrad.estimators.base import (
    Estimate,
    Estimator,
    Progress,
    Step,
    ValidateAt,
    Window,
    compiled_estimate,
    refuse_wrong_place,
    summary,
)
from hypergrad.estimators.memory import device_bytes, temporary_bytes
from hypergrad.estimators.recompute import (
    store_all,
    store_few,
    store_gradients,
    store_roots,
)
from hypergrad.problem.problem import steps_done
from hypergrad.trees import Batch, Hyper, InnerState, Scalar, State, Tree, inner_product, path_name

Checkpoint = Literal["none", "step", "sqrt", "log", "auto"]


@dataclasses.dataclass(frozen=True)
class Unrolled(Estimator):
    """Reverse mode through the last `window` of the K steps, exact where the window is all of them.

    With a = dE/dstate at the end and grad = dE/dhyper, walking back: grad += B_t^T a, a <- A_t^T a,
    where A_t and B_t are the derivatives of step t in the state and in `hyper`.

    Args:
      window: how many of the last steps are differentiated; None for all K. Truncation biases by
        what the window cannot see: greedy windows make learning rates far too small.
      checkpoint: what is stored of a step for the way back. "none": all it needs (the state and
        the batch, as the inner gradient is mixed-mode); "step": its gradient, and the state before
        every eighth, from which the others are had by the optimiser's updates; "sqrt": about 2
        sqrt(window) states, for one more training run of time; "log": about log2(window) states,
        placed anew on the way back (binomial checkpoints), for 3 more training runs over 100 steps
        and 6 over 100,000; "auto": the first of these, in order of cost, whose program fits
        `memory_limit` by XLA's own analysis. That compiles up to four programs, once for each
        problem and shapes.
      memory_limit: bytes for "auto", beside arguments and results; None for half of the device's
        memory. Under `vmap`, and with several seeds, it counts one member.
      validate_at: "last" judges the last parameters; "mean" judges their mean over the window,
        which does not punish the noise of the steps themselves (training goes on from the last);
        an integer judges the mean of that many last ones, a float that of a share of the window.

    Cost in gradient evaluations per differentiated step: 3, with "step" as much and 4 updates of
    the optimiser, with "sqrt" 4, with "log" 7 to 10; memory O(window |inner|), with "step"
    O(window |params|), with "sqrt" O(sqrt(window) |inner|), with "log" O(log(window) |inner|);
    independent of |hyper|. See docs/memory.md. "step" and "log" have a derivative of their own, so
    that forward mode does not pass through the estimate itself.

    `info["growth"]` is the largest norm of the adjoint a (of its part in the parameters) along the
    way over its first one: above 1 and growing with the window means chaos, which the loss does not
    show.

    Source: Franceschi et al. 2017, eq. 8-10; truncation: Shaban et al. 2019; mixed mode: Kemaev et
    al. 2025; binomial checkpoints: Griewank and Walther 2000.
    """

    window: int | None = None
    checkpoint: Checkpoint = "none"
    validate_at: ValidateAt = "last"
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        refuse_wrong_place(self.validate_at)
        if self.window is not None:
            checks.integer_field(self, "window", remedy="or None for all K steps")
        if self.memory_limit is not None:
            checks.positive("memory_limit", self.memory_limit, "bytes")
        checks.choice("checkpoint", self.checkpoint, (*_SCANS, "auto"))
        if self.memory_limit is not None and self.checkpoint != "auto":
            raise ValueError(
                f"memory_limit={self.memory_limit} is read by checkpoint='auto' only, and "
                f"checkpoint is {self.checkpoint!r}."
            )

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One value and gradient of the validation loss; see the class."""
        if self.checkpoint == "auto":
            return self.resolve(window, hyper).estimate(window, hyper, state)
        tail = _tail(self, window, hyper)
        through = _SCANS[self.checkpoint]

        def step_under(hyper: Hyper) -> Step:
            return _tapped(tail.window.one_step(hyper, tail.offset))

        def error(hyper: Hyper, probes: Probes) -> tuple[Scalar, Progress]:
            s = tail.window.begin(hyper)._replace(first_bad_step=tail.first_bad_step)
            inputs = probes.steps, tail.inputs
            s = through(step_under, hyper, s, inputs)  # s_t = Phi_t(s_(t-1), hyper), eq. 1
            params = _tap(tail.window.judged(s), probes.end)
            return tail.window.loss(params, hyper, tail.offset), s  # E(s_T), eq. 3

        # Back along the scan: a_T = dE/ds_T (9), then g += B_t^T a_t (10), a_(t-1) = A_t^T a_t (8).
        probes = Probes(jnp.zeros(tail.length), jnp.zeros(()))
        gradient = jax.value_and_grad(error, (0, 1), has_aux=True)
        (loss, end), (grad, squares) = gradient(hyper, probes)
        info = summary(loss, grad, end.first_bad_step)
        # maximum and division keep NaN: an adjoint that is not finite must not look calm. Only one
        # that is 0 all along (a perfect fit) has not grown, where the division would say NaN.
        # Where the last parameters are judged, their adjoint is the last step's: read once.
        last = tail.window.averaged == 1 and window.problem.evaluate is None
        most, first = jnp.max(squares.steps), squares.steps[-1] if last else squares.end
        still = (most == 0) & (first == 0)
        info["growth"] = jnp.sqrt(jnp.where(still, 0.0, most / jnp.where(still, 1.0, first)))
        return Estimate(loss, grad, end.inner, info), state

    def resolve(self, window: Window, hyper: Hyper) -> Estimator:
        """With "auto", the same estimator with the checkpoint that fits."""
        if self.checkpoint != "auto":
            return self
        limit = device_bytes() if self.memory_limit is None else self.memory_limit
        needed: dict[str, int] = {}
        for checkpoint in _SCANS:  # the cheapest first
            chosen = dataclasses.replace(self, checkpoint=checkpoint, memory_limit=None)
            needed[checkpoint] = temporary_bytes(compiled_estimate(chosen, window, hyper))
            if needed[checkpoint] <= limit:
                return chosen
        raise ValueError(
            f"memory_limit={limit} bytes is too little for {self}: it needs {needed}. Take a "
            "smaller window, fewer steps, or Forward(chunk=...), whose memory does not grow with K."
        )


class Probes(NamedTuple):
    """Zeros whose gradients are the squared norms of the adjoints a_t that pass by.

    Attributes:
      steps: `[window]`, after each differentiated step.
      end: at the parameters that are judged, where the adjoint begins.
    """

    steps: jax.Array
    end: Scalar


class _Tail(NamedTuple):
    """The last steps of a window, those that are differentiated.

    `window` starts before them, `inputs` are theirs; `offset` steps of the run lie before the whole
    window, and the first bad one of those before the tail was `first_bad_step`.
    """

    window: Window
    inputs: tuple[jax.Array, Batch]
    length: int
    offset: jax.typing.ArrayLike
    first_bad_step: jax.Array


def _tail(estimator: Unrolled, window: Window, hyper: Hyper) -> _Tail:
    """The steps before the tail are trained here, without a derivative (Shaban et al. 2019)."""
    steps = window.num_steps
    length = steps if estimator.window is None else estimator.window
    if length > steps:
        raise ValueError(
            f"window={length} exceeds the K={steps} steps in train. Choose a smaller window or "
            "give more steps per estimate."
        )
    tail = window.judging(estimator.validate_at, within=length)
    inputs = step_inputs(window.train)
    if length == steps:
        return _Tail(tail, inputs, length, steps_done(window.inner), jnp.int32(-1))
    ahead = window.begin(hyper)
    offset = steps_done(ahead.inner)
    limit, before, end = window.limit, window, None
    first: jax.typing.ArrayLike = steps - length
    if limit is not None:
        # The last steps that are taken; of one none stands still.
        first = jnp.clip(limit - length, 0, first)
        before, end = dataclasses.replace(window, limit=first), first + length
        limit = None if length == 1 else limit
    ahead = before.trained(hyper, ahead, offset, steps - length)
    tail = dataclasses.replace(tail, inner=ahead.inner, limit=limit, end=end)
    within = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, length), inputs)
    return _Tail(tail, within, length, offset, ahead.first_bad_step)


# In order of cost.
_SCANS: dict[Checkpoint, Callable[..., Progress]] = {
    "none": store_all,
    "step": store_gradients,
    "sqrt": store_roots,
    "log": store_few,
}


def _tapped(step: Step) -> Step:
    """`step` along (probes, its own inputs), the adjoint of its parameters read by the probe."""

    def tapped(progress: Progress, x: tuple[jax.Array, Any]) -> Progress:
        probe, t_and_batch = x
        progress = step(progress, t_and_batch)
        return progress._replace(inner=_tap_params(progress.inner, probe))

    return tapped


# Inside a scan nobody sees the adjoint: a custom backward pass is the place to measure it, and the
# gradient of a zero carries the measurement out.
@jax.custom_vjp
def _tap(tree: Tree, probe: jax.Array) -> Tree:
    """`tree` itself; the gradient in `probe` is the squared norm of the adjoint that passes."""
    return tree


def _tap_forward(tree: Tree, probe: jax.Array) -> tuple[Any, None]:
    return tree, None


def _tap_backward(_: None, adjoint: Tree) -> tuple[Any, jax.Array]:
    floats = [x for x in jax.tree.leaves(adjoint) if x.dtype != jax.dtypes.float0]
    return adjoint, jnp.real(inner_product(floats, floats))


_tap.defvjp(_tap_forward, _tap_backward)


def _tap_params(inner: InnerState, probe: jax.Array) -> InnerState:
    """Taps the leaves under `inner.params`, whatever kind of pytree `inner` is."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(inner)
    leaves = [leaf for _, leaf in paths_and_leaves]
    at = [i for i, (path, _) in enumerate(paths_and_leaves) if path_name(path[:1]) == "params"]
    for i, leaf in zip(at, _tap([leaves[i] for i in at], probe), strict=True):
        leaves[i] = leaf
    return treedef.unflatten(leaves)
