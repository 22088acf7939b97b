"""Axes for pictures: colours, panels, legends, and a hyperparameter's own scale."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

try:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, Locator

    # matplotlib's own dependency
    from PIL import Image
except ImportError as error:
    raise ImportError(
        "hypergrad's pictures need matplotlib: pip install 'hypergrad-jax[plots]'."
    ) from error

from hypergrad.checks import printable
from hypergrad.space.dimensions import Float

GivenAxes = Axes | Sequence[Axes] | np.ndarray | None
# Okabe and Ito 2008, without the yellow that is too light for a line.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def chosen(names: Iterable[str] | None, known: Sequence[str], kind: str) -> list[str]:
    """`names`, all of them known; None for all that are."""
    names = known if names is None else list(names)
    for name in names:
        if name not in known:
            raise ValueError(f"names holds {name!r}: the {kind} are {list(known)}.")
    return list(names)


def literal(text: str) -> str:
    """`text` as matplotlib draws it letter by letter: a `$` would begin a formula."""
    return printable(text).replace("$", r"\$")


def given_or_new(axes: GivenAxes, names: Sequence[str]) -> dict[str, Axes]:
    """One of the given axes for each name, in order; those of a new figure where they are None."""
    grid = new_panels(len(names)) if axes is None else np.atleast_1d(np.asarray(axes)).flatten()
    if len(grid) < len(names):
        raise ValueError(f"axes holds {len(grid)}, but {len(names)} are drawn: {list(names)}.")
    return dict(zip(names, grid, strict=False))


def new_panels(count: int, size: tuple[float, float] | None = None) -> np.ndarray:
    """The axes `[count]` of a new figure, up to three in a row, 9 inches wide.

    One panel is 6 inches wide. `size` is another size of the figure, in inches.
    """
    # Four are a square, not three and one.
    columns = min(count, 2 if count == 4 else 3)
    rows = -(-count // columns)
    size = size or (9 if columns > 1 else 6, 2.6 * rows if rows > 1 else 3.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in grid[count:]:
        axis.remove()
    return grid[:count]


def set_hyper_axis(axis: Axes, name: str, dimension: Float) -> None:
    """Sets the vertical axis to a hyperparameter's name, its scale and its range."""
    # A long name shrinks to the height of its panel.
    axis.set_ylabel(literal(name), fontsize=10 * min(1, 22 / len(name)))
    if dimension.scale == "log":
        axis.set_yscale("log")
    elif dimension.scale == "reverse_log":
        axis.set_yscale("function", functions=(_from_one, _to_one))
        axis.yaxis.set_major_locator(ReverseLogLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    if dimension.low is not None:
        # A little beyond the bounds, so that a value that lies on one is seen.
        axis.set_ylim(*(float(dimension.from_unit(u)) for u in (-0.04, 1.04)))


def set_step_axis(axis: Axes, label: str) -> None:
    """Sets the horizontal axis to steps, 250000 written as 250k."""
    axis.set_xlabel(label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.25)


def log_if_wide(axis: Axes, values: ArrayLike) -> None:
    """Makes the vertical axis logarithmic where positive values span more than a factor of 5."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.min() > 0 and finite.max() > 5 * finite.min():
        log_scale(axis)


def fenced(axis: Axes, values: ArrayLike, sign: int = 1) -> tuple[float, float]:
    """Limits an axis to what values that are not far off need; returns the limits.

    Far off on the bad side (above, with `sign` 1) is more than three times as far from the best as
    three quarters of the values are, on the axis' own scale.
    """
    log = axis.get_yscale() == "log"
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    places = sign * (np.log10(finite) if log else finite)
    best, worst = places.min(), places.max()
    fence = best + 3 * (np.quantile(places, 0.75) - best)
    low, high = axis.get_ylim()
    if best < fence < worst:
        margin = 0.05 * (fence - best)
        low, high = sorted(sign * np.array([best - margin, fence + margin]))
        low, high = (10.0**low, 10.0**high) if log else (low, high)
        axis.set_ylim(low, high)
    return low, high


def log_scale(axis: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers as labels."""
    axis.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain)


def png(figure: Figure) -> bytes:
    """The figure as a PNG of at most 256 colours, 150 dpi: a third of matplotlib's own in size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    image = Image.open(buffer).convert("RGB")
    # The palette that keeps far apart colours, and so thin lines, true.
    small = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    result = io.BytesIO()
    small.save(result, format="png", optimize=True)
    return result.getvalue()


def legend_above(axis: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend above the axes, where it hides no data, in as many columns as fit."""
    inches = axis.get_window_extent().width / axis.figure.dpi
    # A letter is about 0.07 inches wide at this size, a handle with its gaps as wide as 5.
    columns = int(inches / (0.07 * (max(map(len, labels)) + 5)))
    axis.legend(
        handles,
        [*map(literal, labels)],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(max(columns, 1), len(labels)),
        fontsize=8,
        frameon=False,
        borderaxespad=0.2,
        columnspacing=1,
        handlelength=1.6,
    )


def _from_one(value: ArrayLike) -> np.ndarray:
    # Beyond one there is no logarithm; an axis asks there when it is dragged about.
    return -np.log(np.maximum(1 - np.asarray(value, float), 1e-12))


def _to_one(position: ArrayLike) -> np.ndarray:
    return 1 - np.exp(-np.asarray(position, float))


class ReverseLogLocator(Locator):
    """Ticks at 0, 0.5, 0.8, 0.9, 0.95, ...; only at 0, 0.9, 0.99, ... where those are too many."""

    def __call__(self) -> Sequence[float]:
        """The ticks of what is in view."""
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """The ticks between two values."""
        low, high = sorted((vmin, vmax))

        def inside(digits: tuple[int, ...]) -> list[float]:

            values = (round(1 - m * 10.0**k, 12) for k in range(3, -10, -1) for m in digits)
            return sorted({v for v in values if low <= v <= high})

        fine = inside((5, 2, 1))
        return fine if len(fine) < 9 else inside((1,))
