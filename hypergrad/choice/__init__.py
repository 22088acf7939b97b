"""Which estimator to take, and the call that takes one."""

from hypergrad.choice.choose import choose_estimator
from hypergrad.choice.hypergradient import hypergradient
