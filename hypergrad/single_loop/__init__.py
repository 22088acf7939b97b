"""Hypergradients in one loop with training: by a memory of all blocks, by a penalty."""

from hypergrad.single_loop.penalty import F2SA
from hypergrad.single_loop.saba import SABA
