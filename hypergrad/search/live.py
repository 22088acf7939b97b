"""What a person sees while a sweep runs: one line on a terminal, nothing anywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Moment(NamedTuple):
    """Where a sweep stands.

    Attributes:
      done: trials finished by all processes, and the share done of those that train here.
      running: trials that train here.
      steps: training steps this call has spent.
      best: the best score so far, or None.
    """

    done: float
    running: int
    steps: int
    best: float | None


Show = Callable[[Moment], None]


@contextlib.contextmanager
def live_view(num_trials: int, enabled: bool = True) -> Iterator[Show | None]:
    """A progress bar on standard error: gives the function that moves it, None off a terminal.

    It shows the trials done, the best score, the running population, trials per second, training
    steps spent and the time left, of this call.
    """
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("{task.completed:.0f}/{task.total} trials"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=Console(stderr=True),
    )
    begin = time.perf_counter()
    before: float | None = None
    with progress:
        bar = progress.add_task("sweep", total=num_trials, text="")

        def show(moment: Moment) -> None:
            nonlocal before
            # What a storage held before is not this call's speed.
            before = moment.done if before is None else before
            speed = (moment.done - before) / max(time.perf_counter() - begin, 1e-9)
            progress.update(bar, completed=moment.done, text=_text(moment, speed))

        yield show


def _text(moment: Moment, trials_per_second: float) -> str:
    best = "none yet" if moment.best is None else f"{moment.best:.4g}"
    return (
        f"best {best}, {moment.running} run, {trials_per_second:.2g} trials/s, {moment.steps} steps"
    )
