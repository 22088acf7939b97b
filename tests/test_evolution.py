"""Evolution strategies: the contract, means over keys, episodes, and what cannot be derived."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.estimators.evolution import Evolution, Particles
from hypergrad.testing import EstimatorContract, momentum_quadratic, relative_error

METHODS = ("pes", "es", "es_single")


class EvolutionContract(EstimatorContract):
    # One estimate's standard error is 2^-7 of the whole gradient's norm in every entry: 0.07 of the
    # smallest leaf, the target's, which three of them bound.
    float32_tolerance = 0.2


class TestPersistent(EvolutionContract):
    estimator = Evolution(2**14, 0.01)


class TestTruncated(EvolutionContract):
    estimator = Evolution(2**14, 0.01, "es")


class TestSingle(EvolutionContract):
    estimator = Evolution(2**14, 0.01, "es_single")


def mean_and_error(samples: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and its standard error, leaves side by side."""
    flat = np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(samples)], 1)
    return flat.mean(0), flat.std(0, ddof=1) / np.sqrt(len(flat))


def assert_within_error(samples: Any, reference: Any) -> None:
    """Within 3 standard errors in every entry, and zero is ruled out by more than 10 overall."""
    mean, error = mean_and_error(samples)
    expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(reference)])
    assert np.max(np.abs(mean - expected) / error) < 3
    assert np.linalg.norm(expected) > 10 * np.linalg.norm(error)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("whole", [True, False])
def test_mean_over_keys_is_the_exact_gradient(whole: bool) -> None:
    oracle = momentum_quadratic(10)
    inner = None if whole else oracle.problem.init(oracle.hyper, oracle.key)
    arguments = (oracle.problem, oracle.hyper, inner, oracle.train, oracle.valid)
    estimator = Evolution(64, 1e-4, "pes" if whole else "es")
    keys = jax.random.split(jax.random.key(1), 200)
    estimates = jax.jit(jax.vmap(lambda k: hg.hypergradient(*arguments, k, estimator)))(keys)
    exact = hg.hypergradient(*arguments, oracle.key)
    assert_within_error(estimates.grad, exact.grad)
    np.testing.assert_allclose(estimates.loss, exact.loss, rtol=1e-12)
    # What one estimate says about itself is what 200 of them do.
    spread = np.linalg.norm(mean_and_error(estimates.grad)[1]) * np.sqrt(200)
    np.testing.assert_allclose(np.mean(estimates.info["std_error"]), spread, rtol=0.1)


class Recurrent(NamedTuple):
    params: jax.Array
    step: jax.Array


DECAY = np.array([[0.9, 0.3, 0.0], [-0.2, 0.9, 0.1], [0.0, 0.1, 0.95]])
INPUT = np.array([[0.1, 0.0], [0.02, 0.05], [0.0, 0.1]])


def recurrence() -> hg.Problem:
    """S' = A s + B theta with loss |s - 1|^2 / 2; its memory outlasts a window of 5."""

    def init(hyper: Any, key: Any) -> Recurrent:
        return Recurrent(jnp.array([1.0, -1.0, 0.5]), jnp.zeros((), jnp.int32))

    def step(inner: Recurrent, hyper: Any, batch: Any, key: Any) -> Recurrent:
        moved = jnp.asarray(DECAY) @ inner.params + jnp.asarray(INPUT) @ hyper
        return Recurrent(moved, inner.step + 1)

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return 0.5 * jnp.sum((params - 1) ** 2)

    return hg.Problem(init, step, loss, loss)


WINDOW, WINDOWS = jnp.zeros((5, 1)), 6


def episode(estimator: hg.Estimator, hyper: Any, key: jax.Array) -> Any:
    """The sum of the estimates over the windows of an episode."""
    problem = recurrence()
    inner = problem.init(hyper, key)
    state = estimator.init(hg.Window(problem, inner, None, None, key), hyper)

    def window(carry: Any, _: None) -> Any:
        window = hg.Window(problem, carry[0], WINDOW, WINDOW[0], key)
        estimate, state = estimator.estimate(window, hyper, carry[1])
        return (estimate.inner, state), estimate.grad

    return jnp.sum(jax.lax.scan(window, (inner, state), None, WINDOWS)[1], 0)


