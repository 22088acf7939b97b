"""What ends a sweep or a run before its last: seconds, evaluations, callbacks."""

import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.knowledge.spending import evaluations_per_step
from hypergrad.search.limits import Limits

X = jnp.asarray(np.linspace(-1.0, 1.0, 32, dtype=np.float32))  # the same bits in any process
DATA = hg.Splits(X[:16], X[16:24], X[24:])
SPACE = hg.Space(
    {"power": hg.Categorical([2, 4]), "rate": hg.Float(1e-3, 0.3, scale="log")},
)


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> Any:
    return jnp.mean((w - batch) ** 2)


def make_problem(choices: dict[str, Any]) -> hg.Problem:
    train = lambda w, hyper, batch, key: jnp.mean((w - batch) ** choices["power"])  # noqa: E731
    return hg.bilevel(lambda key: jnp.ones(()), train, loss, lambda h: optax.sgd(0.1 * h["rate"]))


def sweep(**options: Any) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given: dict[str, Any] = {"num_trials": 6, "num_steps": 20, "batch_size": 8, "progress": False}
    given |= {"sampler": "random", "make_problem": make_problem}
    options = given | options
    return hg.sweep(options.pop("make_problem"), SPACE, DATA, **options)


def test_an_evaluation_is_counted_by_convention() -> None:
    refine = hg.Refine(hg.Forward(), steps_per_update=5)
    assert evaluations_per_step(refine, 3, 2.0, 5) == pytest.approx(1 + 3 * 1.7 + 0.4)
    sqrt = hg.Refine(hg.Unrolled(checkpoint="sqrt"))
    assert evaluations_per_step(sqrt, 3, 0.0, 5) == 4
    pairs = hg.Refine(hg.Evolution(4, 0.1))
    assert evaluations_per_step(pairs, 3, 0.0, 5) == 9


@pytest.mark.parametrize("refine", [None, hg.Refine(steps_per_update=5)])
def test_no_more_is_spent_than_may_be(refine: Any, tmp_path: Any) -> None:
    rate = 1.0 if refine is None else 3 + (8 / 8) / 5
    most = 3.5 * 20 * rate
    options: dict[str, Any] = {"refine": refine, "storage": tmp_path / "a.journal"}
    result = sweep(max_evaluations=most, **options)
    spent = [t.user_attrs.get("evaluations", 0.0) for t in result.study.trials]
    assert sum(spent) == pytest.approx(3 * 20 * rate) and not result.interrupted
    assert max(spent) == pytest.approx(20 * rate)
    # All that the storage holds counts, and what was handed back is gone on with.
    assert sweep(max_evaluations=most, **options).steps_spent == 0
    more = sweep(max_evaluations=5 * 20 * rate, **options)
    assert more.steps_spent == 2 * 20
    assert sweep(**options).steps_spent == 20


def test_a_rung_that_cannot_be_afforded_begins_for_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler = hg.SuccessiveHalving(min_steps=10, eta=2)
    options: dict[str, Any] = {"num_trials": 4, "num_steps": 40, "population": 4}
    options |= {"scheduler": scheduler, "seed": 1}
    # 4 * 10 + 2 * 10 steps, and the last rung's 20 do not fit.
    result = sweep(max_evaluations=79, **options)
    states = [t.state.name for t in result.study.trials]
    assert states.count("PRUNED") == 3 and "COMPLETE" not in states
    assert states.count("WAITING") == 1 and result.steps_spent == 60
    assert sweep(max_evaluations=39, **options).steps_spent == 0
    (told,) = [x for x in caplog.records if x.levelname == "WARNING"]
    assert "0 of max_evaluations=39 are spent and what is next takes 40" in told.message
    again = sweep(max_evaluations=80, **options)
    assert [t.state.name for t in again.study.trials].count("COMPLETE") == 1


def test_the_clock_ends_a_sweep_between_rungs() -> None:
    scheduler = hg.SuccessiveHalving(min_steps=5, eta=2)
    slow = []

    def late(choices: dict[str, Any]) -> hg.Problem:
        slow.append(choices)
        time.sleep(1.0)
        return make_problem(choices)

    begin = time.monotonic()
    result = sweep(make_problem=late, scheduler=scheduler, num_trials=40, timeout=1.0)
    assert time.monotonic() - begin < 30 and len(slow) == 1
    states = [t.state.name for t in result.study.trials]
    # Handed back, to be gone on with; nothing was judged by a rung that some had not come to.
    assert set(states) <= {"FAIL", "WAITING"} and "WAITING" in states
    assert "running" not in result.table().lower()


