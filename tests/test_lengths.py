"""Batch sizes, lengths and data that are chosen, and Ints that share a program."""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.knowledge.lengths import Length, Lengths
from hypergrad.knowledge.programs import count_programs

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (48, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])
DATA = hg.Splits((X[:32], Y[:32]), (X[32:40], Y[32:40]), (X[40:], Y[40:]))
RATE = hg.Float(1e-3, 0.3, scale="log")


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


PROBLEM = hg.bilevel(lambda key: jnp.zeros(3), loss, loss, lambda hyper: optax.sgd(hyper["rate"]))


def sweep(space: dict[str, Any], **options: Any) -> Any:
    given: dict[str, Any] = {"num_trials": 4, "num_steps": 12, "batch_size": 4, "seed": 1}
    given |= {"make_problem": lambda choices: PROBLEM, "sampler": "random", "progress": False}
    given |= options
    return hg.sweep(given.pop("make_problem"), hg.Space(space | {"rate": RATE}), DATA, **given)


def test_lengths_are_numbers_names_or_functions_of_the_choices() -> None:
    space = hg.Space(
        {
            "batch": hg.Int(8, 32, step=8),
            "kind": hg.Categorical(["a", "b"]),
            "more": hg.Int(1, 1000, when={"kind": "b"}),
            "other": hg.Int(1, 100_000),
        }
    )

    def steps(choices: dict[str, Any]) -> int:
        return 960 // choices["batch"] if choices["kind"] == "a" else 10 * dict(choices)["batch"]

    fixed = Lengths(space, 4, 30, None)
    assert (fixed.batch_size, fixed.num_steps, fixed.steps_per_update) == (4, 30, 10)
    assert fixed.describe() == {"num_steps": 30, "batch_size": 4} and not fixed.reads
    by_name = Lengths(space, "batch", lambda choices: 960 // choices["batch"], None)
    assert by_name.of({"batch": 8, "kind": "a"}) == Length(8, 120, 10)
    # Equal examples: what a full run sees at the largest batch.
    assert (by_name.batch_size, by_name.num_steps, by_name.reads) == (32, 30, {"batch"})
    assert [by_name.steps_at(Length(8, 120, 10), rung) for rung in (1, 10, 30, 99)] == [
        10,
        40,
        120,
        120,
    ]
    # `dict(choices)` reads all that is active: refused where that is too much to look at.
    with pytest.raises(ValueError, match="depend on more than 10000 sets of choices"):
        Lengths(space, "batch", steps, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": "size"}, r"batch_size='size' names no hyperparameter: .*\['batch'\]"),
        ({"batch_size": "rate"}, r"batch_size='rate' names Float.*: name an Int or a Categorical"),
        ({"batch_size": lambda c: 64}, "batch_size=64 exceeds the 32 examples in data.train"),
        ({"batch_size": "batch"}, r"batch_size=64 under {'batch': 64} exceeds the 32 examples"),
        ({"num_steps": lambda c: c["no"]}, r"num_steps\(choices\) failed \(KeyError: 'no'\)"),
        ({"num_steps": lambda c: -c["batch"]}, r"num_steps under {'batch': 4}=-4 must be at least"),
        (
            {"num_steps": lambda c: c["batch"] + 1, "refine": hg.Refine(steps_per_update=4)},
            r"num_steps=5 under {'batch': 4} is no multiple of steps_per_update=4",
        ),
    ],
)
def test_lengths_that_make_no_sense_are_refused(options: Any, expected: str) -> None:
    with pytest.raises((ValueError, TypeError), match=expected) as error:
        sweep({"batch": hg.Categorical([4, 64])}, **options)
    assert str(error.value).count(". ") <= 1


def test_schedulers_ration_examples_where_batches_differ() -> None:
    """A rung is reached at equal examples, and a run that is shorter than it has its score."""
    space = {"batch": hg.Categorical([4, 16])}
    result = sweep(
        space,
        num_trials=9,
        num_steps=lambda choices: 28800 // choices["batch"],
        batch_size="batch",
        scheduler=hg.SuccessiveHalving(min_steps=200),
    )
    trained: dict[str, set[Any]] = {}
    for trial in result.study.trials:
        batch = trial.params["batch"]
        assert trial.user_attrs["examples"] == batch * trial.user_attrs["steps"]
        trained.setdefault(trial.state.name, set()).add((batch, trial.user_attrs["examples"]))
    assert {examples for _, examples in trained["COMPLETE"]} == {28800}
    stopped = {examples for _, examples in trained["PRUNED"]}
    assert stopped == {3200, 9600}
    # With one length for all, a batch of 4 ends after a quarter of the examples.
    one = sweep(
        space, num_trials=9, batch_size="batch", scheduler=hg.SuccessiveHalving(min_steps=1)
    )
    ended = [(t.params["batch"], t.state.name, t.user_attrs["steps"]) for t in one.study.trials]
    assert all(steps == 12 for batch, state, steps in ended if state == "COMPLETE")
    assert {state for batch, state, _ in ended if batch == 4} >= {"COMPLETE"}


