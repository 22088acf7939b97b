"""The README's Python blocks run, in order, in one session; the first one by line 40."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a checkpoint is written
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    loss = float(out.getvalue().split()[0])
    # 30 updates from a learning rate of 1e-3 solve the regression; untrained, the loss is 140
    assert np.isfinite(loss)
    assert loss < 1e-2


def test_readme_shows_two_commands_then_code() -> None:
    lines = README.splitlines()
    assert any(line.startswith("tuner = ") for line in lines[:40])
    assert "make demo" in README
    assert "make test" in README
