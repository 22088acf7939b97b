"""What a search leaves: networks trained again, saved and loaded; what was confirmed; marks."""

import dataclasses
import pickle
import shutil
import tomllib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest
from flax.core import FrozenDict

import hypergrad as hg
from hypergrad.files.toml import readable, toml_of
from hypergrad.results.layout import arranged, arrays_of, layout
from hypergrad.results.saved import Saved, write
from hypergrad.training.arrays import take_apart

X = jax.random.normal(jax.random.key(0), (60, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])
DATA = hg.Splits((X[:40], Y[:40]), (X[40:50], Y[40:50]), (X[50:], Y[50:]))
SPACE = hg.Space(
    {
        "optimizer": hg.Categorical(["sgd", "adam"]),
        "rate": hg.Float(1e-3, 0.3, scale="log"),
    }
)


def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


def make_problem(choices: dict[str, Any]) -> hg.Problem:
    make = {"sgd": optax.sgd, "adam": optax.adam}[choices["optimizer"]]
    init = lambda key: {"w": jax.random.normal(key, (3,))}  # noqa: E731
    return hg.bilevel(init, loss, loss, lambda hyper: make(hyper["rate"]))


def sweep(**options: Any) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given: dict[str, Any] = {"num_trials": 3, "num_steps": 20, "batch_size": 8, "progress": False}
    given |= {"sampler": "random", "scheduler": None}
    return hg.sweep(make_problem, SPACE, DATA, **(given | options))


@pytest.fixture(scope="module")
def refined(tmp_path_factory: Any) -> Any:
    refine = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    storage = tmp_path_factory.mktemp("refined") / "sweep.journal"
    enqueue = [{"optimizer": "adam", "rate": rate} for rate in (0.02, 0.1, 0.25)]
    return sweep(refine=refine, storage=storage, enqueue=enqueue)


def test_a_network_is_trained_again_saved_and_loaded(refined: Any, tmp_path: Path) -> None:
    best = refined.best
    state = refined.retrain()
    assert isinstance(state, hg.Inner) and int(state.step) == 20
    folder = refined.save(tmp_path / "best")
    found = hg.load(folder)
    assert found.hyper == best.hyper
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(found.state), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert found.params is found.state.params
    np.testing.assert_allclose(found.score, loss(found.params, {}, DATA.valid, None), rtol=1e-6)
    assert found.schedule.of("rate")(3) == pytest.approx(best.hyper["rate"])
    # It goes on from there.
    problem = make_problem(found.hyper)
    hyper = {"rate": jnp.float32(found.hyper["rate"])}
    after = problem.step(found.state, hyper, (X[:8], Y[:8]), jax.random.key(0))
    assert int(after.step) == 21
    values = tomllib.loads((tmp_path / "best" / "hyper.toml").read_text())
    assert values["hyper"] == best.hyper and values["score"] == pytest.approx(found.score)


def test_a_plain_run_of_the_same_seed_is_the_same_and_others_differ(refined: Any) -> None:
    hyper = {"optimizer": "adam", "rate": 0.05}
    one, other = refined.retrain(hyper, seed=1), refined.retrain(hyper, seed=2)
    assert float(jnp.abs(one.params["w"] - other.params["w"]).max()) > 1e-3
    again = refined.retrain(hyper, seed=1)
    np.testing.assert_array_equal(one.params["w"], again.params["w"])
    # By hand: what a plain run is.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2**31 + 2), 1)
    problem = make_problem(hyper)
    inner, steps = problem.init({"rate": jnp.float32(0.05)}, key), hg.Minibatches(DATA.train, 8, 5)
    for _ in range(4):
        inner = hg.rollout(problem, {"rate": jnp.float32(0.05)}, inner, steps, key)
    assert float(jnp.abs(inner.params["w"]).max()) > 0.1
    np.testing.assert_allclose(one.params["w"], inner.params["w"], rtol=2e-5)


