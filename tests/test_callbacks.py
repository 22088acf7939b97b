"""Where records go: each tracker's own files, read back, with no update twice under resume."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypergrad.training.callbacks import JSONLines, MLflow, TensorBoard, WandB
from hypergrad.training.history import History, Record


def _record(update: int) -> Record:
    hyper = {"rate": np.array(0.5**update), "l2": np.array([1.0, 2.0 + update])}
    return Record(update, 1.0 / (1 + update), float("nan"), hyper, None, refused=update % 2)


def _history(updates: int) -> History:
    history = History(_record(0).hyper)
    for update in range(updates):
        history.append(_record(update))
    return history


def _write(callback: Any, first: int, stop: int) -> None:
    """A run that does the updates `first`, ..., `stop - 1`, resumed where `first` is not 0."""
    callback.open(_history(first), first)
    for update in range(first, stop):
        callback(_record(update))
    callback.close()


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    _write(JSONLines(path), 0, 6)
    whole = path.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["update"] for line in lines] == list(range(6))
    assert lines[3]["hyper"] == {"rate": 0.125, "l2": [1.0, 5.0]} and lines[3]["refused"] == 1
    assert np.isnan(lines[3]["train_loss"])
    # killed in the middle of a line, after the checkpoint of update 4
    path.write_text(whole[:-30])
    _write(JSONLines(path), 4, 6)
    assert path.read_text() == whole
    # lost altogether
    path.unlink()
    _write(JSONLines(path), 4, 6)
    assert path.read_text() == whole
    # killed before the first checkpoint
    _write(JSONLines(path), 0, 6)
    assert path.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["history.jsonl"]


def test_json_lines_of_earlier_updates_stay(tmp_path: Path) -> None:
    """A second call of `fit` that goes on from the first one's state appends."""
    path = tmp_path / "history.jsonl"
    _write(JSONLines(path), 0, 6)
    whole = path.read_text()
    _write(JSONLines(path), 0, 3)
    second = JSONLines(path)
    second.open(History(_record(0).hyper), 3)
    for update in range(3, 6):
        second(_record(update))
    second.close()
    assert path.read_text() == whole


def _events(folder: Path) -> Iterator[Any]:
    """The events of a folder's files, in the order of their names."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            # TFRecord: length, its checksum, the data, their checksum
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    _write(TensorBoard(tmp_path), 0, 6)
    found: dict[str, dict[int, float]] = {}
    for event in _events(tmp_path):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    assert found["hyper/rate"] == {update: 0.5**update for update in range(6)}
    assert found["hyper/l2/1"] == {update: 2.0 + update for update in range(6)}
    assert found["refused"][3] == 1.0
    _write(TensorBoard(tmp_path), 4, 6)
    restarts = [event for event in _events(tmp_path) if event.HasField("session_log")]
    assert [event.step for event in restarts] == [4]


def test_tensorboard_reads_each_update_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _write(TensorBoard(tmp_path), 0, 6)
    _write(TensorBoard(tmp_path), 4, 8)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(8))
    np.testing.assert_allclose([event.value for event in scalars], 1 / np.arange(1.0, 9.0))


@pytest.mark.filterwarnings("default")
def test_mlflow_has_each_update_once(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)

    def tracker() -> MLflow:
        return MLflow("digits", "run 1", uri, params={"seed": 3})

    killed = tracker()
    killed.open(_history(0), 0)
    for update in range(120):
        killed(_record(update))
    # 100 are logged; the last 20 die with the process
    _write(tracker(), 90, 130)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.data.params == {"seed": "3"}
    logged = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in logged) == list(range(130))
    by_step = {metric.step: metric.value for metric in logged}
    assert by_step[64] == 1 / 65
    l2 = client.get_metric_history(run.info.run_id, "hyper/l2/1")
    assert {metric.step: metric.value for metric in l2} == {i: 2.0 + i for i in range(130)}


@pytest.mark.filterwarnings("default")
def test_wandb_writes_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record as Written

    run = WandB(project="digits", mode="offline", dir=str(tmp_path), id="run1")
    run.open(_history(2), 2)
    for update in range(2, 6):
        run(_record(update))
    run.close()
    (path,) = tmp_path.rglob("*.wandb")
    content, rows = path.read_bytes()[7:], []
    assert len(content) < 32_000  # one block of LevelDB's log, so that no record is split
    while content:
        # a record: checksum, length, type, the data
        (length,) = struct.unpack("<H", content[4:6])
        written = Written.FromString(content[7 : 7 + length])
        content = content[7 + length :]
        if written.HasField("history"):
            items = written.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    assert [row["_step"] for row in rows] == list(range(6))
    assert [row["hyper/l2/1"] for row in rows] == [2.0 + update for update in range(6)]


def test_a_full_disk_is_one_sentence_with_the_path(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "history.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = JSONLines(path)
    lines.open([], 0)
    record = Record(0, 0.5, 0.75, {"rate": np.array(0.125)}, None)
    lines(record)
    whole = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"history\.jsonl' cannot be written \(File too large\)"):
            lines(record._replace(update=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines.close()
    # Half a line is replaced when the run goes on.
    lines.open([], 1)
    lines(record._replace(update=1))
    lines.close()
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [0, 1]
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["it's", 'a "run"', 'it\'s a "run"', "50% _of_ it"])
def test_an_mlflow_run_may_have_any_name(name: str, tmp_path: Path) -> None:
    """A quote ended the filter, and a second opening made a second run or an error."""
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    record = Record(0, 0.5, 0.75, {"rate": np.array(0.125)}, None)
    for opening in range(2):
        callback = MLflow("test", name, tracking_uri=uri)
        callback.open([], 0)
        assert callback._last == opening - 1
        callback(record)
        callback.close()
    other = MLflow("test", f"{name} other", tracking_uri=uri)
    other.open([], 0)
    assert other._last == -1
    other.close()
