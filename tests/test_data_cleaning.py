"""The data cleaning example runs as a user runs it, finds flipped labels and draws its picture."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_data_cleaning_quick(tmp_path: Path) -> None:
    picture = tmp_path / "data_cleaning.png"
    command = [sys.executable, "examples/data_cleaning.py", "--quick", "--out", str(picture)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    row = re.search(r"hypergradients\W+(\d+)%\W+([\d.]+)", run.stdout)
    assert row is not None, run.stdout
    # 75% and .86 after 30 of the 100 updates; a random half has an F1 of .47 and closes nothing
    assert float(row[1]) > 50 and float(row[2]) > 0.75
    assert picture.stat().st_size > 10_000
