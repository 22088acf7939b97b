"""Many members of one program, trained together: seeds and hyperparameters traced."""

from hypergrad.population.population import Population, width_for
from hypergrad.population.refine import Refine

__all__ = ["Population", "Refine", "width_for"]
