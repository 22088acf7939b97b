"""The study: the same proposals as Optuna's, refined values in every storage, recovery."""

import ast
import json
import math
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

import hypergrad as hg
from hypergrad.space.description import fingerprint, first_difference
from hypergrad.study import workers
from hypergrad.study.distributions import Coordinates
from hypergrad.study.optuna_private import backend_of, note
from hypergrad.study.slots import counted
from hypergrad.study.storage import open_storage
from hypergrad.study.study import open_study

SPACE = hg.Space(
    {
        "learning_rate": hg.Float(1e-4, 1.0, scale="log"),
        "momentum": hg.Float(0.5, 0.999, scale="reverse_log", when={"optimizer": "sgd"}),
        "optimizer": hg.Categorical(["sgd", "adamw"]),
        "layers": hg.Int(1, 4),
        "dropout": hg.Float(0.0, 0.8),
    }
)
FLAT = hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log"), "width": hg.Categorical([8, 16, 32])})
PACKAGE = Path(hg.__file__).parent
STORAGES = ("memory", "journal", "sqlite")


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(params=STORAGES)
def storage(request, tmp_path):
    return place(request.param, tmp_path)


def place(kind, folder):
    if kind == "memory":
        return optuna.storages.InMemoryStorage()
    return str(folder / "a.journal") if kind == "journal" else f"sqlite:///{folder}/a.db"


def hyper_of(proposal):
    return {**proposal.choices, **proposal.start}


def loss(hyper):
    """Return something with an optimum inside, so that TPE has what to learn."""
    rate = hyper.get("learning_rate", hyper.get("rate"))
    return (math.log10(rate) + 2) ** 2 + hyper.get("dropout", 0) + hyper.get("width", 0) / 8


def run(opened, num_trials, **options):
    """Run trials; returns the values that were proposed."""
    found = []
    while len(found) < num_trials and (proposal := opened.ask(**options)):
        found.append(hyper_of(proposal))
        opened.finish(proposal, loss(found[-1]))
    return found


def reopen(opened):
    """Return the same study as an unbiased reader sees it."""
    return optuna.load_study(study_name=opened.study.study_name, storage=opened.study._storage)


# What the room is made of.


