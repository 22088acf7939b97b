"""Checkpoints and a journal of version 0.1.0's first form: read on, or refused in words.

`tests/written_before` holds half a run of each tuner, written by `fit`, and half a sweep.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.study.storage import open_storage

WRITTEN = Path(__file__).resolve().parent / "written_before"
TRAIN, VALID = jnp.linspace(0, 1, 60).reshape(20, 3), jnp.linspace(0.2, 1.2, 12).reshape(4, 3)
RATE = hg.Float(1e-3, 1.0, scale="log")
MOMENTUM = hg.Float(0.1, 0.9, scale="reverse_log")
SPACE = hg.Space({"learning_rate": RATE, "momentum": MOMENTUM})


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    noise = 0.01 * jax.random.normal(key, w.shape)
    return jnp.mean((w + noise - batch) ** 2)


def problem(choices: dict[str, Any]) -> hg.Problem:
    def optimizer(h: Any) -> Any:
        if choices.get("optimizer") == "adam":
            return optax.adam(h["learning_rate"])
        return optax.sgd(h["learning_rate"], momentum=h["momentum"])

    return hg.bilevel(lambda key: jnp.zeros(3), loss, loss, optimizer)


def run(make: Any, folder: Path, space: hg.Space = SPACE) -> Any:
    tuner = make(problem({}), space)
    state = tuner.init({"learning_rate": 0.02, "momentum": 0.5}, jax.random.key(3))
    train = hg.Minibatches(TRAIN, 4, 5)
    return hg.fit(tuner, state, train, VALID, 8, checkpoint=hg.Checkpoint(folder, keep=1))


@pytest.mark.parametrize("make", [hg.alternating, hg.restarting])
def test_a_checkpoint_of_another_trust_rule_is_refused_and_kept(make: Any, tmp_path: Path) -> None:
    """Its state has no place for what the rule of now remembers."""
    old = tmp_path / "old"
    shutil.copytree(WRITTEN / make.__name__, old)
    before = sorted(path.name for path in old.rglob("*"))
    with pytest.raises(
        ValueError, match=r"update 4 in .* another run.*missing here.*another folder"
    ):
        run(make, old)
    # but for the lock of who looked
    assert sorted(p.name for p in old.rglob("*") if p.name != ".lock") == before


def test_a_checkpoint_of_another_space_is_refused(tmp_path: Path) -> None:
    """It holds the ends and the middle of each range, and no space."""
    shutil.copytree(WRITTEN / "alternating", tmp_path / "old")
    other = hg.Space({**SPACE, "learning_rate": hg.Float(1e-3, 1.0)})
    with pytest.raises(ValueError, match=r"'learning_rate' ranges over .* there and .* here"):
        run(hg.alternating, tmp_path / "old", other)


def test_a_journal_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "sweep.journal"
    shutil.copy(WRITTEN / "sweep.journal", journal)
    [name] = optuna.get_all_study_names(storage := open_storage(str(journal)))
    finished = optuna.load_study(study_name=name, storage=storage).get_trials(
        states=[optuna.trial.TrialState.COMPLETE]
    )
    conditional = hg.Float(0.1, 0.9, scale="reverse_log", when={"optimizer": "sgd"})
    optimizer = hg.Categorical(["sgd", "adam"])
    result = hg.sweep(
        problem,
        hg.Space({"optimizer": optimizer, "learning_rate": RATE, "momentum": conditional}),
        hg.Splits(TRAIN, VALID, VALID),
        num_trials=9,
        num_steps=20,
        batch_size=4,
        refine=hg.Refine(steps_per_update=5),
        storage=str(journal),
        seed=5,
        progress=False,
    )
    trials = result.study.trials
    assert len(trials) == 9 and all(t.state.name == "COMPLETE" for t in trials)
    # Those of before stand as they were.
    assert len(finished) == 5
    assert all(trials[t.number].value == t.value for t in finished)
