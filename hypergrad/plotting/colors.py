"""The colours of trials: what every picture of a sweep shares."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from hypergrad.plotting.panels import PALETTE, Axes
from hypergrad.study.ranking import Scored, sign_of

BEST_COLOR, OTHER_COLOR = PALETTE[1], "#555555"


class Colors:
    """Colours by score: dark is good, and all that is far worse than the median has one colour.

    The `best` trial that trained in full stands out; None where no trial did. `worst_first` is the
    order of drawing, so that the good ones end in front.
    """

    def __init__(self, scored: Sequence[Scored], study: optuna.Study) -> None:
        sign = sign_of(study)
        self.worst_first = sorted(scored, key=lambda s: -sign * s.score)
        complete = [s for s in scored if s.complete]
        self.best = min(complete, key=lambda s: sign * s.score, default=None)
        losses = np.array([sign * s.score for s in scored])
        best, worst = losses.min(), losses.max()
        # One diverged trial must not leave all others in one colour.
        fence = best + 3 * (np.median(losses) - best)
        fence = fence if best < fence < worst else worst
        self._extend = "neither" if fence == worst else "max" if sign > 0 else "min"
        low, high = sorted((sign * best, sign * fence))
        # A scale of equal scores would have no length.
        self._norm = Normalize(low, high if high > low else low + 1, clip=True)
        self._map = colormaps["viridis" if sign > 0 else "viridis_r"]

    def of(self, one: Scored) -> Any:
        """The colour of one trial."""
        return BEST_COLOR if one is self.best else self._map(self._norm(one.score))

    def bar(self, axes: Sequence[Axes]) -> None:
        """Draws the scale beside the axes, with an arrow where it goes on in one colour."""
        mappable = ScalarMappable(self._norm, self._map)
        options: dict[str, Any] = {"aspect": 30, "fraction": 0.04, "pad": 0.02}
        bar = axes[0].figure.colorbar(mappable, ax=list(axes), extend=self._extend, **options)
        bar.set_label("score (validation)")
