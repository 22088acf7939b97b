"""The training examples that helped and harmed a test example most, as pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hypergrad.checks import WrongTypeError, integer
from hypergrad.plotting.panels import PALETTE, literal


def plot_attribution(
    scores: ArrayLike,
    examples: ArrayLike,
    tests: ArrayLike,
    count: int = 5,
    *,
    names: Sequence[Any] | None = None,
    test_names: Sequence[Any] | None = None,
) -> Figure:
    """One row per test image: the `count` most helpful training images, then the most harmful.

    Args:
      scores: `[tests, examples]`, what `attribution` gives for one weight per example: leaving an
        example out changes the test loss by minus its score, so that negative ones help.
      examples: training images, `[examples, height, width]` or with a last axis of channels.
      tests: test images, likewise.
      count: how many of either kind.
      names: what stands above a training image, its label say; None for nothing.
      test_names: what stands above a test image.

    Raises:
      ValueError: shapes that do not fit one another.

    >>> scores = np.array([[-1.0, 0.5, 0.2]])
    >>> images = np.zeros((3, 8, 8))
    >>> len(plot_attribution(scores, images, images[:1], count=1, names="abc").axes)
    3
    """
    scores, examples, tests = (np.asarray(x) for x in (scores, examples, tests))
    for name, images in (("examples", examples), ("tests", tests)):
        if images.ndim not in (3, 4):
            raise WrongTypeError(
                f"{name} has the shape {images.shape}: give images, [n, height, width] or "
                "[n, height, width, channels]."
            )
    if scores.shape != (len(tests), len(examples)):
        raise ValueError(
            f"scores has the shape {scores.shape}, but there are {len(tests)} tests and "
            f"{len(examples)} examples: give [tests, examples]."
        )
    count = min(integer("count", count), len(examples))
    figure = Figure(figsize=(0.75 * (2 * count + 1), 0.95 * len(tests)), layout="constrained")
    grid = figure.subplots(len(tests), 2 * count + 1, squeeze=False)
    for row, score, test, i in zip(grid, scores, tests, range(len(tests)), strict=True):
        _picture(row[0], test, "" if test_names is None else test_names[i], "black")
        order = np.argsort(score)
        chosen = [*order[:count], *order[::-1][:count]]
        for axis, j in zip(row[1:], chosen, strict=True):
            colour = PALETTE[2] if score[j] < 0 else PALETTE[1]
            label = "" if names is None else f"{names[j]}: "
            _picture(axis, examples[j], f"{label}{-score[j]:+.1g}", colour)
    return figure


def _picture(axis: Axes, image: np.ndarray, title: Any, colour: str) -> None:
    axis.imshow(image, cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.set_title(literal(str(title)), fontsize=7, color=colour, pad=2)
    for spine in axis.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.5)
