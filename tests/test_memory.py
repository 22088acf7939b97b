"""What tuning holds, in copies of the parameters, by XLA's analysis of the compiled programs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.estimators.recompute import repetitions, snapshots
from hypergrad.testing.contract import relative_error
from hypergrad.tuners.trust import NORM_SPIKE, NOT_FINITE

SIDE, KEY = 192, jax.random.key(0)
SPACE = hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")})
VALID = np.ones((2, SIDE), np.float32)


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean(jnp.tanh(batch @ w) ** 2)


PROBLEM = hg.bilevel(
    lambda key: jax.random.normal(key, (SIDE, SIDE)), loss, loss, lambda h: optax.adam(h["lr"])
)


def batches(steps: int) -> Any:
    return jax.ShapeDtypeStruct((steps, 2, SIDE), jnp.float32)


def sizes(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[float, float]:
    """(peak, temporaries) in copies of the one matrix."""
    analysis = jax.jit(function, **options).lower(*args).compile().memory_analysis()
    names = ("argument", "output", "temp", "alias")
    argument, output, temp, alias = (getattr(analysis, f"{n}_size_in_bytes") for n in names)
    # The batches are the user's, and more than the weights in a long run.
    data = sum(4 * np.prod(a.shape) for a in args if isinstance(a, jax.ShapeDtypeStruct))
    return (argument + output + temp - alias - data) / (4 * SIDE**2), temp / (4 * SIDE**2)


def updated(estimator: hg.Estimator, **options: Any) -> float:
    tuner = hg.alternating(PROBLEM, SPACE, estimator, **options)
    state = tuner.init({"lr": 1e-2}, KEY)
    return sizes(tuner.update, state, batches(5), VALID, donate_argnums=0)[0]


def test_the_online_tuner_holds_few_copies() -> None:
    """It held 18 where donated training holds 4: a second state, branches, Adam's residuals."""
    inner = PROBLEM.init({"lr": 1e-2}, KEY)
    run = lambda inner, train: hg.rollout(PROBLEM, {"lr": 1e-2}, inner, train, KEY)  # noqa: E731
    plain = sizes(run, inner, batches(5), donate_argnums=0)[0]
    assert plain == pytest.approx(4, abs=0.2)
    lean = hg.Trust(rewinds="hyper")
    assert updated(hg.Unrolled(window=1), trust=lean) <= 5.2
    assert updated(hg.Unrolled(window=1)) <= 12.2


def copies_per_step(checkpoint: Any) -> float:
    def run(hyper: Any, inner: Any, train: Any) -> Any:
        estimator = hg.Unrolled(checkpoint=checkpoint)
        estimate = hg.hypergradient(PROBLEM, hyper, inner, train, VALID, KEY, estimator)
        return estimate.grad, estimate.inner

    hyper = {"lr": jnp.float32(1e-2)}
    inner = PROBLEM.init(hyper, KEY)
    few, many = (sizes(run, hyper, inner, batches(k))[1] for k in (64, 128))
    return (many - few) / 64


def test_an_unroll_stores_few_copies_per_step() -> None:
    """Adam's derivative alone stored three of the seven that a step took."""
    assert copies_per_step("none") == pytest.approx(4, abs=0.1)
    # a gradient, and an eighth of a state
    assert copies_per_step("step") == pytest.approx(1 + 3 / 8, abs=0.1)


def test_a_hundred_thousand_steps_in_the_memory_of_twenty_states() -> None:
    steps = 100_000

    def run(hyper: Any, inner: Any, train: Any) -> Any:
        estimator = hg.Unrolled(checkpoint="log")
        return hg.hypergradient(PROBLEM, hyper, inner, train, VALID, KEY, estimator).grad

    hyper = {"lr": jnp.float32(1e-2)}
    inner = PROBLEM.init(hyper, KEY)
    temporaries = sizes(run, hyper, inner, batches(steps))[1]
    # A place per step for the adjoint's growth counts too: 8 bytes a step.
    assert temporaries - 8 * steps / (4 * SIDE**2) <= 3 * 20
    assert snapshots(steps) == 16 and repetitions(steps) + 3 <= np.log2(steps)