@pytest.mark.usefixtures("x64")
def test_windows_sum_to_the_gradient_of_the_summed_losses() -> None:
    """Persistent particles see past the window, truncation does not."""
    problem, hyper = recurrence(), jnp.array([0.5, -1.0])

    def summed(hyper: Any) -> jax.Array:
        inner, total = problem.init(hyper, None), 0.0
        for _ in range(WINDOWS):
            inner = hg.rollout(problem, hyper, inner, WINDOW, jax.random.key(0))
            total += problem.valid_loss(inner.params, hyper, None, None)
        return total

    exact = jax.grad(summed)(hyper)
    keys = jax.random.split(jax.random.key(2), 400)
    sums = {
        method: jax.jit(jax.vmap(lambda k, m=method: episode(Evolution(16, 0.1, m), hyper, k)))(
            keys
        )
        for method in METHODS
    }
    assert_within_error(sums["pes"], exact)
    assert_within_error(sums["es_single"], exact)
    truncated = episode(hg.Unrolled(), hyper, keys[0])
    assert_within_error(sums["es"], truncated)
    for method in ("pes", "es_single"):
        mean, error = mean_and_error(sums[method])
        assert np.max(np.abs(mean - truncated) / error) > 10


def counting(inner_key: bool = False) -> hg.Problem:
    """An integer state that moves only where a comparison with `hyper` lets it.

    The state counts in a leaf that is not called `step`, so every call needs noise of its own.
    """

    class Counting(NamedTuple):
        params: jax.Array
        draw: Any

    def init(hyper: Any, key: Any) -> Counting:
        return Counting(jnp.zeros((), jnp.int32), key if inner_key else None)

    def step(inner: Counting, hyper: Any, batch: Any, key: Any) -> Counting:
        draw = jax.random.split(inner.draw)[0] if inner_key else None
        return Counting(inner.params + (hyper["threshold"] > batch), draw)

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return (params - 3.0) ** 2

    return hg.Problem(init, step, loss, loss)


BATCHES = jnp.linspace(0.1, 0.9, 9)


def smoothed_slope(loss: Callable[..., jax.Array], at: float, std: float) -> float:
    """d/dh of the mean of loss(h + e), e ~ N(0, std^2), by differences of a quadrature."""
    points = jnp.linspace(at - 8 * std, at + 8 * std, 20_001)
    values = np.asarray(jax.jit(jax.vmap(loss))(points), np.float64)

    def smoothed(center: float) -> float:
        density = np.exp(-0.5 * ((np.asarray(points) - center) / std) ** 2)
        return float(np.sum(values * density) / np.sum(density))

    d = 1e-3 * std
    return (smoothed(at + d) - smoothed(at - d)) / (2 * d)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inner_key", [False, True])
def test_integer_state_behind_a_comparison(inner_key: bool) -> None:
    problem, hyper, std = counting(inner_key), {"threshold": jnp.array(0.72)}, 0.1
    keys = jax.random.split(jax.random.key(3), 100)

    def estimate(key: jax.Array) -> Any:
        inner = problem.init(hyper, key)
        arguments = (hyper, inner, BATCHES, BATCHES[0], key)
        return hg.hypergradient(problem, *arguments, Evolution(64, std))

    estimates = jax.jit(jax.vmap(estimate))(keys)
    slope = smoothed_slope(lambda h: (jnp.sum(h > BATCHES) - 3.0) ** 2, 0.72, std)
    assert_within_error(estimates.grad, np.array(slope))
    assert estimates.inner.params.dtype == jnp.int32
    with pytest.raises(ValueError, match="a comparison"):
        hg.hypergradient(problem, hyper, None, BATCHES, BATCHES[0], keys[0])


