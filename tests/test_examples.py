"""The examples run as a user runs them, print what they promise and draw their pictures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def printed_by(name: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{name}.py", "--quick", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_digits(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    assert "one alternating run" in printed_by("digits", "--out", str(picture))
    assert picture.stat().st_size > 10_000


def test_hybrid_sweep(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.journal"
    text = printed_by("hybrid_sweep", "--storage", str(storage), "--pictures", str(tmp_path))
    assert "4 trials: 4 complete" in text
    assert "fresh seeds: test loss" in text
    assert f"optuna-dashboard {storage}" in text
    for name in ("scores", "parallel", "refinement"):
        assert (tmp_path / f"{name}.png").stat().st_size > 4_000


def test_ray_sweep(tmp_path: Path) -> None:
    """Two actors, one journal: nothing is trained twice."""
    pytest.importorskip("ray")
    text = printed_by("ray_sweep", "--workers", "2", "--storage", str(tmp_path / "sweep.journal"))
    assert "4 trials: 4 complete" in text
    steps = [int(number) for number in re.findall(r"worker \d: (\d+) training steps", text)]
    assert len(steps) == 2 and sum(steps) == 4 * 60


def test_data_cleaning(tmp_path: Path) -> None:
    picture = tmp_path / "data_cleaning.png"
    text = printed_by("data_cleaning", "--out", str(picture))
    row = re.search(r"hypergradients\W+(\d+)%\W+([\d.]+)", text)
    assert row is not None, text
    # 75% and .86 after 30 of the 100 updates; a random half has an F1 of .47 and closes nothing
    assert float(row[1]) > 50 and float(row[2]) > 0.75
    assert picture.stat().st_size > 10_000


def test_cross_validated_l2(tmp_path: Path) -> None:
    picture = tmp_path / "l2.png"
    text = printed_by("cross_validated_l2", "--out", str(picture))
    number = r"\W+([\d.,]+)"
    zoomed = re.findall(rf"3 zooms{number}{number}%{number}{number}{number}", text)
    found = re.findall(rf"from 1{number}{number}%{number}{number}{number}", text)
    optima = [float(l2) for l2 in re.findall(rf"optimum, to 0.8%, is{number}", text)]
    assert len(found) == len(zoomed) == len(optima) == 2, text
    for ours, grid, optimum in zip(found, zoomed, optima, strict=True):
        assert abs(float(ours[0]) / optimum - 1) < 0.05
        assert float(ours[1]) < 5
        assert int(ours[4].replace(",", "")) < int(grid[4].replace(",", ""))
    assert picture.stat().st_size > 10_000


def test_drop_in(tmp_path: Path) -> None:
    picture = tmp_path / "drop_in.png"
    text = printed_by("drop_in", "--out", str(picture))
    lines = re.search(r"(\d+) new or changed", text)
    losses = [float(loss) for loss in re.findall(r"test loss ([\d.]+)", text)]
    assert lines is not None and int(lines[1]) <= 10, text
    assert losses[1] < 0.85 * losses[0]
    assert picture.stat().st_size > 10_000


def test_per_weight_l2(tmp_path: Path) -> None:
    picture = tmp_path / "l2.png"
    text = printed_by("per_weight_l2", "--out", str(picture))

    def losses(row: str) -> list[float]:
        found = re.search(row + r" +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+)", text)
        assert found is not None, text
        return [float(number) for number in found.groups()]

    one, free, penalised = (losses(row) for row in ("grid of 5", "│ weight", "penalised"))
    # column 1: what was tuned on, 3: the test images
    assert free[1] < penalised[1] < 0.7 * one[1]
    assert penalised[3] < min(free[3], 0.95 * one[3])
    assert picture.stat().st_size > 10_000
