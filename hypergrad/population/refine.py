"""How a member's run is trained: following hypergradients (`Refine`), or plainly."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad.checks import instance, integer_field, optimizer, positive
from hypergrad.estimators.base import Estimator
from hypergrad.estimators.hypergradient import as_estimator
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.problem import Problem, rollout, run_key
from hypergrad.problem.structure import naming_missing
from hypergrad.space.space import Space
from hypergrad.trees import Batch, Hyper, InnerState, Key, Scalar, Train, Unit
from hypergrad.tuners.alternating import alternating, horizon
from hypergrad.tuners.base import Tuner, TunerState
from hypergrad.tuners.trust import Trust


@dataclasses.dataclass(frozen=True)
class Refine:
    """How the members of a population follow hypergradients while they train: a recipe.

    A tuner needs a problem, and a sweep has many; `tuner` makes the `alternating` of each.

    Args:
      estimator: as of `alternating`, "auto" included, which fits one member into the memory: under
        "vmap" give `hypergrad.estimators.auto.Auto(memory_limit=...)` a member's share.
      outer_optimizer: any optax optimiser over unit coordinates; None for `alternating`'s.
      steps_per_update: K, the training steps between two outer steps; None for what the length of
        the run says (`hypergrad.tuners.alternating.horizon`).
      max_move: the most a unit coordinate moves in one update.
      trust: when a hypergradient is refused.

    Raises:
      ValueError: steps_per_update that is no positive integer, max_move that is not positive.

    >>> Refine(Unrolled(), optax.adam(0.03), steps_per_update=5).steps_per_update
    5
    """

    estimator: Estimator | Literal["auto"] = Unrolled(validate_at=0.8)  # noqa: RUF009  frozen
    outer_optimizer: optax.GradientTransformation | None = None
    steps_per_update: int | None = None
    max_move: float = 0.07
    trust: Trust = Trust()  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.steps_per_update is not None:
            integer_field(self, "steps_per_update", remedy="the training steps of one update")
        remedy = "give a share of the range, or refine=None for plain training"
        positive("max_move", self.max_move, remedy, infinite=True)
        as_estimator(self.estimator)
        instance("trust", self.trust, Trust, "a hypergrad.Trust")
        if self.outer_optimizer is not None:
            optimizer("outer_optimizer", self.outer_optimizer)

    def steps(self, num_steps: int) -> int:
        """K in a run of `num_steps`."""
        return horizon(num_steps) if self.steps_per_update is None else self.steps_per_update

    def tuner(self, problem: Problem, space: Space) -> Tuner:
        """The tuner of one problem."""
        return alternating(
            problem,
            space,
            self.estimator,
            self.outer_optimizer,
            max_move=self.max_move,
            trust=self.trust,
        )


@dataclasses.dataclass(frozen=True)
class RefinedRuns:
    """Runs that follow hypergradients: what trains them, and where they keep hyperparameters."""

    tuner: Tuner
    space: Space

    def unit(self, run: TunerState) -> Unit:
        """Where a run's hyperparameters stand, in unit coordinates."""
        return run.now.unit

    def hyper(self, run: TunerState) -> Hyper:
        """The same in the user's units."""
        return self.space.from_unit(run.now.unit)

    def moved(self, run: TunerState, unit: Unit) -> TunerState:
        """The run with its hyperparameters at `unit`."""
        return run._replace(now=run.now._replace(unit=unit))


class Plain(NamedTuple):
    """A run under hyperparameters that stand still; cf. `TunerState`.

    Attributes:
      hyper: in the user's units.
      inner: the training state.
      key: the run's key.
      updates: int32, blocks of K training steps done.
    """

    hyper: Hyper
    inner: InnerState
    key: Key
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class PlainRuns:
    """`RefinedRuns` without refinement: what a black-box trial is."""

    tuner: Tuner
    space: Space

    def unit(self, run: Plain) -> Unit:
        """Where a run's hyperparameters stand, in unit coordinates."""
        return self.space.to_unit(run.hyper)

    def hyper(self, run: Plain) -> Hyper:
        """The same in the user's units."""
        # Not by way of unit coordinates: what stands still is to be found again bit by bit.
        return run.hyper

    def moved(self, run: Plain, unit: Unit) -> Plain:
        """The run with its hyperparameters at `unit`."""
        return run._replace(hyper=self.space.from_unit(unit))


class Untuned(NamedTuple):
    """What an update has to say that follows no hypergradient; cf. `Info`.

    Attributes:
      loss: the training loss of the last step; 0 where the training state shows none.
      hyper: the hyperparameters, in the user's units.
      refused: 0, as of a trusted step.
    """

    loss: Scalar
    hyper: Hyper
    refused: int = 0


def plain(problem: Problem, space: Space) -> Tuner:
    """Training under hyperparameters that stand still, in the shape of a tuner."""

    def init(hyper: Hyper, key: Key) -> Plain:
        hyper = space.validate(hyper)
        with naming_missing(hyper):
            inner = problem.init(hyper, key)
        return Plain(hyper, inner, key, jnp.zeros((), jnp.int32))

    def update(run: Plain, train: Train, valid: Batch) -> tuple[Plain, Untuned]:
        key = run_key(run.key, run.inner, run.updates)
        inner = rollout(problem, run.hyper, run.inner, train, key)
        info = Untuned(getattr(inner, "loss", jnp.zeros(())), run.hyper)
        return run._replace(inner=inner, updates=run.updates + 1), info

    return Tuner(init, update, lambda run: run.hyper, space)


class Replay(NamedTuple):
    """A run under a learned schedule; cf. `Plain`.

    Attributes:
      values: in the user's units, one for each block of K training steps, leaves `[blocks, ...]`.
      inner: the training state.
      key: the run's key.
      updates: int32, blocks done.
    """

    values: Hyper
    inner: InnerState
    key: Key
    updates: jax.Array


def replaying(problem: Problem, space: Space) -> Tuner:
    """Training under a learned schedule, in the shape of a tuner; it starts from the values."""

    def hyper_at(values: Hyper, updates: jax.Array) -> Hyper:
        return jax.tree.map(lambda x: x[updates], values)

    def init(values: Hyper, key: Key) -> Replay:
        none = jnp.zeros((), jnp.int32)
        return Replay(values, problem.init(hyper_at(values, none), key), key, none)

    def update(run: Replay, train: Train, valid: Batch) -> tuple[Replay, Untuned]:
        key = run_key(run.key, run.inner, run.updates)
        hyper = hyper_at(run.values, run.updates)
        inner = rollout(problem, hyper, run.inner, train, key)
        info = Untuned(getattr(inner, "loss", jnp.zeros(())), hyper)
        return run._replace(inner=inner, updates=run.updates + 1), info

    return Tuner(init, update, lambda run: hyper_at(run.values, run.updates - 1), space)
