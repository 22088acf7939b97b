"""A sweep's settings as TOML: what is read, changed on the line, and refused by name."""

import functools
from pathlib import Path
from typing import Any

import pytest

import hypergrad as hg
from hypergrad.settings import settings_of, with_settings

TEXT = """
[sweep]
num_trials = 12
sampler = "random"

[space.rate]
kind = "Float"
low = 1e-3
high = 0.3
scale = "log"

[space.optimizer]
kind = "Categorical"
choices = ["sgd", "adam"]

[space.momentum]
kind = "Float"
low = 0.0
high = 0.9
when = {optimizer = "sgd"}

[scheduler]
kind = "Hyperband"
min_steps = 10
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(TEXT)
    return path


def test_a_file_and_changes_are_keywords_of_a_sweep(file: Path) -> None:
    found = settings_of(file, ["sweep.num_trials=4", "space.rate.high=0.5", "sweep.name=mine"])
    assert found["num_trials"] == 4 and found["name"] == "mine" and found["sampler"] == "random"
    assert found["scheduler"] == hg.Hyperband(10)
    assert list(found["space"]) == ["rate", "optimizer", "momentum"]
    assert found["space"]["rate"] == hg.Float(1e-3, 0.5, scale="log")
    assert found["space"]["momentum"].when == {"optimizer": ("sgd",)}

    def sweep(make_problem: Any, space: Any, data: Any, **words: Any) -> Any:
        return make_problem, space, data, words

    function = functools.partial(sweep, "problem", "old", "data", num_trials=1, num_steps=5)
    made, space, data, words = with_settings(function, found)()
    assert (made, data, space) == ("problem", "data", found["space"])
    assert words["num_trials"] == 4 and words["num_steps"] == 5
    assert with_settings(lambda **words: words, found)()["space"] is found["space"]
    # A word of the command comes last.
    assert with_settings(function, {"seed": 1})(num_trials=7)[3]["num_trials"] == 7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("sweep.sampelr=tpe", "sweep: the key 'sampelr' is unknown: did you mean 'sampler'?"),
        ("swep.num_trials=3", "table: the key 'swep' is unknown: did you mean 'sweep'?"),
        ("space.rate.hihg=1.0", "space.rate: the key 'hihg' is unknown: did you mean 'high'?"),
        ("space.rate.kind=float", "space.rate.kind='float': give one of"),
        ("scheduler.kind=Fast", "scheduler.kind='Fast': give one of ['"),
        ("space.rate.low=2.0", "space.rate: Float(low=2.0"),
        ("space.rate=3", "space.rate is 3: give a table"),
        ("sweep=3", "'sweep' is 3: give a table"),
        ("sweep.refine=1", "sweep: the key 'refine' is unknown"),
        ("sweep.seed.x=1", "'seed' is no table"),
        ("nothing", "'nothing' is no change: give KEY=VALUE"),
    ],
)
def test_what_is_wrong_is_named(file: Path, change: str, text: str) -> None:
    with pytest.raises(ValueError) as error:
        settings_of(file, ["sweep.seed=1", change])
    assert text in str(error.value), str(error.value)


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("x = [")
    with pytest.raises(ValueError, match="is no TOML"):
        settings_of(tmp_path / "a.toml")
    with pytest.raises(OSError):
        settings_of(tmp_path / "missing.toml")
