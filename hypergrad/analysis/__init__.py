"""What a hypergradient is good for: is it right, by which estimator, and what it shows."""

from hypergrad.analysis.attribution import attribution
from hypergrad.analysis.check import check_hypergradient
from hypergrad.analysis.choose import choose_estimator
from hypergrad.analysis.smoothness import metasmoothness
