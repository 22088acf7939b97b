"""What may be tuned: dimensions, unit coordinates, and a space as JSON."""

from hypergrad.space.dimensions import Categorical, Float, Int
from hypergrad.space.space import Space
