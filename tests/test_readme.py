"""The README's Python blocks run, in order, in one session; the first one by line 40."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
            result = namespace["result"]
            assert result.score < result.candidates[0].score
    # the first regression is solved; untrained, the loss is 140
    assert float(out.getvalue().split()[0]) < 1e-2


def test_readme_shows_commands_then_code_and_stays_short() -> None:
    lines = README.splitlines()
    assert any(line.startswith("tuner = ") for line in lines[:40])
    assert "make demo" in README
    assert "make test" in README
    assert len(lines) <= 120