def by_hand() -> hg.Problem:
    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        noise = hyper["noise"] * jax.random.normal(key, params["w"].shape)
        return jnp.mean(jnp.tanh(batch @ (params["w"] + noise)) ** 2) + hyper["l2"] * jnp.sum(
            params["w"] ** 2
        )

    def init(key: Any) -> Any:
        return {"w": jax.random.normal(key, (3, 2)), "count": jnp.int32(3)}

    def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((batch @ params["w"] - 1.0) ** 2)

    return hg.bilevel(init, train_loss, valid_loss, lambda h: optax.adam(h["lr"]))


HYPER = {"lr": 0.05, "l2": 0.01, "noise": 0.1}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("checkpoint", ["step", "log"])
@pytest.mark.parametrize("steps", [1, 8, 13])
def test_what_is_had_again_is_what_was_stored(steps: int, checkpoint: str) -> None:
    problem, train = by_hand(), jax.random.normal(KEY, (steps, 5, 3))

    def run(checkpoint: Any, window: int | None = None) -> hg.Estimate:
        estimator = hg.Unrolled(window, checkpoint, validate_at="mean")
        return hg.hypergradient(problem, HYPER, None, train, train[0], KEY, estimator)

    exact, ours = run("none"), run(checkpoint)
    assert float(jnp.abs(exact.grad["lr"])) > 1e-3
    # Adam's first step is a sign, in which the others cancel.
    names = ["lr"] if steps == 1 else list(HYPER)
    grads, wanted = ({n: found.grad[n] for n in names} for found in (ours, exact))
    assert relative_error(grads, wanted) < 1e-12
    assert relative_error(ours.inner.params["w"], exact.inner.params["w"]) < 1e-12
    assert ours.info["growth"] == pytest.approx(float(exact.info["growth"]), rel=1e-12)


@pytest.mark.parametrize("mode", ["step", "log"])
def test_log_under_several_seeds_windows_and_minibatches(mode: str) -> None:
    problem, data = by_hand(), jax.random.normal(KEY, (20, 3))
    hyper = jax.tree.map(jnp.float32, HYPER)
    train = hg.Minibatches(data, 5, 14)

    def grads(checkpoint: Any) -> Any:
        estimator = hg.Unrolled(11, checkpoint)

        def run(key):
            return hg.hypergradient(problem, hyper, None, train, data[:4], key, estimator)

        return jax.jit(jax.vmap(run))(jax.random.split(KEY, 2)).grad

    assert relative_error(grads(mode), grads("none")) < 1e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["step", "log"])
def test_what_only_records_sends_nothing_back(mode: str) -> None:
    """A norm of 0, whose derivative is infinite: 0 times that was NaN under "log"."""

    def cubic(w: Any, penalty: Any, batch: Any) -> Any:
        return jnp.sum(batch * w**3) + penalty * w[0] ** 2

    class State(NamedTuple):
        params: Any
        norms: Any
        mean: Any

    def step(state: State, h: Any, batch: Any, key: Any) -> State:
        grads, _ = hg.inner_gradient(cubic)(state.params, h["l2"], batch)
        norms = state.norms + jnp.sqrt(jnp.sum((grads - grads) ** 2))
        # read by nothing but `evaluate`, at the end
        mean = 0.9 * state.mean + 0.1 * state.params
        return State(state.params - h["lr"] * grads, norms, mean)

    loss = lambda params, *_: jnp.sum(params**2)  # noqa: E731
    init = lambda h, key: State(jnp.array([1.0, 2.0]), jnp.zeros(()), jnp.zeros(2))  # noqa: E731
    problem = hg.Problem(init, step, loss, loss, evaluate=lambda state: state.mean)
    hyper, train = {"lr": 0.01, "l2": 0.3}, jnp.ones((9, 2))

    def run(mode: Any) -> Any:
        estimator = hg.Unrolled(checkpoint=mode)
        return hg.hypergradient(problem, hyper, None, train, jnp.ones(2), KEY, estimator).grad

    exact = run("none")
    assert relative_error(run(mode), exact) < 1e-12
    assert all(abs(float(x)) > 1e-3 for x in exact.values())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["step", "log"])
