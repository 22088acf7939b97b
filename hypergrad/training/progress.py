"""How a run or a sweep is going, for whoever watches: a bar, or a line a minute."""

import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

import jax
import numpy as np

from hypergrad.training.history import Record

_log = logging.getLogger("hypergrad")

_BETWEEN_LINES = 60.0
# The bar is drawn by the loop itself, and rarely: its own thread would compete with the run's.
_BETWEEN_DRAWINGS = 0.5
_MOST_NAMED = 4


class ProgressBar:
    """What is done of `total`, a bar, the time left and a text; a context.

    Drawn on a terminal, and in a Jupyter notebook where ipywidgets is installed. `first` of them
    are done before. `file` is where to, and what is asked whether it is a terminal; None is
    standard error. `clock` gives seconds.
    """

    def __init__(
        self,
        first: int,
        total: int,
        unit: str = "",
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        text: str = "",
    ) -> None:
        self._first, self._total, self._unit, self._text = first, total, unit, text
        self._file = sys.stderr if file is None else file
        self._clock = clock
        self._shown = clock()
        self._bar: Any = None

    @property
    def is_open(self) -> bool:
        """Whether there is a terminal or a notebook to draw on."""
        return self._bar is not None

    def __enter__(self) -> Self:
        if self._file is not None:
            if self._file.isatty():
                self._open()
            elif self._file is sys.stderr and _in_notebook():
                self._open(notebook=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def _open(self, notebook: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        fixed, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total}" + self._unit, table_column=fixed),
            BarColumn(bar_width=10),
            TimeRemainingColumn(table_column=fixed),
            TextColumn("left", table_column=fixed),
            TextColumn("{task.description}", markup=False, table_column=rest),
            expand=True,
            console=Console(file=self._file, force_jupyter=notebook),
            auto_refresh=False,
            # Lets a message of the user's own appear above the bar.
            redirect_stdout=True,
            redirect_stderr=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self._text, total=self._total, completed=self._first)
        self._bar.refresh()

    def _is_due(self, seconds: float) -> bool:
        """Whether so many seconds have passed since this was last so."""
        now = self._clock()
        due = now - self._shown >= seconds
        self._shown = now if due else self._shown
        return due

    def _say(self, line: str) -> None:
        """A line for whoever has no bar: to the logger, or to `file` where no logging is set up."""
        if _log.hasHandlers():
            _log.info(line)
        elif self._file is not None:
            print(line, file=self._file, flush=True)

    def _draw(self, done: float, text: str, now: bool = True) -> None:
        self._bar.update(self._task, completed=done, description=text)
        if now:
            self._bar.refresh()


class FitProgress(ProgressBar):
    """Shows records as they come in.

    On a terminal the loss, steps per second and up to four hyperparameters. Elsewhere one line a
    minute to the logger "hypergrad" (level INFO), or to `file` where no logging is set up.
    """

    def __init__(
        self,
        first: int,
        total: int,
        steps_per_update: int,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        enabled: bool = True,
    ) -> None:
        super().__init__(first, total, file=file, clock=clock, text="compiling")
        self._file = self._file if enabled else None
        self._enabled = enabled
        self._steps = steps_per_update
        self._begin: float | None = None

    def show(self, record: Record) -> None:
        """Takes one record; costs next to nothing where nothing is due."""
        done = record.update + 1
        if not self._enabled:
            return
        if self._begin is None:
            # What compiles is the first update, and no measure of the others.
            self._begin, self._first = self._clock(), done
        ends = self.is_open and done == self._total
        if not self._is_due(_BETWEEN_DRAWINGS if self.is_open else _BETWEEN_LINES) and not ends:
            return
        # Two updates may be of one tick of the clock.
        rate = (done - self._first) / max(self._clock() - self._begin, 1e-9)
        text = record_line(record, rate, self._steps)
        if self.is_open:
            self._draw(done, text)
            return
        left = (self._total - done) / rate if rate else float("inf")
        self._say(f"{done}/{self._total} {text}, {_duration(left)} left")


class SweepProgress(ProgressBar):
    """Shows the trials done, the best score, who runs, and speed; else a line a minute.

    Attributes:
      finished: the trials that all processes have finished.
      best: the best score so far, or None.
      last: the score of the trial that was started last among those that have one, or None.
    """

    finished = 0
    best: float | None = None
    last: float | None = None

    def __init__(
        self,
        num_trials: int,
        enabled: bool = True,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(0, num_trials, " trials", file, clock)
        self._file = self._file if enabled else None
        self._begin = self._clock()
        self._before: float | None = None

    @property
    def is_watched(self) -> bool:
        """Whether what stands here is looked at soon: it costs a look at the study."""
        on_time = self._clock() - self._shown >= _BETWEEN_LINES
        return self.is_open or (self._file is not None and on_time)

    def show(self, running: int, partial: float, steps: int, now: bool = False) -> None:
        """Draws where the sweep stands, `now` or when it is time; a line only when it is time.

        `running` trials train here and have `partial` full runs behind them; this call has spent
        `steps` training steps.
        """
        done = self.finished + partial
        # What a storage held before is not this call's speed.
        self._before = done if self._before is None else self._before
        speed = (done - self._before) / max(self._clock() - self._begin, 1e-9)
        best = "none yet" if self.best is None else f"{self.best:.4g}"
        if not self.is_open:
            if self._file is not None and self._is_due(_BETWEEN_LINES):
                left = (self._total - done) / speed if speed else float("inf")
                score = "" if self.last is None else f", score {self.last:.4g}"
                self._say(
                    f"{self.finished}/{self._total} trials{score}, best {best}, "
                    f"{_duration(left)} left"
                )
            return
        text = f"best {best}, {running} run, {speed:.2g} trials/s, {steps} steps"
        self._draw(done, text, self._is_due(_BETWEEN_DRAWINGS) or now)


def record_line(record: Record, rate: float, steps_per_update: int) -> str:
    """A record in one line; `rate` in updates per second.

    >>> record = Record(0, 0.25, 0.5, {"rate": np.array(0.1), "l2": np.array([1.0, 3.0])}, None)
    >>> record_line(record, 20.0, 10)
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


def _in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel whose front end can show what rich draws there."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    has_kernel = type(shell).__name__ == "ZMQInteractiveShell"
    return has_kernel and importlib.util.find_spec("ipywidgets") is not None


def _duration(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
