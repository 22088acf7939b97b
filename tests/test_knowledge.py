"""What is known before a sweep: priors, earlier sweeps, samplers by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.knowledge.positions import position, value_at
from hypergrad.knowledge.priors import PriorSampler, prior_point, relative_ranks
from hypergrad.knowledge.samplers import advised
from hypergrad.knowledge.warm import fitted, warm_points, warm_studies
from hypergrad.study.distributions import Coordinates
from hypergrad.study.study import open_study

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = hg.Space(
    {
        "kind": hg.Categorical(["a", "b", "c"], prior="b"),
        "momentum": hg.Float(0.1, 0.99, scale="reverse_log", when={"kind": "b"}, prior=0.9),
        "rate": hg.Float(1e-5, 1.0, scale="log", prior=1e-2),
        "units": hg.Int(8, 128, step=8, prior=64),
        "free": hg.Float(0.0, 1.0),
    }
)
X = jnp.arange(8.0)


def searched(space: hg.Space, score: Any, num_trials: int, **options: Any) -> optuna.Study:
    """A study of a function of the values, without any training."""
    with open_study(space, num_trials=num_trials, **options) as opened:
        while proposal := opened.ask():
            opened.finish(proposal, score({**proposal.choices, **proposal.start}))
        return opened.study


def bowl(values: dict[str, Any]) -> float:
    place = position(Coordinates(SPACE).distributions["rate"], values["rate"])
    far = (place - 0.6) ** 2 + (values["kind"] != "b") + ((values["units"] - 64) / 120) ** 2
    return float(far + (values["free"] - 0.3) ** 2)


def test_a_prior_is_checked_shown_and_started_from() -> None:
    assert repr(hg.Float(1e-5, 1.0, "log", prior=1e-2)) == (
        "Float(1e-05, 1.0, scale='log', prior=0.01)"
    )
    for make, expected in (
        (lambda: hg.Float(0.1, 1.0, prior=2), r"Float\(prior=2.0\) lies outside \[0.1, 1.0\]"),
        (lambda: hg.Float(0.1, 1.0, prior=float("nan")), r"Float\(prior=nan\) is not finite"),
        (lambda: hg.Int(8, 16, step=8, prior=9), r"Int\(prior=9\) is none of the values of Int"),
        (lambda: hg.Categorical(["a"], prior="z"), r"Categorical\(prior='z'\) is none of the"),
    ):
        with pytest.raises(ValueError, match=expected):
            make()
    point = {"kind": "b", "momentum": 0.9, "rate": 1e-2, "units": 64}
    assert prior_point(SPACE) == point
    other = hg.Space({**SPACE, "kind": hg.Categorical(["a", "b", "c"], prior="a")})
    assert prior_point(other) == {"kind": "a", "rate": 1e-2, "units": 64}
    open_ = hg.Space({**SPACE, "kind": hg.Categorical(["a", "b", "c"])})
    assert prior_point(open_) == {"momentum": 0.9, "rate": 1e-2, "units": 64}


def test_trials_follow_a_prior_less_and_less_and_not_one_that_is_wrong() -> None:
    coordinates = Coordinates(SPACE)
    beliefs = coordinates.to_study(prior_point(SPACE))
    distributions = {p: d for _, p, d in coordinates.parameters() if p in beliefs}

    def sampler(seed: int = 0) -> PriorSampler:
        return PriorSampler(optuna.samplers.RandomSampler(seed), beliefs, distributions, seed)

    right = sampler()
    study = searched(SPACE, bowl, 40, sampler=right)
    near = [abs(np.log10(t.params["rate"]) + 2) < 1.0 for t in study.trials]
    # By chance two fifths: of the first half more follow the prior than of the second.
    assert np.mean(near[:20]) > 0.55
    assert 0 < right.share(study) < 0.5 * 20 / (20 + 40) * 2 + 1e-9
    assert any(0 < t.params["1 - momentum"] < 0.2 for t in study.trials if t.params["kind"] == "b")
    wrong = sampler()
    other = searched(SPACE, lambda values: -bowl(values), 40, sampler=wrong)
    assert wrong.share(other) < 0.3 * right.share(study)
    # The first random state is kept by the study: a resumed one goes on as it would have.
    again = searched(SPACE, bowl, 40, sampler=sampler())
    assert [t.params for t in again.trials] == [t.params for t in study.trials]


def test_without_a_prior_the_sampler_is_left_alone() -> None:
    space = hg.Space({"rate": hg.Float(1e-5, 1.0, scale="log")})
    result = sweep(space=space, num_trials=1)
    assert type(result.study.sampler) is optuna.samplers.RandomSampler


def test_ranks_of_several_kinds_of_trials() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    for values in ([0.0, 5.0], [1.0, 7.0], [2.0, 3.0]):
        study.add_trial(optuna.trial.create_trial(values=values))
    assert np.allclose(relative_ranks(study, study.trials), [1 / 3, 1 / 3, 5 / 6])


def test_positions_are_those_of_the_scale() -> None:
    for name, value in (("rate", 1e-3), ("units", 72), ("free", 0.25), ("momentum", 0.5)):
        distribution = Coordinates(SPACE).distributions[name]
        assert value_at(distribution, position(distribution, value)) == pytest.approx(value)
        assert value_at(distribution, 7.0) == distribution.high  # type: ignore[attr-defined]


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((w - batch) ** 2)


PROBLEM = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda hyper: optax.sgd(hyper["rate"]))


def sweep(**options: Any) -> Any:
    given: dict[str, Any] = {"space": hg.Space({"rate": hg.Float(1e-3, 1.0, "log", prior=0.1)})}
    given |= {"num_trials": 3, "num_steps": 4, "batch_size": 4, "sampler": "random"}
    given |= {"progress": False} | options
    return hg.sweep(lambda c: PROBLEM, given.pop("space"), hg.Splits(X, X, X), **given)


def test_a_sweep_and_tune_begin_at_the_prior_and_a_sweep_at_earlier_ones_best(
    tmp_path: Any,
) -> None:
    path = str(tmp_path / "first.journal")
    first = sweep(storage=path, num_trials=4, enqueue=[{"rate": 0.5}])
    rates = [trial.params["rate"] for trial in first.study.trials]
    assert rates[:2] == [0.5, pytest.approx(0.1)]
    wider = hg.Space({"rate": hg.Float(1e-4, 0.2, "log"), "other": hg.Categorical([1, 2])})
    for source in (path, first, first.study):
        second = sweep(space=wider, warm_from=[source], num_trials=5)
        # Cut to the new range, and what is new proposed.
        assert second.study.trials[0].params["rate"] == pytest.approx(0.2)
        assert second.study.trials[0].params["other"] in (1, 2)
    # A study is no news to itself.
    assert sweep(storage=path, num_trials=4, warm_from=[path]).steps_spent == 0
    space = hg.Space({"rate": hg.Float(1e-3, 1.0, "log", prior=0.3)})
    tuned = hg.tune(
        PROBLEM, space, hg.Splits(X, X, X), num_steps=8, batch_size=4, budget=1.0, progress=False
    )
    assert float(tuned.candidates[0].start["rate"]) == pytest.approx(0.3, rel=1e-5)


def test_warm_points_cover_all_earlier_studies() -> None:
    """Two studies with optima apart: both are tried, before the second best of either."""
    space = hg.Space({"x": hg.Float(0.0, 1.0), "kind": hg.Categorical(["a", "b"])})

    def study(best: float, kind: str) -> optuna.Study:
        def score(values: dict[str, Any]) -> float:
            return (values["x"] - best) ** 2 + 0.3 * (values["kind"] != kind)

        return searched(space, score, 40, sampler="random", seed=1, name=kind)

    studies = warm_studies([study(0.2, "a"), study(0.8, "b")])
    own = optuna.create_study()
    points = warm_points(studies, space, own, 4)
    assert len(points) == 4
    assert {point["kind"] for point in points[:2]} == {"a", "b"}
    near = sorted(point["x"] for point in points[:2])
    assert abs(near[0] - 0.2) < 0.1 and abs(near[1] - 0.8) < 0.1
    # Of a study that Optuna made alone, parameters are what the names say.
    alone = optuna.create_study()
    alone.optimize(lambda trial: trial.suggest_float("x", -3, 0.5) ** 2, n_trials=5)
    (point,) = warm_points(warm_studies([alone]), space, own, 1)
    assert set(point) == {"x"} and 0 <= point["x"] <= 0.5


def test_what_another_space_cannot_hold_is_left_out() -> None:
    values = {"kind": "z", "momentum": 0.9, "rate": 7.0, "units": 45.2, "free": "x", "gone": 1}
    assert fitted(values, Coordinates(SPACE)) == {"momentum": 0.9, "rate": 1.0, "units": 48}
    assert fitted({**values, "kind": "a"}, Coordinates(SPACE)) == {
        "kind": "a",
        "rate": 1.0,
        "units": 48,
    }


def test_warm_starts_that_make_no_sense_are_refused(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other = searched(hg.Space({"x": hg.Float(0.0, 1.0)}), lambda values: 0.0, 1, name="other")
    expected = r"warm_from\[0\]: the study 'other' holds \['x'\], and this space \['rate'\]: give"
    with pytest.raises(ValueError, match=expected):
        sweep(warm_from=[other])
    for wrong, text in (
        (3, "warm_from=3: give a list"),
        ("a.journal", "warm_from='a.journal': give a list"),
        ([3], r"warm_from\[0\]: storage=3 is no storage"),
        ([None], r"warm_from\[0\] is None"),
        ([str(tmp_path / "no.journal")], r"warm_from\[0\]: "),
        ([optuna.storages.InMemoryStorage()], r"warm_from\[0\]=.* holds no study"),
    ):
        with pytest.raises((TypeError, ValueError, OSError), match=text):
            sweep(warm_from=wrong)
    assert len(sweep(warm_from=[optuna.create_study()], num_trials=1).study.trials) == 1
    assert "has no trial that trained in full" in caplog.text


@pytest.mark.parametrize("name", ["cmaes", "qmc", "nsga2", "auto"])
def test_samplers_by_name(name: str) -> None:
    space = hg.Space({"x": hg.Float(0.0, 1.0), "y": hg.Float(0.0, 1.0)})
    if name == "auto":
        assert advised(space, 200) == "tpe" and advised(SPACE, 5000) == "tpe"
        return
    study = searched(space, lambda values: values["x"] ** 2 + values["y"], 8, sampler=name, seed=0)
    assert len({t.params["x"] for t in study.trials}) == 8


def test_a_sampler_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="sampler='gp' needs the package 'torch': install it"):
        sweep(sampler="gp", space=hg.Space({"rate": hg.Float(1e-3, 1.0)}))
