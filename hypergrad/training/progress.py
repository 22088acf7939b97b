"""How a run is going, for whoever watches: a bar on a terminal, else one log line a minute."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import jax
import numpy as np

from hypergrad.training.history import Record

__all__ = ["Progress", "summary"]

_log = logging.getLogger("hypergrad")

_BETWEEN_LINES = 60.0
# The bar is drawn by the loop itself, and rarely: its own thread would compete with the run's.
_BETWEEN_DRAWINGS = 0.5
_MOST_NAMED = 4


class Progress:
    """Shows records as they come in; a context.

    On a terminal a rich bar on `file` with the time left, the loss, steps per second and up
    to four hyperparameters. Elsewhere one line a minute to the logger "hypergrad" (level
    INFO), or to `file` where no logging is set up.

    Args:
      first: the number of the first update to come.
      total: that of the last, plus one.
      steps_per_update: K.
      file: where to, and what is asked whether it is a terminal; None for standard error.
      clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        first: int,
        total: int,
        steps_per_update: int,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._steps = total, steps_per_update
        self._file = sys.stderr if file is None else file
        self._clock = clock
        self._first = self._done = first
        self._begin: float | None = None
        self._shown = clock()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._file is not None and self._file.isatty():
            self._open_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        fixed, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bar = Bar(
            MofNCompleteColumn(table_column=fixed),
            BarColumn(bar_width=10),
            TimeRemainingColumn(table_column=fixed),
            TextColumn("{task.description}", markup=False, table_column=rest),
            expand=True,
            console=Console(file=self._file),
            auto_refresh=False,
            # Lets a message of the user's own appear above the bar.
            redirect_stdout=True,
            redirect_stderr=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("compiling", total=self._total, completed=self._first)
        self._bar.refresh()

    def show(self, record: Record) -> None:
        """Take one record; costs next to nothing where nothing is due."""
        self._done = record.update + 1
        now = self._clock()
        if self._begin is None:
            # What compiles is the first update, and no measure of the others.
            self._begin, self._first = now, self._done
        ends = self._bar is not None and self._done == self._total
        between = _BETWEEN_LINES if self._bar is None else _BETWEEN_DRAWINGS
        if now - self._shown < between and not ends:
            return
        self._shown = now
        rate = (self._done - self._first) / max(now - self._begin, 1e-9)
        text = summary(record, rate, self._steps)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
            self._bar.refresh()
            return
        left = (self._total - self._done) / rate if rate else float("inf")
        line = f"{self._done}/{self._total} {text}, {_duration(left)} left"
        if _log.hasHandlers():
            _log.info(line)
        elif self._file is not None:
            print(line, file=self._file, flush=True)


def summary(record: Record, rate: float, steps_per_update: int) -> str:
    """A record in one line; `rate` in updates per second.

    >>> record = Record(0, 0.25, 0.5, {"rate": np.array(0.1), "l2": np.array([1.0, 3.0])}, None)
    >>> summary(record, 20.0, 10)
    'loss 0.25, 200 steps/s, rate 0.1, l2 1..3'
    """
    speed = f"{rate * steps_per_update:.3g} steps/s"
    parts = [f"loss {record.loss:.4g}", *(["refused"] if record.refused else []), speed]
    hyper = record.hyper if isinstance(record.hyper, dict) else {"hyper": record.hyper}
    for name, tree in list(hyper.items())[:_MOST_NAMED]:
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(tree)]
        if leaves and sum(map(len, leaves)):
            values = np.concatenate(leaves)
            low, high = f"{values.min():.3g}", f"{values.max():.3g}"
            parts.append(f"{name} {low}" if low == high else f"{name} {low}..{high}")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