def test_log_with_a_python_number_in_the_state(mode: Any) -> None:
    """The scale of flax's DynamicScale, which a step makes a float32: refused by JAX under x64.

    And what is no array of JAX's: NumPy's, and a truth, in a start by hand.
    """

    class State(NamedTuple):
        params: Any
        scale: Any
        even: Any

    def step(state: State, h: Any, batch: Any, key: Any) -> State:
        scale = jnp.asarray(state.scale, jnp.float32)
        even = jnp.logical_not(state.even)
        grads, _ = hg.inner_gradient(lambda w, _, b: jnp.sum(w * b))(state.params, (), batch)
        return State(state.params - h["lr"] * scale * grads, scale, even)

    loss = lambda params, *_: jnp.sum(params**2)  # noqa: E731
    problem = hg.Problem(lambda h, key: State(np.ones(2), 2.0, True), step, loss, loss)
    run = lambda e: hg.hypergradient(problem, {"lr": 0.1}, None, jnp.ones(3), jnp.ones(()), KEY, e)  # noqa: E731
    ours = run(hg.Unrolled(checkpoint=mode)).grad["lr"]
    assert float(ours) == pytest.approx(4 * (1 - 0.6) * -6)


def test_what_a_loss_gives_beside_its_value_is_not_stored_where_no_update_reads_it() -> None:
    def fit(w: Any, h: Any, batch: Any, key: Any) -> Any:
        logits = jnp.outer(batch, jnp.full(1000, w))
        return jnp.mean(jnp.tanh(logits) ** 2) + h["l2"] * w**2, logits

    problem = hg.bilevel(lambda key: jnp.ones(()), fit, fit, lambda h: optax.sgd(h["lr"]))
    hyper, train = {"lr": jnp.float32(0.05), "l2": jnp.float32(0.01)}, jnp.ones((50, 20))
    inner, estimator = problem.init(hyper, KEY), hg.Unrolled(checkpoint="step")
    run = lambda h: hg.hypergradient(problem, h, inner, train, train[0], KEY, estimator).grad  # noqa: E731
    logits_of_one = 4 * 20 * 1000
    temporary = sizes(run, hyper)[1] * 4 * SIDE**2
    assert temporary < 5 * logits_of_one  # it held those of all 50


@pytest.mark.usefixtures("x64")
def test_gradients_inside_of_a_loop_are_taken_no_oftener() -> None:
    """The first part of a batch outside of the scan over the others: each update took them anew."""
    taken = []

    def fit(w: Any, h: Any, batch: Any) -> Any:
        def note(x: Any) -> Any:
            taken.append(x)
            return np.asarray(x)

        seen = jax.pure_callback(note, jax.ShapeDtypeStruct((), batch.dtype), batch)
        return jnp.tanh(w * seen) ** 2 + h["l2"] * w**2

    class State(NamedTuple):
        params: Any

    def step(state: State, h: Any, batch: Any, key: Any) -> State:
        gradient = lambda x: hg.inner_gradient(fit)(state.params, h, x)[0]  # noqa: E731
        add = lambda total, x: (total + gradient(x), None)  # noqa: E731
        total, _ = jax.lax.scan(add, gradient(batch[0]), batch[1:])
        return State(state.params - h["lr"] * total)

    loss = lambda w, *_: (w - 2.0) ** 2  # noqa: E731
    problem = hg.Problem(lambda h, key: State(jnp.ones(())), step, loss, loss)
    train, counts, grads = jnp.linspace(0.5, 1.5, 24).reshape(8, 3), [], []
    for mode in ("none", "step"):
        estimator = hg.Unrolled(checkpoint=mode)  # type: ignore[arg-type]
        hyper = {"lr": 0.1, "l2": 0.01}
        found = hg.hypergradient(problem, hyper, None, train, jnp.ones(()), KEY, estimator)
        grads.append(jax.block_until_ready(found.grad))
        counts.append(len(taken))
        taken.clear()
    assert relative_error(grads[1], grads[0]) < 1e-12
    assert counts[1] <= 2 * counts[0]


