"""Populations: members do what they do alone, in one program, and leave one another alone."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import populations
from hypergrad.population.member import new_trail, read, record
from hypergrad.population.population import Population, width_for
from hypergrad.population.refine import Refine

SPACE = hg.Space(
    {
        "optimizer": hg.Categorical(["sgd", "adam"]),
        "learning_rate": hg.Float(1e-4, 8.0, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log", when={"optimizer": "sgd"}),
    }
)
DRAW = np.random.default_rng(0)
TRAIN = DRAW.normal(size=(24, 3)).astype(np.float32)
VALID = DRAW.normal(size=(8, 3)).astype(np.float32)
TEST = DRAW.normal(size=(5, 3)).astype(np.float32)
CURVATURE = np.array([0.2, 1.0, 4.0], np.float32)
HYPERS = {
    "learning_rate": np.array([1e-3, 3e-2, 0.2, 1e-2], np.float32),
    "momentum": np.array([0.1, 0.5, 0.0, 0.9], np.float32),
}
KEYS = jax.random.split(jax.random.key(0), 4)
STEPS: list[None] = []  # grows whenever the training step is traced


def _loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean(0.5 * CURVATURE * (params - batch) ** 2)


def _problem(make: Any = None, metrics: Any = None) -> hg.Problem:
    problem = hg.bilevel(
        lambda key: 3.0 + 0.1 * jax.random.normal(key, (3,)),
        _loss,
        _loss,
        make or (lambda hyper: optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"])),
        metrics=metrics,
    )

    def step(*args: Any) -> Any:
        STEPS.append(None)
        return problem.step(*args)

    return problem._replace(step=step)


@functools.cache
def _members(refine: Refine | None = None, mode: Any = "vmap", **options: Any) -> Population:
    return Population(_problem(), SPACE, refine, TRAIN, VALID, 4, mode=mode, **options)


def _row(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _take(tree: Any, rows: list[int]) -> Any:
    return jax.tree.map(lambda x: x[np.array(rows, int)], tree)


def _equal_bits(a: Any, b: Any) -> None:
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(raw(x)), np.asarray(raw(y)))


@functools.cache
def _alone(updates: int) -> Any:
    """`alternating`'s state after that many updates of 5 steps, and what is told of it."""
    tuner, train = hg.alternating(_problem(), SPACE), hg.Minibatches(TRAIN, 4, 5)

    @jax.jit
    def run(hyper: Any, key: jax.Array) -> Any:
        update = lambda _, state: tuner.update(state, train, VALID)[0]  # noqa: E731
        state = jax.lax.fori_loop(0, updates, update, tuner.init(hyper, key))
        return state, SPACE.from_unit(state.now.unit), tuner.best(state)

    return run


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_a_refined_member_does_what_it_does_alone(mode: Any) -> None:
    members = _members(Refine(steps_per_update=5), mode)
    report = members.report(members.advance(members.init(HYPERS, KEYS), 8))
    for i in range(4):
        state, now, best = _alone(8)(_row(HYPERS, i), KEYS[i])
        for name, start in HYPERS.items():
            assert abs(float(now[name]) - start[i]) > 1e-5
            np.testing.assert_allclose(report.hyper[name][i], now[name], rtol=1e-4)
            np.testing.assert_allclose(report.best[name][i], best[name], rtol=1e-4)
            np.testing.assert_allclose(report.start[name][i], start[i], rtol=1e-5, atol=1e-7)
        score = _loss(state.inner.params, None, VALID, None)
        np.testing.assert_allclose(report.score[i], score, rtol=1e-5)
        assert int(report.steps[i]) == int(state.inner.step) == 40
        assert int(report.reasons[i, 0]) == int(state.trust.seen)


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_a_plain_member_does_what_it_does_alone(mode: Any) -> None:
    members, problem = _members(None, mode), _problem()
    state = members.advance(members.advance(members.init(HYPERS, KEYS), 1), 2)

    @jax.jit
    def alone(hyper: Any, key: jax.Array) -> Any:
        return hg.rollout(problem, hyper, problem.init(hyper, key), train, key).params

    train = hg.Minibatches(TRAIN, 4, 30)
    for i in range(4):
        params = alone(_row(HYPERS, i), KEYS[i])
        np.testing.assert_allclose(state.run.inner.params[i], params, rtol=1e-5)
    report = members.report(state)
    _equal_bits(report.hyper, HYPERS)
    _equal_bits(report.best, HYPERS)
    assert report.steps.tolist() == [30] * 4


