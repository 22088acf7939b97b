"""Learning curves extrapolated by an ensemble of parametric ones, with a predictive spread.

As Domhan et al. 2015, who weight eleven families by Markov chains. Here a curve is `c + a g(x)`, of
which `a` and `c` follow by least squares, so that families and the shapes of `g` can be listed and
weighted by how well they fit: an average over models without a random number.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Fewer points say nothing about three parameters.
FEWEST_POINTS = 4
# What a score moves by itself, as a part of the curve's range: no fit is taken to be exact.
_NOISE = 0.02


class Extrapolation(NamedTuple):
    """What the models say about a later score.

    Attributes:
      means: of each model, `[models]`.
      weights: of the models, which sum to 1.
      std: of a score about its model.
    """

    means: np.ndarray
    weights: np.ndarray
    std: float

    @property
    def mean(self) -> float:
        """Of all models."""
        return float(self.weights @ self.means)

    @property
    def spread(self) -> float:
        """The standard deviation of the prediction, between the models and about them."""
        between = float(self.weights @ (self.means - self.mean) ** 2)
        return math.sqrt(between + self.std**2)

    def probability_below(self, bound: float) -> float:
        """That the later score is below `bound`."""
        z = (bound - self.means) / (self.std * math.sqrt(2))
        return float(sum(w * 0.5 * math.erfc(-x) for w, x in zip(self.weights, z, strict=True)))


def extrapolated(steps: Sequence[float], scores: Sequence[float], last: float) -> Extrapolation:
    """The score after `last` steps, from those after `steps`.

    Powers, exponentials, hyperbolas and a logarithm of the step, and the constant. Cost: a least
    squares fit with two unknowns for each of some eighty models.

    >>> steps = [10, 20, 30, 40, 50]
    >>> found = extrapolated(steps, [0.2 + 3 / s for s in steps], 1000)
    >>> abs(found.mean - 0.2) < 2 * found.spread < 0.2
    True
    """
    x, y = np.asarray(steps, float), np.asarray(scores, float)
    size = max(float(np.ptp(y)), 1e-12 * float(np.abs(y).max()), 1e-300)
    shapes = _shapes(x / x[-1], last / x[-1])
    residuals, means = [], []
    for here, then in shapes:
        design = np.stack([here, np.ones_like(here)], axis=1)
        fitted, *_ = np.linalg.lstsq(design, y, rcond=None)
        residuals.append(float(np.sum((design @ fitted - y) ** 2)))
        means.append(float(fitted[0] * then + fitted[1]))
    squares = np.asarray(residuals)
    freedom = max(len(x) - 2, 1)
    variance = float(squares.min()) / freedom + (_NOISE * size) ** 2
    weights = np.exp(-(squares - squares.min()) / (2 * variance))
    return Extrapolation(np.asarray(means), weights / weights.sum(), math.sqrt(variance))


def _shapes(x: np.ndarray, last: float) -> list[tuple[np.ndarray, float]]:
    """`g` at the points and at the end, in units of the last point."""
    families = [
        (lambda t, p: t**-p, np.geomspace(0.1, 3, 24)),
        (lambda t, p: np.exp(-p * t), np.geomspace(0.3, 10, 24)),
        (lambda t, p: 1 / (1 + t / p), np.geomspace(0.05, 5, 24)),
    ]
    listed = [(g(x, p), float(g(last, p))) for g, shape in families for p in shape]
    # The last two know no asymptote, and no change.
    return [*listed, (np.log(x), math.log(last)), (np.zeros_like(x), 0.0)]