@pytest.mark.parametrize("mode", ["none", "step"])
def test_complex_parameters_warn_of_nothing(mode: Any) -> None:
    """Of a norm and of a zero, both real, that were handed on as complex numbers."""

    def fit(w: Any, h: Any, batch: Any, key: Any) -> Any:
        return jnp.mean(jnp.abs(batch @ w - 1) ** 2) + h["l2"] * jnp.sum(jnp.abs(w) ** 2)

    class State(NamedTuple):
        params: Any

    def run(mixed: bool, estimator: hg.Estimator) -> hg.Estimate:
        def step(state: State, h: Any, batch: Any, key: Any) -> State:
            gradient = hg.inner_gradient(fit, mixed_mode=mixed)
            grads, _ = gradient(state.params, h, batch, key)
            return State(state.params - h["lr"] * jnp.conj(grads))

        start = jnp.array([1 + 0.5j, -1j], jnp.complex64)
        problem = hg.Problem(lambda h, key: State(start), step, fit, fit)
        train = jnp.array([[1, 1j], [0.5, 2]], jnp.complex64) * jnp.ones((3, 1, 1))
        hyper = {"lr": 0.1, "l2": 0.01}
        return hg.hypergradient(problem, hyper, None, train, train[0], KEY, estimator)

    found, wanted = run(True, hg.Unrolled(checkpoint=mode)), run(False, hg.Unrolled())
    assert relative_error(found.grad, wanted.grad) < 1e-5
    assert found.info["growth"] == pytest.approx(float(wanted.info["growth"]), rel=1e-5)


def spike(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.sum((params - 1.0) ** 2) * jnp.mean(batch)


def test_what_is_refused_takes_back_the_hyperparameters_alone() -> None:
    plain = lambda p, h, b, k: jnp.sum((p - 1.0) ** 2)  # noqa: E731
    problem = hg.bilevel(lambda key: jnp.zeros(2), plain, spike, lambda h: optax.sgd(h["lr"]))
    train, fine = jnp.ones((3, 1)), jnp.ones(1)
    last, after = {}, {}
    for kind in ("all", "hyper"):
        rule = hg.Trust(warm_up=1, rewinds=kind)  # type: ignore[arg-type]
        tuner = hg.alternating(problem, SPACE, hg.Unrolled(), trust=rule)
        state = tuner.init({"lr": 1e-3}, KEY)
        for _ in range(4):
            state, info = tuner.update(state, train, fine)
            assert info.refused == 0
        last[kind] = state
        for bad, reason in ((1e6, NORM_SPIKE), (jnp.nan, NOT_FINITE)):
            once, info = tuner.update(state, train, bad * fine)
            assert info.refused == reason
            after[kind, reason] = once, tuner.update(once, train, bad * fine)[0]
    for reason in (NORM_SPIKE, NOT_FINITE):
        held, lean = after["all", reason], after["hyper", reason]
        for ours, theirs in zip(lean, held, strict=True):
            # The same hyperparameters, stood still and then rewound, and the same history.
            assert ours.now.unit == theirs.now.unit and ours.trust == theirs.trust
            assert jax.tree.leaves(ours.trusted.inner) == []
        assert lean[1].now.unit["lr"] != lean[0].now.unit["lr"]
        assert lean[0].inner.step == held[0].inner.step
        # Training went on from where the refused steps led.
        assert jnp.all(lean[0].inner.params > last["hyper"].inner.params)
        assert jnp.all(held[0].inner.params == last["all"].inner.params)


def test_rematerialised_blocks_compose_with_mixed_mode() -> None:
    """A model's own `jax.checkpoint` changes no hypergradient, and saves its memory."""
    width, depth = 16, 8

    def made(remat: bool) -> hg.Problem:
        def block(x: jax.Array, w: Any) -> jax.Array:
            return x + jnp.tanh(jnp.tanh(jnp.tanh(x @ w) * 0.5) @ w.T)

        step = jax.checkpoint(block) if remat else block

        def stacked(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
            out = jax.lax.scan(lambda x, w: (step(x, w), None), batch, params)[0]
            return jnp.mean((out - 1.0) ** 2) + hyper["l2"] * jnp.sum(params**2)

        init = lambda key: 0.1 * jax.random.normal(key, (depth, width, width))  # noqa: E731
        return hg.bilevel(init, stacked, stacked, lambda h: optax.sgd(h["lr"]))

    train = jax.random.normal(KEY, (3, 512, width))
    hyper = {"lr": jnp.float32(0.1), "l2": jnp.float32(1e-3)}
    found = {}
    for remat in (True, False):
        problem = made(remat)
        run = lambda h, p=problem: (  # noqa: E731
            hg.hypergradient(p, h, None, train, train[0], KEY).grad
        )
        compiled = jax.jit(run).lower(hyper).compile()
        found[remat] = compiled(hyper), compiled.memory_analysis().temp_size_in_bytes
    assert relative_error(found[True][0], found[False][0]) < 1e-4
    assert found[True][1] < 0.75 * found[False][1]
