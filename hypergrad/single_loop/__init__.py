"""Hypergradients in one loop with training: by a memory of all blocks, a penalty, a response."""

from hypergrad.single_loop.penalty import F2SA
from hypergrad.single_loop.saba import SABA
from hypergrad.single_loop.self_tuning import SelfTuning
