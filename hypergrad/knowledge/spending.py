"""What training costs, in gradient evaluations: the unit of `max_evaluations`."""

from hypergrad.estimators.difference import FiniteDifference
from hypergrad.estimators.evolution import Evolution
from hypergrad.estimators.forward import Forward
from hypergrad.population.refine import Refine


def evaluations_per_step(
    refine: Refine | None, num_floats: int, guidance: float, steps_per_update: int
) -> float:
    """Gradient evaluations of one training step of a trial, by convention.

    A plain step counts 1, the way back through it 2 more (3 more where it is recomputed), a tangent
    1.7, a step of a particle or of a difference 1; a validation gradient `guidance`, which is
    n_valid / batch_size, once in `steps_per_update`.

    >>> evaluations_per_step(None, 2, 1.5, 10), evaluations_per_step(Refine(), 2, 1.5, 10)
    (1.0, 3.15)
    """
    if refine is None:
        return 1.0
    estimator, validation = refine.estimator, guidance / steps_per_update
    if isinstance(estimator, Forward):
        return 1 + 1.7 * num_floats + validation
    if isinstance(estimator, Evolution):
        return 1 + 2 * estimator.pairs + validation
    if isinstance(estimator, FiniteDifference):
        return 1 + 2 * num_floats + validation
    recomputes = getattr(estimator, "checkpoint", "none") not in ("none", "step")
    return 3.0 + recomputes + validation
