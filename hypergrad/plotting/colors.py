"""The trials of a study that have a score, and their colours: what every picture of a sweep shares.

A score is what the study was told: the validation loss, or a metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from optuna.trial import FrozenTrial, TrialState

from hypergrad.plotting.panels import PALETTE, Axes
from hypergrad.search.ledger import counted

BEST_COLOR, OTHER_COLOR = PALETTE[1], "#555555"


class Scored(NamedTuple):
    """A trial with a finite score; `complete` where it trained in full."""

    trial: FrozenTrial
    score: float
    complete: bool


def scored_trials(study: optuna.Study) -> list[Scored]:
    """Trials with a finite score; a stopped one's is its last.

    Raises:
      ValueError: there is none.
    """
    scored = []
    for trial in counted(study.get_trials(deepcopy=False)):
        score = None
        if trial.state == TrialState.COMPLETE:
            score = trial.value
        elif trial.state == TrialState.PRUNED and trial.last_step is not None:
            score = trial.intermediate_values[trial.last_step]
        if score is not None and math.isfinite(score):
            scored.append(Scored(trial, score, trial.state == TrialState.COMPLETE))
    if not scored:
        raise ValueError(
            f"The study {study.study_name!r} has no trial with a score: run the sweep first, or "
            "see the trials' user attribute 'error'."
        )
    return scored


def refined_trials(scored: Sequence[Scored]) -> list[Scored]:
    """Those that hypergradients moved: their attributes hold a start and a trajectory of Floats."""
    # A black-box trial's trajectory stands still, and its start is its recorded parameters.
    return [
        s
        for s in scored
        if "start" in s.trial.user_attrs and len(s.trial.user_attrs.get("trajectory", {})) > 1
    ]


def sign_of(study: optuna.Study) -> int:
    """1 where a small score is good, -1 where a large one is."""
    return -1 if study.direction.name == "MAXIMIZE" else 1


def worst_first(scored: Sequence[Scored], study: optuna.Study) -> list[Scored]:
    """In the order of drawing, so that the good ones end in front."""
    return sorted(scored, key=lambda s: -sign_of(study) * s.score)


def best_of(scored: Sequence[Scored], study: optuna.Study) -> Scored | None:
    """The best trial that trained in full."""
    complete = [s for s in scored if s.complete]
    return min(complete, key=lambda s: sign_of(study) * s.score, default=None)


class Colors:
    """Colours by score: dark is good, and all that is far worse than the median has one colour."""

    def __init__(self, scored: Sequence[Scored], study: optuna.Study) -> None:
        sign = sign_of(study)
        losses = np.array([sign * s.score for s in scored])
        best, worst = losses.min(), losses.max()
        # One diverged trial must not leave all others in one colour.
        fence = best + 3 * (np.median(losses) - best)
        fence = fence if best < fence < worst else worst
        self._extend = "neither" if fence == worst else "max" if sign > 0 else "min"
        low, high = sorted((sign * best, sign * fence))
        self._norm = Normalize(low, high if high > low else low + 1, clip=True)
        self._map = colormaps["viridis" if sign > 0 else "viridis_r"]

    def of(self, score: float) -> Any:
        """The colour of one score."""
        return self._map(self._norm(score))

    def bar(self, axes: Sequence[Axes]) -> None:
        """Draws the scale beside the axes, with an arrow where it goes on in one colour."""
        mappable = ScalarMappable(self._norm, self._map)
        options: dict[str, Any] = {"aspect": 30, "fraction": 0.04, "pad": 0.02}
        bar = axes[0].figure.colorbar(mappable, ax=list(axes), extend=self._extend, **options)
        bar.set_label("score (validation)")
