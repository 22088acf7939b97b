"""Where the records of a run go: a file of JSON lines, TensorBoard, MLflow, Weights & Biases.

A callback of `hypergrad.fit` is any function of one record (`history.Record`): it is
called for every update in order, a few updates after the device has begun it, in the thread that
called `fit`. An object may also have

- `open(history, update)`, called before its first record. `update` is the number of the first
  record to come; `history` are the records of the run so far, in order: none, unless the run
  resumes from a checkpoint. What a killed run wrote after that checkpoint will come again.
- `close()`, called at the end, also after an error.

One that raises `Stop` ends the run there, with what it has: `EarlyStopping` does.

Each class below imports its tracker when it is used, and writes no update twice under resume.

>>> class Best:
...     loss = float("inf")
...
...     def open(self, history, update):
...         for record in history:
...             self(record)
...
...     def __call__(self, record):
...         self.loss = min(self.loss, record.loss)
>>> best = Best()
>>> best.open([], 0)
>>> best(Record(0, 0.5, 0.25, {}, None))
>>> best.loss
0.5
"""

import contextlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypergrad.checks import folder_name, in_one_sentence, instance, integer, positive, text
from hypergrad.training.history import Record, scalars

# Records that MLflow gets at once, and the most metrics that it takes in one request.
_AT_ONCE, _MOST_METRICS = 50, 1000


def check(callbacks: Sequence[Any]) -> None:
    """Raise TypeError for what cannot be called with a record."""
    if callable(callbacks) or isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks={callbacks!r} is no list: give [callback, ...].")
    for i, callback in enumerate(callbacks):
        if isinstance(callback, type) or not callable(callback):
            raise TypeError(
                f"callbacks[{i}]={callback!r} cannot be called with a record: give a function of "
                "one record, or an object such as hypergrad.callbacks.JSONLines(path)."
            )


class Stop(Exception):
    """Raised by a callback, it ends the run of `fit`, or the sweep, with what it has.

    Its text says why, for the log. What the device has begun by then is finished: up to four more
    updates of `fit`; a sweep's running trials are queued again.
    """


class EarlyStopping:
    """Ends a run of `fit` whose validation loss has not fallen for `patience` updates in a row.

    A fall counts from `least` on. The state that `fit` returns is the last one, not that of the
    lowest loss; under resume it goes on counting.

    Raises ValueError for a patience below 1 and a negative `least`.

    >>> stopping = EarlyStopping(patience=2)
    >>> for update, loss in enumerate([0.5, 0.4, 0.45]):
    ...     stopping(Record(update, loss, 0.0, {}, None))
    >>> stopping(Record(3, 0.4, 0.0, {}, None))
    Traceback (most recent call last):
        ...
    hypergrad.training.callbacks.Stop: the validation loss has not fallen below 0.4 in 2 updates
    """

    def __init__(self, patience: int, least: float = 0.0) -> None:
        self._patience = integer("patience", patience)
        self._least = positive("least", least, zero=True)
        self._lowest, self._since = math.inf, 0

    def open(self, history: Sequence[Record], update: int) -> None:
        """Count what came before."""
        self._lowest, self._since = math.inf, 0
        for record in history:
            self(record)

    def __call__(self, record: Record) -> None:
        """Count one more; NaN is no fall."""
        fell = record.loss < self._lowest - self._least or not math.isfinite(self._lowest)
        if fell and math.isfinite(record.loss):
            self._lowest, self._since = record.loss, 0
            return
        self._since += 1
        if self._since >= self._patience:
            raise Stop(
                f"the validation loss has not fallen below {self._lowest:.4g} in {self._since} "
                "updates"
            )


