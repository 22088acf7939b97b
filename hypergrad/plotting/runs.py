"""Pictures of a run: trajectories of its hyperparameters, losses, hypergradients, schedules.

A `history` is the sequence of what `tuner.update` returned as `info`, one per update, or what
`hypergrad.fit` recorded. Each function draws on the axes it is given, or on a new figure, and
returns the axes; `axes[0].figure.savefig` writes the picture. Nothing global is touched (no pyplot,
no rcParams): for a window, give axes made by `matplotlib.pyplot.subplots`. Colours are those of
Okabe and Ito, safe for the colour-blind.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from hypergrad import checks
from hypergrad.optim.schedules import Schedule
from hypergrad.plotting.panels import (
    PALETTE,
    Axes,
    Figure,
    GivenAxes,
    chosen,
    given_or_new,
    legend_above,
    literal,
    log_if_wide,
    new_panels,
    set_hyper_axis,
    set_step_axis,
)
from hypergrad.space.dimensions import Float
from hypergrad.space.space import Space
from hypergrad.trees import Tree
from hypergrad.tuners.trust import REASONS

_DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
# More numbers than this are drawn as a median and a band.
_MOST_LINES = len(PALETTE)
# One for each of `trust.REASONS`: its few words, its marker, its colour.
REFUSALS = (
    ("trusted", "", ""),
    ("not finite", "s", PALETTE[6]),
    ("norm spike", "^", PALETTE[4]),
    ("adjoint grew", "X", PALETTE[1]),
    ("learned too little", "v", PALETTE[3]),
    ("system not solved", "D", PALETTE[2]),
)
assert len(REFUSALS) == len(REASONS)


def plot_trajectories(
    history: Sequence[Any],
    space: Space,
    *,
    steps_per_update: int | None = None,
    names: Sequence[str] | None = None,
    axes: GivenAxes = None,
    label: str | None = None,
    color: str | None = None,
) -> np.ndarray:
    """Draws where the hyperparameters went, one panel each, in their own units and on their scales.

    The vertical axis is the range in `space`. Up to 7 numbers of one hyperparameter (one per layer)
    are lines; more are their median with bands from the 25th to the 75th and from the 5th to the
    95th percentile.

    Args:
      history: the run's infos, or what has their `hyper`, in order.
      space: the tuner's space: scales and bounds.
      steps_per_update: K; the horizontal axis is then training steps instead of updates.
      names: which hyperparameters, in this order; None for all.
      axes: one for each, as an array or a list; None for a new figure.
      label: of the run in the legends, where several share the axes.
      color: of the run; its numbers then differ by their dashes.

    Returns the axes used, `[hyperparameters]`.

    Raises:
      ValueError: an empty history, a name that is not in the history or not in the space, too few
        axes.

    >>> import hypergrad as hg
    >>> from types import SimpleNamespace
    >>> history = [SimpleNamespace(hyper={"rate": 10.0**-i}) for i in range(3)]
    >>> space = hg.Space({"rate": hg.Float(1e-3, 1.0, scale="log")})
    >>> axis, = plot_trajectories(history, space, steps_per_update=10)
    >>> axis.get_yscale(), axis.get_xlabel(), axis.lines[0].get_xdata().tolist()
    ('log', 'training step', [10, 20, 30])
    """
    hypers = [dict(info.hyper) for info in _checked(history)]
    values = jax.tree.map(lambda *leaves: np.stack(leaves), *hypers)
    x = _positions(history, steps_per_update)
    panels = _hyper_panels(values, space, names, axes)
    for name, axis in panels.items():
        _draw(axis, x, _series(values[name]), label, color)
        _finish(axis, steps_per_update)
    return np.array(list(panels.values()))


def plot_schedule(
    schedule: Schedule,
    space: Space,
    *,
    names: Sequence[str] | None = None,
    axes: GivenAxes = None,
    label: str | None = None,
    color: str | None = None,
) -> np.ndarray:
    """Draws a schedule (`learned_schedule`, `settled_schedule`) as the steps that it consists of.

    Arguments, result and errors as in `plot_trajectories`; each value stands for the training
    steps it is used in.
    """
    # The last value stands until the end of its steps.
    values = jax.tree.map(lambda v: np.concatenate([v, v[-1:]]), dict(schedule.values))
    x = schedule.steps_per_update * np.arange(len(jax.tree.leaves(values)[0]))
    panels = _hyper_panels(values, space, names, axes)
    for name, axis in panels.items():
        _draw(axis, x, _series(values[name]), label, color, step="post")
        _finish(axis, schedule.steps_per_update)
    return np.array(list(panels.values()))


def plot_losses(
    history: Sequence[Any],
    *,
    steps_per_update: int | None = None,
    train_losses: Sequence[float] | None = None,
    axes: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
) -> Axes:
    """Draws the validation loss of each update, refused ones marked, and the training loss.

    Args:
      history: the run's infos, in order.
      steps_per_update: K; the horizontal axis is then training steps instead of updates.
      train_losses: one per update; None for the `train_loss` of the infos, where they have one.
      axes: where to draw; None for a new figure.
      label: of the run in the legend, where several share the axes.
      color: of the run.

    The axis is logarithmic where the losses span more than a factor of 5. A refused update whose
    loss is not finite is marked at the upper edge.

    Raises:
      ValueError: an empty history; `train_losses` of another length.
    """
    losses = np.array([float(info.loss) for info in _checked(history)])
    axis = new_panels(1)[0] if axes is None else axes
    x = _positions(history, steps_per_update)
    before = f"{label}: " if label else ""
    axis.plot(x, losses, color=color or PALETTE[0], label=label or "validation")
    if train_losses is None:
        train_losses = [float(getattr(info, "train_loss", np.nan)) for info in history]
    elif len(train_losses) != len(history):
        raise ValueError(
            f"train_losses has {len(train_losses)} entries and history {len(history)}: give one "
            "per update."
        )
    trained = np.asarray(train_losses, float)
    with_training = bool(np.isfinite(trained).any())
    if with_training:
        axis.plot(x, trained, "--", color=color or PALETTE[4], label=before + "training")
    _mark_refused(axis, x, losses, history)
    log_if_wide(axis, [*losses, *trained])
    axis.set_ylabel("loss" if with_training else "validation loss")
    _finish(axis, steps_per_update)
    return axis


def plot_norms(
    history: Sequence[Any],
    *,
    steps_per_update: int | None = None,
    axes: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
) -> Axes:
    """Draws the hypergradients' norms on a logarithmic axis, refused ones marked by their reason.

    The norm is in unit coordinates: loss per full range of the hyperparameters. One that is not
    finite is marked at the upper edge; one of exactly zero has no place on a logarithmic axis and
    is left out. Arguments as in `plot_losses`.

    Raises:
      ValueError: an empty history; infos without a norm, as a tuner of one's own may have.
    """
    if any(getattr(info, "norm", None) is None for info in _checked(history)):
        raise ValueError(
            "history holds infos without a norm, which this tuner does not report: draw its losses."
        )
    norms = np.array([float(info.norm) for info in history])
    axis = new_panels(1)[0] if axes is None else axes
    x = _positions(history, steps_per_update)
    trusted = color or PALETTE[0]
    axis.plot(x, norms, ".-", color=trusted, label=label or "trusted", linewidth=1, markersize=4)
    axis.set_yscale("log", nonpositive="mask")
    _mark_refused(axis, x, norms, history)
    axis.set_ylabel("hypergradient norm\n(loss per range)")
    _finish(axis, steps_per_update)
    return axis


def plot_run(
    history: Sequence[Any],
    space: Space,
    *,
    steps_per_update: int | None = None,
    train_losses: Sequence[float] | None = None,
    title: str | None = None,
) -> Figure:
    """One run on one figure: its trajectories, its losses, its hypergradients' norms.

    Arguments and errors as in `plot_trajectories` and `plot_losses`.
    """
    first = _checked(history)[0]
    count = len(first.hyper)
    with_norms = getattr(first, "norm", None) is not None
    axes = new_panels(count + 1 + with_norms)
    common: dict[str, Any] = {"steps_per_update": steps_per_update}
    plot_trajectories(history, space, axes=axes[:count], **common)
    plot_losses(history, train_losses=train_losses, axes=axes[count], **common)
    if with_norms:
        plot_norms(history, axes=axes[-1], **common)
        # The marks are explained there, beside it.
        _legend(axes[count], without="refused")
    figure = axes[0].figure
    if title:
        figure.suptitle(literal(title))
    return figure


def _checked(history: Sequence[Any]) -> Sequence[Any]:
    if not len(history):
        raise ValueError("history=[] holds no update: append the info of every tuner.update to it.")
    return history


def _positions(history: Sequence[Any], steps_per_update: int | None) -> np.ndarray:
    """Where the updates stand: at the last training step of each, or at their number from 1."""
    if steps_per_update is not None:
        checks.integer("steps_per_update", steps_per_update)
    # `fit` numbers its updates, which may begin anywhere.
    numbers = [getattr(info, "update", i) for i, info in enumerate(history)]
    return (steps_per_update or 1) * (np.array(numbers) + 1)


def _hyper_panels(
    values: Mapping[str, Tree], space: Space, names: Iterable[str] | None, axes: GivenAxes
) -> dict[str, Axes]:
    """The axes of each hyperparameter, on its scale."""
    # JAX sorts a dict's keys; the space has the user's order.
    known = sorted(values, key=lambda name: [*space, name].index(name))
    floats = {}
    for name in chosen(names, known, "run's hyperparameters"):
        dimension = space.dimensions.get(name)
        if not isinstance(dimension, Float):
            raise ValueError(
                f"The run's hyperparameter {name!r} is no Float of this space, whose Floats are "
                f"{list(space.continuous)}: give the tuner's space, or choose with names=."
            )
        floats[name] = dimension
    panels = given_or_new(axes, list(floats))
    for name, axis in panels.items():
        set_hyper_axis(axis, name, floats[name])
    return panels


def _series(tree: Tree) -> dict[str, np.ndarray]:
    """The numbers of one hyperparameter by their labels, `[updates]`; or all, `[updates, n]`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if sum(leaf[0].size for _, leaf in leaves) > _MOST_LINES:
        return {"": np.concatenate([leaf.reshape(len(leaf), -1) for _, leaf in leaves], axis=1)}
    lines = {}
    for path, leaf in leaves:
        label = jax.tree_util.keystr(path, simple=True, separator=".")
        for index in np.ndindex(leaf.shape[1:]):
            place = f"[{', '.join(map(str, index))}]" if index else ""
            lines[label + place] = leaf[(slice(None), *index)]
    return lines


