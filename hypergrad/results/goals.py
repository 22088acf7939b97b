"""What a sweep reaches for, by metrics: one score or several objectives, and bounds to keep to."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.checks import choice, finite, instance, text
from hypergrad.population.member import PopulationReport
from hypergrad.problem.mistakes import metrics_of
from hypergrad.problem.problem import Problem
from hypergrad.trees import Batch, Hyper, Key, Params, Scalar

# The name of the validation loss, where no metric has it.
LOSS = "loss"
_DIRECTIONS = ("minimize", "maximize")
# A stream of seeds, far from the trials' own, which are folded in by their numbers.
_WEIGHTS = 2**31 + 7


class Goals(NamedTuple):
    """The objectives, of which the first is the score, and the constraints.

    Attributes:
      names: metrics; None is the validation loss.
      directions: "minimize" or "maximize" each.
      constraints: metrics with the bounds that they must stay below.
      given_as: the argument that named the objectives.
    """

    names: tuple[str | None, ...] = (None,)
    directions: tuple[str, ...] = ("minimize",)
    constraints: Mapping[str, float] = {}
    given_as: str = "metric"

    @property
    def several(self) -> bool:
        """Whether there is more than one objective."""
        return len(self.names) > 1

    def score(self, report: PopulationReport) -> jax.Array:
        """The first objective of each slot, `[slots]`."""
        return _metric(self.names[0], report)

    def values(self, report: PopulationReport) -> np.ndarray:
        """Every objective of each slot, `[slots, objectives]`."""
        return np.stack([np.asarray(_metric(n, report), float) for n in self.names], axis=1)

    def excess(self, report: PopulationReport, slot: int) -> dict[str, float]:
        """How far each constraint's metric is above its bound; at most 0 is kept to."""
        found = {n: float(_metric(n, report)[slot]) - b for n, b in self.constraints.items()}
        return {n: x if np.isfinite(x) else float("inf") for n, x in found.items()}

    def unknown(self, known: Collection[str]) -> str:
        """What of this is none of the metrics that are known, as a sentence; empty if all is."""
        wanted = [(self.given_as, name) for name in self.names if name not in (None, LOSS)]
        wanted += [("constraints", name) for name in self.constraints if name != LOSS]
        for argument, name in wanted:
            if name not in known:
                names = argument == "metric"
                what = f"metric={name!r} is" if names else f"{argument} names {name!r}, which is"
                return f"{what} none of the problem's metrics: {sorted(known)}."
        return ""

    def scalarised(self, problem: Problem, weights: jax.Array) -> Problem:
        """The problem whose validation loss is the weighted sum of the objectives, to minimise."""
        signs = [-1.0 if d == "maximize" else 1.0 for d in self.directions]

        def valid_loss(params: Params, hyper: Hyper, batch: Batch, key: Key) -> Scalar:
            known = metrics_of(problem.metrics, params, hyper, batch, key)
            losses = [
                known[n] if n in known else problem.valid_loss(params, hyper, batch, key)
                for n in self.names
            ]
            terms = zip(signs, weights, losses, strict=True)
            return sum(sign * weight * loss for sign, weight, loss in terms)

        return problem._replace(valid_loss=valid_loss)

    def weights(self, seed: int, number: int, told: Sequence[Sequence[float]]) -> np.ndarray:
        """A trial's weights of the objectives, drawn evenly; the unit of each is its spread so far.

        As ParEGO does (Knowles 2006), with the sum in place of its maximum.
        """
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _WEIGHTS), number)
        drawn = np.asarray(jax.random.dirichlet(key, jnp.ones(len(self.names))), float)
        spread = np.ptp(np.asarray(told, float), axis=0) if len(told) > 1 else np.ones(len(drawn))
        return drawn / np.where(spread > 0, spread, 1.0)


def goals_of(metric: Any, direction: Any, objectives: Any, constraints: Any) -> Goals:
    """What the four arguments of `sweep` mean together.

    Raises:
      ValueError: a direction or a bound that is none, objectives beside a metric, a validation loss
        to maximise.
    """
    if metric is not None:
        text("metric", metric)
    choice("direction", direction, _DIRECTIONS)
    if direction == "maximize" and metric is None:
        raise ValueError(
            "direction='maximize' with metric=None would maximise the validation loss: name one of "
            "the problem's metrics."
        )
    bounds = {} if constraints is None else constraints
    instance("constraints", bounds, Mapping, "a dict from metrics to their bounds, or None")
    bounds = {
        text("constraints' name", n): finite(f"constraints[{n!r}]", b) for n, b in bounds.items()
    }
    if objectives is None:
        return Goals((metric,), (direction,), bounds)
    instance("objectives", objectives, Mapping, "a dict from metrics to directions, or None")
    if not objectives:
        raise ValueError("objectives={} is empty: name metrics, or give None.")
    if metric is not None or direction != "minimize":
        raise ValueError(
            f"objectives={dict(objectives)!r} stand beside metric={metric!r} and "
            f"direction={direction!r}: give one or the other."
        )
    for name, way in objectives.items():
        choice(f"objectives[{text('objectives', name)!r}]", way, _DIRECTIONS)
    return Goals(tuple(objectives), tuple(objectives.values()), bounds, "objectives")


def _metric(name: str | None, report: PopulationReport) -> Any:
    known = report.metrics or {}
    return report.score if name is None or (name == LOSS and name not in known) else known[name]
