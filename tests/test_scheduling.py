"""Schedulers that wait for nobody, curves that are extrapolated, and polish by one coordinate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.search.curves import extrapolated

X = jnp.arange(8.0)
STEPS = np.arange(1, 7) * 10.0


@pytest.mark.parametrize(
    "curve",
    [
        lambda t: 0.3 + 2 * t**-0.7,
        lambda t: 1.0 - 0.8 * np.exp(-0.05 * t),
        lambda t: 5 / (1 + t / 20),
        lambda t: 2.0 + 0 * t,
    ],
)
def test_a_curve_of_a_family_is_extrapolated_within_its_spread(curve: Any) -> None:
    found = extrapolated(STEPS, curve(STEPS), 200)
    assert found.weights.sum() == pytest.approx(1)
    assert abs(found.mean - curve(200.0)) < 3 * found.spread
    assert found.spread < 0.25 * np.ptp(curve(STEPS)) + 1e-6
    below = [found.probability_below(found.mean + k * found.spread) for k in (-6, 0, 6)]
    assert below[0] < 0.05 and 0.2 < below[1] < 0.8 and below[2] > 0.95


def test_fewer_points_and_more_noise_say_less() -> None:
    curve = 1 + STEPS**-0.5
    wide = extrapolated(STEPS[:4], curve[:4], 1000).spread
    assert wide > extrapolated(STEPS, curve, 100).spread
    noise = np.random.default_rng(0).normal(0, 0.03, len(STEPS))
    noisy = extrapolated(STEPS, curve + noise, 100)
    assert noisy.std > 3 * extrapolated(STEPS, curve, 100).std
    # Scale and shift of the scores change nothing.
    shifted = extrapolated(STEPS, 1e-6 * (curve + noise) + 3e-6, 100)
    assert shifted.mean == pytest.approx(1e-6 * noisy.mean + 3e-6, rel=1e-6)


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((w - batch) ** 2) + 0.1 * hyper["extra"]


PROBLEM = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["rate"]))
SPACE = hg.Space({"rate": hg.Float(1e-4, 0.3, scale="log"), "extra": hg.Float(0.0, 1.0)})


def sweep(**options: Any) -> Any:
    given: dict[str, Any] = {"num_trials": 12, "num_steps": 90, "batch_size": 4, "seed": 1}
    given |= {"make_problem": lambda c: PROBLEM, "space": SPACE, "data": hg.Splits(X, X, X)}
    return hg.sweep(**(given | {"sampler": "random", "progress": False} | options))


def test_asha_judges_each_trial_by_all_that_were_there_before() -> None:
    result = sweep(scheduler=hg.ASHA(10), num_trials=20)
    at: dict[int, list[float]] = {10: [], 30: [], 90: []}
    stopped = 0
    for trial in result.study.trials:
        for step, score in trial.intermediate_values.items():
            at[step].append(score)
            places = max(1, len(at[step]) // 3)
            goes_on = sum(other < score for other in at[step]) < places
            last = step == trial.last_step
            assert step == 90 or goes_on != last
            stopped += last and step < 90
        assert trial.state.name == ("COMPLETE" if trial.last_step == 90 else "PRUNED")
    assert stopped >= 10 and len(at[90]) >= 1
    assert result.steps_spent < 20 * 45


def test_asha_counts_the_trials_of_other_processes(tmp_path: Any) -> None:
    """A second process finds the first one's scores at the rungs, those of failed trials too."""
    path = str(tmp_path / "a.journal")
    best = {"rate": 0.1, "extra": 0.0}
    sweep(scheduler=hg.ASHA(10), num_trials=3, storage=path, enqueue=[best])
    worse = [{"rate": 1e-3, "extra": 0.1 * i} for i in range(3)]
    both = sweep(scheduler=hg.ASHA(10), num_trials=6, storage=path, enqueue=worse)
    states = {t.params["rate"]: t.state.name for t in both.study.trials}
    assert states[0.1] == "COMPLETE" and states[1e-3] == "PRUNED"


def test_learning_curves_stop_what_has_no_hope_and_keep_the_best() -> None:
    full = sweep()
    curves = sweep(scheduler=hg.LearningCurves(min_steps=10, points=9))
    states = [t.state.name for t in curves.study.trials]
    assert states[0] == "COMPLETE" and states.count("PRUNED") >= 4
    # Nobody is stopped before the fourth score.
    assert all(t.last_step >= 40 for t in curves.study.trials)
    assert curves.best.hyper == full.best.hyper
    assert curves.steps_spent < 0.8 * full.steps_spent


def test_polish_without_hypergradients_moves_one_coordinate_of_the_best() -> None:
    result = sweep(num_trials=16, polish=6)
    trials = result.study.trials
    for i in range(10, 16):
        before = min(trials[:i], key=lambda t: t.value)
        new = trials[i].params
        changed = [name for name in new if new[name] != before.params[name]]
        assert len(changed) <= 1
    assert result.best.score <= min(t.value for t in trials[:10])
    moved = {tuple(sorted(t.params.items())) for t in trials[10:]}
    assert len(moved) == 6


def test_a_study_by_hand_knows_neighbours() -> None:
    from hypergrad.knowledge.local import neighbour
    from hypergrad.study.study import open_study

    space = hg.Space(
        {
            "kind": hg.Categorical(["a", "b"]),
            "depth": hg.Int(1, 4, when={"kind": "b"}),
            "x": hg.Float(0.0, 1.0),
        }
    )
    with open_study(space, sampler="random", seed=0) as opened:
        assert neighbour(opened.study, space) is None
        proposal = opened.ask({"kind": "b"})
        assert proposal is not None
        opened.finish(proposal, 1.0)
        best = {**proposal.choices, **proposal.start}
        seen = [neighbour(opened.study, space, taken=n) for n in range(6)]
    for point in seen:
        assert point is not None
        differing = {name for name in point if point[name] != best[name]}
        assert len(differing) == 1
        assert "depth" not in point or point["kind"] == "b"
    assert {name for p in seen for name in p if p[name] != best[name]} == {"kind", "depth", "x"}
    assert optuna.logging.get_verbosity() is not None
