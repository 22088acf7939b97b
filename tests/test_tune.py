"""`hg.tune`: the budget is kept, the untuned start competes, what is found is what was trained."""

import dataclasses
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.estimators.ahead import Ahead
from hypergrad.search.candidates import Workshop
from hypergrad.tuners.compressed import compressed

SPACE = hg.Space(
    {
        "rate": hg.Float(1e-3, 2.0, scale="log"),
        "l2": hg.Float(1e-5, 1.0, scale="log"),
    }
)
START = {"rate": 0.01, "l2": 1e-3}
STEPS, BATCH = 40, 8


def _data(key: int = 0, valid: int = 24) -> hg.Splits:
    rng = np.random.default_rng(key)
    weights = rng.normal(size=5)
    x = rng.normal(size=(120, 5)).astype(np.float32)
    y = (x @ weights + rng.normal(size=120)).astype(np.float32)
    ends = ((0, 32), (32, 32 + valid), (80, 120))
    return hg.Splits(*((x[i:j], y[i:j]) for i, j in ends))


DATA = _data()


def _square(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


def _penalised(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return _square(params, hyper, batch, key) + hyper["l2"] * jnp.sum(params["w"] ** 2)


def _init(key: Any) -> Any:
    return {"w": 0.3 * jax.random.normal(key, (5,))}


def _problem(optimizer: Any = None) -> hg.Problem:
    return hg.bilevel(_init, _penalised, _square, optimizer or (lambda h: optax.sgd(h["rate"])))


# One for all: calls with the same problem share what they compile.
PROBLEM = _problem()


def _tune(problem: Any = None, start: Any = START, data: Any = DATA, **options: Any) -> Any:
    options = {"num_steps": STEPS, "batch_size": BATCH, "progress": False} | options
    return hg.tune(problem or PROBLEM, SPACE, data, start, **options)


@pytest.fixture(scope="module")
def found() -> Any:
    return _tune(budget=12)


def test_a_tuned_network_beats_the_untuned_start(found: Any) -> None:
    kinds = [candidate.kind for candidate in found.candidates]
    assert kinds[0] == "untuned" and {"alternating", "frozen"} <= set(kinds)
    assert found.score < 0.9 * found.candidates[0].score
    assert found.score == min(c.score for c in found.candidates) == found.best.score
    score = _square(found.params, None, tuple(map(jnp.asarray, DATA.valid)), None)
    assert float(score) == pytest.approx(found.score, rel=1e-6)
    assert 0 < found.std_error < found.score


def test_the_budget_is_kept_and_counted(found: Any) -> None:
    assert sum(c.evaluations for c in found.candidates) <= found.evaluations <= 12 * STEPS
    for budget in (1, 2.5, 4, 6):
        result = _tune(budget=budget)
        assert result.evaluations <= budget * STEPS
        assert result.candidates[0].kind == "untuned"
    # an alternating run: 40 steps forth and twice back, and eight validation gradients of 8
    own = next(c for c in found.candidates if c.kind == "alternating")
    assert own.horizon == 5 and own.evaluations == 3 * STEPS + 8


def test_what_to_keep_is_of_a_constant_candidate(found: Any) -> None:
    constant = [c for c in found.candidates if c.is_constant]
    lowest = min(constant, key=lambda c: c.score)
    for name in SPACE:
        assert float(found.hyper[name]) == pytest.approx(float(lowest.hyper[name]))
    np.testing.assert_array_equal(found.schedule(0)["rate"], found.best.schedule(0)["rate"])
    state = found.retrain(seed=3)
    again = found.retrain(seed=3)
    np.testing.assert_array_equal(state.params["w"], again.params["w"])
    assert int(state.step) == STEPS
    assert np.any(state.params["w"] != found.retrain(seed=4).params["w"])


def test_an_audit_is_on_the_test_split_under_fresh_seeds(found: Any) -> None:
    audit, untuned = found.audit(seeds=4), found.audit(seeds=4, hyper=START)
    assert audit.test_losses.shape == (4,) and audit.mean < untuned.mean
    with pytest.raises(ValueError, match=r"data\.test=None"):
        _tune(data=DATA._replace(test=None), budget=1).audit()
    with pytest.raises(ValueError, match="rate"):
        found.audit(hyper={"l2": 0.1})


def test_table_and_pictures(found: Any, tmp_path: Path) -> None:
    lines = found.table().splitlines()
    assert len(lines) == len(found.candidates) + 2 and "untuned" in found.table()
    assert lines[1].startswith(found.best.kind)
    assert all(path.stat().st_size > 5000 for path in found.save_pictures(tmp_path / "made"))


def test_a_result_can_be_pickled(found: Any) -> None:
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.params["w"], found.params["w"])
    assert again.table() == found.table() and again.score == found.score
    with pytest.raises(ValueError, match=r"unpickled.*neither problem nor data"):
        again.audit()


def test_parameters_that_are_judged_are_those_to_keep() -> None:
    def optimizer(hyper: Any) -> Any:
        return optax.chain(optax.sgd(hyper["rate"]), optax.ema(0.5))

    def evaluate(params: Any, opt_state: Any) -> Any:
        return jax.tree.map(lambda w: 0.5 * w, params)

    problem = hg.bilevel(_init, _penalised, _square, optimizer, evaluate=evaluate)
    result = _tune(problem, budget=1)
    np.testing.assert_allclose(result.params["w"], 0.5 * result.state.params["w"])
    score = _square(result.params, None, tuple(map(jnp.asarray, DATA.valid)), None)
    assert float(score) == pytest.approx(result.score, rel=1e-6)


def test_the_same_call_finds_the_same() -> None:
    first, second = _tune(budget=6), _tune(budget=6)
    assert [c.score for c in first.candidates] == [c.score for c in second.candidates]
    assert first.score != _tune(budget=6, seed=1).score


def test_a_killed_call_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    code = f"""
    import os, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_tune as t
    import hypergrad.search.candidates as candidates
    fit, runs = candidates.fit, []
    def killed(*args, **options):
        runs.append(0)
        if len(runs) == 3:
            os.kill(os.getpid(), {int(signal.SIGKILL)})
        return fit(*args, **options)
    candidates.fit = killed
    t._tune(budget=6, checkpoint={str(folder)!r})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(folder.iterdir())) == 2
    resumed, whole = _tune(budget=6, checkpoint=folder), _tune(budget=6)
    # Another process, and other compiler options: not to the last bit.
    scores = [[c.score for c in result.candidates] for result in (resumed, whole)]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    with pytest.raises(ValueError, match="checkpoint"):
        _tune(budget=6, checkpoint=folder, start={"rate": 0.02, "l2": 1e-3})


def test_a_budget_that_tunes_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hypergrad"):
        result = _tune(budget=2)
    assert [c.kind for c in result.candidates] == ["untuned"]
    assert "Nothing was tuned: budget=2" in result.remarks[0] and "budget=2" in caplog.text


def test_warnings_are_of_the_run_that_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hypergrad"):
        result = _tune(budget=6)
    assert "horizon" not in caplog.text
    assert result.best.kind == "alternating" or result.remarks == ()


def test_bad_data_and_wrong_names_are_named() -> None:
    x, y = DATA.train
    bad = DATA._replace(train=(np.where(np.arange(len(y))[:, None] == 3, np.nan, x), y))
    with pytest.raises(FloatingPointError, match=r"the data are the reason.*data\.train.*\[3\]"):
        _tune(data=bad, budget=1)
    with pytest.raises(ValueError, match=r"data\.valid: arrays disagree"):
        _tune(data=DATA._replace(valid=(x, y[:-1])))
    with pytest.raises(ValueError, match=r"'learning_rate'.*rate"):
        _tune(_problem(lambda h: optax.sgd(h["learning_rate"])), budget=1)


@pytest.mark.parametrize("num_steps", [8, 13, 37])
def test_few_steps_are_enough_for_every_kind_of_run(num_steps: int) -> None:
    result = _tune(num_steps=num_steps, budget=30)
    kinds = {candidate.kind for candidate in result.candidates}
    assert kinds == {"untuned", "alternating", "ahead", "frozen", "whole runs", "settled"}
    assert result.evaluations <= 30 * num_steps


def test_starts() -> None:
    several = _tune(start=[START, {"rate": 0.3, "l2": 1e-3}], budget=2)
    assert [c.kind for c in several.candidates] == ["untuned", "untuned"]
    assert float(several.hyper["rate"]) == pytest.approx(0.3)
    middle = _tune(start=None, budget=1).candidates[0].hyper
    assert float(middle["rate"]) == pytest.approx((1e-3 * 2.0) ** 0.5, rel=1e-4)


def test_a_run_that_diverges_is_a_candidate_that_lost() -> None:
    result = _tune(start=[{"rate": 2.0, "l2": 1.0}, START], budget=6, num_steps=200)
    assert result.candidates[0].score == np.inf
    assert np.isfinite(result.score)
    with pytest.raises(FloatingPointError, match=r"Every candidate diverged.*'rate': 2\.0"):
        _tune(start={"rate": 2.0, "l2": 1.0}, budget=1, num_steps=200)


def test_validation_gradients_of_a_large_split_are_cheap() -> None:
    big = DATA._replace(valid=jax.tree.map(lambda x: np.repeat(x, 100, 0), DATA.valid))
    shop = Workshop(_problem(), SPACE, big, 1000, BATCH, 0)
    assert 3 * 1000 < shop.alternating_cost() <= 3.1 * 1000


@pytest.mark.parametrize("alone", [False, True])
def test_hyperparameters_too_large_for_a_history(alone: bool) -> None:
    """One per input and more, judged in the validation loss, too."""

    def weighted(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        loss = _square if alone else _penalised
        return loss(params, hyper, batch, key) + 1e-3 * jnp.mean(hyper["big"] ** 2)

    space = {"big": hg.Float(0.01, 1.0)}
    start = {"big": np.full(10_001, 0.5, np.float32)}
    if not alone:
        space, start = {**SPACE, **space}, {**START, **start}
    sgd = lambda h: optax.sgd(0.01 if alone else h["rate"])  # noqa: E731
    result = hg.tune(
        hg.bilevel(_init, weighted, weighted, sgd),
        hg.Space(space),
        DATA,
        start,
        num_steps=STEPS,
        batch_size=BATCH,
        budget=7,
        progress=False,
    )
    assert {"untuned", "alternating", "frozen"} <= {c.kind for c in result.candidates}
    assert result.hyper["big"].shape == (10_001,) and np.isfinite(result.score)
    assert result.candidates[0].is_constant and "alternating" in result.table()


def test_a_run_that_looks_ahead_trains_by_its_window_alone() -> None:
    problem, key = _problem(), jax.random.key(1)
    inner, valid = problem.init(START, key), jax.tree.map(jnp.asarray, DATA.valid)

    def window(steps: int) -> hg.Window:
        return hg.Window(problem, inner, hg.Minibatches(DATA.train, BATCH, steps), valid, key)

    unrolled = jax.jit(hg.Unrolled().estimate)
    found, _ = jax.jit(Ahead(hg.Unrolled(), 5).estimate)(window(4), START, ())
    later, _ = unrolled(window(9), START, ())
    now, _ = unrolled(window(4), START, ())
    assert abs(now.grad["rate"] / later.grad["rate"] - 1) > 0.05
    jax.tree.map(np.testing.assert_array_equal, found.grad, later.grad)
    assert int(found.inner.step) == 4
    np.testing.assert_allclose(found.inner.params["w"], now.inner.params["w"], rtol=1e-5)


def test_a_tuner_looks_ahead_as_far_as_its_estimator() -> None:
    """The steps beyond the window stood still, as if the run had been cut short there."""
    key, train = jax.random.key(1), hg.Minibatches(DATA.train, BATCH, 4)
    tuner = hg.alternating(_problem(), SPACE, Ahead(hg.Unrolled(), 5))
    state = tuner.init(START, key)
    _, info = jax.jit(tuner.update)(state, train, DATA.valid)
    later = dataclasses.replace(train, num_steps=9)
    expected = hg.hypergradient(_problem(), START, state.inner, later, DATA.valid, key)
    slope = jax.vjp(SPACE.from_unit, state.now.unit)[1](expected.grad)[0]
    for name in SPACE:
        np.testing.assert_allclose(info.grad[name], slope[name], rtol=1e-4)


def test_a_large_budget_looks_ahead(found: Any) -> None:
    result = _tune(budget=30)
    ahead = next(c for c in result.candidates if c.kind == "ahead")
    # each of 40 steps in two windows and once by itself; 8 validation gradients of 24 / 8
    assert ahead.evaluations <= 7 * STEPS + 8 * 3 and np.isfinite(ahead.score)
    assert result.evaluations <= 30 * STEPS
    assert "ahead" not in {c.kind for c in found.candidates}


def test_a_compressed_run_goes_through_the_whole_decay() -> None:
    decay = optax.scale_by_schedule(lambda count: -0.1 * jnp.where(count < 20, 1.0, 0.1))
    problem = _problem(lambda h: optax.chain(optax.scale_by_adam(), decay))
    batch = jax.tree.map(lambda x: jnp.asarray(x[:8]), DATA.train)
    for stride, made in ((4, compressed(problem, 4)), (1, compressed(problem, 1))):
        inner = problem.init(START, jax.random.key(0))
        for _ in range(3):
            inner = made.step(inner, START, batch, jax.random.key(0))
        adam, scheduled = inner.opt_state
        assert int(scheduled.count) == 3 * stride
        assert int(adam.count) == 3 and int(inner.step) == 3


def test_wrong_arguments_are_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for options, text in (
        ({"budget": 0.5}, r"budget=0\.5 is less than one plain run"),
        ({"budget": -1}, "budget=-1"),
        ({"start": {"rate": 5.0, "l2": 1e-3}}, "rate"),
        ({"start": {"rate": 0.1}}, "l2"),
        ({"start": []}, r"start=\[\] is empty"),
        ({"num_steps": 6}, "num_steps=6 is too short"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"batch_size": 99}, "batch_size=99 exceeds the 32 examples"),
        ({"seed": None}, "seed=None"),
        ({"data": DATA._replace(valid=None)}, r"data\.valid=None"),
        ({"checkpoint": tmp_path / "no" / "where"}, "which is no folder"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            _tune(**options)
    with pytest.raises(TypeError, match="data is a tuple"):
        _tune(data=(1, 2))
    with pytest.raises(TypeError, match="checkpoint=3"):
        _tune(checkpoint=3)
    with pytest.raises(ValueError, match="holds no Float"):
        hg.tune(_problem(), hg.Space({}), DATA, num_steps=40, batch_size=8)
    mixed = hg.Space({**SPACE, "act": hg.Categorical(["relu", "tanh"])})
    with pytest.raises(ValueError, match=r"\['act'\].*hypergrad\.sweep"):
        hg.tune(_problem(), mixed, DATA, START, num_steps=40, batch_size=8)
    with caplog.at_level(logging.WARNING, "hypergrad"):
        _tune(data=DATA._replace(valid=jax.tree.map(lambda x: x[:1], DATA.valid)), budget=1)
    assert "holds one example" in caplog.text