@pytest.mark.usefixtures("x64")
def test_sign_steps() -> None:
    """Under the sign of the gradient, `target` has no derivative, yet it moves the end."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return 0.5 * jnp.sum((w - hyper["target"]) ** 2)

    def valid_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum((w - 1) ** 2)

    problem = hg.bilevel(
        lambda key: jnp.zeros(()), loss, valid_loss, lambda hyper: optax.sign_sgd(0.1)
    )
    train, valid, key = jnp.zeros((8, 1)), jnp.zeros(1), jax.random.key(4)

    def end(target: jax.Array) -> jax.Array:
        hyper = {"target": target}
        inner = hg.rollout(problem, hyper, problem.init(hyper, key), train, key)
        return valid_loss(inner.params, hyper, valid, key)

    estimates = jax.jit(
        jax.vmap(
            lambda k: hg.hypergradient(
                problem, {"target": jnp.array(0.42)}, None, train, valid, k, Evolution(64, 0.15)
            )
        )
    )(jax.random.split(key, 100))
    assert_within_error(estimates.grad, np.array(smoothed_slope(end, 0.42, 0.15)))


def noisy_problem() -> hg.Problem:
    """Momentum on minibatches, under noise from the step's key."""

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        shift = 0.1 * jax.random.normal(key, jnp.shape(w), w.dtype)
        return jnp.mean((batch @ (w + shift) - 1) ** 2)

    def valid_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((batch @ w - 1) ** 2)

    return hg.bilevel(
        lambda key: jax.random.normal(key, (3,)),
        train_loss,
        valid_loss,
        lambda hyper: optax.sgd(hyper["rate"], momentum=hyper["momentum"]),
    )


HYPER = {"momentum": jnp.float32(0.7), "rate": jnp.float32(0.05)}
DATA = jax.random.normal(jax.random.key(7), (20, 3))


BATCH_ROWS = DATA.reshape(5, 4, 3)


def rolled_out(hyper: Any, num_steps: int) -> jax.Array:
    """The parameters that plain training reaches on `windows`' minibatches."""
    problem, key = noisy_problem(), jax.random.key(8)
    inner = problem.init(HYPER, key)
    return hg.rollout(problem, hyper, inner, hg.Minibatches(DATA, 4, num_steps), key).params


def windows(estimator: Evolution, count: int) -> tuple[Any, Particles]:
    """Estimates over `count` windows of 5 steps, compiled once, and the last state."""
    problem, key = noisy_problem(), jax.random.key(8)

    @jax.jit
    def begin() -> Any:
        inner = problem.init(HYPER, key)
        return inner, estimator.init(hg.Window(problem, inner, None, None, key), HYPER)

    @jax.jit
    def update(inner: Any, state: Any) -> Any:
        train = hg.Minibatches(DATA, 4, 5)
        return estimator.estimate(hg.Window(problem, inner, train, DATA, key), HYPER, state)

    inner, state = begin()
    estimates = []
    for _ in range(count):
        estimate, state = update(inner, state)
        inner = estimate.inner
        estimates.append(estimate)
    assert update._cache_size() == 1
    return estimates, state


@pytest.mark.parametrize("method", METHODS)
def test_two_windows_walk_as_one(method: str) -> None:
    """The unperturbed run goes on as plain training, in one compilation over all calls."""
    estimates, state = windows(Evolution(2, 0.01, method), 2)
    end = jax.jit(rolled_out, static_argnums=1)(HYPER, 10)
    np.testing.assert_allclose(estimates[-1].inner.params, end, rtol=1e-5)
    assert int(state.calls) == 2
    assert (state.inner is None) == (method == "es")


def test_single_particles_walk_as_one_run_under_their_own_hyper() -> None:
    """Same keys and minibatches as the unperturbed run, across windows."""
    _, state = windows(Evolution(2, 0.01, "es_single"), 2)
    noise = jnp.concatenate([jnp.zeros((1, 2)), state.noise, -state.noise])
    hypers = {"momentum": 0.7 + noise[:, 0], "rate": 0.05 + noise[:, 1]}
    plain, *alone = jax.jit(jax.vmap(lambda hyper: rolled_out(hyper, 10)))(hypers)
    for particle, params in zip(state.inner.params, alone, strict=True):
        np.testing.assert_allclose(particle, params, rtol=1e-4)
        assert relative_error(params, plain) > 1e-3


