"""Models: dropouts and widths that may be traced, adapters from linen, nnx and Equinox."""

import importlib
from typing import Any

from hypergrad.nn.dropout import LinenDropout, NNXDropout
from hypergrad.nn.linen import from_train_state, linen_problem, to_train_state
from hypergrad.nn.masked import MaskedDense, masked_dense, masked_kernel, unit_mask
from hypergrad.nn.nnx import NNXBatchNorm, from_nnx, nnx_problem, to_nnx

# Loaded on use: Equinox is an extra.
_EQUINOX = ("EquinoxDropout", "equinox_problem", "from_equinox", "to_equinox")

__all__ = [
    "EquinoxDropout",
    "LinenDropout",
    "MaskedDense",
    "NNXBatchNorm",
    "NNXDropout",
    "equinox_problem",
    "from_equinox",
    "from_nnx",
    "from_train_state",
    "linen_problem",
    "masked_dense",
    "masked_kernel",
    "nnx_problem",
    "to_equinox",
    "to_nnx",
    "to_train_state",
    "unit_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _EQUINOX:
        raise AttributeError(f"module 'hypergrad.nn' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("hypergrad.nn.equinox"), name)
    except ModuleNotFoundError as error:
        if error.name != "equinox":
            raise
        raise ModuleNotFoundError(
            f"hypergrad.nn.{name} needs Equinox: pip install 'hypergrad-jax[equinox]'.",
            name=error.name,
        ) from error
