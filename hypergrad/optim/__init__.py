"""What goes into an optax chain: transformations, and schedules with a gradient in every number."""

from hypergrad.optim.proximal import prox
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
