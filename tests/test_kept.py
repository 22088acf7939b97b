"""Trials that go on from their last rung when their process has died or handed them back."""

import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from tests.test_limits import sweep

SCHEDULER = hg.SuccessiveHalving(min_steps=10, eta=2)
HALVED: dict[str, Any] = {"num_trials": 4, "num_steps": 40, "population": 4, "seed": 1}
HALVED |= {"scheduler": SCHEDULER}


@pytest.mark.parametrize("refine", [None, hg.Refine(hg.Unrolled(), optax.adam(0.1), 10)])
def test_what_was_handed_back_goes_on_to_the_same_end(refine: Any, tmp_path: Path) -> None:
    options = HALVED | {"refine": refine}
    whole = sweep(**options)
    most = 79 * (1 if refine is None else 3 + 0.1)
    kept = {"checkpoint": tmp_path / "kept", "storage": tmp_path / "a.journal"}
    cut = sweep(**options, **kept, max_evaluations=most)
    assert cut.steps_spent == 60
    assert [t.state.name for t in cut.study.trials].count("WAITING") == 1
    result = sweep(**options, **kept)
    # The last rung alone, and from the same weights, hyperparameters and random stream.
    assert result.steps_spent == 20
    assert result.top(1)[0].score == pytest.approx(whole.top(1)[0].score, rel=1e-6)
    assert result.top(1)[0].hyper == whole.top(1)[0].hyper
    ended = [t for t in result.study.trials if t.state.name == "COMPLETE"]
    assert ended[0].user_attrs["evaluations"] == pytest.approx(40 * most / 79)
    assert not list((tmp_path / "kept").rglob("small*"))


def test_a_killed_process_loses_no_more_than_a_rung(tmp_path: Path, caplog: Any) -> None:
    script = """
        import os
        from tests.test_kept import HALVED, sweep

        def kill(study, trial):
            # The loser of the second rung: what the first one left is kept.
            if max(trial.intermediate_values) == 20:
                os.kill(os.getpid(), 9)

        sweep(**HALVED, checkpoint="kept", storage="a.journal", callbacks=[kill])
    """
    root = Path(__file__).resolve().parent.parent
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n{textwrap.dedent(script)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    kept = {"checkpoint": tmp_path / "kept", "storage": tmp_path / "a.journal"}
    with caplog.at_level(logging.INFO, logger="hypergrad"):
        result = sweep(**HALVED, **kept)
    # From 10 steps on, where 20 had been reached.
    assert result.steps_spent == 30 and "goes on from update 1 of #" in caplog.text
    assert result.top(1)[0].score == pytest.approx(sweep(**HALVED).top(1)[0].score, rel=1e-6)


def test_what_cannot_be_kept_or_read_costs_a_warning(tmp_path: Path, caplog: Any) -> None:
    kept = {"checkpoint": tmp_path / "kept", "storage": tmp_path / "a.journal"}
    sweep(**HALVED, **kept, max_evaluations=79)
    files = [f for f in (tmp_path / "kept").rglob("*") if f.is_file() and f.stat().st_size > 20]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    result = sweep(**HALVED, **kept)
    assert "cannot be used" in caplog.text and result.steps_spent == 40
    assert len(result.top()) == 1
    # A full run is kept while it trains, and a file in the way is no end.
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        sweep(checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="copy each other cannot go on alone"):
        scheduler = hg.PopulationBasedTraining(every=10)
        sweep(checkpoint=tmp_path / "pbt", scheduler=scheduler, population=4)


def test_a_long_run_is_kept_between_its_rungs(tmp_path: Path, monkeypatch: Any) -> None:
    from hypergrad.results import kept

    monkeypatch.setattr(kept, "_OFTEN", 0.0)

    class Killed(BaseException):
        pass

    steps: list[int] = []

    def die(folder: Any, step: int, *_: Any) -> None:
        steps.append(step)
        written(folder, step, *_)
        if step == 3:
            raise Killed

    written = kept.write_checkpoint
    monkeypatch.setattr(kept, "write_checkpoint", die)
    options = {"num_trials": 1, "num_steps": 60, "checkpoint": tmp_path / "kept"}
    options |= {"storage": tmp_path / "a.journal"}
    with pytest.raises(Killed):
        sweep(**options)
    assert steps == [1, 2, 3]
    monkeypatch.setattr(kept, "write_checkpoint", written)
    result = sweep(**options)
    assert result.steps_spent == 30
    assert isinstance(result.study, optuna.Study) and np.isfinite(result.best.score)
