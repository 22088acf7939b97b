"""Training as a function of hyperparameters: what is trained, what is judged, and its gradient."""

from hypergrad.problem.inner_gradient import inner_gradient
from hypergrad.problem.noise import dropout
from hypergrad.problem.problem import Inner, Problem, bilevel, nonzero_gradient, rollout
