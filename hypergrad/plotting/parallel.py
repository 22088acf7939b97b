"""Parallel coordinates of a sweep: each trial a line through its hyperparameters."""

import numpy as np
import optuna
from matplotlib.lines import Line2D

from hypergrad.plotting.colors import BEST_COLOR, OTHER_COLOR, Colors
from hypergrad.plotting.panels import Axes, ReverseLogLocator, legend_above, literal, new_panels
from hypergrad.space.dimensions import Categorical, Float
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates
from hypergrad.study.ranking import scored_trials
from hypergrad.study.signature import stored_space

# Where an inactive hyperparameter stands, below its axis.
_INACTIVE = -0.16
# Over this much of an axis lines through one choice fan out, so that they can be told apart.
_FAN = 0.05
_DASHED = (0, (3, 2))


def plot_parallel(study: optuna.Study, *, axes: Axes | None = None) -> Axes:
    """Draws each trial as a line through its hyperparameters, on their own scales.

    The values are those the study was told, in the user's units. Better scores are darker and in
    front; the best trial that trained in full is vermilion, stopped trials are dashed. An inactive
    hyperparameter is passed below its axis. Lines through one choice fan out.

    Raises:
      ValueError: no trial has a score, or no sweep has opened the study.
    """
    scored, space = scored_trials(study), stored_space(study)
    coordinates, names = Coordinates(space), list(space)
    width = max(9.0, 0.9 * len(names))
    axis = new_panels(1, (width, 4.2))[0] if axes is None else axes
    _label(axis, space, width)
    colors = Colors(scored, study)
    for i, one in enumerate(colors.worst_first):
        values = coordinates.from_study(one.trial.params)
        fan = _FAN * (i / max(len(scored) - 1, 1) - 0.5)
        axis.plot(
            range(len(names)),
            [
                _place(space, name, values[name], fan) if name in values else _INACTIVE + fan
                for name in names
            ],
            color=colors.of(one),
            lw=2.2 if one is colors.best else 1.2,
            ls="-" if one.complete else _DASHED,
            zorder=3 if one is colors.best else 2,
        )
    colors.bar([axis])
    legend = {"trained in full": Line2D([], [], color=OTHER_COLOR)}
    if colors.best is not None:
        legend[f"best: trial {colors.best.trial.number}"] = Line2D([], [], color=BEST_COLOR, lw=2.2)
    if not all(s.complete for s in scored):
        legend["stopped early"] = Line2D([], [], color=OTHER_COLOR, ls=_DASHED)
    legend_above(axis, list(legend.values()), list(legend))
    return axis


def _label(axis: Axes, space: Space, width: float) -> None:
    """Draws a vertical axis for each hyperparameter, with its name and its marks."""
    for i, (name, dimension) in enumerate(space.items()):
        axis.plot([i, i], [0, 1], color="black", lw=0.8, zorder=1)
        for text, height in _marks(space, name):
            _write(axis, i, height, text)
        if dimension.when:
            _write(axis, i, _INACTIVE, "inactive")
    conditional = any(dimension.when for dimension in space.values())
    axis.set_xlim(-0.55, len(space) - 0.9)
    axis.set_ylim(_INACTIVE - 0.05 if conditional else -0.05, 1.05)
    axis.set_yticks([])
    axis.set_xticks(range(len(space)), [*map(literal, space)], fontsize=9)
    # Names that would run into one another are slanted.
    if 0.09 * max(map(len, space)) > width / len(space):
        for label in axis.get_xticklabels():
            label.set(rotation=20, ha="right", rotation_mode="anchor")
    axis.spines[:].set_visible(False)


def _place(space: Space, name: str, value: object, fan: float = 0.0) -> float:
    """The position of a value on its axis, in [0, 1]; choices are spread by `fan`."""
    dimension = space[name]
    if isinstance(dimension, Categorical):
        last = len(dimension.choices) - 1
        return (dimension.choices.index(value) / last if last else 0.5) + fan
    assert isinstance(value, int | float)
    if isinstance(dimension, Float):
        return float(dimension.to_unit(float(value)))
    # An Int has no unit coordinate: the one that a Float of the same range has.
    return float(Float(dimension.low, dimension.high, dimension.scale).to_unit(value)) + fan


def _marks(space: Space, name: str) -> list[tuple[str, float]]:
    """What is written beside an axis, and where: all choices; else bounds and round values."""
    dimension = space[name]
    if isinstance(dimension, Categorical):
        return [(str(c), _place(space, name, c)) for c in dimension.choices]
    low, high = dimension.low, dimension.high
    assert low is not None and high is not None
    values: list[float] = [low, high]
    if dimension.scale == "log":
        values += [10.0**k for k in range(-12, 13) if low < 10.0**k < high]
    elif dimension.scale == "reverse_log":
        values += ReverseLogLocator().tick_values(low, high)
    elif isinstance(dimension, Float):
        values += list(np.linspace(low, high, 5)[1:-1])
    marks: list[tuple[str, float]] = []
    for value in values:
        height = _place(space, name, value)
        # The bounds come first; what would touch a mark that is there is left out.
        if all(abs(height - other) > 0.07 for _, other in marks):
            marks.append((f"{value:.3g}", height))
    return marks


def _write(axis: Axes, x: float, y: float, text: str) -> None:
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.6}
    axis.text(x - 0.05, y, literal(text), ha="right", va="center", fontsize=7.5, zorder=4, bbox=box)
