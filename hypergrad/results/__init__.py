"""What a search has found: a result, its table and pictures, audits, saved networks."""

from hypergrad.results.result import Audit, SweepResult
from hypergrad.results.saved import Saved, load
