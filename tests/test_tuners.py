"""Both tuners: they descend, compile once, survive what diverges, and say what they did."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.trees import norm
from hypergrad.tuners.alternating import steady_adam
from hypergrad.tuners.restarting import combine
from hypergrad.tuners.trust import (
    ADJOINT_GROWTH,
    NORM_SPIKE,
    NOT_FINITE,
    NOT_LEARNED,
    NOT_SOLVED,
    Trust,
    initial_trust,
    judge,
    remember,
)

CURVATURE = jnp.array([0.2, 1.0, 4.0])
SPACE = hg.Space(
    {
        "learning_rate": hg.Float(1e-4, 2.0, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
    }
)
START = {"learning_rate": 1e-3, "momentum": 0.1}


def _loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return 0.5 * jnp.sum(CURVATURE * params**2) + jnp.mean(batch) * params[0]


def _problem() -> hg.Problem:
    return hg.bilevel(
        lambda key: 1.0 + 0.1 * jax.random.normal(key, (3,)),
        _loss,
        _loss,
        lambda hyper: optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
    )


TRAIN, VALID = jnp.zeros((6, 2)), jnp.zeros(2)


def _run(tuner: hg.Tuner, start: Any, updates: int, train: Any = TRAIN) -> tuple[Any, list[Any]]:
    update = jax.jit(tuner.update)
    state, infos = tuner.init(start, jax.random.key(0)), []
    for _ in range(updates):
        state, info = update(state, train, VALID)
        infos.append(info)
    return state, infos


@pytest.mark.parametrize("make", [hg.alternating, hg.restarting])
def test_tuning_beats_the_start(make: Any) -> None:
    state, infos = _run(make(_problem(), SPACE), START, 25)
    assert min(float(info.loss) for info in infos) < 0.1 * float(infos[0].loss)
    assert float(infos[-1].hyper["learning_rate"]) > 10 * START["learning_rate"]
    assert all(bool(info.finite) for info in infos)
    assert max(float(info.worth) for info in infos) > 0
    assert set(make(_problem(), SPACE).best(state)) == set(START)


@pytest.mark.parametrize("make", [hg.alternating, hg.restarting])
def test_update_is_compiled_once(make: Any) -> None:
    tuner, traces = make(_problem(), SPACE), []

    @jax.jit
    def update(state: Any, train: Any, valid: Any) -> Any:
        traces.append(None)
        return tuner.update(state, train, valid)

    # Python floats are the weakly typed start that would recompile at the second call
    state = tuner.init({"learning_rate": 0.01, "momentum": 0.5}, jax.random.key(0))
    for _ in range(3):
        state, info = update(state, TRAIN, VALID)
    assert len(traces) == 1
    assert info.loss.dtype == jnp.float32
    assert not info.hyper["learning_rate"].weak_type


def test_alternating_goes_on_with_training() -> None:
    """Two updates of 5 steps under one key walk the steps that 10 would, if hyper stands still."""
    tuner = hg.alternating(_problem(), SPACE, outer_optimizer=optax.sgd(0.0))
    state, _ = _run(tuner, START, 2, TRAIN[:5])
    problem, hyper = _problem(), hg.Space.from_unit(SPACE, SPACE.to_unit(SPACE.cast(START)))
    inner = problem.init(hyper, jax.random.key(0))
    whole = hg.rollout(problem, hyper, inner, jnp.zeros((10, 2)), jax.random.key(0))
    np.testing.assert_allclose(state.inner.params, whole.params, rtol=1e-5)
    assert int(state.inner.step) == 10


def test_a_bad_batch_costs_its_own_update_and_no_earlier_one() -> None:
    tuner = hg.alternating(_problem(), SPACE)
    update = jax.jit(tuner.update)
    state, _ = update(tuner.init(START, jax.random.key(0)), TRAIN, VALID)
    trusted, _ = update(state, TRAIN, VALID)
    state, info = update(trusted, TRAIN.at[3].set(jnp.nan), VALID)
    assert int(info.refused) == NOT_FINITE
    assert not bool(info.finite)
    assert int(info.first_bad_step) == 3
    assert float(info.worth) == 0
    assert float(info.step_scale) == 0.5
    # where the bad update began, as one piece, but for the step count
    for name in ("unit", "outer_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(state.now, name), getattr(trusted.now, name)
        )
    np.testing.assert_array_equal(state.inner.params, trusted.inner.params)
    assert int(state.inner.step) == 18
    assert int(info.refusals) == 1
    good, info = update(state, TRAIN, VALID)
    assert int(info.refused) == 0 and float(info.step_scale) == 1
    assert bool(jnp.isfinite(good.inner.params).all())
    # a second one in a row goes back to where the last trusted hypergradient was taken
    state, info = update(state, TRAIN.at[3].set(jnp.nan), VALID)
    assert int(info.refusals) == 2
    np.testing.assert_array_equal(state.now.unit["momentum"], trusted.trusted.unit["momentum"])
    np.testing.assert_array_equal(state.inner.params, trusted.trusted.inner.params)


def _cycle(reasons: list[int]) -> list[float]:
    """How far one coordinate stands from its start after updates with these verdicts."""
    problem = _problem()
    # The estimator is a puppet: its growth or loss says what the verdict is to be.
    verdicts = iter(reasons)

    class Puppet(hg.Estimator):
        def estimate(self, window: Any, hyper: Any, state: Any) -> Any:
            verdict = window.train[0, 0]
            grad = jax.tree.map(jnp.ones_like, hyper)
            info = {
                "finite": verdict != NOT_FINITE,
                "first_bad_step": jnp.int32(-1),
                "growth": jnp.where(verdict == ADJOINT_GROWTH, 9.0, 0.1),
            }
            return hg.Estimate(jnp.float32(1.0), grad, window.inner, info), state

    tuner = hg.alternating(problem, SPACE, Puppet())
    update = jax.jit(tuner.update)
    state = tuner.init(START, jax.random.key(0))
    places = []
    for verdict in verdicts:
        state, _ = update(state, jnp.full((2, 2), float(verdict)), VALID)
        places.append(float(state.now.unit["momentum"]))
    return places


@pytest.mark.parametrize(
    ("reason", "pattern"),
    [(ADJOINT_GROWTH, "r"), *itertools.product([ADJOINT_GROWTH, NOT_FINITE], ["tr", "ttr", "trr"])],
)
def test_refusals_of_any_pattern_leave_nothing_standing(reason: int, pattern: str) -> None:
    """Wherever every second or third hypergradient is refused, hyperparameters still move."""
    verdicts = [reason if step == "r" else 0 for step in 20 * pattern]
    places = _cycle(verdicts)
    late = places[len(places) // 2 :]
    assert max(late) - min(late) > 0.005 * len(late) / len(pattern) ** 2 or min(places) == 0


def test_alternating_finds_its_way_from_a_start_that_diverges() -> None:
    start = {"learning_rate": 2.0, "momentum": 0.9}
    _, infos = _run(hg.alternating(_problem(), SPACE), start, 40)
    assert int(infos[0].refused) == ADJOINT_GROWTH
    assert float(infos[0].loss) > 100
    assert float(infos[-1].loss) < 0.1
    assert int(infos[-1].refused) == 0


def test_alternating_finds_its_way_where_even_one_window_overflows() -> None:
    start = {"learning_rate": 2.0, "momentum": 0.5}
    _, infos = _run(hg.alternating(_problem(), SPACE), start, 30, jnp.zeros((64, 2)))
    assert int(infos[0].refused) == NOT_FINITE
    assert float(infos[-1].hyper["learning_rate"]) < 0.5
    assert float(infos[-1].loss) < 1e-3


def test_restarting_finds_its_way_from_a_start_that_diverges() -> None:
    start = {"learning_rate": 2.0, "momentum": 0.9}
    train = jnp.zeros((300, 2))
    tuner = hg.restarting(_problem(), SPACE)
    state, infos = _run(tuner, start, 30, train)
    shortened = [int(info.estimate["shortened"]) for info in infos]
    assert int(infos[0].refused) == NOT_FINITE
    assert max(shortened) >= 3
    assert shortened[-1] == 0
    assert float(infos[-1].loss) < 0.1
    assert float(tuner.best(state)["learning_rate"]) < 1.0


def test_restarting_keeps_its_seeds_unless_told_otherwise() -> None:
    still = optax.sgd(0.0)
    for fresh in (False, True):
        tuner = hg.restarting(_problem(), SPACE, outer_optimizer=still, fresh_seeds=fresh)
        _, infos = _run(tuner, START, 2)
        assert (float(infos[0].loss) != float(infos[1].loss)) == fresh


def test_gradients_of_zero_are_no_measure_of_the_next_one() -> None:
    """A median of 0 made every later norm a spike, for good."""
    state, info = initial_trust(jnp.float32), {"finite": jnp.bool_(True)}
    for size in (0.0,) * 4 + (1.0,) * 4:
        refused = judge(Trust(), state, jnp.float32(size), info)
        assert int(refused) == 0
        state = remember(state, jnp.float32(size), refused, 10)
    assert 0.5 < float(state.median) < 2


def test_an_unsolved_linear_system_is_refused() -> None:
    info = {"finite": jnp.bool_(True), "residual": jnp.float32(50.0)}
    state = initial_trust(jnp.float32)
    assert int(judge(Trust(), state, jnp.float32(1.0), info)) == NOT_SOLVED
    assert int(judge(Trust(max_residual=100), state, jnp.float32(1.0), info)) == 0


def test_several_seeds_are_one_estimate() -> None:
    many = hg.restarting(_problem(), SPACE, num_seeds=3)
    _, infos = _run(many, START, 1)
    assert 0.9 < float(infos[0].estimate["agreement"]) <= 1.0 + 1e-6
    one = _run(hg.restarting(_problem(), SPACE), START, 1)[1][0]
    np.testing.assert_allclose(infos[0].norm, one.norm, rtol=0.5)


def test_one_outlier_does_not_own_the_combination() -> None:
    grads = {"a": jnp.array([1.0, 1.2, 1e6]), "b": jnp.array([[0.5], [0.4], [-1e6]])}
    grad, agreement = combine(grads)
    size = norm(grad)
    assert 0.5 < float(grad["a"]) < 1.5
    assert float(size) < 2
    assert 0 < float(agreement) < 1
    lost = {"a": jnp.array([1.0, jnp.nan, 1.2]), "b": jnp.array([[0.5], [0.0], [0.4]])}
    np.testing.assert_allclose(combine(lost)[0]["a"], 1.07, atol=0.05)
    gone = {"a": jnp.array([1.0, jnp.nan, jnp.inf])}
    assert not bool(jnp.isfinite(combine(gone)[0]["a"]))
    np.testing.assert_allclose(combine({"a": jnp.array([3.0])})[0]["a"], 3.0)


def test_a_dead_run_is_refused_though_it_looks_calm() -> None:
    """Validation at a constant: nothing was learned, and no norm or growth shows it."""

    def stuck(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return 1.0 + 1e-3 * jnp.sum(params * hyper["learning_rate"])

    problem = _problem()._replace(valid_loss=stuck)
    _, infos = _run(hg.restarting(problem, SPACE), START, 1)
    assert int(infos[0].refused) == NOT_LEARNED


def test_trust_by_norm_and_growth() -> None:
    trust, state = Trust(), initial_trust(jnp.float32)
    calm = {"finite": jnp.bool_(True), "growth": jnp.float32(0.8)}
    for _ in range(5):
        state = remember(state, jnp.float32(1.0), judge(trust, state, jnp.float32(1.0), calm), 6)
    assert float(state.scale) == 1
    assert int(judge(trust, state, jnp.float32(5.0), calm)) == 0
    spike = judge(trust, state, jnp.float32(50.0), calm)
    assert int(spike) == NORM_SPIKE
    wild = dict(calm, growth=jnp.float32(3.0))
    assert int(judge(trust, state, jnp.float32(1.0), wild)) == ADJOINT_GROWTH
    lost = dict(calm, growth=jnp.float32(jnp.nan))
    assert int(judge(trust, state, jnp.float32(1.0), lost)) == ADJOINT_GROWTH
    after = remember(state, jnp.float32(50.0), spike, 6)
    assert float(after.scale) == 0.5
    assert float(after.median) == float(state.median)
    # a lasting change of scale is accepted in the end
    for _ in range(5):
        after = remember(after, jnp.float32(50.0), judge(trust, after, jnp.float32(50.0), calm), 6)
    assert int(judge(trust, after, jnp.float32(50.0), calm)) == 0


def test_tuner_under_vmap() -> None:
    """A population of starts in one program, each member as if alone."""
    tuner = hg.alternating(_problem(), SPACE)
    rates = jnp.array([1e-3, 1e-2])
    start = lambda rate: tuner.init(  # noqa: E731
        {"learning_rate": rate, "momentum": jnp.float32(0.1)}, jax.random.key(0)
    )
    states, infos = jax.vmap(tuner.update, (0, None, None))(jax.vmap(start)(rates), TRAIN, VALID)
    alone, info = tuner.update(start(rates[1]), TRAIN, VALID)
    np.testing.assert_allclose(infos.loss[1], info.loss, rtol=1e-6)
    np.testing.assert_allclose(states.inner.params[1], alone.inner.params, rtol=1e-5)


def test_arrays_of_hyperparameters_under_one_float() -> None:
    def penalised(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return _loss(params, hyper, batch, key) + jnp.vdot(hyper["l2"]["per_weight"], params**2)

    problem = _problem()._replace()
    problem = hg.bilevel(lambda key: jnp.ones(3), penalised, _loss, lambda hyper: optax.sgd(0.05))
    space = hg.Space({"l2": hg.Float(1e-6, 1.0, scale="log")})
    tuner = hg.alternating(problem, space)
    start = {"l2": {"per_weight": np.full(3, 1e-3, np.float32)}}
    state, infos = _run(tuner, start, 10)
    assert tuner.best(state)["l2"]["per_weight"].shape == (3,)
    assert float(infos[-1].hyper["l2"]["per_weight"].min()) > 1e-3


def test_wrong_arguments_are_named() -> None:
    tuner = hg.alternating(_problem(), SPACE)
    with pytest.raises(ValueError, match="learning_rate"):
        tuner.init({"learning_rate": 5.0, "momentum": 0.1}, jax.random.key(0))
    with pytest.raises(ValueError, match="momentum"):
        tuner.init({"learning_rate": 0.1}, jax.random.key(0))
    with pytest.raises(ValueError, match=r"num_seeds=0"):
        hg.restarting(_problem(), SPACE, num_seeds=0)
    state = tuner.init(START, jax.random.key(0))
    with pytest.raises(ValueError, match="disagree on the leading axis K"):
        tuner.update(state, {"x": jnp.zeros((3, 2)), "y": jnp.zeros((4, 2))}, VALID)


def test_a_loss_that_closes_over_a_hyperparameter_is_refused() -> None:
    def step(inner: hg.Inner, hyper: Any, batch: Any, key: Any) -> hg.Inner:
        leaky = hg.inner_gradient(lambda p, _, b: hyper["learning_rate"] * _loss(p, None, b, None))
        grads, _ = leaky(inner.params, None, batch)
        return inner._replace(params=inner.params - grads)

    problem = _problem()._replace(step=step)
    hyper = {"learning_rate": 0.1}
    inner = _problem().init(START, jax.random.key(0))
    with pytest.raises(ValueError, match="closes over a traced value"):
        hg.hypergradient(problem, hyper, inner, TRAIN, VALID, jax.random.key(0))


def test_learned_schedule_replays() -> None:
    tuner = hg.alternating(_problem(), SPACE)
    state, infos = _run(tuner, START, 6)
    schedule = hg.learned_schedule([info.hyper for info in infos], 6)
    problem, key = _problem(), jax.random.key(0)
    inner = problem.init(START, key)
    rates = [float(schedule(t)["learning_rate"]) for t in (0, 5, 6, 35, 99)]
    assert rates[0] == rates[1] != rates[2]
    assert rates[3] == rates[4]
    end = hg.replay(problem, schedule, inner, jnp.zeros((36, 2)), key)
    assert bool(jnp.isfinite(end.params).all())
    # the same in a plain optax loop
    params, velocity = inner.params, jnp.zeros(3)
    for t in range(36):
        grads = jax.grad(_loss)(params, None, jnp.zeros(2), None)
        velocity = schedule.of("momentum")(t) * velocity + grads
        params = params - schedule.of("learning_rate")(t) * velocity
    np.testing.assert_allclose(end.params, params, rtol=1e-4)
    del state


def test_settled_schedule_forgets_the_way_from_the_start() -> None:
    history = [
        {"learning_rate": jnp.float32(r)} for r in (1e-3, 1e-2, 0.1, 0.1, 0.1, 0.1, 0.2, 0.4)
    ]
    space = hg.Space({"learning_rate": hg.Float(1e-4, 2.0, scale="log")})
    schedule = hg.settled_schedule(space, history, 5)
    rates = [float(schedule(5 * i)["learning_rate"]) for i in range(8)]
    np.testing.assert_allclose(rates, [0.1] * 6 + [0.2, 0.4], rtol=1e-4)
    with pytest.raises(ValueError, match="history has 3 updates"):
        hg.settled_schedule(space, history[:3], 5)


@pytest.mark.parametrize("outliers", [[47.7], [410.0, 160.0, 0.67]])
def test_outliers_of_the_first_updates_neither_move_nor_freeze(outliers: list[float]) -> None:
    optimizer = steady_adam(0.1)
    usual = [0.002, 0.0021, 0.0019, 0.002, 0.0022, 0.002]
    place, state = jnp.zeros(()), optimizer.init(jnp.zeros(()))
    for grad in outliers:
        move, state = optimizer.update(jnp.float32(grad), state)
        place += move
    move, state = optimizer.update(jnp.float32(usual[0]), state)
    assert float(place + move) == pytest.approx(0, abs=1e-6)
    for grad in usual[1:]:
        move, state = optimizer.update(jnp.float32(grad), state)
        assert -0.12 < float(move) < -0.08
    adam, theirs = optax.adam(0.1, b1=0.3, b2=0.99, eps=0), optax.adam(0.1).init(jnp.zeros(()))
    state = optimizer.init(jnp.zeros(()))
    for grad in (1.0, 0.8, -0.5, 0.3, 1e-3, 0.7, 0.0):
        move, state = optimizer.update(jnp.float32(grad), state)
        expected, theirs = adam.update(jnp.float32(grad), theirs)
        assert float(move) == pytest.approx(float(expected), rel=1e-4)
    nothing, _ = optimizer.update(jnp.zeros(()), optimizer.init(jnp.zeros(())))
    assert float(nothing) == 0


def test_norm_adam_keeps_proportions() -> None:
    optimizer = hg.norm_adam(0.1)
    grads = jnp.array([3e-3, 4e-3, 0.0])
    updates, state = optimizer.update(grads, optimizer.init(grads))
    np.testing.assert_allclose(updates, [-0.06, -0.08, 0.0], rtol=1e-5)
    huge, _ = optimizer.update(1e9 * grads, state)
    assert float(jnp.linalg.norm(huge)) < 0.2
    nothing, _ = optimizer.update(jnp.zeros(3), optimizer.init(grads))
    assert bool((nothing == 0).all())


def test_a_hyperparameter_that_is_missing_is_named() -> None:
    problem = hg.bilevel(
        lambda key: jnp.zeros(3),
        lambda w, hyper, batch, key: jnp.sum((w - batch) ** 2),
        lambda w, hyper, batch, key: jnp.sum((w - batch) ** 2),
        lambda hyper: optax.sgd(hyper["learning_rate"]),
    )
    tuner = hg.alternating(problem, hg.Space({"rate": hg.Float(1e-3, 1.0, scale="log")}))
    with pytest.raises(ValueError, match=r"reads hyper\['learning_rate'\], which hyper lacks"):
        tuner.init({"rate": 0.1}, jax.random.key(0))


def test_a_key_that_a_library_misses_is_no_hyperparameter() -> None:
    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return optax.tree_utils.tree_set({"a": w}, b=w)["a"]

    problem = hg.bilevel(lambda key: jnp.zeros(3), loss, loss, lambda h: optax.sgd(h["rate"]))
    tuner = hg.alternating(problem, hg.Space({"rate": hg.Float(1e-3, 1.0, scale="log")}))
    with pytest.raises(KeyError, match="b"):
        tuner.update(tuner.init({"rate": 0.1}, jax.random.key(0)), jnp.ones((2, 3)), jnp.ones(3))


def test_the_largest_move_may_be_traced_but_not_negative() -> None:
    """One compiled update for several step sizes, as examples/tiny_transformer.py does it."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((w - batch) ** 2)

    problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    space = hg.Space({"lr": hg.Float(1e-3, 1.0, scale="log")})
    state = hg.alternating(problem, space).init({"lr": 0.01}, jax.random.key(0))

    @jax.jit
    def moved(largest: jax.Array) -> jax.Array:
        tuner = hg.alternating(problem, space, outer_optimizer=optax.sgd(1e3), max_move=largest)
        after, _ = tuner.update(state, jnp.ones((5, 3)), jnp.ones(3))
        return after.now.unit["lr"] - state.now.unit["lr"]

    for largest in (0.01, 0.02):
        assert float(moved(jnp.float32(largest))) == pytest.approx(largest, rel=1e-3)
    for make in (hg.alternating, hg.restarting):
        with pytest.raises(ValueError, match=r"max_move=-1 must be positive"):
            make(problem, space, max_move=-1)
