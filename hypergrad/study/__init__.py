"""One Optuna study that survives `kill -9` and is shared by processes."""

from hypergrad.study.ledger import Progress
from hypergrad.study.sampling import Proposal
from hypergrad.study.study import OpenStudy, open_study
