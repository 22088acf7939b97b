"""The sweep on a small regression: what is proposed, trained, told, stopped and refused."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.study.distributions import Coordinates

KEY = jax.random.key(0)
INPUTS = jax.random.normal(KEY, (60, 4))
TARGETS = INPUTS @ jnp.array([1.0, -2.0, 0.5, 3.0]) + 0.1 * jax.random.normal(KEY, (60,))
DATA = hg.Splits(
    (INPUTS[:40], TARGETS[:40]), (INPUTS[40:50], TARGETS[40:50]), (INPUTS[50:], TARGETS[50:])
)
SPACE = hg.Space(
    {
        "optimizer": hg.Categorical(["sgd", "adam"]),
        "momentum": hg.Float(0.1, 0.9, scale="reverse_log", when={"optimizer": "sgd"}),
        "rate": hg.Float(1e-3, 0.3, scale="log"),
    }
)


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def make_problem(choices: dict[str, Any]) -> hg.Problem:
    def optimizer(hyper: Any) -> Any:
        if choices["optimizer"] == "sgd":
            return optax.sgd(hyper["rate"], momentum=hyper["momentum"])
        return optax.adam(hyper["rate"])

    return hg.bilevel(lambda key: jax.random.normal(key, (4,)), loss, loss, optimizer)


def run(**options: Any) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments: dict[str, Any] = {
        "num_trials": 6,
        "num_steps": 20,
        "batch_size": 8,
        "sampler": "random",
    }
    return hg.sweep(make_problem, SPACE, DATA, **(arguments | options))


def test_black_box_proposes_what_optuna_alone_does() -> None:
    result = run(population=1, sampler="tpe", num_trials=14, seed=3)
    coordinates = Coordinates(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3))
    for trial in result.study.trials:
        alone = study.ask()
        values: dict[str, Any] = {}
        for name in coordinates.order:
            if SPACE.is_active(name, values):
                values[name] = alone._suggest(
                    coordinates.names[name], coordinates.distributions[name]
                )
        assert alone.params == trial.params
        study.tell(alone, trial.value)
    assert result.steps_spent == 14 * 20


def test_refined_values_are_told_and_beat_their_starts() -> None:
    refine = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    refined, plain = run(refine=refine, num_steps=60), run(num_steps=60)
    moved = 0
    for trial in refined.study.trials:
        assert trial.state.name == "COMPLETE"
        start = trial.user_attrs["start"]["rate"]
        moved += abs(np.log(trial.params["rate"] / start)) > 1e-3
        assert trial.user_attrs["trajectory"]["steps"][-1] == 60
    assert moved >= 5
    assert refined.best.score <= plain.best.score * 1.5
    assert set(refined.best.hyper) in ({"optimizer", "rate"}, {"optimizer", "momentum", "rate"})
    assert np.isfinite(refined.best.held_out)


def test_hyperband_stops_losers_and_finishes_winners() -> None:
    result = run(scheduler=hg.Hyperband(min_steps=10, eta=2), num_steps=40, num_trials=9)
    states = [t.state.name for t in result.study.trials]
    assert states.count("PRUNED") + states.count("COMPLETE") == 9
    assert states.count("PRUNED") >= 4
    for trial in result.study.trials:
        reached = max(trial.intermediate_values)
        assert (reached == 40) == (trial.state.name == "COMPLETE")
    assert result.steps_spent < 9 * 40
    assert "pruned" in result.table()


def test_one_compilation_per_program_and_width() -> None:
    traced: list[str] = []

    def counting(choices: dict[str, Any]) -> hg.Problem:
        problem = make_problem(choices)

        def step(*args: Any) -> Any:
            traced.append(choices["optimizer"])
            return problem.step(*args)

        return problem._replace(step=step)

    arguments = {"num_steps": 20, "batch_size": 8, "sampler": "random", "population": 2}
    hg.sweep(counting, SPACE, DATA, num_trials=8, **arguments)
    few = len(traced)
    traced.clear()
    hg.sweep(counting, SPACE, DATA, num_trials=16, **arguments)
    assert len(traced) == few


def test_the_same_call_goes_on_where_it_stopped(tmp_path: Any) -> None:
    storage = str(tmp_path / "sweep.journal")
    assert len(run(storage=storage, num_trials=4).study.trials) == 4
    both = run(storage=storage, num_trials=7)
    numbers = [t.number for t in both.study.trials if t.state.name == "COMPLETE"]
    assert len(numbers) == 7
    assert both.steps_spent == 3 * 20
    assert run(storage=storage, num_trials=7).steps_spent == 0


def test_a_trial_that_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    def broken(choices: dict[str, Any]) -> hg.Problem:
        if choices["optimizer"] == "adam":
            raise RuntimeError("no such optimizer here")
        return make_problem(choices)

    result = hg.sweep(
        broken,
        SPACE,
        DATA,
        num_trials=8,
        num_steps=20,
        batch_size=8,
        sampler="random",
        population=2,
    )
    failed = [t for t in result.study.trials if t.state.name == "FAIL"]
    assert 0 < len(failed) < 8
    assert all("no such optimizer here" in t.user_attrs["error"] for t in failed)
    assert f"#{failed[0].number}" in caplog.text and "no such optimizer here" in caplog.text
    assert result.best.hyper["optimizer"] == "sgd"


def test_what_a_killed_sweep_would_lose_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rung's standings before the next rung trains, a failure before the next program trains."""
    from hypergrad.search.cohort import Cohort
    from hypergrad.study.study import OpenStudy

    events: list[Any] = []

    def noting(owner: Any, name: str, note: Any) -> None:
        original = getattr(owner, name)

        def noted(self: Any, *args: Any) -> Any:
            events.append(note(*args))
            return original(self, *args)

        monkeypatch.setattr(owner, name, noted)

    noting(Cohort, "_advanced", lambda group, done, until: ("train", until))
    noting(OpenStudy, "report", lambda proposal, value, step: ("told", step))
    noting(OpenStudy, "fail", lambda proposal, error: ("failed", proposal.number))
    run(scheduler=hg.SuccessiveHalving(min_steps=10, eta=2), num_steps=40, num_trials=4)
    for steps, after in ((10, 20), (20, 40)):
        first = events.index(("train", after))
        assert ("told", steps) in events[:first] and ("told", steps) not in events[first:]
        assert ("train", steps) not in events[first:]

    def broken(choices: dict[str, Any]) -> hg.Problem:
        def step(*args: Any) -> Any:
            raise RuntimeError("not here")

        return make_problem(choices)._replace(step=step)

    monkeypatch.setattr("hypergrad.search.cohort.Programs._check", lambda *args: None)
    events.clear()
    arguments = {"num_trials": 2, "num_steps": 20, "batch_size": 8, "sampler": "random"}
    scheduler = hg.SuccessiveHalving(min_steps=10, eta=2)
    hg.sweep(broken, SPACE, DATA, scheduler=scheduler, **arguments)
    assert events == [("train", 10), ("failed", 0), ("train", 10), ("failed", 1)]


