"""Pictures of a sweep: scores, parallel coordinates, importance, and where refinement led.

Each function takes an Optuna study that `hypergrad.sweep` has opened (`result.study`, or one loaded
from its storage), draws on the axes it is given or on a new figure, and returns the axes. The
importances are Optuna's. Optuna's own plots work on the same study, too; they change matplotlib's
style for good, leave out stopped trials and know no scale of one minus the value.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hypergrad.checks import in_one_sentence
from hypergrad.plotting.colors import BEST_COLOR, OTHER_COLOR, Colors
from hypergrad.plotting.panels import (
    PALETTE,
    Axes,
    Figure,
    GivenAxes,
    chosen,
    fenced,
    given_or_new,
    legend_above,
    literal,
    log_if_wide,
    new_panels,
    png,
    set_hyper_axis,
    set_step_axis,
)
from hypergrad.plotting.parallel import plot_parallel
from hypergrad.space.dimensions import Float
from hypergrad.study.distributions import Coordinates
from hypergrad.study.ranking import (
    Scored,
    failed_trials,
    front,
    objective_names,
    ranked,
    refined_trials,
    scored_trials,
    sign_of,
)
from hypergrad.study.signature import stored_space

# Trials that trained in full, of which a tenth is one.
_FEWEST = 10


def plot_scores(study: optuna.Study, *, axes: Axes | None = None) -> Axes:
    """Draws each trial's score by its number, and the best so far (the optimisation history).

    A trial that a scheduler stopped stands at its last score; one that failed is a mark at the
    lower edge, one that is far worse than most a mark at the edge that it lies beyond. Only trials
    that trained in full count as the best.

    Raises:
      ValueError: no trial has a score.
    """
    scored = scored_trials(study)
    axis = new_panels(1)[0] if axes is None else axes
    full = [(s.trial.number, s.score) for s in scored if s.complete]
    stopped = [(s.trial.number, s.score) for s in scored if not s.complete]
    # In parts of the axis' height, as they have no score.
    failed = [(t.number, 0.03) for t in failed_trials(study)]
    if full:
        numbers, scores = zip(*full, strict=True)
        better = np.minimum if sign_of(study) > 0 else np.maximum
        # The best stands to the end.
        best = better.accumulate([*scores, scores[-1]])
        last = max(s.trial.number for s in scored)
        axis.step([*numbers, last], best, where="post", color=BEST_COLOR, label="best so far")
        axis.plot(numbers, scores, "o", color=PALETTE[0], ms=5, label="trained in full")
    if stopped:
        axis.plot(*zip(*stopped, strict=True), "x", color=OTHER_COLOR, ms=5, label="stopped early")
    if failed:
        style: dict[str, Any] = {"label": "failed", "transform": axis.get_xaxis_transform()}
        axis.plot(*zip(*failed, strict=True), "v", color=PALETTE[6], ms=5, **style)
    log_if_wide(axis, [s.score for s in scored])
    low, high = fenced(axis, [s.score for s in scored], sign_of(study))
    beyond = [s.trial.number for s in scored if not low <= s.score <= high]
    if beyond:
        place, mark = (0.97, "^") if sign_of(study) > 0 else (0.03, "v")
        style = {"label": "far worse", "transform": axis.get_xaxis_transform()}
        axis.plot(beyond, [place] * len(beyond), mark, color=PALETTE[0], mfc="none", ms=6, **style)
    axis.set_title(literal(study.study_name), fontsize=10)
    axis.set_xlabel("trial")
    axis.set_ylabel("score (validation)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    legend_above(axis, *axis.get_legend_handles_labels())
    return axis


def plot_importance(study: optuna.Study, *, axes: Axes | None = None) -> Axes:
    """Draws how much each hyperparameter mattered among the trials that trained in full.

    Optuna's estimate (`optuna.importance.get_param_importances`, PED-ANOVA): what sets the best
    tenth of the trials apart. Below some dozens of trials it is a hint at most. Of refined trials
    the values that they started from count, as those that they ended with are alike where
    hypergradients have done their work; the axis says so.

    Raises:
      ValueError: fewer than ten trials trained in full, or no sweep has opened the study.
    """
    count = sum(s.complete for s in scored_trials(study))
    if count < _FEWEST:
        raise ValueError(
            f"The study {study.study_name!r} has {count} trials that trained in full. Importance "
            f"compares the best tenth with the others: run at least {_FEWEST}."
        )
    names = {parameter: name for name, parameter in Coordinates(stored_space(study)).names.items()}
    seen = _by_starts(study)
    shares = _importances(seen)
    # The largest on top.
    found = {names.get(p, p): shares[p] for p in sorted(shares, key=shares.__getitem__)}
    axis = new_panels(1, (6, 0.9 + 0.28 * len(found)))[0] if axes is None else axes
    axis.barh([*map(literal, found)], list(found.values()), color=PALETTE[0], height=0.65)
    for i, share in enumerate(found.values()):
        text = f"{share:.2f}" if share >= 0.01 else "<0.01"
        axis.text(share, i, f" {text}", va="center", fontsize=8)
    axis.set_xlim(0, 1.15 * max(found.values()))
    of = "; where they started" if seen is not study else ""
    axis.set_xlabel(f"importance (share of 1; {count} trials{of})")
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def _by_starts(study: optuna.Study) -> optuna.Study:
    """The study with the starts of refined trials in the place of their ends, if there are any."""
    coordinates = Coordinates(stored_space(study))
    scored = [s for s in scored_trials(study) if s.complete]
    starts = [s.trial.user_attrs.get("start") or {} for s in scored]
    if not any(starts):
        return study
    copy = optuna.create_study(
        directions=study.directions, storage=optuna.storages.InMemoryStorage()
    )
    for one, start in zip(scored, starts, strict=True):
        trial = one.trial
        params = trial.params | coordinates.to_study(start)
        params = {name: params[name] for name in trial.params}
        copy.add_trial(
            optuna.create_trial(
                params=params, distributions=trial.distributions, values=trial.values
            )
        )
    return copy


def plot_refinement(
    study: optuna.Study, *, names: Sequence[str] | None = None, axes: GivenAxes = None
) -> np.ndarray:
    """Draws where hypergradients took each trial: its continuous values while it trained.

    One panel per Float, in its own units and on its scale. A trial starts at a ring, where the
    sampler proposed it, and ends at a dot, or at a cross where a scheduler stopped it; between them
    are the means of blocks of updates. Better scores are darker; the best trial that trained in
    full is vermilion. A new figure has a legend and a scale of colours.

    Args:
      study: the sweep's.
      names: which Floats; None for all that any trial had.
      axes: one for each; None for a new figure.

    Returns the axes used, `[Floats]`.

    Raises:
      ValueError: no trial was refined; a name that no refined trial has; too few axes; no sweep has
        opened the study.
    """
    space = stored_space(study)
    refined = refined_trials(scored_trials(study))
    if not refined:
        raise ValueError(
            f"The study {study.study_name!r} has no refined trial: sweep with "
            "refine=hypergrad.Refine()."
        )
    known = [n for n in space.continuous if any(n in _path(one) for one in refined)]
    colors = Colors(refined, study)
    panels = given_or_new(axes, chosen(names, known, "Floats that were refined"))
    for name, axis in panels.items():
        dimension = space[name]
        assert isinstance(dimension, Float)
        set_hyper_axis(axis, name, dimension)
        for one in colors.worst_first:
            if name in _path(one):
                x = [0, *_path(one)["steps"]]
                y = [one.trial.user_attrs["start"][name], *_path(one)[name]]
                color = colors.of(one)
                axis.plot(x, y, color=color, lw=2 if one is colors.best else 1)
                axis.plot(x[:1], y[:1], "o", color=color, markerfacecolor="white", ms=4)
                axis.plot(x[-1:], y[-1:], "o" if one.complete else "x", color=color, ms=4)
        set_step_axis(axis, "training step")
    used = list(panels.values())
    if axes is None:
        colors.bar(used)
        _explain_paths(used[0], colors, stopped=not all(s.complete for s in refined))
    return np.array(used)


def _importances(study: optuna.Study) -> dict[str, float]:
    if len(study.directions) == 1:
        return optuna.importance.get_param_importances(study)
    sign = sign_of(study)
    with warnings.catch_warnings():
        # That low values of a target of one's own are taken for good, as they are here.
        warnings.simplefilter("ignore", UserWarning)
        return optuna.importance.get_param_importances(study, target=lambda t: sign * t.values[0])


def plot_front(study: optuna.Study, *, axes: Axes | None = None) -> Axes:
    """Draws the first two objectives of every full trial, those on the front in vermilion.

    Trials that break a constraint are crosses.

    Raises:
      ValueError: a study with one objective, or no trial that trained in full.
    """
    trials, names = ranked(study), objective_names(study)
    if len(names) < 2 or not trials:
        raise ValueError(
            f"The study {study.study_name!r} has {len(names)} objectives and {len(trials)} trials "
            "that trained in full: a front needs two objectives and a trial."
        )
    axis = new_panels(1, (5, 4))[0] if axes is None else axes
    best = {one.number for one in front(study)}
    kinds = {
        "trained in full": ([t for t in trials if not t.excess], "o", PALETTE[0]),
        "breaks a constraint": ([t for t in trials if t.excess], "x", OTHER_COLOR),
        "front": ([t for t in trials if t.number in best], "o", BEST_COLOR),
    }
    for label, (found, marker, color) in kinds.items():
        if found:
            x, y, *_ = zip(*(t.values for t in found), strict=True)
            axis.plot(x, y, marker, color=color, ms=5, label=label)
    axis.set_xlabel(literal(names[0]))
    axis.set_ylabel(literal(names[1]))
    axis.grid(alpha=0.25)
    legend_above(axis, *axis.get_legend_handles_labels())
    return axis


def _path(one: Scored) -> dict[str, list[float]]:
    return one.trial.user_attrs["trajectory"]


def _explain_paths(axis: Axes, colors: Colors, stopped: bool) -> None:
    mark: dict[str, Any] = {"color": OTHER_COLOR, "ls": ""}
    legend = {
        "start": Line2D([], [], marker="o", markerfacecolor="white", **mark),
        "end": Line2D([], [], marker="o", **mark),
    }
    if stopped:
        legend["stopped early"] = Line2D([], [], marker="x", **mark)
    if colors.best is not None:
        legend[f"best: trial {colors.best.trial.number}"] = Line2D([], [], color=BEST_COLOR, lw=2)
    style: dict[str, Any] = {"loc": "outside upper center", "fontsize": 9, "frameon": False}
    axis.figure.legend(list(legend.values()), list(legend), ncols=len(legend), **style)


def save_pictures(study: optuna.Study, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes the pictures that the study has data for into `folder`; returns their paths.

    `scores.png`, `parallel.png`, `front.png` (of several objectives), `importance.png` (from ten
    trials that trained in full on) and `refinement.png` (for a sweep that refined), to be shown up
    to 900 pixels wide. The folder is made.

    Raises:
      ValueError: no trial has a score, or no sweep has opened the study.
    """
    scored = scored_trials(study)
    pictures: dict[str, Callable[..., Any]] = {"scores": plot_scores, "parallel": plot_parallel}
    if sum(s.complete for s in scored) >= _FEWEST:
        pictures["importance"] = plot_importance
    if len(study.directions) > 1 and ranked(study):
        pictures["front"] = plot_front
    if refined_trials(scored):
        pictures["refinement"] = plot_refinement
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in pictures.items():
        figure: Figure = np.atleast_1d(draw(study))[0].figure
        written.append(Path(folder) / f"{name}.png")
        try:
            written[-1].write_bytes(png(figure))
        except OSError as error:
            what = f"the picture {written[-1]} cannot be written"
            raise in_one_sentence(error, what, "make room, or name another folder") from None
    return written
