"""The gauntlet's tasks are what they say, and its benchmark runs, resumes and summarises."""

import json
from pathlib import Path

import pytest

from benchmarks import gauntlet
from benchmarks.gauntlet_tasks import DECAYS, FREE, NAMES, WITH_DATA, task


@pytest.mark.parametrize("name", [name for name in FREE if "mnist1d" not in name])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_task_has_splits_and_starts_inside_its_space(name: str, decay: str) -> None:
    made = task(name, decay)
    assert next(iter(made.starts)) == "default" and len(made.starts) >= 3
    for start in made.starts.values():
        made.space.validate(start)
    sizes = [len(split[0]) for split in made.data]
    assert min(sizes) >= 50 and sizes[0] >= made.batch


def test_what_is_missing_is_named() -> None:
    assert set(NAMES) == {*FREE, *WITH_DATA}
    with pytest.raises(ValueError, match="--data FOLDER"):
        task("concrete")
    with pytest.raises(ValueError, match="decay='linear' is unknown"):
        task("wine-adamw", "linear")


def test_the_benchmark_runs_small_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--quick", "--tasks", "wine-adamw", "--out", str(out)]
    gauntlet.main(argv=[*arguments, "--methods", "untuned", "TPE"])
    first = json.loads(out.read_text())["rows"]
    # 60 training examples: a validation gradient costs 59 / 20 of a step.
    assert {row["what"] for row in first} == {"untuned", "TPE-5: own", "TPE-5: frozen"}
    result = gauntlet.main(argv=[*arguments, "--methods", "untuned", "TPE", "alternating"])
    rows = json.loads(out.read_text())["rows"]
    assert rows[: len(first)] != [] and all(row in rows for row in first)
    own = [row for row in rows if row["what"] == "alternating: own"]
    assert len(own) == 2 and all(0 < row["test"] < 1 for row in own)
    assert own[0]["runs"] == pytest.approx(3 + 59 / 20 / 10)
    assert set(result) >= {"untuned", "TPE-5: own", "alternating: settled"}
    printed = capsys.readouterr().out
    assert "wine-adamw:cosine" in printed and "<= TPE-20" in printed