def test_scores_of_values_that_moved_are_marked_until_they_are_confirmed(refined: Any) -> None:
    moved = [t.user_attrs.get("moved") for t in refined.study.trials]
    assert moved == [True] * 3 and all(best.moved for best in refined.top())
    best = refined.best
    assert not best.moved and "confirmed, its values frozen:\n#" in refined.table()
    assert refined.table().count("* ") >= 3 and "of values that moved" in refined.table()
    assert refined.study.user_attrs["confirmed"]["of"] == 3
    plain = sweep()
    assert not any(best.moved for best in plain.top()) and "*" not in plain.table()
    # Confirmed is best, also where nothing moved.
    alone = plain.best
    found = plain.confirm(count=2, seeds=1)
    assert plain.best == found and found.score != alone.score
    assert "confirmed" in plain.table()


def test_copies_of_a_population_are_marked() -> None:
    scheduler = hg.PopulationBasedTraining(every=5, fraction=0.4)
    rates = (1e-3, 0.01, 0.1, 0.2)
    enqueue = [{"optimizer": "adam", "rate": rate} for rate in rates]
    result = sweep(scheduler=scheduler, population=4, num_trials=4, enqueue=enqueue)
    for trial in result.study.trials:
        assert bool(trial.user_attrs["copied"]) == trial.user_attrs.get("moved", False)
    assert any(best.moved for best in result.top())


