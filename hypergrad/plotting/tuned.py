"""Pictures of what `tune` did: the candidates by cost, and what the best trained with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypergrad.plotting.panels import PALETTE, Axes, legend_above, new_panels, png
from hypergrad.plotting.runs import plot_schedule
from hypergrad.space.space import Space


def plot_candidates(candidates: Sequence[Any], unit: float, *, axes: Axes | None = None) -> Axes:
    """Draws each candidate's validation loss, with its error, over what was spent until then.

    Args:
      candidates: `TuneResult.candidates`.
      unit: gradient evaluations of a plain run.
      axes: where to; None for a new figure.

    Raises:
      ValueError: no candidate has a finite score.
    """
    finite = [(i, c) for i, c in enumerate(candidates) if np.isfinite(c.score)]
    if not finite:
        raise ValueError("no candidate has a finite score: there is nothing to draw.")
    axis = new_panels(1)[0] if axes is None else axes
    spent = np.cumsum([c.evaluations for c in candidates]) / unit
    kinds = list(dict.fromkeys(c.kind for c in candidates))
    for number, kind in enumerate(kinds):
        mine = [(spent[i], c.score, c.std_error) for i, c in finite if c.kind == kind]
        if mine:
            x, y, error = map(np.array, zip(*mine, strict=True))
            axis.errorbar(
                x,
                y,
                np.nan_to_num(error),
                fmt="o",
                label=kind,
                color=PALETTE[number % len(PALETTE)],
            )
    lowest = np.minimum.accumulate([c.score for c in candidates])
    axis.step(spent, lowest, where="post", color="0.6", linewidth=1, zorder=0)
    axis.set_xlabel("plain runs spent on candidates")
    axis.set_ylabel("validation loss")
    legend_above(axis, *axis.get_legend_handles_labels())
    return axis


def save_candidates(
    candidates: Sequence[Any], space: Space, unit: float, folder: str | os.PathLike[str]
) -> list[Path]:
    """Writes `candidates.png` and `schedule.png` into `folder`; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    axis = plot_candidates(candidates, unit)
    written = [folder / "candidates.png", folder / "schedule.png"]
    figure: Any = axis.figure
    written[0].write_bytes(png(figure))
    axes: Any = None
    # The winner, and beside it the best values that stood still.
    constant = [c for c in candidates if jax.tree.leaves(c.schedule.values)[0].shape[0] == 1]
    for group, color in ((candidates, PALETTE[0]), (constant, PALETTE[1])):
        shown = min(group, key=lambda c: c.score)
        label = f"{shown.kind}: {shown.score:.4g}"
        axes = plot_schedule(shown.schedule, space, axes=axes, label=label, color=color)
    figure = axes[0].figure
    written[1].write_bytes(png(figure))
    return written
