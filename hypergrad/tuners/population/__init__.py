"""Many members of one program, trained together: seeds and hyperparameters traced."""

from hypergrad.tuners.population.population import Population, width_for
from hypergrad.tuners.population.refine import Refine

__all__ = ["Population", "Refine", "width_for"]
