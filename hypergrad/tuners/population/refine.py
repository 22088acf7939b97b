"""A recipe for following hypergradients while training, of which many problems' tuners are made."""

import dataclasses
from typing import Any, Literal

import optax

from hypergrad.estimators.base import Estimator
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.problem import Problem
from hypergrad.space.space import Space
from hypergrad.tuners.alternating import alternating
from hypergrad.tuners.base import Tuner
from hypergrad.tuners.trust import Trust


@dataclasses.dataclass(frozen=True)
class Refine:
    """How the members of a population follow hypergradients while they train: a recipe.

    A tuner needs a problem, and a sweep has many; `tuner` makes the `alternating` of each.

    Args:
      estimator: as of `alternating`, "auto" included, which fits one member into the memory: under
        "vmap" give `hypergrad.estimators.choose.Auto(memory_limit=...)` a member's share.
      outer_optimizer: any optax optimiser over unit coordinates; None for `alternating`'s.
      steps_per_update: K, the training steps between two outer steps.
      max_move: the most a unit coordinate moves in one update.
      trust: when a hypergradient is refused.

    Raises:
      ValueError: steps_per_update that is no positive integer, max_move that is not positive.

    >>> Refine(Unrolled(), optax.adam(0.03), steps_per_update=5).steps_per_update
    5
    """

    estimator: Estimator | Literal["auto"] = Unrolled(validate_at=0.8)  # noqa: RUF009  frozen
    outer_optimizer: optax.GradientTransformation | None = None
    steps_per_update: int = 10
    max_move: float = 0.05
    trust: Trust = Trust()  # noqa: RUF009

    def __post_init__(self) -> None:
        check_steps("Refine", self.steps_per_update)
        if not self.max_move > 0:
            raise ValueError(
                f"Refine(max_move={self.max_move!r}) lets no hyperparameter move: give a positive "
                "share of the range, or refine=None for plain training."
            )

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


def check_steps(owner: str, steps: Any) -> None:
    """Raises ValueError unless `steps`, an argument of `owner`, is a positive Python integer."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"{owner}(steps_per_update={steps!r}) must be a positive Python integer: it fixes a "
            "length in the compiled program."
        )
