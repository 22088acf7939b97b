"""Several objectives and constraints, through Optuna's own support."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.results.goals import Goals, goals_of
from hypergrad.study.ranking import front, ranked

X = jnp.arange(8.0)
SPACE = hg.Space({"rate": hg.Float(1e-3, 0.5, scale="log"), "units": hg.Categorical([1, 2, 4])})


def make_problem(choices: dict[str, Any]) -> hg.Problem:
    """More units fit better, and are slower; `size` is what the weights cost."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((w - batch) ** 2) / choices["units"]

    def metrics(w: Any, hyper: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        return {"latency": jnp.float32(choices["units"]), "size": w**2}

    optimizer = lambda hyper: optax.sgd(hyper["rate"])  # noqa: E731
    return hg.bilevel(lambda key: jnp.zeros(()), loss, loss, optimizer, metrics=metrics)


def sweep(**options: Any) -> Any:
    given: dict[str, Any] = {"num_trials": 9, "num_steps": 8, "batch_size": 4, "seed": 2}
    given |= {"sampler": "random", "progress": False} | options
    return hg.sweep(make_problem, SPACE, hg.Splits(X, X, X), **given)


BOTH = {"loss": "minimize", "latency": "minimize"}


def test_a_study_of_two_objectives_keeps_their_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = sweep(objectives=BOTH, num_trials=12, storage=str(tmp_path / "a.journal"))
    study = result.study
    assert [d.name for d in study.directions] == ["MINIMIZE", "MINIMIZE"]
    for trial in study.trials:
        assert trial.values[1] == trial.params["units"]
    best = front(study)
    assert {one.number for one in best} == {t.number for t in study.best_trials}
    for one in best:
        assert not any(
            all(a <= b for a, b in zip(t.values, one.values, strict=True))
            and tuple(t.values) != one.values
            for t in study.trials
        )
    assert [b.number for b in ranked(study)[: len(best)]] == [b.number for b in best]
    assert result.best.score == min(t.values[0] for t in study.trials)
    table = result.table()
    assert "scores are loss (minimize), latency (minimize); the first" in table
    names = [path.name for path in result.save_pictures(tmp_path / "pictures")]
    assert "front.png" in names and "scores.png" in names
    from hypergrad.plotting import report

    monkeypatch.setattr(report, "save_pictures", lambda study, folder: [])
    assert "loss is minimized, latency is minimized" in report.page(study)
    # It goes on, and refuses others.
    assert (
        sweep(objectives=BOTH, num_trials=12, storage=str(tmp_path / "a.journal")).steps_spent == 0
    )
    with pytest.raises(ValueError, match=r"direction='minimize', but the study"):
        sweep(storage=str(tmp_path / "a.journal"))
    with pytest.raises(ValueError, match=r"objectives=\[\['latency'.*but the trials of the study"):
        turned = dict(reversed(BOTH.items()))
        sweep(objectives=turned, storage=str(tmp_path / "a.journal"), num_trials=13)


def test_hypergradients_follow_a_weighted_sum_of_a_trials_own() -> None:
    """Where all weight is on the loss the rate rises, where it is on the size it falls."""
    goals = goals_of(None, "minimize", {"loss": "minimize", "size": "minimize"}, None)
    problem = make_problem({"units": 1})
    w, hyper, key = jnp.float32(2.0), {"rate": 0.1}, jax.random.key(0)
    loss, size = float(problem.valid_loss(w, hyper, X, key)), 4.0
    for weights in ([1.0, 0.0], [0.0, 1.0], [0.3, 0.5]):
        both = goals.scalarised(problem, jnp.array(weights))
        expected = weights[0] * loss + weights[1] * size
        assert float(both.valid_loss(w, hyper, X, key)) == pytest.approx(expected)
    up = Goals(("size",), ("maximize",)).scalarised(problem, jnp.array([2.0]))
    assert float(up.valid_loss(w, hyper, X, key)) == -8.0

    class Fixed(Goals):
        weight = 0.0

        def weights(self, *_: Any) -> np.ndarray:
            return np.array([self.weight, 1 - self.weight])

    moved = []
    module = sys.modules["hypergrad.search.sweep"]
    for weight in (1.0, 0.0):
        fixed = type("Fixed", (Fixed,), {"weight": weight})(*goals)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "goals_of", lambda *_, fixed=fixed: fixed)
            result = sweep(
                objectives={"loss": "minimize", "size": "minimize"},
                refine=hg.Refine(steps_per_update=2),
                num_trials=1,
                enqueue=[{"rate": 0.02, "units": 1}],
            )
        (trial,) = result.study.trials
        assert len(trial.values) == 2 and trial.user_attrs["refused"] == 0
        moved.append(trial.params["rate"] / trial.user_attrs["start"]["rate"])
        assert "hypergrad:weights" not in trial.user_attrs["trajectory"]
    assert moved[0] > 1.02 and moved[1] < 0.98


def test_weights_differ_by_trial_and_count_in_spreads() -> None:
    goals = goals_of(None, "minimize", BOTH, None)
    one, other = goals.weights(0, 1, []), goals.weights(0, 2, [])
    assert one.sum() == pytest.approx(1) and not np.allclose(one, other)
    scaled = goals.weights(0, 1, [(0.0, 5.0), (2.0, 5.0)])
    assert np.allclose(scaled, one / [2.0, 1.0])


