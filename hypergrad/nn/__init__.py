"""Flax: dropouts whose rate has a gradient, and adapters from linen and nnx scripts to problems."""

from hypergrad.nn.dropout import LinenDropout, NNXDropout
from hypergrad.nn.linen import from_train_state, linen_problem, to_train_state
from hypergrad.nn.nnx import NNXBatchNorm, from_nnx, nnx_problem, to_nnx

__all__ = [
    "LinenDropout",
    "NNXBatchNorm",
    "NNXDropout",
    "from_nnx",
    "from_train_state",
    "linen_problem",
    "nnx_problem",
    "to_nnx",
    "to_train_state",
]
