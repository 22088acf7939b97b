"""What a hypergradient shows: which training examples a test loss owes what to."""

from hypergrad.analysis.attribution import attribution