class Uncounted(NamedTuple):
    params: jax.Array


def test_a_state_that_counts_no_steps_draws_new_batches_in_each_update() -> None:
    problem = _problem()._replace(
        init=lambda hyper, key: Uncounted(jnp.zeros(3)),
        step=lambda inner, hyper, batch, key: Uncounted(inner.params + batch.sum(0)),
    )
    members = Population(problem, SPACE, None, TRAIN, VALID, 4, steps_per_update=1, mode="vmap")
    first = members.advance(members.init(HYPERS, KEYS), 1)
    second = members.advance(first, 1)
    moves = second.run.inner.params - first.run.inner.params
    assert float(jnp.abs(moves - first.run.inner.params).min()) > 1e-3


@pytest.mark.parametrize("refine", [None, Refine(steps_per_update=2)])
@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_all_rung_lengths_are_one_program(refine: Any, mode: Any) -> None:
    members = _members(refine, mode)
    state = members.advance(members.init(HYPERS, KEYS), 1)
    traced = len(STEPS)
    for num_updates in (1, 3, np.int64(9), jnp.int32(2), np.array([0, 1, 2, 3]), 0):
        state = members.advance(state, num_updates)
    state = members.put(state, [1], _take(HYPERS, [2]), KEYS[:1])
    state = members.advance(members.select(state, [3, 2, 1, 0]), 2)
    assert len(STEPS) == traced
    assert (members.report(state).steps // members.steps_per_update).tolist() == [21, 20, 2, 18]


def test_hypers_are_traced_whatever_their_types() -> None:
    members = _members()
    kinds = [HYPERS, jax.tree.map(jnp.asarray, HYPERS), jax.tree.map(np.float64, HYPERS)]
    states = [members.advance(members.init(kinds[0], KEYS), 1)]
    traced = len(STEPS)
    states += [members.advance(members.init(kind, KEYS), 1) for kind in kinds[1:]]
    for state in states[1:]:
        _equal_bits(state, states[0])
    assert len(STEPS) == traced


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_what_diverges_leaves_the_others_alone(mode: Any) -> None:
    members = _members(None, mode)
    wild = HYPERS | {"learning_rate": HYPERS["learning_rate"].copy()}
    wild["learning_rate"][1] = 8.0
    calm, wild = (members.advance(members.init(h, KEYS), 40) for h in (HYPERS, wild))
    for i in (0, 2, 3):
        _equal_bits(_row(calm, i), _row(wild, i))
    report = members.report(wild)
    assert report.finite.tolist() == [True, False, True, True]
    assert not np.isfinite(report.score[1])


def test_a_refined_member_comes_back_from_a_start_that_diverges() -> None:
    members = _members(Refine(steps_per_update=40), "map")
    wild = HYPERS | {"learning_rate": np.array([1e-3, 8.0, 0.2, 1e-2])}
    report = members.report(members.advance(members.init(wild, KEYS), 25))
    assert report.refused.tolist()[0] == 0
    assert int(report.refused[1]) == int(report.reasons[1, 1:].sum()) > 0
    assert int(report.reasons[1].sum()) == 25
    assert bool(report.finite.all())
    assert float(report.hyper["learning_rate"][1]) < 4


def test_survivors_and_new_members_keep_the_others_bits() -> None:
    members = _members()
    state = members.advance(members.init(HYPERS, KEYS, width=5), 2)
    kept = members.select(state, [3, 1], width=4)
    _equal_bits(_row(kept, 0), _row(state, 3))
    _equal_bits(_row(kept, 1), _row(state, 1))
    assert kept.active.tolist() == [True, True, False, False]
    new = {"learning_rate": np.float32([0.3, 0.4]), "momentum": np.float32([0.5, 0.6])}
    keys = jax.random.split(jax.random.key(9), 2)
    full = members.put(kept, [0, 3], new, keys)
    assert full.active.tolist() == [True, True, False, True]
    _equal_bits(_row(full, 1), _row(kept, 1))
    fresh = members.init(new, keys)
    _equal_bits((_row(full, 0), _row(full, 3)), (_row(fresh, 0), _row(fresh, 1)))
    # a member goes on as if nothing had happened around it
    on, alone = members.advance(full, 3), members.advance(state, 3)
    np.testing.assert_allclose(
        on.run.inner.params[1], alone.run.inner.params[1], rtol=1e-6, atol=1e-7
    )
    report = members.report(on)
    assert report.steps.tolist() == [30, 50, 20, 30]
    assert np.isnan(report.score[2]) and not report.finite[2]
    assert np.isfinite(np.delete(report.score, 2)).all()


def test_legacy_keys_serve_too() -> None:
    legacy = jax.vmap(jax.random.key_data)(KEYS)
    members = _members()
    state = members.put(members.init(HYPERS, legacy), [0], _take(HYPERS, [2]), legacy[2:3])
    state = members.advance(members.select(state, [0, 2], width=3), 1)
    _equal_bits(_row(state.run.inner, 0), _row(state.run.inner, 1))


def test_hyper_holds_exactly_the_active_hyperparameters() -> None:
    problem = _problem(lambda hyper: optax.adam(hyper["learning_rate"]))
    hypers = {"learning_rate": HYPERS["learning_rate"]}
    members = Population(problem, SPACE, Refine(), TRAIN, VALID, 4, mode="map")
    report = members.report(members.advance(members.init(hypers, KEYS), 2))
    for values in (report.hyper, report.start, report.best, report.mean, report.trail):
        assert list(values) == ["learning_rate"]
    assert bool(report.finite.all())


def test_seeds_alone_make_a_population() -> None:
    problem, space = _problem(lambda hyper: optax.sgd(0.1)), hg.Space({})
    members = Population(problem, space, None, TRAIN, VALID, 4, mode="vmap")
    state = members.advance(members.init({}, KEYS), 2)
    report = members.report(members.exploit(state, jax.random.key(0))[0])
    assert len(set(report.score.tolist())) == 3  # the worst is now a copy of the best


def test_report_of_metrics_and_of_a_held_out_split() -> None:
    problem = _problem(metrics=lambda params, hyper, batch, key: {"largest": jnp.max(batch)})
    members = Population(
        problem, SPACE, None, TRAIN, VALID, 4, test=TEST, mode="map", valid_batch_size=2
    )
    state = members.init(HYPERS, KEYS)
    report = members.report(state)
    np.testing.assert_allclose(report.metrics["largest"], [VALID.max()] * 4)
    np.testing.assert_allclose(report.test_metrics["largest"], [TEST.max()] * 4)
    for i in range(4):
        params = state.run.inner.params[i]
        np.testing.assert_allclose(report.score[i], _loss(params, None, VALID, None), rtol=1e-6)
        np.testing.assert_allclose(report.test_score[i], _loss(params, None, TEST, None), rtol=1e-6)
    for name, values in HYPERS.items():
        np.testing.assert_allclose(report.mean[name], values, rtol=1e-5, atol=1e-7)
    members = _members()
    assert members.report(members.init(HYPERS, KEYS)).test_score is None


@pytest.mark.parametrize("updates", [1, 2, 7, 8, 9, 16, 37])
def test_the_trail_holds_a_run_of_any_length(updates: int) -> None:
    walk = np.cumsum(np.random.default_rng(updates).normal(size=(updates, 2)), 0)
    trail = new_trail({"a": jnp.zeros(2)}, 8)
    for position in walk:
        trail = record(trail, {"a": jnp.asarray(position, jnp.float32)})
    blocks, ends, mean = read(trail, {"a": jnp.zeros(2)})
    ends = ends[ends > 0].tolist()
    assert ends[-1] == updates
    for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        np.testing.assert_allclose(blocks["a"][i], walk[first:last].mean(0), rtol=1e-4, atol=1e-5)
    if updates in (1, 2, 7, 8, 16):  # where no block straddles the middle
        np.testing.assert_allclose(mean["a"], walk[updates // 2 :].mean(0), rtol=1e-4)


def test_auto_times_both_modes_once_and_keeps_the_faster() -> None:
    members = _members(None, "auto")
    single = members.init(_take(HYPERS, [0]), KEYS[:1])
    members.advance(single, 1)
    assert members.execution.mode is None
    state = members.init(HYPERS, KEYS)
    after = members.advance(state, 2)
    seconds = members.execution.seconds
    assert members.execution.mode == min(seconds, key=seconds.__getitem__)
    assert set(seconds) == {"vmap", "map"}
    assert members.report(after).steps.tolist() == [20] * 4
    traced = len(STEPS)
    members.advance(after, 3)
    assert len(STEPS) == traced
    assert _members(None, "map").execution.mode == "map"


@pytest.mark.parametrize("refine", [None, Refine(steps_per_update=2)])
def test_exploit_copies_the_best_over_the_worst(refine: Any) -> None:
    members = _members(refine)
    hypers = _take(HYPERS, [0, 1, 2, 3] * 2)
    keys = jax.random.split(jax.random.key(3), 8)
    state = members.advance(members.init(hypers, keys, width=9), 5)
    before = members.report(state)
    order = np.argsort(before.score[:8])
    after, parents = members.exploit(state, jax.random.key(0), 0.25, perturb=0.1)
    worst, best = order[-2:], order[:2]
    assert np.flatnonzero(np.asarray(parents) != np.arange(9)).tolist() == sorted(worst)
    assert set(np.asarray(parents)[worst]) <= set(best)
    for i in range(9):
        if i not in worst:
            _equal_bits(_row(after, i), _row(state, i))
    report = members.report(after)
    for i in worst:
        parent = int(parents[i])
        _equal_bits(after.run.inner.params[i], state.run.inner.params[parent])
        _equal_bits(after.run.key[i], state.run.key[i])
        unit, old = (
            SPACE.to_unit(_row(hyper, j))
            for hyper, j in ((report.hyper, i), (before.hyper, parent))
        )
        for name in unit:
            expected = np.clip(float(old[name]) + np.array([-0.1, 0.1]), 0, 1)
            assert np.abs(float(unit[name]) - expected).min() < 1e-5
    members.advance(after, 1)


def test_exploit_by_other_scores_and_by_drawing_anew() -> None:
    members = _members()
    state = members.init(HYPERS, KEYS)
    scores = [0.0, np.nan, np.inf, 1.0]
    after, parents = members.exploit(state, jax.random.key(1), resample=1.0, scores=scores)
    assert parents.tolist() == [0, 0, 0, 3]
    drawn = SPACE.to_unit(members.report(after).hyper)
    assert abs(float(drawn["momentum"][1] - drawn["momentum"][2])) > 1e-3
    assert ((drawn["momentum"] >= 0) & (drawn["momentum"] <= 1)).all()
    # nobody to learn from, nobody to teach
    assert members.exploit(state, KEYS[0], scores=[np.nan] * 4)[1].tolist() == [0, 1, 2, 3]
    one = members.init(_take(HYPERS, [0]), KEYS[:1], width=4)
    assert members.exploit(one, KEYS[0])[1].tolist() == [0, 1, 2, 3]


def test_exploit_leaves_unbounded_hyperparameters_unbounded() -> None:
    space = hg.Space({"shift": hg.Float()})
    problem = _problem(lambda hyper: optax.sgd(0.1))
    members = Population(problem, space, None, TRAIN, VALID, 4, mode="map")
    state = members.init({"shift": np.full((4, 2), 5.0)}, KEYS)
    after, parents = members.exploit(state, KEYS[0], resample=1.0, perturb=0.5, scores=range(4))
    assert parents.tolist() == [0, 1, 2, 0]
    assert set(np.ravel(after.run.hyper["shift"][3])) <= {4.5, 5.5}


SHARDED = """
import jax, numpy as np
import test_population as t
jax.config.update("jax_disable_most_optimizations", True)
assert len(jax.devices()) == 8
hypers = t._take(t.HYPERS, [0, 1, 2, 3] * 2)
keys = jax.random.split(jax.random.key(3), 8)

def run(refine, mode, devices):
    members = t._members(refine, mode, devices=devices)
    state = members.advance(members.init(hypers, keys), 3)
    spread = len(state.run.inner.params.sharding.device_set)
    assert spread == (8 if devices is None else 1), spread
    if refine is None:
        return jax.tree.map(np.asarray, members.report(state))
    state, parents = members.exploit(state, jax.random.key(1))
    state = members.put(state, [5], t._take(hypers, [1]), keys[1:2])
    few = members.advance(members.select(state, [6, 2, 5], width=4), 2)
    assert len(few.run.inner.params.sharding.device_set) == 1
    wide = members.advance(members.select(few, [1, 0, 2], width=8), np.arange(8))
    assert len(wide.run.inner.params.sharding.device_set) == spread
    return jax.tree.map(np.asarray, (parents, members.report(state), members.report(wide)))

for refine, mode in ((None, "map"), (t.Refine(steps_per_update=2), "vmap")):
    sharded, single = (run(refine, mode, devices) for devices in (None, (jax.devices()[1],)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, sharded, single)
auto = t._members(None, "auto")
auto.advance(auto.init(hypers, keys), 1)
assert auto.execution.mode is None  # one member on each device: there is nothing to choose
print("same")
"""


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one() -> None:
    here = Path(__file__).resolve().parent
    eight = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {eight}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("same\n"), done.stderr


def test_widths() -> None:
    assert [width_for(n) for n in (1, 2, 4, 5, 16, 17, 65)] == [1, 4, 4, 16, 16, 64, 256]
    assert width_for(9, (32, 8, 16)) == 16
    with pytest.raises(ValueError, match=r"n=33 members exceed .*\[8, 32\]"):
        width_for(33, [8, 32])
    with pytest.raises(ValueError, match="n=0"):
        width_for(0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=25 exceeds the 24 examples"):
        Population(_problem(), SPACE, None, TRAIN, VALID, 25)
    with pytest.raises(ValueError, match="batch_size=9 exceeds the 8 examples"):
        _members(valid_batch_size=9)
    with pytest.raises(ValueError, match=r"steps_per_update=5 .*\(10\): leave it out"):
        _members(Refine(steps_per_update=10), steps_per_update=5)
    with pytest.raises(ValueError, match="steps_per_update=0 must be at least 1"):
        _members(steps_per_update=0)
    with pytest.raises(ValueError, match=r"steps_per_update=2\.0 is no integer"):
        Refine(steps_per_update=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_move=0 must be positive"):
        Refine(max_move=0)
    with pytest.raises(ValueError, match="mode='pmap' is unknown"):
        _members(mode="pmap")
    with pytest.raises(ValueError, match="trail=3 must be an even"):
        _members(trail=3)


def test_bad_members_are_refused() -> None:
    members = _members()
    with pytest.raises(ValueError, match="The population is empty"):
        members.init(_take(HYPERS, []), KEYS[:0])
    with pytest.raises(ValueError, match=r"\(\).*leading axis of members"):
        members.init({"learning_rate": 0.1, "momentum": HYPERS["momentum"]}, KEYS)
    with pytest.raises(ValueError, match="disagree on the number of members"):
        members.init(_take(HYPERS, [0, 1]), KEYS)
    with pytest.raises(TypeError, match="give a dict"):
        members.init([0.1], KEYS)
    with pytest.raises(ValueError, match="'rate', which is not in the space"):
        members.init({"rate": np.ones(4)} | HYPERS, KEYS)
    with pytest.raises(ValueError, match="hyper has no 'learning_rate'"):
        members.init({}, KEYS)
    with pytest.raises(ValueError, match="nothing to refine: use refine=None"):
        _members(Refine()).init({}, KEYS)
    with pytest.raises(ValueError, match="width=3 does not hold 4 members"):
        members.init(HYPERS, KEYS, width=3)
    state = members.init(HYPERS, KEYS)
    for indices in ([], [4], [-1]):
        with pytest.raises(ValueError, match="slots 0 to 3"):
            members.select(state, indices)
    with pytest.raises(ValueError, match=r"slots=\[1, 1\] do not take 2 new members"):
        members.put(state, [1, 1], _take(HYPERS, [0, 1]), KEYS[:2])
    with pytest.raises(ValueError, match=r"fraction=0\.6"):
        members.exploit(state, KEYS[0], 0.6)


@pytest.mark.slow
def test_the_benchmark_runs_small() -> None:
    rows = populations.main(quick=True)
    assert [row.width for row in rows] == [1, 8, 64, 512][: len(rows)]
    assert all(row.trials_per_second > 0 and 0 <= row.share < 1 for row in rows)
