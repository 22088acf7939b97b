"""Hyperparameters tuned by gradients: the validation loss differentiated through training."""

import importlib
from typing import Any

from hypergrad.analysis.attribution import attribution
from hypergrad.analysis.check import check_hypergradient
from hypergrad.analysis.choose import choose_estimator
from hypergrad.analysis.smoothness import metasmoothness
from hypergrad.data.batches import Minibatches
from hypergrad.data.splits import Splits
from hypergrad.estimators.base import Estimate, Estimator, Window
from hypergrad.estimators.difference import FiniteDifference
from hypergrad.estimators.evolution import Evolution
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.hypergradient import hypergradient
from hypergrad.estimators.implicit import Implicit
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.linear.direct import Cholesky, Nystrom
from hypergrad.linear.krylov import GMRES, BiCGSTAB, ConjugateGradient
from hypergrad.linear.preconditioned import Preconditioned
from hypergrad.linear.roots import custom_fixed_point, custom_root
from hypergrad.linear.series import Identity, Neumann, Richardson
from hypergrad.optim.proximal import prox
from hypergrad.optim.schedules import (
    Schedule,
    exponential_decay,
    piecewise_constant,
    piecewise_cosine,
    piecewise_linear,
    polynomial_decay,
    warmup_cosine,
)
from hypergrad.optim.transforms import (
    decay_by_tree,
    hypergradient_descent,
    norm_adam,
    scale_by_tree,
)
from hypergrad.population.refine import Refine
from hypergrad.problem.inner_gradient import inner_gradient
from hypergrad.problem.mixed import Mixed
from hypergrad.problem.noise import dropout
from hypergrad.problem.problem import Inner, Problem, bilevel, nonzero_gradient, rollout
from hypergrad.single_loop.penalty import F2SA
from hypergrad.single_loop.saba import SABA
from hypergrad.single_loop.self_tuning import SelfTuning
from hypergrad.space.dimensions import Categorical, Float, Int
from hypergrad.space.space import Space
from hypergrad.tuners.alternating import alternating
from hypergrad.tuners.base import Tuner
from hypergrad.tuners.learned import learned_schedule, replay, settled_schedule
from hypergrad.tuners.restarting import restarting
from hypergrad.tuners.trust import Trust
from hypergrad.version import __version__ as __version__

__all__ = [
    "F2SA",
    "GMRES",
    "SABA",
    "BiCGSTAB",
    "Categorical",
    "Cholesky",
    "ConjugateGradient",
    "Estimate",
    "Estimator",
    "Evolution",
    "FiniteDifference",
    "Float",
    "Forward",
    "Identity",
    "Implicit",
    "Inner",
    "Int",
    "Minibatches",
    "Mixed",
    "Neumann",
    "Nystrom",
    "Preconditioned",
    "Problem",
    "Refine",
    "Richardson",
    "Schedule",
    "SelfTuning",
    "Space",
    "Splits",
    "Trust",
    "Tuner",
    "Unrolled",
    "Window",
    "alternating",
    "attribution",
    "bilevel",
    "check_hypergradient",
    "choose_estimator",
    "custom_fixed_point",
    "custom_root",
    "decay_by_tree",
    "dropout",
    "exponential_decay",
    "hypergradient",
    "hypergradient_descent",
    "inner_gradient",
    "learned_schedule",
    "metasmoothness",
    "nonzero_gradient",
    "norm_adam",
    "piecewise_constant",
    "piecewise_cosine",
    "piecewise_linear",
    "polynomial_decay",
    "prox",
    "replay",
    "restarting",
    "rollout",
    "scale_by_tree",
    "settled_schedule",
    "warmup_cosine",
]


# Loaded on use: flax, matplotlib and Optuna take a while, and many programs use none of them.
_LATER = {
    "ASHA": "search.schedulers",
    "Checkpoint": "training.checkpoints",
    "Hyperband": "search.schedulers",
    "LearningCurves": "search.schedulers",
    "PopulationBasedTraining": "search.schedulers",
    "SuccessiveHalving": "search.schedulers",
    "fit": "training.fit",
    "load": "results.saved",
    "sweep": "search.sweep",
    "tune": "search.tune",
}
_MODULES = {
    "callbacks": "training.callbacks",
    "nn": "nn",
    "plotting": "plotting",
    "testing": "testing",
    "trust": "tuners.trust",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hypergrad.{_MODULES[name]}")
    if name in _LATER:
        return getattr(importlib.import_module(f"hypergrad.{_LATER[name]}"), name)
    raise AttributeError(f"module 'hypergrad' has no attribute {name!r}")
