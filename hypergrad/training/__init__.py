"""`fit`, the loop around a tuner: history, progress, callbacks, checkpoints."""

from hypergrad.training.checkpoints import Checkpoint
from hypergrad.training.fit import FitResult, fit
from hypergrad.training.history import History, Record
