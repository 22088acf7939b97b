"""Is a hypergradient right? Closed forms, a contract for tests, a check on any problem."""

from hypergrad.testing.check import check_hypergradient
from hypergrad.testing.contract import (
    EstimatorContract,
    Oracle,
    momentum_quadratic,
    relative_error,
    ridge,
)
