"""What goes into an optax chain: transformations, and schedules with a gradient in every number."""

from hypergrad.optim.schedules import (
    Schedule,
    exponential_decay,
    piecewise_constant,
    piecewise_linear,
    warmup_cosine,
)
from hypergrad.optim.transforms import (
    decay_by_tree,
    hypergradient_descent,
    norm_adam,
    scale_by_tree,
)

__all__ = [
    "Schedule",
    "decay_by_tree",
    "exponential_decay",
    "hypergradient_descent",
    "norm_adam",
    "piecewise_constant",
    "piecewise_linear",
    "scale_by_tree",
    "warmup_cosine",
]
