"""The sweep: a study outside, populations of one program inside, brackets in between."""

from hypergrad.search.schedulers import (
    ASHA,
    Hyperband,
    LearningCurves,
    PopulationBasedTraining,
    SuccessiveHalving,
)
from hypergrad.search.sweep import sweep
from hypergrad.search.tune import tune
from hypergrad.search.tuned import TuneResult