def test_particles_follow_the_count_of_steps_that_a_tuner_kept() -> None:
    """A tuner that goes back restores the particles, not `step`; they share the run's minibatch."""
    problem, key, estimator = noisy_problem(), jax.random.key(8), Evolution(2, 1e-6)
    inner = problem.init(HYPER, key)
    state = estimator.init(hg.Window(problem, inner, None, None, key), HYPER)

    @jax.jit
    def window(inner: Any) -> Any:
        train = hg.Minibatches(DATA, 4, 5)
        return estimator.estimate(hg.Window(problem, inner, train, DATA, key), HYPER, state)

    estimate, after = window(inner._replace(step=inner.step + 3))
    assert np.array_equal(after.inner.step, np.full(4, 8))
    for params in after.inner.params:
        np.testing.assert_allclose(params, estimate.inner.params, rtol=1e-3)
    other, _ = window(inner)
    assert relative_error(other.inner.params, estimate.inner.params) > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("whole", [True, False])
def test_noise_is_fresh_in_every_call(method: str, whole: bool) -> None:
    """Under one key, also where the state counts no steps; only ES-Single keeps its noise."""
    problem, key = counting(), jax.random.key(5)
    hyper, estimator = {"threshold": jnp.float32(0.5)}, Evolution(3, 0.2, method)
    inner = None if whole else problem.init(hyper, key)
    window = hg.Window(problem, inner, BATCHES, BATCHES[0], key)
    state = estimator.init(window, hyper)
    grads, estimate_of = [], jax.jit(estimator.estimate)
    for _ in range(2):
        estimate, state = estimate_of(window, hyper, state)
        grads.append(float(estimate.grad["threshold"]))
    # The particles of ES-Single go on, so that its second estimate differs by its states alone.
    assert grads[0] != grads[1]
    if state.noise is not None and method == "es_single":
        first = estimator.init(window, hyper).noise
        np.testing.assert_array_equal(state.noise, first)


def test_single_calls_have_fresh_noise_at_each_step() -> None:
    """Without a state that lasts, the step tells calls apart."""
    problem, key, hyper = recurrence(), jax.random.key(8), jnp.array([0.5, -1.0])
    inner = problem.init(hyper, key)
    here, later = (
        hg.hypergradient(problem, hyper, start, WINDOW, WINDOW[0], key, Evolution(3, 0.01)).grad
        for start in (inner, inner._replace(step=inner.step + 5))
    )
    assert relative_error(here, later) > 1e-3


def test_a_population_under_vmap_keeps_its_own_particles() -> None:
    problem, key, estimator = noisy_problem(), jax.random.key(8), Evolution(2, 0.01)

    def two_windows(rate: jax.Array) -> Any:
        hyper = dict(HYPER, rate=rate)
        inner = problem.init(hyper, key)
        state = estimator.init(hg.Window(problem, inner, None, None, key), hyper)
        for _ in range(2):
            window = hg.Window(problem, inner, BATCH_ROWS, DATA, key)
            estimate, state = estimator.estimate(window, hyper, state)
            inner = estimate.inner
        return estimate.grad, state.inner.params

    population = jax.jit(jax.vmap(two_windows))(jnp.array([0.03, 0.06]))
    alone = jax.jit(two_windows)(jnp.float32(0.06))
    assert relative_error(jax.tree.map(lambda x: x[1], population), alone) < 1e-3
    assert relative_error(jax.tree.map(lambda x: x[0], population), alone) > 1e-2


def test_validation_at_the_window_mean() -> None:
    problem, key = noisy_problem(), jax.random.key(8)

    @jax.jit
    def both() -> Any:
        arguments = (problem, HYPER, None, BATCH_ROWS, DATA, key)
        return [
            hg.hypergradient(*arguments, estimator)
            for estimator in (
                hg.Unrolled(validate_at="mean"),
                Evolution(2**12, 1e-3, validate_at="mean"),
                hg.Unrolled(),
            )
        ]

    exact, estimate, last = both()
    np.testing.assert_allclose(estimate.loss, exact.loss, rtol=1e-5)
    distance = lambda a, b: float(jnp.linalg.norm(ravel(a.grad) - ravel(b.grad)))  # noqa: E731
    assert distance(estimate, exact) < 3 * estimate.info["std_error"]
    assert distance(estimate, last) > 10 * estimate.info["std_error"]


