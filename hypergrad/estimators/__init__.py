"""Hypergradients, one file each."""

from hypergrad.estimators.base import Estimate, Estimator, Window
from hypergrad.estimators.difference import FiniteDifference
from hypergrad.estimators.evolution import Evolution
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.hypergradient import hypergradient
from hypergrad.estimators.implicit import Implicit
from hypergrad.estimators.unrolled import Unrolled
