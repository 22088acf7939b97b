"""Hyperparameters tuned by gradients: the validation loss differentiated through training."""

from hypergrad.estimators.base import Estimate, Estimator, hypergradient
from hypergrad.estimators.difference import FiniteDifference
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.inner_gradient import inner_gradient
from hypergrad.minibatches import Minibatches
from hypergrad.problem import Inner, Problem, bilevel, nonzero_gradient, rollout

__all__ = [
    "Estimate",
    "Estimator",
    "FiniteDifference",
    "Forward",
    "Inner",
    "Minibatches",
    "Problem",
    "Unrolled",
    "bilevel",
    "hypergradient",
    "inner_gradient",
    "nonzero_gradient",
    "rollout",
]