def optuna_private_uses(source):
    """Return where a file reads a private name of an object not its own, or of Optuna's modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        private = [n for n in names if n.startswith("optuna.") and "._" in n]
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            # Of a NamedTuple, `_replace` is public.
            if owner not in ("self", "cls") and node.attr != "_replace":
                private.append(ast.unparse(node))
        found += [f"{node.lineno}: {name}" for name in private]
    return found


def test_one_file_holds_every_use_of_optunas_private_names():
    assert optuna_private_uses("from optuna.storages._cached_storage import _CachedStorage")
    assert optuna_private_uses("import optuna.trial._trial")
    assert optuna_private_uses("self._study._storage") and optuna_private_uses("trial()._trial_id")
    assert not optuna_private_uses("import optuna\nself._study.tell(trial)\nx._replace(a=1)")
    allowed, found = "study/optuna_private.py", {}
    for path in sorted(PACKAGE.rglob("*.py")):
        # Where Optuna's objects go by: the others have private names of their own.
        if re.search("^ *(import|from) (optuna|hypergrad.study)", path.read_text(), re.MULTILINE):
            found[str(path.relative_to(PACKAGE))] = optuna_private_uses(path.read_text())
    assert found.pop(allowed)
    assert not {path: uses for path, uses in found.items() if uses}
    assert {"cli.py", "study/study.py", "search/cohort.py", "search/sweep.py"} <= found.keys()


def test_the_study_holds_no_jax():
    for path in (PACKAGE / "study").glob("*.py"):
        assert not re.search(r"^\s*(import|from) (jax|optax|flax)", path.read_text(), re.MULTILINE)


# What Optuna is asked and told.


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("record", [True, False])
def test_proposals_are_those_of_optuna_alone(sampler, record):
    """Also without recording: the starts of Floats come from the sampler in the same way."""
    kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[sampler]
    alone = optuna.create_study(sampler=kind(seed=3))
    coordinates = Coordinates(SPACE)
    with open_study(SPACE, sampler=sampler, seed=3) as opened:
        for _ in range(25):
            trial = alone.ask()
            hyper = {}
            for name in ("learning_rate", "optimizer", "momentum", "layers", "dropout"):
                if SPACE.is_active(name, hyper):
                    parameter = trial._suggest(
                        coordinates.names[name], coordinates.distributions[name]
                    )
                    hyper[name] = coordinates.value(name, parameter)
            # Optuna suggests in the order in which we ask; `order` puts the optimizer first.
            proposal = opened.ask(record=record)
            opened.finish(proposal, loss(hyper_of(proposal)))
            alone.tell(trial, loss(hyper))
            assert proposal.trial.number == trial.number
            assert hyper_of(proposal) == hyper
    assert [t.params for t in opened.study.trials] == [t.params for t in alone.trials]


def test_refined_values_are_what_the_study_holds(storage):
    """Overwriting after `suggest` is silently ignored on SQLite: nothing may be recorded before."""
    refined = {"rate": 0.25}
    with open_study(FLAT, storage, "random", seed=0) as opened:
        proposal = opened.ask(record=False)
        assert "rate" not in proposal.trial.params
        assert opened.finish(proposal, 1.5, refined, {"trajectory": [0.1, 0.2, 0.25]})
        stopped = opened.ask(record=False)
        opened.report(stopped, 3.0, step=10)
        assert opened.prune(stopped, 2.5, 30, {"rate": 0.125})
        failed = opened.ask(record=False)
        assert opened.fail(failed, "Traceback: out of memory")
        absent = opened.ask(record=False)
        assert opened.finish(absent, float("nan"))
        for trials in (opened.study.trials, reopen(opened).trials):
            full, pruned, broken, nan = trials
            assert full.params["rate"] == 0.25 and full.value == 1.5
            assert full.user_attrs["start"] == proposal.start != refined
            assert full.user_attrs["trajectory"] == [0.1, 0.2, 0.25]
            assert pruned.state == TrialState.PRUNED and pruned.params["rate"] == 0.125
            assert pruned.intermediate_values == {10: 3.0, 30: 2.5}
            assert broken.state == TrialState.FAIL
            assert broken.user_attrs["error"] == "Traceback: out of memory"
            assert broken.params["rate"] == failed.start["rate"]
            assert nan.state == TrialState.FAIL and "NaN" in nan.user_attrs["error"]
        assert opened.progress() == (4, 1, 1, 2, 0, 0)


def test_tpe_learns_from_refined_values(storage):
    """It then proposes what it proposes in a study that never held another value."""
    distributions = Coordinates(FLAT).distributions
    plain = optuna.create_study()
    with open_study(FLAT, storage, "random", seed=0) as opened:
        for i in range(15):
            proposal = opened.ask(record=False)
            refined = {"rate": math.sqrt(proposal.start["rate"] * 0.01)}
            value, stopped = loss({**proposal.choices, **refined}), i % 3 == 0
            if stopped:
                opened.prune(proposal, value, 10, refined)
            else:
                opened.finish(proposal, value, refined)
            plain.add_trial(
                optuna.trial.create_trial(
                    params={**proposal.choices, **refined},
                    distributions=distributions,
                    value=value,
                    intermediate_values={10: value} if stopped else None,
                    state=TrialState.PRUNED if stopped else TrialState.COMPLETE,
                )
            )
        asked = []
        for study in (plain, opened.study, reopen(opened)):
            study.sampler = optuna.samplers.TPESampler(seed=7)
            trial = study.ask(distributions)
            asked.append(trial.params)
            study.tell(trial, state=TrialState.FAIL)
        assert asked[0] == asked[1] == asked[2]


def test_conditional_hyperparameters_are_neither_asked_nor_recorded(storage):
    with open_study(SPACE, storage, "random", seed=1) as opened:
        for record in [True, False] * 6:
            proposal = opened.ask(record=record)
            assert ("momentum" in proposal.start) == (proposal.choices["optimizer"] == "sgd")
            opened.finish(proposal, 0.0)
        for trial in reopen(opened).trials:
            sgd = trial.params["optimizer"] == "sgd"
            values = Coordinates(SPACE).from_study(trial.params)
            assert ("1 - momentum" in trial.params) == ("momentum" in values) == sgd
        assert Counter(t.params["optimizer"] for t in opened.study.trials).keys() == {
            "sgd",
            "adamw",
        }


def test_reverse_log_is_uniform_in_the_unit_coordinate():
    space = hg.Space({"momentum": hg.Float(0.0, 0.999, scale="reverse_log")})
    with open_study(space, sampler="random", seed=0) as opened:
        values = []
        for _ in range(300):
            proposal = opened.ask()
            values.append(proposal.start["momentum"])
            opened.finish(proposal, 0.0)
    values = np.array(values)
    assert values.min() >= 0.0 and values.max() <= 0.999
    unit = np.asarray(space.to_unit({"momentum": values})["momentum"])
    assert np.allclose(np.quantile(unit, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.06)


def test_values_beyond_a_bound_by_rounding_are_clipped():
    coordinates = Coordinates(SPACE)
    for name in SPACE.continuous:
        dimension, distribution = SPACE[name], coordinates.distributions[name]
        for bound in (dimension.low, dimension.high):
            single = float(np.float32(bound))
            coordinates.check({name: single}, "hyper", complete=False)
            (value,) = coordinates.to_study({name: single}).values()
            assert distribution.low <= value <= distribution.high
            assert dimension.low <= coordinates.value(name, value) <= dimension.high


@pytest.mark.parametrize("sampler", ["tpe", "random", "GPSampler", "CmaEsSampler", "QMCSampler"])
def test_members_of_a_population_share_their_choices(sampler):
    if sampler == "GPSampler":
        pytest.importorskip("torch")
    if sampler == "CmaEsSampler":
        pytest.importorskip("cmaes")
    options = {"sampler": sampler, "seed": 0}
    if sampler[0].isupper():
        options = {"sampler": getattr(optuna.samplers, sampler)(seed=0)}
    with open_study(SPACE, **options) as opened:
        for _ in range(5):
            first = opened.ask(record=False)
            members = [first, *(opened.ask(first.choices, record=False) for _ in range(3))]
            assert all(member.choices == first.choices for member in members)
            # Two of Sobol's sequences, that of all parameters and that of Floats, start alike.
            # A Gaussian process soon proposes one bound for all, so whole starts are compared.
            distinct = len({tuple(map(float, member.start.values())) for member in members})
            assert distinct == 4 or (sampler == "QMCSampler" and distinct == 3)
            for member in members:
                opened.finish(member, loss(hyper_of(member)))
        params = [trial.params["layers"] for trial in opened.study.trials]
        assert [params[4 * i] for i in range(5) for _ in range(4)] == params


def test_a_member_leaves_queued_points_of_other_choices():
    with open_study(FLAT, sampler="random", seed=0, num_trials=4) as opened:
        opened.enqueue({"width": 8, "rate": 0.5})
        opened.enqueue({"width": 16, "rate": 0.25})
        assert opened.ask({"width": 16}).start == {"rate": 0.25}
        other = opened.ask({"width": 16})
        assert other.choices == {"width": 16} and other.start["rate"] != 0.5
        assert hyper_of(opened.ask()) == {"width": 8, "rate": 0.5}


@pytest.mark.parametrize("record", [True, False])
def test_known_points_and_results_of_another_study(storage, record):
    with open_study(SPACE, storage, "random", seed=0, num_trials=3) as opened:
        known = {"optimizer": "sgd", "momentum": 0.9, "dropout": 0.0}
        assert opened.enqueue(known)
        assert not opened.enqueue(known)
        elsewhere = {"optimizer": "adamw", "layers": 2, "dropout": 0.1, "learning_rate": 1e-3}
        assert opened.add_finished(elsewhere, 0.5, {"data": "other"})
        assert not opened.add_finished(elsewhere, 0.5)
        assert opened.progress() == (0, 0, 0, 0, 0, 1)
        proposal = opened.ask(record=record)
        hyper = hyper_of(proposal)
        assert hyper.keys() == set(SPACE)
        assert (hyper["optimizer"], hyper["dropout"]) == ("sgd", 0.0)
        assert hyper["momentum"] == pytest.approx(0.9, abs=1e-12)
        opened.finish(proposal, 1.0)
        assert len(run(opened, 10, record=record)) == 2
        assert opened.progress().finished == 3
        assert len(counted(opened.study)) == 3
        added = next(t for t in opened.study.trials if t.user_attrs.get("data") == "other")
        assert Coordinates(SPACE).from_study(added.params) == elsewhere and added.value == 0.5


# The grid.


def test_a_grid_has_every_active_point_once_with_equal_choices_together():
    with open_study(SPACE, sampler="grid", grid_points=3) as opened:
        found = run(opened, 10_000, record=False)
        assert opened.ask() is None
    # Four layers are more values than three: they are thinned.
    assert len(found) == 3 * (3**3 + 3**2)
    assert len({tuple(sorted(p.items())) for p in found}) == len(found)
    programs = [(p["optimizer"], p["layers"]) for p in found]
    changes = sum(a != b for a, b in pairwise(programs))
    assert changes == 6 - 1
    assert sorted({p["learning_rate"] for p in found}) == pytest.approx([1e-4, 1e-2, 1.0])
    ends = sorted({p["momentum"] for p in found if "momentum" in p})
    assert ends == pytest.approx([0.5, 1 - math.sqrt(0.5 * 0.001), 0.999])


def test_a_wide_int_is_thinned_on_its_scale():
    space = hg.Space({"width": hg.Int(16, 256, scale="log"), "layers": hg.Int(1, 3)})
    points = Coordinates(space).grid(5, seed=None)
    assert {p["width"] for p in points} == {16, 32, 64, 128, 256}
    assert {p["layers"] for p in points} == {1, 2, 3}


def test_a_resumed_grid_repeats_and_leaves_out_nothing(tmp_path):
    path, found = str(tmp_path / "a.journal"), []
    for seed, count in enumerate((4, 1, 100)):
        # Another seed shuffled anew: a point came twice, and one never.
        with open_study(FLAT, path, "grid", seed=seed) as opened:
            assert count == 100 or opened.ask() is not None  # Given back when it closes.
            found += run(opened, count)
    assert len(found) == len({tuple(p.values()) for p in found}) == 15
    with pytest.raises(ValueError, match=r"grid_points=4, but the grid .* has 5"):
        open_study(FLAT, path, "grid", grid_points=4)


# Resuming.


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("record", [True, False])
def test_a_resumed_study_goes_on_as_an_uninterrupted_one(tmp_path, sampler, record):
    """25 trials straight are 13 + 12 (TPE draws at random up to the tenth, then from its model)."""
    with open_study(SPACE, sampler=sampler, seed=5) as straight:
        expected = run(straight, 25, record=record)
    found, path = [], str(tmp_path / "a.journal")
    for count in (13, 12):
        with open_study(SPACE, path, sampler, seed=5) as opened:
            found += run(opened, count, record=record)
    assert found == expected


def test_an_ask_that_was_cut_short_is_drawn_again(tmp_path, monkeypatch):
    with open_study(FLAT, sampler="random", seed=5) as straight:
        expected = run(straight, 3)
    path = str(tmp_path / "a.journal")
    opened = open_study(FLAT, path, "random", seed=5)
    found = run(opened, 1)
    monkeypatch.setattr(opened._randomness, "place", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opened.ask()
    opened._worker.close()
    with open_study(FLAT, path, "random", seed=5) as again:
        found += run(again, 2)
        assert again.progress() == (3, 3, 0, 0, 0, 0)
    assert found == expected


def test_a_second_worker_draws_its_own_proposals(tmp_path):
    path = str(tmp_path / "a.journal")
    with (
        open_study(FLAT, path, "random", seed=5) as first,
        open_study(FLAT, path, "random", seed=5) as second,
    ):
        assert run(first, 3) != run(second, 3)


def test_a_study_of_optuna_alone_is_continued_without_repeating_it(tmp_path):
    path = str(tmp_path / "a.journal")
    alone = optuna.create_study(
        storage=open_storage(path), study_name="x", sampler=optuna.samplers.RandomSampler(seed=5)
    )
    for _ in range(3):
        alone.tell(alone.ask(Coordinates(FLAT).distributions), 1.0)
    before = {trial.params["rate"] for trial in alone.trials}
    with open_study(FLAT, path, "random", seed=5, name="x") as opened:
        found = run(opened, 3)
    assert not {p["rate"] for p in found} & before


# What is refused.


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"rate": hg.Float(1e-4, 0.5, scale="log")}, "'rate' has high 1.0 there and 0.5 here"),
        ({"rate": hg.Float(1e-4, 1.0)}, "'rate' has scale 'log' there and 'linear' here"),
        ({"width": hg.Categorical([8, 16])}, r"'width' has choices \[8, 16, 32\] there"),
        ({"width": hg.Int(8, 32)}, "'width' has kind 'Categorical' there and 'Int' here"),
        ({"extra": hg.Int(1, 2)}, "it lacks 'extra'"),
        ({"rate": None}, "it has 'rate', which this space lacks"),
        (
            {"rate": hg.Float(1e-4, 1.0, scale="log", when={"width": 8})},
            "'rate' has when None there and {'width': .8.} here",
        ),
    ],
)
def test_another_space_is_refused(storage, change, difference):
    open_study(FLAT, storage).close()
    space = hg.Space({n: d for n, d in {**FLAT, **change}.items() if d is not None})
    with pytest.raises(ValueError, match=f"made for another space: {difference}"):
        open_study(space, storage)
    open_study(FLAT, storage).close()


def test_the_order_of_names_is_no_difference_but_true_is_not_one():
    backwards = hg.Space({name: FLAT[name] for name in reversed(list(FLAT))})
    assert first_difference(fingerprint(FLAT), fingerprint(backwards)) is None
    one, true = (hg.Space({"flag": hg.Categorical([v, 5])}) for v in (1, True))
    assert "'flag' has choices" in first_difference(fingerprint(one), fingerprint(true))
    assert json.loads(json.dumps(fingerprint(SPACE))) == fingerprint(SPACE)


def test_a_study_of_optuna_alone_with_other_ranges_is_refused():
    storage = optuna.storages.InMemoryStorage()
    alone = optuna.create_study(storage=storage, study_name="x")
    alone.tell(alone.ask({"rate": optuna.distributions.FloatDistribution(0.0, 1.0)}), 1.0)
    with pytest.raises(ValueError, match="'x' in this storage has 'rate' as FloatDistribution"):
        open_study(FLAT, storage, name="x")


def test_another_direction_is_refused(storage):
    open_study(FLAT, storage, direction="maximize").close()
    with pytest.raises(ValueError, match=r"direction='minimize', but the study .* to maximize"):
        open_study(FLAT, storage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "bayes"}, "sampler='bayes' is unknown: choose 'tpe', 'random', 'grid', "),
        ({"direction": "min"}, "direction='min' is unknown"),
        ({"num_trials": 0}, "num_trials=0 must be at least 1, or None"),
        ({"storage": "sweep.txt"}, "storage='sweep.txt' is neither a journal nor a URL"),
        ({"storage": "/no/such/a.journal"}, "lies in '/no/such', which is no folder"),
        ({"storage": "grpc://here"}, "names no proxy"),
        ({"beat_every": 0}, "beat_every=0 must be positive and finite: a period in seconds"),
        ({"grace": 1.0}, "grace=1.0 seconds declares a worker dead before"),
        ({"sampler": "grid", "grid_points": 1}, "grid_points=1 must be at least 2"),
        ({"sampler": "grid", "grid_points": 10**6}, "sampler='grid' has 3000000 points"),
        (
            {"sampler": optuna.samplers.RandomSampler(), "seed": 1},
            r"seed=1 cannot reach .* RandomSampler\(seed=...\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        open_study(FLAT, **options)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"weights": hg.Float()}, r"Space\['weights'\] is Float\(\) without bounds"),
        (
            {"a": hg.Float(0.0, 0.9, scale="reverse_log"), "1 - a": hg.Float(0.0, 1.0)},
            "holds '1 - a', under which the study keeps 'a'",
        ),
    ],
)
def test_spaces_that_no_study_can_hold_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        open_study(hg.Space(space))


def test_wrong_values_are_refused():
    with open_study(SPACE, sampler="random", seed=0) as opened:
        for hyper, message in [
            ({"rate": 1.0}, r"hyper holds 'rate': this space holds"),
            ({"dropout": 0.9}, r"hyper\['dropout'\] is 0.9, outside \[0.0, 0.8\]"),
            ({"dropout": [0.1]}, "give one finite number"),
            ({"layers": 9}, r"hyper\['layers'\] is 9: give one of the values"),
            ({"optimizer": "adamw", "momentum": 0.9}, "holds 'momentum', which is inactive"),
        ]:
            with pytest.raises(ValueError, match=message):
                opened.enqueue(hyper)
        with pytest.raises(ValueError, match="hyper has no 'dropout': give a value"):
            opened.add_finished({"optimizer": "adamw", "layers": 1, "learning_rate": 0.1}, 1.0)
        with pytest.raises(ValueError, match=r"fixed_choices\['layers'\] is 0"):
            opened.ask({"layers": 0})
        proposal = opened.ask(record=False)
        for wrong in (float("nan"), 0.9):
            refined = {**proposal.start, "dropout": wrong}
            with pytest.raises(ValueError, match=r"refined\['dropout'\] is"):
                opened.finish(proposal, 1.0, refined)
        with pytest.raises(ValueError, match="give exactly the active Floats"):
            opened.finish(proposal, 1.0, {"dropout": 0.1})
        with pytest.raises(ValueError, match="comes too late: trial 1 has its start recorded"):
            opened.finish(opened.ask(), 1.0, {"dropout": 0.1})
        assert len(opened.study.trials) == 2


# Dead workers.


def abandon(opened):
    """Leave a study as `kill -9` does: nothing is given back, the process is no more."""
    record = {**opened._worker._record, "pid": 2**22 + 1, "beat": time.time()}
    opened._worker._stop.set()
    opened._worker._write(record)
    workers._open_here.pop(opened._worker.id)


@pytest.mark.parametrize("record", [True, False])
def test_trials_of_a_dead_worker_start_again_from_the_same_values(storage, record):
    dead = open_study(SPACE, storage, "random", seed=0, num_trials=5)
    run(dead, 2)
    lost = [dead.ask(record=record), dead.ask(record=record)]
    abandon(dead)
    with open_study(SPACE, storage, "random", seed=0, num_trials=5) as opened:
        assert opened.progress() == (2, 2, 0, 0, 0, 2)
        assert [hyper_of(opened.ask(record=record)) for _ in lost] == [*map(hyper_of, lost)]
        assert opened.ask() is not None
        assert opened.ask() is None
        # The dead may have been only slow.
        refined = None if record else lost[0].start
        assert not dead.finish(lost[0], 1.0, refined)
    with open_study(SPACE, storage, "random", seed=0, num_trials=5) as opened:
        assert opened.recover() == []
        run(opened, 10)
        assert opened.progress() == (5, 5, 0, 0, 0, 0)


def test_a_living_worker_keeps_its_trials(storage):
    with open_study(FLAT, storage, seed=0) as first, open_study(FLAT, storage, seed=1) as second:
        proposal = first.ask()
        assert first.recover() == second.recover() == []
        assert first.finish(proposal, 1.0)


def test_two_that_recover_at_once_queue_one_successor(storage):
    dead = open_study(FLAT, storage, "random", seed=0)
    proposal = dead.ask()
    first, second = open_study(FLAT, storage, seed=1), open_study(FLAT, storage, seed=2)
    abandon(dead)
    # The second one reads the trials before the first one recovers them.
    (before,) = second.study.get_trials(deepcopy=True)
    assert first.recover() == [proposal.number]
    assert not second._slots.lose(before)
    assert second.recover() == first.recover() == []
    # The narrow race: both queue a successor. The later one never runs.
    assert second._slots.queue_successor(second.study.trials[0])
    assert hyper_of(second.ask()) == hyper_of(proposal)
    assert hyper_of(first.ask()) != hyper_of(proposal)
    states = [t.state for t in first.study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.FAIL, TrialState.RUNNING]
    first.close(), second.close()


def test_a_successor_is_queued_also_where_the_recovering_worker_dies(storage):
    dead = open_study(FLAT, storage, "random", seed=0)
    proposal = dead.ask()
    doctor = open_study(FLAT, storage)
    abandon(dead)
    # Its last act: the state is set, the successor not yet queued.
    assert doctor._slots.lose(doctor.study.get_trials()[0])
    abandon(doctor)
    with open_study(FLAT, storage, "random", seed=0) as opened:
        assert opened.progress() == (0, 0, 0, 0, 0, 1)
        assert hyper_of(opened.ask()) == hyper_of(proposal)


def test_a_trial_that_always_kills_its_process_fails_in_the_end(tmp_path):
    path = str(tmp_path / "a.journal")
    for _ in range(3):
        opened = open_study(FLAT, path, "random", seed=0, num_trials=1, max_retries=2)
        assert opened.ask() is not None
        abandon(opened)
    with open_study(FLAT, path, "random", seed=0, num_trials=1, max_retries=2) as opened:
        assert opened.ask() is None
        assert opened.progress() == (1, 0, 0, 1, 0, 0)
        assert "died 3 times" in counted(opened.study)[0].user_attrs["error"]


def test_the_slot_of_a_worker_that_died_before_it_gave_way(tmp_path, monkeypatch):
    """Two make the last trial at once, and the later one dies before it cancels its own."""
    path = str(tmp_path / "a.journal")
    late = open_study(FLAT, path, "random", seed=0, num_trials=1)
    before = late.study.get_trials()
    with open_study(FLAT, path, "random", seed=1, num_trials=1) as opened:
        proposal = opened.ask()
        monkeypatch.setattr(late._slots, "cancel", lambda *_: None)
        assert late._slots._create(before) is None
        abandon(late)
        opened.finish(proposal, 1.0)
        assert opened.recover() == [1]
        assert opened.ask() is None
        assert opened.progress() == (1, 1, 0, 0, 0, 0)


def test_an_interrupted_sweep_gives_its_trials_back_at_once(storage):
    with pytest.raises(KeyboardInterrupt), open_study(FLAT, storage, "random", seed=0) as opened:
        lost = opened.ask()
        raise KeyboardInterrupt
    with open_study(FLAT, storage, "random", seed=0) as opened:
        assert hyper_of(opened.ask()) == hyper_of(lost)


def test_trials_of_optuna_alone_are_left_alone(storage):
    with open_study(FLAT, storage, seed=0) as opened:
        opened.study.ask()
        assert opened.recover() == []


def test_who_is_dead(monkeypatch):
    here = {"place": workers._place(), "started": workers._process_start(os.getppid())}
    alive = {**here, "pid": os.getppid(), "beat": 0.0, "grace": 60.0}
    assert not workers.is_dead("a", alive)
    assert workers.is_dead("a", None)
    assert workers.is_dead("a", {**alive, "ended": True})
    assert workers.is_dead("a", {**alive, "pid": 2**22 + 1})
    # The same process, but an opening of it that nobody holds any more (a notebook).
    assert workers.is_dead("a", {**alive, "pid": os.getpid()})
    if alive["started"] is not None:
        assert workers.is_dead("a", {**alive, "started": "1"})
    elsewhere = {**alive, "place": "another machine"}
    assert workers.is_dead("a", {**elsewhere, "beat": time.time() - 61})
    assert not workers.is_dead("a", {**elsewhere, "beat": time.time() - 59})


def test_a_worker_beats_in_the_background(tmp_path):
    with open_study(FLAT, str(tmp_path / "a.journal"), beat_every=0.02, grace=1.0) as opened:
        beats = set()
        for _ in range(100):
            (record,) = workers.read_workers(opened.storage, opened.study._study_id).values()
            beats.add(record["beat"])
            if len(beats) > 2:
                break
            time.sleep(0.02)
    assert len(beats) > 2


# Storages.


def test_a_torn_last_line_is_cut_off(tmp_path):
    """A machine that loses power may leave half a line, after which Optuna reads nothing more."""
    path = tmp_path / "a.journal"
    with open_study(FLAT, str(path), "random", seed=0) as opened:
        run(opened, 2)
    with path.open("a") as file:
        file.write('{"op_code":4,"worker')
    with open_study(FLAT, str(path), "random", seed=0, num_trials=4) as opened:
        run(opened, 4)
        assert opened.progress().finished == 4


def _die_with_the_lock(path):
    backend = open_storage(path)._backend
    backend._lock.acquire()
    os.kill(os.getpid(), 9)


def test_a_lock_of_a_killed_process_is_taken_over(tmp_path, spawn):
    """Optuna waits 30 s for the symbolic link that a killed process left."""
    path = str(tmp_path / "a.journal")
    process = spawn(_die_with_the_lock, path)
    process.join()
    assert os.path.islink(path + ".lock")
    begin = time.monotonic()
    with open_study(FLAT, path, "random", seed=0) as opened:
        run(opened, 1)
    assert time.monotonic() - begin < 10
    # Optuna alone still sees the link of a process that lives.
    backend = open_storage(path)._backend
    backend._lock.acquire()
    assert os.path.islink(path + ".lock") and os.path.exists(path + ".lock")
    backend._lock.release()
    assert not os.path.islink(path + ".lock")


def test_every_lock_is_a_young_one_to_other_machines(tmp_path):
    """They break one whose target was not touched for 30 s, however many held it in between."""
    path = str(tmp_path / "a.journal")
    lock = open_storage(path)._backend._lock
    os.utime(lock._kernel_file, (0, 0))
    lock.acquire()
    assert os.stat(path + ".lock").st_mtime > time.time() - 60
    lock.release()


def test_attributes_come_back_whatever_their_size_and_value(storage):
    """A trajectory of 32 blocks and 30 Floats is 20 KB; a metric may be NaN or infinite."""
    trajectory = {f"l2_{i}": [0.1 + i + step / 3 for step in range(32)] for i in range(30)}
    metrics = {"accuracy": float("nan"), "loss": float("inf")}
    with open_study(FLAT, storage, "random", seed=0) as opened:
        proposal = opened.ask(record=False)
        opened.report(proposal, float("nan"), 10)
        opened.report(proposal, float("inf"), 20)
        opened.finish(proposal, -math.inf, None, {"trajectory": trajectory, "metrics": metrics})
        for trial in (*opened.study.trials, *reopen(opened).trials):
            assert trial.user_attrs["trajectory"] == trajectory
            assert math.isnan(trial.user_attrs["metrics"]["accuracy"])
            assert trial.user_attrs["metrics"]["loss"] == math.inf
            assert math.isnan(trial.intermediate_values[10])
            assert (trial.intermediate_values[20], trial.value) == (math.inf, -math.inf)


def test_what_a_trial_leaves_is_one_transaction(tmp_path):
    """Each waits for the disk: ten of them were more than all that Optuna does for a trial."""
    commits = []
    attrs = {"steps": 5, "trajectory": {"rate": [0.1, 0.2]}, "held_out": 0.5}
    storage = f"sqlite:///{tmp_path}/a.db"
    with open_study(FLAT, storage, "random", seed=0, beat_every=900.0, grace=1800.0) as opened:
        proposals = [opened.ask(record=False) for _ in range(2)]
        engine = backend_of(opened.storage).engine
        sqlalchemy.event.listen(engine, "commit", lambda connection: commits.append(1))
        note(proposals[0].trial, {}, attrs)
        assert len(commits) == 1
        # What stands there already (a tell that was cut short) is written over, one by one.
        assert opened.finish(proposals[0], 1.0, {"rate": 0.25}, {**attrs, "steps": 6})
        assert opened.finish(proposals[1], 1.0, {"rate": 0.5}, attrs)
        one, other = reopen(opened).trials
    assert (one.params["rate"], other.params["rate"]) == (0.25, 0.5)
    assert one.user_attrs == {"start": proposals[0].start, **attrs, "steps": 6}
    assert other.user_attrs == {"start": proposals[1].start, **attrs}


@pytest.fixture
def spawn():
    """Start a function in a process of a server that has imported us, in a few ms each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hypergrad.study.study"])
    started = []

    def start(function, *args):
        process = context.Process(target=function, args=args, daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def _open_together(storage, barrier):
    barrier.wait()
    open_study(FLAT, storage).close()


def test_processes_that_open_a_new_database_at_once_all_find_its_tables(tmp_path, spawn):
    """Optuna alone: each makes the tables that it finds missing, and all but one may fail."""
    storage, count = place("sqlite", tmp_path), 4
    barrier = multiprocessing.get_context("forkserver").Barrier(count)
    processes = [spawn(_open_together, storage, barrier) for _ in range(count)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_postgresql_frees_the_locks_of_lost_machines_and_its_restart_is_survived(postgresql):
    with open_study(FLAT, postgresql, "random", seed=0) as opened:
        engine = opened.storage._backend.engine
        with engine.connect() as connection:
            limit = connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout")
            assert limit.scalar() == "1min"
        proposal = opened.ask(record=False)
        with engine.connect() as connection:
            # All sessions but this one, as a restart of the server ends them.
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert opened.finish(proposal, 1.0)
        attrs = {"trajectory": [math.nan, math.inf] + [1 / 3] * 10_000}
        assert opened.finish(opened.ask(record=False), math.inf, None, attrs)
        (_, last) = reopen(opened).trials
        assert last.value == math.inf and math.isnan(last.user_attrs["trajectory"][0])
        assert last.user_attrs["trajectory"][1:] == attrs["trajectory"][1:]


def _work(storage, num_trials, log):
    """Run trials until nothing is left, waiting for those of others, which may die."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with open_study(FLAT, storage, "random", num_trials=num_trials) as opened:
        while True:
            proposal = opened.ask(record=False)
            if proposal is None:
                if not opened.progress().running:
                    return
                time.sleep(0.02)
                opened.recover()
                continue
            time.sleep(0.02)
            opened.finish(proposal, loss(hyper_of(proposal)))
            with open(log, "a") as file:
                file.write("x\n")


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_two_processes_killed_at_random_moments_lose_and_double_nothing(
    tmp_path, spawn, kind, request
):
    remote = kind == "postgresql"
    storage = request.getfixturevalue(kind) if remote else place(kind, tmp_path)
    log, num_trials, kills = str(tmp_path / "log"), 20, 6
    rng = random.Random(0)
    open_study(FLAT, storage).close()
    processes = [spawn(_work, storage, num_trials, log) for _ in range(2)]
    for i in range(kills):
        time.sleep(rng.uniform(0.1, 0.4))
        processes[i % 2].kill()
        processes[i % 2].join()
        processes[i % 2] = spawn(_work, storage, num_trials, log)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with open_study(FLAT, storage, num_trials=num_trials) as opened:
        assert opened.ask() is None
        assert opened.progress() == (num_trials, num_trials, 0, 0, 0, 0)
        finished = counted(opened.study)
        roots = [t.system_attrs.get("hypergrad:root", t.number) for t in finished]
        assert len(set(roots)) == len(roots) == num_trials
        assert len({t.user_attrs["start"]["rate"] for t in finished}) == num_trials
        states = Counter(t.state for t in opened.study.trials)
        assert states.keys() <= {TrialState.COMPLETE, TrialState.FAIL}


def test_many_processes_never_run_more_than_asked_for(tmp_path, spawn):
    path, log = str(tmp_path / "a.journal"), str(tmp_path / "log")
    for process in [spawn(_work, path, 9, log) for _ in range(4)]:
        process.join(60)
    with open(log) as file:
        assert len(file.readlines()) == 9


def test_a_point_queued_again_is_dropped_where_no_slot_is_left() -> None:
    """Two processes may both queue what a sweep polishes."""
    space = hg.Space({"rate": hg.Float(0.0, 1.0)})
    with open_study(space, sampler="random", seed=0, num_trials=2) as opened:
        assert opened.enqueue({"rate": 0.5})
        assert not opened.enqueue({"rate": 0.5})
        assert all(opened.enqueue({"rate": 0.5}, again=True) for _ in range(2))
        starts = []
        while proposal := opened.ask():
            starts.append(proposal.start["rate"])
            opened.finish(proposal, 1.0)
        assert starts == [0.5, 0.5]
        assert opened.progress()[:2] == (2, 2)
        assert opened.progress().waiting == 0
