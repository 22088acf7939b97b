"""Many members of one program, trained together: seeds and hyperparameters traced."""

from hypergrad.tuners.population.population import Population, population, width_for
from hypergrad.tuners.population.refine import Refine

__all__ = ["Population", "Refine", "population", "width_for"]
