"""The demo runs as a user runs it, and draws its picture."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_digits_quick(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    command = [sys.executable, "examples/digits.py", "--quick", "--out", str(picture)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "one alternating run" in run.stdout
    assert picture.stat().st_size > 10_000


def test_hybrid_sweep_quick(tmp_path: Path) -> None:
    journal = str(tmp_path / "sweep.journal")
    command = [sys.executable, "examples/hybrid_sweep.py", "--quick", "--storage", journal]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "4 trials: 4 complete" in run.stdout
    assert "fresh seeds: test loss" in run.stdout