class JSONLines:
    """Writes each record as one line of JSON to a file.

    A line holds the fields of `Record`, arrays as nested lists; what is not finite stands as NaN or
    Infinity, as Python's `json` reads and writes them. Lines of earlier updates that stand in the
    file stay; those of updates to come, and half a line that a killed process left, are replaced.

    Raises ValueError where the file's folder is missing.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "history.jsonl")
    >>> lines = JSONLines(path)
    >>> lines.open([], 0)
    >>> lines(Record(0, 0.5, 0.75, {"rate": np.array(0.125)}, None, refused=0))
    >>> lines.close()
    >>> json.loads(path.read_text())["hyper"]
    {'rate': 0.125}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(folder_name("path", path))
        if not self._path.absolute().parent.is_dir():
            raise ValueError(
                f"path={os.fspath(path)!r} lies in {str(self._path.absolute().parent)!r}, which is "
                "no folder: make it."
            )
        self._file: Any = None

    def open(self, history: Sequence[Record], update: int) -> None:
        """Write what came before, and nothing of what is to come."""
        # A run that resumes brings its records along: they take the place of the file's own.
        first = history[0].update if history else update
        with self._written():
            lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
            # A name that nobody can have put a link at.
            beside = self._path.with_name(f"{secrets.token_hex(8)}.tmp")
            try:
                with open(beside, "x") as file:
                    file.writelines(line for line in lines if _update_of(line) < first)
                    file.writelines(_line(record) for record in history)
                # In one move: a process that is killed until here leaves the old file.
                os.replace(beside, self._path)
            finally:
                beside.unlink(missing_ok=True)
            # Unbuffered: a killed process loses what it has not handed to the system, and what a
            # full disk refused would be written at the end.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  closed by `close`

    def __call__(self, record: Record) -> None:
        """Write one line."""
        with self._written():
            left = _line(record).encode()
            while left:
                left = left[self._file.write(left) :]

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise in_one_sentence(
                error,
                f"path={str(self._path)!r} cannot be written",
                "the lines before stand in it; make room and run the same command again",
            ) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _line(record: Record) -> str:
    # Not one map over the whole dict, which would sort its keys.
    plain = {
        name: jax.tree.map(lambda x: np.asarray(x).tolist(), value)
        for name, value in record._asdict().items()
    }
    return json.dumps(plain) + "\n"


def _update_of(line: str) -> float:
    """The update of a line; infinite for half a line or somebody else's."""
    try:
        return json.loads(line)["update"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """Writes each record's numbers as scalars to a folder that TensorBoard shows.

    Names are those of `history.scalars`, the step is the record's update. Under resume,
    what a killed run wrote after its checkpoint is hidden by TensorBoard. Needs `tensorboardX`
    (`pip install "hypergrad-jax[tensorboard]"`).
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder_name("folder", folder)
        self._writer: Any = None

    def open(self, history: Sequence[Record], update: int) -> None:
        """Begin a file of events that replaces those from `update` on."""
        from tensorboardX import SummaryWriter

        # Files are read in the order of their names, and two may be of one second.
        suffix = f".{update:012}"
        purge = update if any(Path(self._folder).glob("*tfevents*")) else None
        self._writer = SummaryWriter(self._folder, purge_step=purge, filename_suffix=suffix)

    def __call__(self, record: Record) -> None:
        """Write the record's scalars."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.update)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """Logs each record's numbers as metrics of one MLflow run, 50 updates at a time.

    Names are those of `history.scalars`, the step is the record's update; values that are
    not finite are logged as such. The run is found again by its name in the experiment, and updates
    that it already has are left alone. Needs `mlflow` (`pip install "hypergrad-jax[mlflow]"`).

    Args:
      experiment: its name; made where it is missing.
      run: the run's name.
      tracking_uri: where to; None for MLflow's own setting (`MLFLOW_TRACKING_URI`).
      params: what to note once, as the seed or the data set.
    """

    def __init__(
        self,
        experiment: str,
        run: str,
        tracking_uri: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self._experiment, self._name = text("experiment", experiment), text("run", run)
        if tracking_uri is not None:
            text("tracking_uri", tracking_uri)
        if params is not None:
            instance("params", params, Mapping, "a dict of what to note, or None")
        self._uri, self._params = tracking_uri, dict(params or {})
        self._client: Any = None
        self._waiting: list[Record] = []

    def open(self, history: Sequence[Record], update: int) -> None:
        """Find or make the run."""
        from mlflow import MlflowClient

        client = MlflowClient(self._uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        runs = [
            run
            for run in client.search_runs([experiment], _filter(self._name))
            if run.info.run_name == self._name
        ]
        run = runs[0] if runs else client.create_run(experiment, run_name=self._name)
        self._client, self._run = client, run.info.run_id
        # A run that is found again may have been ended.
        client.update_run(self._run, "RUNNING")
        for name, value in self._params.items():
            client.log_param(self._run, name, value)
        logged = client.get_metric_history(self._run, "loss") if runs else []
        self._last = max((metric.step for metric in logged), default=-1)
        # A killed process may have logged less than its checkpoint holds.
        self._waiting = [record for record in history if record.update > self._last]

    def __call__(self, record: Record) -> None:
        """Log the record with the next 50."""
        if record.update > self._last:
            self._waiting.append(record)
        if len(self._waiting) >= _AT_ONCE:
            self._log()

    def close(self) -> None:
        """Log what is left, and end the run."""
        if self._client is not None:
            self._log()
            self._client.set_terminated(self._run)

    def _log(self) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        batch: list[Any] = []
        for record in self._waiting:
            numbers = scalars(record)
            # The loss last: it tells `open` how far a run got whose process was killed in between.
            numbers["loss"] = numbers.pop("loss")
            metrics = [Metric(name, value, now, record.update) for name, value in numbers.items()]
            if len(batch) + len(metrics) > _MOST_METRICS:
                self._client.log_batch(self._run, batch)
                batch = []
            batch += metrics
        if batch:
            self._client.log_batch(self._run, batch)
        self._waiting = []


def _filter(name: str) -> str:
    """What finds runs by their name, others among them where quotes are in it."""
    part = max(re.split(r"['\"]", name), key=len)
    return f"attributes.run_name {'=' if part == name else 'LIKE'} '{_around(part, name)}'"


def _around(part: str, name: str) -> str:
    return part if part == name else f"%{part}%"


class WandB:
    """Logs each record's numbers to one Weights & Biases run; arguments are those of `wandb.init`.

    Names are those of `history.scalars`, the step is the record's update. With an `id`
    the run is resumed (`resume="allow"`), and W&B leaves updates alone that it already has. Needs
    `wandb` (`pip install "hypergrad-jax[wandb]"`).
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._run: Any = None

    def open(self, history: Sequence[Record], update: int) -> None:
        """Begin or resume the run."""
        import wandb

        resume = {"resume": "allow"} if "id" in self._arguments else {}
        self._run = wandb.init(**(resume | self._arguments))
        for record in history:
            self(record)

    def __call__(self, record: Record) -> None:
        """Log the record, unless W&B has it."""
        # Below its own step W&B would warn about every update.
        if record.update >= self._run.step:
            self._run.log(scalars(record), step=record.update)

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()