def test_a_member_that_diverges_leaves_the_others_alone() -> None:
    wide = hg.Space({"rate": hg.Float(1e-3, 1e6, scale="log")})

    def problem(choices: dict[str, Any]) -> hg.Problem:
        return hg.bilevel(lambda key: jnp.ones(4), loss, loss, lambda h: optax.sgd(h["rate"]))

    points = [{"rate": 1e6}, {"rate": 0.1}]
    arguments = {"num_trials": 2, "num_steps": 40, "batch_size": 8}
    result = hg.sweep(problem, wide, DATA, enqueue=points, **arguments)
    states = {t.params["rate"]: t.state.name for t in result.study.trials}
    assert states == {1e6: "FAIL", 0.1: "COMPLETE"}


def test_audit_retrains_on_fresh_seeds() -> None:
    result = run(num_steps=100)
    audit = result.audit(seeds=5)
    assert audit.test_losses.shape == (5,)
    assert len(set(audit.test_losses.tolist())) == 5
    assert audit.mean == pytest.approx(audit.test_losses.mean())
    with pytest.raises(ValueError, match="hyper holds 'lr'"):
        result.audit(hyper={"lr": 0.1})
    with pytest.raises(ValueError, match="seeds=0"):
        result.audit(seeds=0)
    with pytest.raises(ValueError, match=r"data.test=None"):
        hg.sweep(
            make_problem, SPACE, DATA._replace(test=None), num_trials=2, num_steps=20, batch_size=8
        ).audit()


