"""The examples run as a user runs them, print what they promise and draw their pictures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def printed_by(name: str, *arguments: str, **variables: str) -> str:
    command = [sys.executable, f"examples/{name}.py", "--quick", *arguments]
    # XLA's first level of optimisation runs the examples about as fast as its last, and compiles in
    # a third (convolutions) to five sixths of the time; with none a convolution takes minutes.
    flags = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    optimised = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    env = os.environ | optimised | variables
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_digits(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    assert "one alternating run" in printed_by("digits", "--out", str(picture))
    assert picture.stat().st_size > 10_000


def test_hybrid_sweep(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.journal"
    # A sweep of few steps compiles for most of its time.
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    place = ("--storage", str(storage), "--pictures", str(tmp_path))
    text = printed_by("hybrid_sweep", *place, **quickly)
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


def test_attribution(tmp_path: Path) -> None:
    """What is predicted to matter most does, by about as much, and in the predicted direction."""
    picture = tmp_path / "attribution.png"
    text = printed_by("attribution", "--out", str(picture))
    rows = re.findall(r"most h\w+ +│ +([-+][\d.]+) │ +([-+][\d.]+)", text)
    assert len(rows) == 8, text
    for predicted, true in rows:
        assert 0.4 < float(predicted) / float(true) < 1.5, text
    assert "smooth" in text and picture.stat().st_size > 10_000


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


def test_few_shot() -> None:
    """A learned start beats a random one on new sinusoids, by every method that looks ahead."""
    # Small programs that compile for most of their time.
    text = printed_by("few_shot", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    found = {name: float(score) for name, score in re.findall(r"│ ([\w -]+?) +│ +([\d.]+) │", text)}
    assert len(found) == 6, text
    assert found["MAML"] < 0.9 * found["random start"], text
    assert found["first-order MAML"] < 0.9 * found["random start"], text


def write_digits(folder: Path) -> None:
    """Ten blurred prototypes in MNIST's file format."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500).astype(np.uint8)
    prototypes = rng.integers(0, 256, (10, 7, 7)).repeat(4, 1).repeat(4, 2)
    images = np.clip(100 + prototypes[labels] / 9 + rng.normal(0, 60, (500, 28, 28)), 0, 255)
    for name, array in (("images-idx3", images.astype(np.uint8)), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (folder / f"t10k-{name}-ubyte").write_bytes(header + array.tobytes())


def test_relaxed_choices(tmp_path: Path) -> None:
    """Both steps choose a kernel and an activation for each layer, and what they chose learns."""
    write_digits(tmp_path)
    text = printed_by("relaxed_choices", "--data", str(tmp_path))
    row = r" +│ +([\d.]+) │ +[\d.]+ │ +([\d.]+) │ +1.8 │ [135] \w+, [135] \w+ "
    for name in (r"window=1\)", "differences"):
        found = re.search(name + row, text)
        assert found is not None and float(found[1]) < 2.3, text


def test_mnist_schedule(tmp_path: Path) -> None:
    """On ten blurred prototypes in MNIST's file format."""
    write_digits(tmp_path)
    picture = tmp_path / "schedule.png"
    text = printed_by("mnist_schedule", "--data", str(tmp_path), "--out", str(picture))
    number = r"\W+([\d.]+)"
    default, tuned = (
        re.search(rf"{row}{number}{number}", text) for row in ("0.01, kept", "hypergradients")
    )
    assert default is not None and tuned is not None, text
    assert 0 < float(tuned[1]) < float(default[1])
    assert picture.stat().st_size > 10_000


def test_tiny_transformer(tmp_path: Path) -> None:
    """On random sentences of eleven words, one layer, 120 steps."""
    rng = np.random.default_rng(0)
    words = ["the", "king", "and", "queen", "shall", "not", "speak", "to", "thee", "again", "lord"]
    text = " ".join(
        word + end
        for word, end in zip(
            rng.choice(words, 1500), rng.choice(["", "", ",", ".\n"], 1500), strict=True
        )
    )
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    picture = tmp_path / "transformer.png"
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    place = ("--data", str(tmp_path), "--out", str(picture))
    text = printed_by("tiny_transformer", *place, **quickly)
    number = r" +│ +1 │ +([\d.]+) │ +([\d.]+)"
    default, tuned = (re.search(row + number, text) for row in ("untuned", "one alternating run"))
    assert default is not None and tuned is not None, text
    assert float(tuned[2]) < 0.85 * float(default[2])
    assert picture.stat().st_size > 10_000


def test_data_scorer(tmp_path: Path) -> None:
    """On sentences of three words, so that a few steps tell what is corrupted."""
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(["thou", "speakest", "lord"], 3000))
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    picture = tmp_path / "scorer.png"
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    place = ("--data", str(tmp_path), "--out", str(picture))
    text = printed_by("data_scorer", *place, **quickly)

    def kept(method: str) -> list[int]:
        row = re.search(method + r"\W+(\d+)%\W+(\d+)%\W+(\d+)%\W+(\d+)%", text)
        assert row is not None, text
        return [int(share) for share in row.groups()]

    assert kept("oracle")[0] > 90
    assert kept("learned scorer")[0] > kept("learned scorer")[2]
    assert kept("loss of a reference")[0] > 2 * kept("loss of a reference")[2]
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "name", ["data_scorer", "mnist_schedule", "relaxed_choices", "tiny_transformer"]
)
def test_missing_data_is_named(name: str, tmp_path: Path) -> None:
    command = [sys.executable, f"examples/{name}.py", "--data", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith(f"--data {tmp_path}: ") and run.stderr.count("\n") == 1