def test_a_storage_knows_its_lengths(tmp_path: Any) -> None:
    """Another function of the choices is another kind of score; the same one goes on."""
    path = str(tmp_path / "a.journal")
    arguments: dict[str, Any] = {"num_trials": 2, "storage": path, "batch_size": "batch"}
    space = {"batch": hg.Categorical([4, 8])}
    sweep(space, num_steps=lambda choices: 48 // choices["batch"], **arguments)
    again = sweep(space, num_steps=lambda choices: 24 * 2 // choices["batch"], **arguments)
    assert again.steps_spent == 0
    with pytest.raises(ValueError, match="num_steps='by choice "):
        sweep(space, num_steps=lambda choices: 96 // choices["batch"], **arguments)


def test_a_problem_may_bring_its_own_data() -> None:
    """Choices of the data are searched like others, and confirmed and audited on their own."""

    def make(choices: dict[str, Any]) -> Any:
        scale = {"plain": 1.0, "scaled": 3.0}[choices["data"]]
        splits = hg.Splits(*((x * scale, y) for x, y in DATA))
        return PROBLEM if choices["data"] == "plain" else (PROBLEM, splits)

    space = {"data": hg.Categorical(["plain", "scaled"])}
    enqueue = [{"data": kind, "rate": 0.01} for kind in ("plain", "scaled")]
    result = sweep(space, make_problem=make, num_trials=2, enqueue=enqueue)
    plain, scaled = (trial.value for trial in result.study.trials)
    assert scaled < 0.5 * plain
    audited = [result.audit(2, values).mean for values in enqueue]
    assert audited[1] < 0.5 * audited[0]
    with pytest.raises(ValueError, match=r"trials have failed alike.*batch_size=16 exceeds the 8"):
        small = hg.Splits(*((x[:8], y[:8]) for x, y in DATA))
        sweep(space, make_problem=lambda c: (PROBLEM, small), batch_size=16, num_trials=9)
    with pytest.raises(ValueError, match=r"failed alike.*data is a int: give hypergrad\.Splits"):
        sweep(space, make_problem=lambda c: (PROBLEM, 3), num_trials=9)


TRACED = {"power": hg.Int(1, 40, traced=True), "size": hg.Categorical([1.0, 2.0])}


def powered(choices: dict[str, Any]) -> hg.Problem:
    assert set(choices) == {"size"}

    def init(hyper: Any, key: Any) -> Any:
        assert hyper["power"].dtype == jnp.int32
        return PROBLEM.init(hyper, key)

    def judged(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return loss(w, hyper, batch, key) + choices["size"] * hyper["power"]

    return PROBLEM._replace(init=init, valid_loss=judged)


@pytest.mark.parametrize("refine", [None, hg.Refine(steps_per_update=4)])
def test_a_traced_int_is_no_program_of_its_own(
    refine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its value reaches the problem traced, is told, and stands still where Floats are refined."""
    caplog.set_level(logging.INFO, "hypergrad")
    made = []

    def make(choices: dict[str, Any]) -> hg.Problem:
        made.append(choices)
        return powered(choices)

    result = sweep(TRACED, make_problem=make, num_trials=8, population=2, refine=refine)
    assert len(made) == 2
    assert "at most 2 programs of equal choices for 8 trials" in caplog.text
    powers = []
    for trial in result.study.trials:
        powers.append(trial.params["power"])
        least = trial.params["power"] * trial.params["size"]
        assert least <= trial.value < least + 6
        assert set(trial.user_attrs["trajectory"]) == {"steps", "rate"}
        if refine is not None:
            assert trial.params["rate"] != trial.user_attrs["start"]["rate"]
    assert len(set(powers)) >= 4
    best = result.best
    least = best.hyper["power"] * best.hyper["size"]
    assert least <= best.score < least + 6 and np.isfinite(result.audit(2).mean)


def test_what_a_traced_int_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"name one, such as hypergrad\.Unrolled"):
        sweep(TRACED, make_problem=powered, refine=hg.Refine("auto", steps_per_update=4))
    with pytest.raises(ValueError, match="condition on 'n', which is traced"):
        hg.Space({"n": hg.Int(1, 4, traced=True), "m": hg.Int(1, 4, when={"n": 2})})
    with pytest.raises(TypeError, match=re.escape("Int(traced is 3")):
        hg.Int(1, 4, traced=3)  # type: ignore[arg-type]


def test_programs_are_counted_without_listing_them() -> None:
    space = hg.Space(
        {
            "optimizer": hg.Categorical(["sgd", "adam"]),
            "nesterov": hg.Categorical([True, False], when={"optimizer": "sgd"}),
            "layers": hg.Int(1, 5),
            "width": hg.Int(16, 256, traced=True),
            "rate": RATE,
        }
    )
    assert count_programs(space) == (2 + 1) * 5