def test_metrics_can_be_maximised() -> None:
    def with_metric(choices: dict[str, Any]) -> hg.Problem:
        metrics = lambda w, hyper, batch, key: {"fit": -loss(w, hyper, batch, key)}  # noqa: E731
        return make_problem(choices)._replace(metrics=metrics)

    arguments = {"num_trials": 4, "num_steps": 20, "batch_size": 8, "sampler": "random"}
    result = hg.sweep(with_metric, SPACE, DATA, metric="fit", direction="maximize", **arguments)
    assert result.best.score == max(t.value for t in result.study.trials)
    with pytest.raises(ValueError, match=r"is none of the problem's metrics: \['fit'\]"):
        hg.sweep(with_metric, SPACE, DATA, metric="accuracy", **arguments)


def test_bad_input_is_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"num_trials=0"):
        run(num_trials=0)
    with pytest.raises(ValueError, match=r"num_steps=20: lower min_steps"):
        run(scheduler=hg.Hyperband(min_steps=50))
    with pytest.raises(ValueError, match=r"has nothing to refine"):
        discrete = hg.Space({"optimizer": hg.Categorical(["sgd", "adam"])})
        hg.sweep(
            make_problem,
            discrete,
            DATA,
            num_trials=1,
            num_steps=10,
            batch_size=8,
            refine=hg.Refine(),
        )
    with pytest.raises(ValueError, match=r"num_steps=25 is no multiple of steps_per_update=10"):
        run(refine=hg.Refine(steps_per_update=10), num_steps=25)
    with pytest.raises(ValueError, match=r"population=0"):
        run(population=0)
    with pytest.raises(ValueError, match=r"would maximise the validation loss"):
        run(direction="maximize")
    storage = str(tmp_path / "a.journal")
    run(storage=storage, num_trials=1)
    other = hg.Space({**SPACE, "rate": hg.Float(1e-3, 0.5, scale="log")})
    with pytest.raises(ValueError, match="rate"):
        hg.sweep(
            make_problem, other, DATA, num_trials=1, num_steps=20, batch_size=8, storage=storage
        )
    extra = hg.Space({**SPACE, "unused": hg.Float(0.0, 1.0)})
    arguments = {"num_trials": 1, "num_steps": 20, "batch_size": 8}
    with pytest.raises(ValueError, match="'unused' never reaches"):
        hg.sweep(make_problem, extra, DATA, **arguments)
    less = hg.Space({name: SPACE[name] for name in ("optimizer", "momentum")})
    with pytest.raises(ValueError, match=r"reads hyper\['rate'\], which hyper lacks"):
        hg.sweep(make_problem, less, DATA, **arguments)
    for wrong in ({"refine": True}, {"scheduler": "hyperband"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} is a "):
            run(**wrong)
    with pytest.raises(ValueError, match=r"num_steps=40, but the trials .* have num_steps=20"):
        run(storage=storage, num_trials=2, num_steps=40)
    with pytest.raises(ValueError, match="told='first' is unknown"):
        run(told="first")
    with pytest.raises(ValueError, match="batch_size=80"):
        run(batch_size=80)


@pytest.mark.parametrize("told", ["start", "mean"])
def test_optuna_samplers_and_every_told_value(told: Any) -> None:
    refine = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    sampler = optuna.samplers.QMCSampler(seed=1, warn_independent_sampling=False)
    result = run(refine=refine, num_steps=10, num_trials=3, sampler=sampler, told=told)
    starts = [t.user_attrs["start"]["rate"] for t in result.study.trials]
    values = [t.params["rate"] for t in result.study.trials]
    assert len(set(starts)) == 3
    assert (values == pytest.approx(starts, rel=1e-5)) == (told == "start")


def test_population_based_training_copies_and_moves() -> None:
    scheduler = hg.PopulationBasedTraining(every=20, fraction=0.5, perturb=0.1)
    options = {"num_steps": 100, "num_trials": 4, "population": 4, "scheduler": scheduler}
    result = run(**options)
    trials = {t.number: t for t in result.study.trials}
    assert all(t.state.name == "COMPLETE" for t in trials.values())
    copied = [t for t in trials.values() if t.user_attrs["copied"]]
    assert copied
    for trial in copied:
        for steps, parent in trial.user_attrs["copied"]:
            assert steps % 20 == 0 and 0 < steps < 100
            assert parent in trials and parent != trial.number
        assert trial.params["rate"] != pytest.approx(trial.user_attrs["start"]["rate"])
        # told where it ended, which the trail's last block says, too
        assert trial.user_attrs["trajectory"]["rate"][-1] == pytest.approx(trial.params["rate"])
    alone = run(**{**options, "scheduler": None})
    worst = max(t.value for t in trials.values())
    assert worst < max(t.value for t in alone.study.trials)
    with pytest.raises(ValueError, match="population=1 leaves"):
        run(**{**options, "population": 1})
    with pytest.raises(ValueError, match=r"fraction=0\.8 must lie between"):
        hg.PopulationBasedTraining(every=20, fraction=0.8)


def test_memory_that_suffices_for_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that fails with XLA's error for more than one member runs them one by one."""
    from hypergrad.results import programs

    class Scarce(programs.Population):
        def advance(self, state: Any, num_updates: Any) -> Any:
            if state.active.shape[0] > 1:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return super().advance(state, num_updates)

    ample = run(num_trials=4, population=4)
    monkeypatch.setattr(programs, "Population", Scarce)
    result = run(num_trials=4, population=4)
    assert [t.state.name for t in result.study.trials] == ["COMPLETE"] * 4
    for one, other in zip(result.study.trials, ample.study.trials, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5)


def test_a_trial_that_exhausts_memory_fails_alone() -> None:
    """40 terabytes are not there; the smaller network is trained."""
    space = hg.Space({"width": hg.Categorical([4, 10**13]), "rate": hg.Float(1e-3, 0.1)})

    def problem(choices: dict[str, Any]) -> hg.Problem:
        def wide(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
            return loss(w[:4], hyper, batch, key)

        size = choices["width"]
        optimizer = lambda hyper: optax.sgd(hyper["rate"])  # noqa: E731
        return hg.bilevel(lambda key: jnp.zeros(size), wide, wide, optimizer)

    points = [{"width": 10**13}, {"width": 4}]
    arguments = {"num_trials": 2, "num_steps": 20, "batch_size": 8}
    result = hg.sweep(problem, space, DATA, enqueue=points, **arguments)
    big, small = result.study.trials
    assert small.state.name == "COMPLETE" and big.state.name == "FAIL"
    assert "RESOURCE_EXHAUSTED" in big.user_attrs["error"]


def test_many_values_of_an_int_are_many_programs() -> None:
    space = hg.Space({"width": hg.Int(16, 256), "rate": hg.Float(1e-3, 0.3, scale="log")})
    stop = hg.Space({**space, "width": hg.Int(16, 256, step=16)})
    assert stop["width"].count == 16
    expected = r"'width' is Int\(16, 256\) with 241 values.*up to 2 are .*Give step=30"
    with pytest.warns(UserWarning, match=expected):
        hg.sweep(lambda c: 1 / 0, space, DATA, num_trials=2, num_steps=10, batch_size=8)


def test_one_line_per_rung_and_a_live_view_on_terminals_only(
    caplog: pytest.LogCaptureFixture, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = hg.SuccessiveHalving(min_steps=10, eta=2)
    with caplog.at_level("INFO", logger="hypergrad"):
        run(scheduler=scheduler, num_trials=4, num_steps=40)
    lines = [record.message for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        "at most 2 programs of equal choices for 4 trials.",
        "4 trials at 10 steps",
        "2 trials at 20 steps",
        "1 trials at 40 steps",
    ]
    assert "".join(capfd.readouterr()) == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    result = run(num_trials=4)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err)
    last = shown.rstrip().splitlines()[-1]
    assert "4/4 trials" in last and f"best {result.best.score:.4g}" in last
    assert "80 steps" in last and "trials/s" in last and "left" in last
    run(num_trials=4, progress=False)
    assert capfd.readouterr().err == ""


def test_the_best_of_a_refined_sweep_is_confirmed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refine = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    result, trained = run(refine=refine, num_trials=5, population=1), []
    retrained = type(result)._retrained

    def counted(self: Any, values: Any, first: int, last: int, stream: int) -> Any:
        trained.extend((tuple(values.items()), seed) for seed in range(first, last))
        return retrained(self, values, first, last, stream)

    monkeypatch.setattr(type(result), "_retrained", counted)
    best = result.best
    # Ends and starts of three trials under one seed, the better three under another.
    assert len(trained) == len(set(trained)) == 9
    starts = [result.study.trials[b.number].user_attrs["start"] for b in result.top(3)]
    ends = [b.hyper for b in result.top(3)]
    assert any(best.hyper["rate"] == pytest.approx(v["rate"]) for v in (*starts, *ends))
    seeds = [retrained(result, best.hyper, i, i + 1, 2**31 + 1).score[0] for i in (0, 1)]
    assert best.score == pytest.approx(np.mean(seeds), rel=1e-5)
    assert result.best == best and len(trained) == 9
    # The same number for each: a plain program of one choice is made once.
    plain = result._programs.plain({"optimizer": best.hyper["optimizer"]})
    assert plain is result._programs.plain({"optimizer": best.hyper["optimizer"]})


def test_the_last_trials_polish_the_best() -> None:
    refine = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    result = run(refine=refine, num_trials=6, polish=3, population=1, told="last")
    trials = result.study.trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 6
    for number in (3, 4, 5):
        best = min(trials[:number], key=lambda t: t.value)
        assert trials[number].params["optimizer"] == best.params["optimizer"]
        assert trials[number].user_attrs["start"]["rate"] == pytest.approx(best.params["rate"])
        assert trials[number].params["rate"] != best.params["rate"]
    found = result.confirm(count=3, seeds=2)
    assert found.number in {best.number for best in result.top(3)}
    assert found.score != next(b.score for b in result.top(3) if b.number == found.number)
    # after a scheduler's brackets, full runs
    scheduler = hg.SuccessiveHalving(min_steps=5, eta=2)
    halved = run(refine=refine, num_trials=6, polish=2, population=1, scheduler=scheduler)
    reached = [max(t.intermediate_values) for t in halved.study.trials]
    assert sorted(reached[:4]) == [5, 5, 10, 20] and reached[4:] == [20, 20]
    with pytest.raises(ValueError, match="polish=6 with num_trials=6"):
        run(refine=refine, polish=6)


def test_choices_without_an_active_float_are_trained_plainly() -> None:
    rate = hg.Float(1e-3, 0.3, scale="log", when={"optimizer": "sgd"})
    space = hg.Space({"optimizer": hg.Categorical(["sgd", "default"]), "rate": rate})

    def problem(choices: dict[str, Any]) -> hg.Problem:
        optimizer = lambda hyper: optax.sgd(hyper.get("rate", 0.05))  # noqa: E731
        return hg.bilevel(lambda key: jnp.zeros(4), loss, loss, optimizer)

    refine = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    points = [{"optimizer": "default"}, {"optimizer": "sgd"}]
    arguments = {"num_trials": 2, "num_steps": 20, "batch_size": 8, "refine": refine}
    result = hg.sweep(problem, space, DATA, enqueue=points, **arguments)
    assert [t.state.name for t in result.study.trials] == ["COMPLETE"] * 2
    assert result.top()[0].score <= result.top()[1].score
    # what one sweep found starts another one
    again = hg.sweep(
        problem, space, DATA, enqueue=[best.hyper for best in result.top(2)], **arguments
    )
    assert {b.hyper["optimizer"] for b in again.top()} == {"sgd", "default"}
