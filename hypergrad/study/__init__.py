"""One Optuna study that survives `kill -9` and is shared by processes."""

from hypergrad.study.slots import TrialCounts
from hypergrad.study.study import OpenStudy, Proposal, open_study