def ravel(tree: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def test_bfloat16_parameters_have_float32_hypergradients() -> None:
    oracle = momentum_quadratic(10)

    @jax.jit
    def estimate(inner: Any, hyper: Any) -> Any:
        arguments = (oracle.train, oracle.valid, oracle.key, Evolution(64, 0.05))
        return hg.hypergradient(oracle.problem, hyper, inner, *arguments)

    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    inner = oracle.problem.init(oracle.hyper, oracle.key)
    wide = estimate(inner, oracle.hyper)
    inner = inner._replace(params=narrow(inner.params), opt_state=narrow(inner.opt_state))
    half = estimate(inner, narrow(oracle.hyper))
    assert {g.dtype for g in jax.tree.leaves(half.grad)} == {jnp.dtype("float32")}
    assert half.inner.params.dtype == jnp.bfloat16
    # The noise is the same, so that only rounding to eight bits in every step is left.
    assert 0 < relative_error(half.grad, wide.grad) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_lost_particle_is_never_hidden(method: str) -> None:
    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum((w - batch) ** 2) * jnp.sqrt(hyper)

    problem = hg.bilevel(lambda key: jnp.zeros(2), loss, loss, lambda hyper: optax.sgd(0.1))
    hyper, key = jnp.float32(0.1), jax.random.key(6)
    inner = problem.init(hyper, key)
    estimator = Evolution(200, 0.1, method)
    window = hg.Window(problem, inner, jnp.ones((3, 2)), jnp.ones(2), key)
    state = estimator.init(window, hyper)
    estimate, _ = jax.jit(lambda: estimator.estimate(window, hyper, state))()
    # A normal variable lies below -1 with a probability of 0.159.
    assert 0.1 < float(estimate.info["nonfinite"]) < 0.22
    assert not bool(estimate.info["finite"])
    assert not np.isfinite(estimate.grad)
    assert np.isfinite(estimate.loss)
    assert int(estimate.info["first_bad_step"]) == 0


def test_one_pair_has_no_standard_error() -> None:
    oracle = momentum_quadratic(4)
    arguments = (oracle.hyper, None, oracle.train, oracle.valid, oracle.key)
    estimate = hg.hypergradient(oracle.problem, *arguments, Evolution(1, 0.1))
    assert float(estimate.info["std_error"]) == np.inf
    assert bool(estimate.info["finite"])


def test_tuners_take_it() -> None:
    """Both tuners, from a start that is too small."""
    problem, key = noisy_problem(), jax.random.key(9)
    space = hg.Space({name: hg.Float(1e-4, 0.9, scale="log") for name in HYPER})
    estimator = Evolution(8, 0.003, "es_single")
    for make in (hg.alternating, hg.restarting):
        tuner = make(problem, space, estimator)
        update = jax.jit(tuner.update)
        state = tuner.init({"momentum": 0.5, "rate": 1e-3}, key)
        infos = []
        for _ in range(4):
            state, info = update(state, BATCH_ROWS, DATA)
            infos.append(info)
        assert bool(infos[-1].finite)
        assert float(infos[-1].hyper["rate"]) > 1e-3


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"pairs=0 must be at least 1"):
        Evolution(0, 0.1)
    with pytest.raises(ValueError, match=r"pairs=2\.5 is no integer"):
        Evolution(2.5, 0.1)  # type: ignore[arg-type]
    for std in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"std=.* must be positive and finite"):
            Evolution(2, std)
    with pytest.raises(ValueError, match=r"method='nes' is unknown: choose 'pes'"):
        Evolution(2, 0.1, "nes")  # type: ignore[arg-type]
    oracle = momentum_quadratic(4)
    unused = oracle._replace(hyper=dict(oracle.hyper, width=1.0))
    with pytest.raises(ValueError, match=r"'width' never reaches the validation loss"):
        hg.hypergradient(
            unused.problem,
            unused.hyper,
            None,
            unused.train,
            unused.valid,
            unused.key,
            Evolution(2, 0.1),
        )
