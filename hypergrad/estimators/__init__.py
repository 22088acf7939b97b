"""Hypergradients, one file each; which one to take, and whether it is right."""

from hypergrad.estimators.base import Estimate, Estimator, Window
from hypergrad.estimators.check import check_hypergradient
from hypergrad.estimators.choose import choose_estimator
from hypergrad.estimators.difference import FiniteDifference
from hypergrad.estimators.evolution import Evolution
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.hypergradient import hypergradient
from hypergrad.estimators.implicit import Implicit
from hypergrad.estimators.linear import (
    GMRES,
    ConjugateGradient,
    Identity,
    Neumann,
    Nystrom,
    Richardson,
)
from hypergrad.estimators.unrolled import Unrolled

__all__ = [
    "GMRES",
    "ConjugateGradient",
    "Estimate",
    "Estimator",
    "Evolution",
    "FiniteDifference",
    "Forward",
    "Identity",
    "Implicit",
    "Neumann",
    "Nystrom",
    "Richardson",
    "Unrolled",
    "Window",
    "check_hypergradient",
    "choose_estimator",
    "hypergradient",
]