def _draw(
    axis: Axes,
    x: np.ndarray,
    series: Mapping[str, np.ndarray],
    label: str | None,
    color: str | None,
    step: Literal["post"] | None = None,
) -> None:
    for i, (part, values) in enumerate(series.items()):
        line_color = color or PALETTE[i]
        style = _DASHES[i] if color else "-"

        text = " ".join(t for t in (label, part) if t) or None
        if values.ndim > 1:
            low, quarter, values, upper, high = np.percentile(values, [5, 25, 50, 75, 95], axis=1)
            bands = ((low, high, "5-95%", 0.15), (quarter, upper, "25-75%", 0.35))
            for bottom, top, between, alpha in bands:
                axis.fill_between(
                    x, bottom, top, color=line_color, alpha=alpha, lw=0, step=step, label=between
                )
            text = " ".join(t for t in (label, "median") if t)
        drawstyle = "default" if step is None else f"steps-{step}"
        axis.plot(x, values, color=line_color, ls=style, label=text, drawstyle=drawstyle)


def _mark_refused(axis: Axes, x: np.ndarray, y: np.ndarray, history: Sequence[Any]) -> None:
    # A tuner of one's own may not judge.
    refused = np.array([int(getattr(info, "refused", None) or 0) for info in history])
    # Where there is no height to show: the upper edge.
    lost, edge = ~np.isfinite(y), axis.get_xaxis_transform()
    style: dict[str, Any] = {"ms": 6, "markeredgecolor": "white", "markeredgewidth": 0.5}
    for reason, (words, marker, color) in enumerate(REFUSALS[1:], 1):
        style |= {"color": color, "label": f"refused: {words}"}
        for here, height, transform in (
            ((refused == reason) & ~lost, y, axis.transData),
            ((refused == reason) & lost, np.full(len(y), 0.97), edge),
        ):
            if here.any():
                axis.plot(x[here], height[here], marker, transform=transform, **style)


def _finish(axis: Axes, steps_per_update: int | None) -> None:
    set_step_axis(axis, "training step" if steps_per_update else "outer update")
    _legend(axis)


def _legend(axis: Axes, without: str | None = None) -> None:
    """A legend, unless it would hold one run's only line."""
    handles, labels = axis.get_legend_handles_labels()
    # Several runs on one axis share the marks of refusals.
    unique = dict(zip(labels, handles, strict=True))
    if without:
        unique = {text: h for text, h in unique.items() if not text.startswith(without)}
    # A new legend would replace the old one, but there may be none.
    old = axis.get_legend()
    if old is not None:
        old.remove()
    if unique.keys() - {"validation", "trusted"}:
        legend_above(axis, list(unique.values()), list(unique))
