"""`fit`, the loop around a tuner: history, progress, callbacks, checkpoints."""

from hypergrad.training.checkpoints import Checkpoint
from hypergrad.training.fit import Result, fit
from hypergrad.training.history import History, Record

__all__ = ["Checkpoint", "History", "Record", "Result", "fit"]