def test_a_broken_constraint_ranks_behind(tmp_path: Path) -> None:
    result = sweep(constraints={"latency": 2.5}, num_trials=12)
    trials = result.study.trials
    for trial in trials:
        assert trial.constraints == {"latency": trial.params["units"] - 2.5}
    free = min(trials, key=lambda t: t.value)
    assert free.params["units"] == 4 and result.best.hyper["units"] < 4
    assert result.best.number == result.study.best_trial.number
    order = [best.excess > 0 for best in ranked(result.study)]
    assert order == sorted(order) and any(order)
    assert "! breaks the constraints" in result.table(12)
    # At a rung, too: the best of those that keep to it goes on.
    halved = sweep(
        constraints={"latency": 2.5},
        scheduler=hg.SuccessiveHalving(min_steps=10, eta=2),
        num_steps=80,
        num_trials=8,
    )
    full = [t for t in halved.study.trials if t.state.name == "COMPLETE"]
    assert full and all(t.params["units"] < 4 for t in full)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"constraints": {"speed": 1}}, "constraints names 'speed', which is none of"),
        (
            {"objectives": {"loss": "minimize", "cost": "minimize"}},
            "objectives names 'cost', which",
        ),
        ({"metric": "cost"}, r"metric='cost' is none of the problem's metrics: \['latency', 'size"),
        ({"objectives": {"loss": "down"}}, r"objectives\['loss'\]='down' is unknown"),
        ({"objectives": ["loss"]}, r"objectives is \['loss'\], of type list: give a dict"),
        ({"objectives": {}}, "objectives={} is empty"),
        ({"constraints": {"latency": "low"}}, r"constraints\['latency'\]='low' is no number"),
        ({"constraints": {"latency": float("inf")}}, r"constraints\['latency'\]=inf is not finite"),
        ({"objectives": BOTH, "metric": "size"}, "objectives=.* stand beside metric='size'"),
        ({"objectives": BOTH, "scheduler": hg.Hyperband(1)}, "objectives=.*with scheduler=Hyper"),
    ],
)
def test_goals_that_are_none_are_refused_before_anything_trains(
    options: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("hypergrad.search.cohort.Cohort._advanced", never)
    with pytest.raises((TypeError, ValueError), match=expected):
        sweep(**options)


def test_one_objective_is_a_metric() -> None:
    result = sweep(objectives={"size": "maximize"}, num_trials=4, sampler="tpe")
    assert result.study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert result.best.score == max(t.value for t in result.study.trials)


def test_what_is_confirmed_keeps_to_the_constraints() -> None:
    """The start has the better score, and breaks the constraint that the end keeps to."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((w - batch) ** 2)

    problem = hg.bilevel(
        lambda key: jnp.zeros(()),
        loss,
        lambda w, hyper, batch, key: w**2,
        lambda hyper: optax.sgd(hyper["rate"]),
        metrics=lambda w, hyper, batch, key: {"gain": w, "rate": hyper["rate"]},
    )
    space = hg.Space({"rate": SPACE["rate"]})
    options: dict[str, Any] = {"metric": "gain", "direction": "maximize", "progress": False}
    result = hg.sweep(
        lambda choices: problem,
        space,
        hg.Splits(X, X),
        num_trials=1,
        num_steps=20,
        batch_size=8,
        refine=hg.Refine(),
        enqueue=[{"rate": 0.12}],
        constraints={"rate": 0.115},
        **options,
    )
    assert result.confirm(count=1).hyper["rate"] < 0.115 and result.best.excess == 0
    # No test split: no column of it.
    assert "test" not in result.table() and "confirmed" in result.table()
    with pytest.raises(ValueError, match=r"data.test=None.*give hypergrad.Splits"):
        result.audit(1)


@pytest.mark.parametrize(
    ("metrics", "test", "expected"),
    [
        (
            lambda w: {"size": w + jnp.zeros(3)},
            X,
            r"metrics returns 'size' of shape \(3,\): return",
        ),
        (lambda w: {"all": {"size": w}}, X, "metrics returns 'all' of dict: return scalars"),
        (lambda w: (w, w), X, "metrics returns a tuple: return a dict of scalars"),
        (lambda w: {"size": float(w)}, X, "metrics makes a Python number of a traced value at"),
        (None, jnp.zeros((2, 3)), "fail on data.test alone: .*ncompatible shapes"),
    ],
)
def test_what_reports_cannot_use_is_told_before_anything_trains(
    metrics: Any, test: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports are made after a rung: a mistake in a metric would cost it."""

    def never(*_: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("hypergrad.search.cohort.Cohort._advanced", never)

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((w - batch) * jnp.ones(8) * hyper["rate"])

    named = None if metrics is None else lambda w, hyper, batch, key: metrics(w)
    start, optimizer = lambda key: jnp.zeros(()), lambda hyper: optax.sgd(0.1)
    problem = hg.bilevel(start, loss, loss, optimizer, metrics=named)
    space, data = hg.Space({"rate": SPACE["rate"]}), hg.Splits(X, X, test)
    options: dict[str, Any] = {"num_trials": 3, "num_steps": 8, "batch_size": 8, "progress": False}
    with pytest.raises(ValueError, match=expected):
        hg.sweep(lambda choices: problem, space, data, **options)
