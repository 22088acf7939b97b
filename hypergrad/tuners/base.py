"""A tuner's shape: what it is, what it knows, and what it has to say about an update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hypergrad import checks
from hypergrad.problem.mistakes import refuse_no_problem
from hypergrad.space.space import Space
from hypergrad.trees import Hyper, InnerState, Key, Scalar, State, Unit


class Tuner(NamedTuple):
    """An outer loop as pure functions, to be called from your own.

    Attributes:
      init: `(hyper, key) -> state`, from starting values in the user's units; that of `alternating`
        also takes a training state to go on from, `inner=`.
      update: `(state, train, valid) -> (state, info)`; outside of `jax.jit` it is compiled at its
        first call; wrap it in `jax.jit` as a whole to donate the state. `train` is
        K stacked batches, leaves `[K, batch, ...]`, or a `Minibatches`; `valid` one batch.
      best: `state -> hyper`, the values to keep: the mean of the trusted iterates in unit
        coordinates (`alternating` gives later ones more weight, as it forgets a far start).
      space: what is tuned, by which a checkpoint knows its own; None for a tuner that has none.
    """

    init: Callable[..., State]
    update: Callable[..., tuple[State, Any]]
    best: Callable[[State], Hyper]
    space: Space | None = None


def refuse_wrong(
    problem: Any, space: Any, outer_optimizer: Any, trust: Any, max_move: float
) -> None:
    """Refuses what no tuner could use, swapped arguments among it, by name."""
    refuse_no_problem(problem)
    checks.instance("space", space, Space, "a hypergrad.Space")
    if outer_optimizer is not None:
        checks.optimizer("outer_optimizer", outer_optimizer)
    checks.having("trust", trust, ("max_spike", "warm_up"), "a hypergrad.Trust")
    checks.positive("max_move", max_move, "a share of the range", infinite=True)


class Info(NamedTuple):
    """What one update has to say; nothing here is needed by the next one.

    Attributes:
      loss: the validation loss under `hyper`.
      hyper: the hyperparameters this update trained with, in the user's units.
      grad: the hypergradient in unit coordinates.
      norm: its Euclidean norm.
      worth: the decrease of the validation loss that the outer step promises, to first order; 0
        for a refused step.
      refused: int32, 0 for a trusted step, else an index into `hypergrad.tuners.trust.REASONS`.
      refusals: int32, how many of the last 16 updates were refused, this one included. Above a
        third, values that this run leaves behind are not to be trusted.
      step_scale: what outer steps are multiplied with after refusals, from 1/8 to 1.
      finite: whether loss and hypergradient are.
      first_bad_step: the first training step of this update that was not finite; -1 if none.
      estimate: the estimator's own `info`.
    """

    loss: Scalar
    hyper: Hyper
    grad: Unit
    norm: Scalar
    worth: Scalar
    refused: jax.Array
    refusals: jax.Array
    step_scale: Scalar
    finite: jax.Array
    first_bad_step: jax.Array
    estimate: dict[str, jax.Array]


class Position(NamedTuple):
    """Where tuning stands: what a refused step goes back to, as one piece.

    `inner` is `()` for a tuner that trains from fresh parameters.
    """

    unit: Unit
    outer_state: State
    inner: InnerState
    estimator_state: State


class Average(NamedTuple):
    """A running mean of trusted iterates in unit coordinates."""

    unit: Unit
    seen: jax.Array


class TrustState(NamedTuple):
    """The history that trust is judged against.

    Attributes:
      median: running median of the trusted norms.
      bar: what a spike's limit is raised by; doubles at a refusal, and falls as the median rises.
      seen: trusted estimates so far.
      scale: what steps along trusted hypergradients are multiplied with, from 1/8 to 1; a refusal
        halves the next.
      shortened: how many times the horizon is quartered; 0 once anything was trusted.
      ground: where this estimate stands: `AHEAD`, `AGAIN`, `BACK` or `LEAVING`.
      refusals: uint32, a bit for each of the last 32 updates, set where it was refused.
    """

    median: jax.Array
    bar: jax.Array
    seen: jax.Array
    scale: jax.Array
    shortened: jax.Array
    ground: jax.Array
    refusals: jax.Array


class TunerState(NamedTuple):
    """The state of `alternating` and of `restarting`.

    Attributes:
      now: where tuning stands.
      trusted: the last position whose hypergradient was trusted.
      trust: the history that trust is judged against.
      average: the running mean of trusted iterates.
      key: the run's key, or the seeds'; never restored.
      updates: int32, updates done; never restored.
    """

    now: Position
    trusted: Position
    trust: TrustState
    average: Average
    key: Key
    updates: jax.Array

    @property
    def inner(self) -> InnerState:
        """The training state, for evaluation or for training on; `()` of `restarting`."""
        return self.now.inner
