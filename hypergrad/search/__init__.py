"""The black box around training: rungs and schedulers; the study's files load Optuna on use."""

from hypergrad.search.rungs import Hyperband, Rung, SuccessiveHalving, bracket_steps, brackets

__all__ = ["Hyperband", "Rung", "SuccessiveHalving", "bracket_steps", "brackets"]