def test_what_tune_found_is_saved_and_needs_no_problem(tmp_path: Path) -> None:
    problem = make_problem({"optimizer": "sgd"})._replace(
        evaluate=lambda inner: {"w": 2.0 * inner.params["w"]}
    )
    space = hg.Space({"rate": SPACE["rate"]})
    options: dict[str, Any] = {"num_steps": 16, "batch_size": 8, "budget": 1.0, "progress": False}
    result = hg.tune(problem, space, DATA, {"rate": 0.1}, **options)
    found = hg.load(pickle.loads(pickle.dumps(result)).save(tmp_path / "tuned"))
    np.testing.assert_array_equal(found.params["w"], 2.0 * found.state.params["w"])
    assert found.score == result.score and float(found.hyper["rate"]) == np.float32(0.1)
    assert found.hyper["rate"].dtype == jnp.float32
    assert found.schedule.steps_per_update == result.schedule.steps_per_update
    np.testing.assert_array_equal(found.schedule.values["rate"], result.schedule.values["rate"])
    retrained = result.retrain(seed=1)
    assert int(retrained.step) == 16


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_pytree_with_keys_class
class Node:
    """A container of somebody else's."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("weight"), self.weight)], "static"

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> "Node":
        assert aux == "static"
        return cls(*children)


def test_trees_come_back_as_they_were() -> None:
    tree = {
        "b": [jnp.arange(3), (None, 2, 0.5), True, "relu"],
        "a": Pair(jnp.ones((2, 2), jnp.bfloat16), jax.random.key(3)),
        "od": OrderedDict(z=jnp.zeros(0), a=jnp.float32(2.0)),
        "frozen": FrozenDict({"k": {"bias": jnp.ones(1, jnp.int8)}}),
        "empty": ((), {}, optax.EmptyState()),
    }
    back = arranged(layout(tree), iter(take_apart(arrays_of(tree))))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert type(one) is type(other)
        if isinstance(one, jax.Array):
            assert one.dtype == other.dtype and bool((one == other).all())
        else:
            assert one == other
    # By its names, as its class is made in a way of its own.
    node = arranged(layout(Node(jnp.ones(2))), iter([np.ones(2, np.float32)]))
    assert node.weight.tolist() == [1.0, 1.0] and not isinstance(node, Node)


def saved(folder: Path, params: Any) -> Path:
    state = hg.Inner(params, (), jnp.int32(1), jnp.float32(0.5))
    return write(folder, Saved(params, state, {"rate": 0.5}, hg.Schedule({}, 1), 0.5))


def test_like_says_how_a_container_is_built(tmp_path: Path) -> None:
    folder = saved(tmp_path / "node", Node(jnp.arange(2.0)))
    like = hg.Inner(Node(jnp.zeros(2)), (), jnp.int32(0), jnp.float32(0))
    found = hg.load(folder, like=like)
    assert found.schedule(3) == {}  # of choices alone
    assert isinstance(found.params, Node) and found.params.weight.tolist() == [0.0, 1.0]
    assert hg.load(folder).params.weight.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="like is a training state of another problem: "):
        hg.load(folder, like=like._replace(params=Node(jnp.zeros(3))))


def test_bad_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    folder = saved(tmp_path / "good", {"w": jnp.ones(2)})
    saved(folder, {"w": jnp.zeros(2)})
    assert hg.load(folder).params["w"].tolist() == [0.0, 0.0]
    assert [p.name for p in (folder / "network").iterdir()] == ["1"]
    shutil.copytree(folder, tmp_path / "torn")
    for file in (tmp_path / "torn" / "network").rglob("*"):
        if file.is_file() and file.stat().st_size > 20:
            file.write_bytes(file.read_bytes()[:-9])
    for name, text in (
        ("missing", "is no folder"),
        ("file", "is no folder"),
        ("empty", "holds no saved network"),
        ("torn", "is torn"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            hg.load(tmp_path / name)
        assert name in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"(?s)file.* is a file"):
        saved(tmp_path / "file", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="is no folder: make it"):
        saved(tmp_path / "missing" / "below", {"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="which is no array"):
        saved(tmp_path / "odd", {"w": object()})


def test_toml_is_read_as_it_was_written() -> None:
    table = {
        "text": 'a "quoted"\\ \n line\x7f\x1b é',
        "number": 1e-5,
        "infinite": float("inf"),
        "whole": -3,
        "yes": True,
        "list": [1.0, [2.0], "x"],
        "odd key.": {"a b": {"c": 0.1}, "d-e": 2},
        "tables in a list": [{"a b": 1.0, "c": [{}]}, {}],
        "numpy": [np.float64(0.25), np.float64("-inf")],
        "plain": {"none": None, "x": 1},
    }
    read = tomllib.loads(toml_of(table))
    assert read == {**table, "plain": {"x": 1}}
    with pytest.raises(TypeError, match=r"a\.b is a object"):
        toml_of({"a": {"b": object()}})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    rate: Any


def test_any_pytree_can_be_read_by_people() -> None:
    """A dict in a list, a class and a truth value of NumPy ended a run that was trained."""
    tree = {
        "layers": ({"l2": jnp.float32(0.1)}, {"l2": 0.5}),
        "class": Layer(np.arange(2)),
        "yes": np.bool_(True),
        "many": np.zeros((9, 9)),
        "none": jnp.zeros(0),
    }
    read = tomllib.loads(toml_of(readable(tree, "network/")))
    assert read == {
        "layers": [{"l2": 0.1}, {"l2": 0.5}],
        "class": {"rate": [0, 1]},
        "yes": True,
        "many": "float64[9, 9], see network/",
        "none": [],
    }


def accuracy(params: Any, hyper: Any, batch: Any, key: Any) -> Any:
    return {"near": jnp.mean(jnp.abs(batch[0] @ params["w"] - batch[1]) < 1.0)}


def test_the_metric_that_selects_is_reported_on_test_and_audited(tmp_path: Path) -> None:
    def problem(choices: dict[str, Any]) -> hg.Problem:
        return make_problem(choices)._replace(metrics=accuracy)

    space = hg.Space({"optimizer": hg.Categorical(["adam"]), "rate": SPACE["rate"]})
    rates = (0.3, 0.1, 1e-3)
    enqueue = [{"optimizer": "adam", "rate": rate} for rate in rates]
    given: dict[str, Any] = {"num_trials": 3, "num_steps": 20, "batch_size": 8, "progress": False}
    given |= {"metric": "near", "direction": "maximize", "sampler": "random", "enqueue": enqueue}
    result = hg.sweep(problem, space, DATA, **given, name="near")
    best = result.top(1)[0]
    trial = result.study.trials[best.number]
    assert best.held_out == trial.user_attrs["test_metrics"]["near"] <= 1
    assert best.score == trial.user_attrs["metrics"]["near"]
    audit = result.audit(seeds=2)
    assert audit.metrics["near"].shape == (2,) and audit.mean == audit.test_losses.mean()
    assert 0 < audit.metrics["near"].mean() <= 1
    found = result.confirm(count=1, seeds=1)
    report = result._retrained(found.hyper, 0, 1, 2**31 + 1)
    assert found.held_out == pytest.approx(float(report.test_metrics["near"][0]))
    # In the table and on the page: the study's name, the audit, and what stands at a bound.
    lines = result.table().splitlines()
    assert lines[0].startswith("near: 3 trials") and "rate=0.3|" in result.table()
    assert any(line.startswith("audit: test loss ") and "near " in line for line in lines)
    assert any(line.startswith("| at a bound") for line in lines)
    assert "optimizer=adam|" not in result.table()
    from hypergrad.plotting.report import page

    text = page(result.study)
    assert "<h1>near</h1>" in text and "<th>test near</th>" in text and "Confirmed: trial" in text
    assert "<td>0.3|</td>" in text
    # Of tune, too.
    tuned = hg.tune(
        problem({"optimizer": "adam"}),
        hg.Space({"rate": SPACE["rate"]}),
        DATA,
        {"rate": 0.1},
        num_steps=16,
        batch_size=8,
        budget=1.0,
        progress=False,
    )
    audit = tuned.audit(seeds=2)
    assert audit.metrics["near"].shape == (2,) and np.isfinite(audit.std_error)


def test_far_worse_scores_do_not_squash_the_axis() -> None:
    from hypergrad.plotting.panels import fenced, new_panels

    scores = [0.2, 0.21, 0.22, 0.24, 0.25, 0.26, 0.3, 1e6]
    axis = new_panels(1)[0]
    low, high = fenced(axis, scores)
    assert low < 0.2 and 0.3 < high < 0.6 and axis.get_ylim() == (low, high)
    logarithmic = new_panels(1)[0]
    logarithmic.set_yscale("log")
    low, high = fenced(logarithmic, scores)
    assert low < 0.2 and 0.3 < high < 1
    upside_down = new_panels(1)[0]
    low, high = fenced(upside_down, [0.9, 0.91, 0.92, 0.93, -50.0], -1)
    assert 0.7 < low < 0.9 and high > 0.93
    # None is far off.
    plain = new_panels(1)[0]
    assert fenced(plain, [0.1, 0.2, 0.3]) == plain.get_ylim()


def test_importance_is_of_starts_where_trials_were_refined() -> None:
    from hypergrad.plotting.sweeps import plot_importance
    from hypergrad.study.distributions import Coordinates
    from hypergrad.study.study import open_study

    space = hg.Space({"rate": SPACE["rate"], "decay": hg.Float(0.0, 1.0)})
    names = Coordinates(space).names
    with open_study(space, sampler="random", seed=0, num_trials=24) as opened:
        while proposal := opened.ask(record=False):
            # The score hangs on where the rate began; all rates end alike, decays do not matter.
            score = abs(np.log(proposal.start["rate"] / 0.02))
            refined = {"rate": 0.02, "decay": proposal.start["decay"]}
            opened.finish(proposal, float(score), refined)
    axis = plot_importance(opened.study)
    assert "where they started" in axis.get_xlabel()
    pairs = zip(axis.get_yticklabels(), axis.patches, strict=True)
    widths = {t.get_text(): bar.get_width() for t, bar in pairs}
    assert widths["rate"] > 0.8 and set(widths) == set(names)
