"""Scripts in the style of other projects' tutorials, each tuned with at most 12 changed lines."""

import contextlib
import difflib
import io
import runpy
from pathlib import Path

import optuna
import pytest

TUTORIALS = Path(__file__).resolve().parent.parent / "examples" / "tutorials"
SCRIPTS = sorted(p.stem for p in TUTORIALS.glob("*.py") if not p.stem.endswith("_tuned"))


def lines(name: str) -> list[str]:
    text = (TUTORIALS / f"{name}.py").read_text().splitlines()
    # What holds no code is no change.
    return [line.strip() for line in text if line.strip() not in ("", ")  # fmt: skip")]


def changed(name: str) -> int:
    """Lines of the tuned script that the first one lacks; indentation apart."""
    diff = difflib.unified_diff(lines(name), lines(f"{name}_tuned"), lineterm="", n=0)
    return sum(line[0] == "+" for line in list(diff)[2:])


def test_there_are_five() -> None:
    assert SCRIPTS == [
        "equinox_mnist", "haiku_transformer", "linen_mnist", "nnx_mnist", "optuna_jax",
    ]  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_few_lines_change_and_it_learns(name: str) -> None:
    """Each starts from the rate that the script has, too low for its few steps."""
    assert 5 <= changed(name) <= 12
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        plain, tuned = (
            runpy.run_path(str(TUTORIALS / f"{name}{end}.py"))["accuracy"] for end in ("", "_tuned")
        )
    assert tuned > 1.2 * plain
