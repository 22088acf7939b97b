"""Reverse mode through the training steps: full or truncated, checkpointed, mixed-mode."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hypergrad.data.batches import num_steps, step_inputs
from hypergrad.estimators.base import Estimate, Estimator, compiled_estimate, summary
from hypergrad.estimators.memory import device_bytes, temporary_bytes
from hypergrad.problem.problem import Problem, steps_done, validation_loss
from hypergrad.problem.window import Progress, ValidateAt, averaged, begin, judged, one_step
from hypergrad.trees import inner_product, path_name

Checkpoint = Literal["none", "step", "sqrt", "auto"]


@dataclasses.dataclass(frozen=True)
class Unrolled(Estimator):
    """Reverse mode through the last `window` of the K steps, exact where the window is all of them.

    With a = dE/dparams at the end, walking back: grad += B_t^T a, a <- A_t^T a, where A_t and B_t
    are the derivatives of step t in the state and in `hyper`.

    Args:
      window: how many of the last steps are differentiated; None for all K. Truncation biases by
        what the window cannot see: greedy windows make learning rates far too small.
      checkpoint: what is stored of a step for the way back. "none": all it needs (the state and
        the batch, as the inner gradient is mixed-mode); "step": the state alone; "sqrt": about
        2 sqrt(window) states, for one more training run of time; "auto": the first of these, in
        order of cost, whose program fits `memory_limit` by XLA's own analysis. That compiles up to
        three programs, once for each problem and shapes.
      memory_limit: bytes for "auto", beside arguments and results; None for half of the device's
        memory. Under `vmap`, and with several seeds, it counts one member.
      validate_at: "last" judges the last parameters; "mean" judges their mean over the window,
        which does not punish the noise of the steps themselves (training goes on from the last);
        an integer judges the mean of that many last ones, a float that of a share of the window.

    Cost in gradient evaluations per differentiated step: 3, with "step" or "sqrt" 4; memory
    O(window |inner|), or O(sqrt(window) |inner|) with "sqrt"; independent of |hyper|.

    `info["growth"]` is the largest norm of the adjoint a along the way over its first one:
    above 1 and growing with the window means chaos, which the loss does not show.

    Source: Franceschi et al. 2017, eq. 7-8; truncation: Shaban et al. 2019; mixed mode: Kemaev et
    al. 2025.
    """

    window: int | None = None
    checkpoint: Checkpoint = "none"
    validate_at: ValidateAt = "last"
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None for all K steps.")
        if self.checkpoint not in (*_SCANS, "auto"):
            raise ValueError(
                f"checkpoint={self.checkpoint!r} is unknown: choose one of {[*_SCANS, 'auto']}."
            )
        if self.memory_limit is not None and self.checkpoint != "auto":
            raise ValueError(
                f"memory_limit={self.memory_limit} is read by checkpoint='auto' only, and "
                f"checkpoint is {self.checkpoint!r}."
            )

    def resolve(
        self, problem: Problem, hyper: Any, inner: Any, train: Any, valid: Any, key: jax.Array
    ) -> Estimator:
        """With "auto", the same estimator with the checkpoint that fits."""
        if self.checkpoint != "auto":
            return self
        limit = device_bytes() if self.memory_limit is None else self.memory_limit
        needed: dict[str, int] = {}
        for checkpoint in _SCANS:
            chosen = dataclasses.replace(self, checkpoint=checkpoint, memory_limit=None)
            compiled = compiled_estimate(chosen, problem, hyper, inner, train, valid, key)
            needed[checkpoint] = temporary_bytes(compiled)
            if needed[checkpoint] <= limit:
                return chosen
        raise ValueError(
            f"memory_limit={limit} bytes is too little for {self}: it needs {needed}. Take a "
            "smaller window, fewer steps, or Forward(chunk=...), whose memory does not grow with K."
        )

    def estimate(
        self,
        problem: Problem,
        hyper: Any,
        inner: Any,
        train: Any,
        valid: Any,
        key: jax.Array,
        state: Any,
    ) -> tuple[Estimate, Any]:
        """One value and gradient of the validation loss; see the class."""
        if self.checkpoint == "auto":
            chosen = self.resolve(problem, hyper, inner, train, valid, key)
            return chosen.estimate(problem, hyper, inner, train, valid, key, state)
        steps = num_steps(train)
        window = steps if self.window is None else self.window
        if window > steps:
            raise ValueError(
                f"window={window} exceeds the K={steps} steps in train. Choose a smaller window or "
                "give more steps per estimate."
            )
        count = averaged(self.validate_at, window)
        xs = step_inputs(train)
        before = jax.tree.map(lambda x: x[: steps - window], xs)
        within = jax.tree.map(lambda x: x[steps - window :], xs)
        first_bad_step = jnp.int32(-1)
        offset = steps_done(inner)
        if window < steps:
            ahead = begin(problem, hyper, inner, key, 1)
            offset = steps_done(ahead.inner)
            ahead = _scan(one_step(problem, hyper, train, key, offset), ahead, before)
            inner, first_bad_step = ahead.inner, ahead.first_bad_step

        def outer(hyper: Any, probes: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Progress]:
            progress = begin(problem, hyper, inner, key, count)
            progress = progress._replace(first_bad_step=first_bad_step)
            advance = one_step(problem, hyper, train, key, offset, count)

            def tapped(progress: Progress, x: Any) -> Progress:
                probe, t_and_batch = x
                progress = advance(progress, t_and_batch)
                return progress._replace(inner=_tap_params(progress.inner, probe))

            progress = _SCANS[self.checkpoint](tapped, progress, (probes[0], within))
            params = _tap(judged(progress, count), probes[1])
            return validation_loss(problem, params, hyper, valid, key, offset + steps), progress

        probes = (jnp.zeros(window), jnp.zeros(()))
        (loss, end), (grad, (squares, first)) = jax.value_and_grad(outer, (0, 1), has_aux=True)(
            hyper, probes
        )
        # maximum and division keep NaN: an adjoint that is not finite must not look calm
        info = summary(loss, grad, end.first_bad_step)
        info["growth"] = jnp.sqrt(jnp.max(squares) / first)
        return Estimate(loss, grad, end.inner, info), state


Step = Callable[[Progress, Any], Progress]


def _scan(step: Step, progress: Progress, xs: Any) -> Progress:
    return jax.lax.scan(lambda p, x: (step(p, x), None), progress, xs)[0]


def _scan_step(step: Step, progress: Progress, xs: Any) -> Progress:
    return _scan(jax.checkpoint(step, prevent_cse=False), progress, xs)


def _scan_sqrt(step: Step, progress: Progress, xs: Any) -> Progress:
    """Chunks of about sqrt(length) steps: stores one state per chunk, then one per step of it."""
    length = jax.tree.leaves(xs)[0].shape[0]
    root = math.isqrt(length)
    # The steps of a remainder would be compiled a second time: take a divisor near the root.
    size = next((s for s in range(root, root // 2, -1) if length % s == 0), root)
    whole = length // size * size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs)
    rest = jax.tree.map(lambda x: x[whole:], xs)
    chunk = jax.checkpoint(lambda p, x: _scan_step(step, p, x), prevent_cse=False)
    progress = _scan(chunk, progress, chunks)
    return _scan_step(step, progress, rest) if whole < length else progress


# In order of cost.
_SCANS: dict[Checkpoint, Callable[..., Progress]] = {
    "none": _scan,
    "step": _scan_step,
    "sqrt": _scan_sqrt,
}


@jax.custom_vjp
def _tap(tree: Any, probe: jax.Array) -> Any:
    """`tree` itself; the gradient in `probe` is the squared norm of the adjoint that passes."""
    return tree


def _tap_forward(tree: Any, probe: jax.Array) -> tuple[Any, None]:
    return tree, None


def _tap_backward(_: None, adjoint: Any) -> tuple[Any, jax.Array]:
    floats = [x for x in jax.tree.leaves(adjoint) if x.dtype != jax.dtypes.float0]
    return adjoint, inner_product(floats, floats)


_tap.defvjp(_tap_forward, _tap_backward)


def _tap_params(inner: Any, probe: jax.Array) -> Any:
    """Taps the leaves under `inner.params`, whatever kind of pytree `inner` is."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(inner)
    leaves = [leaf for _, leaf in paths_and_leaves]
    at = [i for i, (path, _) in enumerate(paths_and_leaves) if _is_params(path)]
    for i, leaf in zip(at, _tap([leaves[i] for i in at], probe), strict=True):
        leaves[i] = leaf
    return treedef.unflatten(leaves)


def _is_params(path: tuple[Any, ...]) -> bool:
    return bool(path) and path_name(path[:1]) == "params"
