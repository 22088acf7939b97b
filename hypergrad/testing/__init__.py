"""For tests of estimators: closed forms, and a contract to inherit."""

from hypergrad.testing.contract import (
    EstimatorContract,
    Oracle,
    momentum_quadratic,
    relative_error,
    ridge,
)