def test_callbacks_see_trials_that_ended_and_may_stop(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, str]] = []

    def see(study: optuna.Study, trial: Any) -> None:
        assert isinstance(study, optuna.Study)
        seen.append((trial.number, trial.state.name))

    def stop(study: optuna.Study, trial: Any) -> None:
        if trial.number == 1:
            raise hg.callbacks.Stop("two are enough")

    with caplog.at_level("INFO", logger="hypergrad"):
        result = sweep(callbacks=[see, stop])
    assert seen == [(0, "COMPLETE"), (1, "COMPLETE")]
    assert len(result.study.trials) == 2 and not result.interrupted
    assert "the sweep ends, as two are enough" in caplog.text
    # Optuna's own: they call study.stop().
    three = optuna.study.MaxTrialsCallback(3, states=None)
    assert len(sweep(callbacks=[three]).study.trials) == 3
    # What has failed is seen, too; an error of a callback is one.
    seen.clear()
    point = {"power": 2, "rate": 0.1}

    def broken(choices: dict[str, Any]) -> hg.Problem:
        raise RuntimeError("no") if choices["power"] == 2 else KeyError("power")

    sweep(make_problem=broken, num_trials=1, callbacks=[see], enqueue=[point])
    assert seen == [(0, "FAIL")]
    with pytest.raises(ZeroDivisionError):
        sweep(callbacks=[lambda study, trial: 1 / 0])


class Opened:
    def open(self, study: optuna.Study) -> None:
        raise hg.callbacks.Stop("nothing is to be trained")

    def __call__(self, study: optuna.Study, trial: Any) -> None:
        raise AssertionError


def test_a_callback_may_stop_before_anything_begins() -> None:
    assert sweep(callbacks=[Opened()]).steps_spent == 0


def fit(callbacks: Any = (), **options: Any) -> Any:
    problem = make_problem({"power": 2})
    tuner = hg.alternating(problem, hg.Space({"rate": SPACE["rate"]}))
    state = tuner.init({"rate": 0.01}, jnp.zeros(2, jnp.uint32))
    train = hg.Minibatches(DATA.train, 8, 5)
    options = {"progress": False} | options
    return hg.fit(tuner, state, train, DATA.valid, 60, callbacks=callbacks, **options)


def test_a_callback_ends_a_run_and_the_others_see_its_end(tmp_path: Any) -> None:
    seen: list[int] = []

    def stop(record: Any) -> None:
        if record.update == 10:
            raise hg.callbacks.Stop("enough")

    result = fit([stop, lambda record: seen.append(record.update)])
    assert 11 <= len(result.history) <= 16 and seen == list(range(len(result.history)))
    assert int(result.state.updates) == len(result.history)
    # The same run, cut.
    whole = fit()
    np.testing.assert_array_equal(
        result.history.hypers["rate"], whole.history.hypers["rate"][: len(result.history)]
    )


def test_early_stopping_on_validation_is_kept_under_resume(tmp_path: Any) -> None:
    stopping = hg.callbacks.EarlyStopping(patience=4, least=0.02)
    result = fit([stopping], checkpoint=tmp_path / "run")
    assert 5 <= len(result.history) < 50
    losses = [record.loss for record in result.history]
    assert min(losses[:-9]) - min(losses[-9:]) < 0.1 and losses[0] > losses[-1]
    again = fit([stopping], checkpoint=tmp_path / "run")
    assert len(again.history) == len(result.history)
    with pytest.raises(ValueError, match="patience=0"):
        hg.callbacks.EarlyStopping(0)


def test_limits_that_cannot_be() -> None:
    for wrong in (0, -1.0, float("nan"), "60", True):
        with pytest.raises((TypeError, ValueError), match="timeout="):
            Limits(wrong, None, ())
    with pytest.raises(ValueError, match="max_evaluations=0"):
        Limits(None, 0, ())
    for callbacks in (print, 3, "stop", [3], [hg.Checkpoint], [lambda study: None]):
        with pytest.raises(TypeError, match="callbacks"):
            Limits(None, None, callbacks)  # type: ignore[arg-type]
