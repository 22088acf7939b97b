"""The outer loop: which hypergradients are trusted, alternating, restarting, what was learned."""

from hypergrad.tuners.alternating import alternating
from hypergrad.tuners.base import Tuner
from hypergrad.tuners.learned import learned_schedule, replay, settled_schedule
from hypergrad.tuners.restarting import restarting
from hypergrad.tuners.trust import Trust
