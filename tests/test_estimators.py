"""Every exact estimator against closed forms, differences, the others, and the contract."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.estimators.base import compiled_estimate
from hypergrad.estimators.memory import temporary_bytes
from hypergrad.testing import EstimatorContract, momentum_quadratic, relative_error, ridge

EXACT = {
    "unrolled": hg.Unrolled(),
    "step": hg.Unrolled(checkpoint="step"),
    "sqrt": hg.Unrolled(checkpoint="sqrt"),
    "forward": hg.Forward(),
    "chunks": hg.Forward(chunk=4),
}


class TestUnrolled(EstimatorContract):
    estimator = hg.Unrolled()


class TestUnrolledStep(EstimatorContract):
    estimator = hg.Unrolled(checkpoint="step")


class TestUnrolledSqrt(EstimatorContract):
    estimator = hg.Unrolled(checkpoint="sqrt")


class TestForward(EstimatorContract):
    estimator = hg.Forward()


class TestForwardChunks(EstimatorContract):
    estimator = hg.Forward(chunk=4)  # of six hyperparameters: the second chunk is not full


class TestFiniteDifference(EstimatorContract):
    # differences in float32 carry two to four digits
    estimator = hg.FiniteDifference(5e-3)
    float32_tolerance = 2e-2


def hypergradient_of(oracle: Any, estimator: hg.Estimator) -> Any:
    arguments = (oracle.hyper, None, oracle.train, oracle.valid, oracle.key, estimator)
    return jax.jit(lambda: hg.hypergradient(oracle.problem, *arguments))()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("make", [ridge, momentum_quadratic])
def test_closed_forms(name: str, make: Any, dtype: Any) -> None:
    oracle = make()
    estimate = hypergradient_of(oracle, EXACT[name])
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-5
    assert relative_error(estimate.grad, oracle.grad) <= tolerance
    np.testing.assert_allclose(estimate.loss, oracle.loss, rtol=tolerance)


@pytest.mark.usefixtures("x64")
def test_differences_reach_the_closed_form() -> None:
    oracle = momentum_quadratic()
    estimate = hypergradient_of(oracle, hg.FiniteDifference())
    assert relative_error(estimate.grad, oracle.grad) <= 1e-8


def _digits_like(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random inputs with constant (zero) columns, as the digits have, and labels."""
    inputs = jax.random.normal(key, (24, 6)).at[:, jnp.array([0, 3])].set(0)
    return inputs, jax.random.randint(jax.random.fold_in(key, 1), (24,), 0, 3)


def _small_problem(optimizer: Any) -> hg.Problem:
    def forward(params: Any, inputs: jax.Array) -> jax.Array:
        return jnp.tanh(inputs @ params["w"] + params["b"]) @ params["v"]

    def cross_entropy(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        inputs, labels = batch
        logits = forward(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def init(key: jax.Array) -> Any:
        w, v = jax.random.normal(key, (2, 6, 6))
        return {"w": w / 2, "b": jnp.zeros(6), "v": v[:, :3] / 2}

    return hg.bilevel(init, cross_entropy, cross_entropy, optimizer)


# name: (optimiser from hyper, starting values). Every number given has a gradient.
OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "sgd": (lambda h: optax.sgd(h["lr"]), {"lr": 0.1}),
    "momentum": (lambda h: optax.sgd(h["lr"], momentum=h["m"]), {"lr": 0.1, "m": 0.9}),
    "nesterov": (
        lambda h: optax.sgd(h["lr"], momentum=h["m"], nesterov=True),
        {"lr": 0.1, "m": 0.9},
    ),
    "adam": (
        lambda h: optax.adam(h["lr"], b1=h["b1"], b2=h["b2"]),
        {"lr": 0.01, "b1": 0.9, "b2": 0.99},
    ),
    "adamw": (
        lambda h: optax.adamw(h["lr"], b1=h["b1"], b2=h["b2"], weight_decay=h["wd"]),
        {"lr": 0.01, "b1": 0.9, "b2": 0.99, "wd": 0.1},
    ),
    "rmsprop": (lambda h: optax.rmsprop(h["lr"], decay=h["d"]), {"lr": 0.01, "d": 0.9}),
    "adagrad": (lambda h: optax.adagrad(h["lr"]), {"lr": 0.1}),
    "lion": (lambda h: optax.lion(h["lr"], weight_decay=h["wd"]), {"lr": 0.01, "wd": 0.1}),
    "lamb": (
        lambda h: optax.lamb(h["lr"], b1=h["b1"], b2=h["b2"], weight_decay=h["wd"]),
        {"lr": 0.01, "b1": 0.9, "b2": 0.99, "wd": 0.1},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optax_optimisers_with_default_arguments(name: str, x64: None) -> None:
    make, hyper = OPTIMIZERS[name]
    problem = _small_problem(make)
    data, valid = _digits_like(jax.random.key(0)), _digits_like(jax.random.key(5))
    train = hg.Minibatches(data, 8, 12)
    # lion's sign flips under a large step; one that crosses no flip here is left with rounding
    lion = name == "lion"
    difference = hg.FiniteDifference(1e-6 if lion else 1e-5)
    estimators, key = (difference, hg.Unrolled(), hg.Forward()), jax.random.key(2)

    @jax.jit
    def all_of() -> Any:
        inner = problem.init(hyper, key)
        arguments = (problem, hyper, inner, train, valid, key)
        return [hg.hypergradient(*arguments, estimator).grad for estimator in estimators]

    grads = all_of()
    assert relative_error(grads[1], grads[0]) < (1e-5 if lion else 1e-6)
    assert relative_error(grads[2], grads[1]) < 1e-12


def test_adam_in_float32_is_finite_where_gradients_are_zero() -> None:
    make, hyper = OPTIMIZERS["adam"]
    problem = _small_problem(make)
    train = hg.Minibatches(_digits_like(jax.random.key(0)), 8, 6)
    valid = _digits_like(jax.random.key(5))
    reverse, forward = (
        jax.jit(
            lambda e=e: hg.hypergradient(problem, hyper, None, train, valid, jax.random.key(2), e)
        )()
        for e in (hg.Unrolled(), hg.Forward())
    )
    assert bool(reverse.info["finite"])
    assert relative_error(reverse.grad, forward.grad) < 1e-3


@pytest.mark.usefixtures("x64")
def test_window_one_is_t1_t2() -> None:
    """d/dl2 of one SGD step is -lr w, so the gradient is -lr grad E(w') . w (Luketina 2016)."""
    oracle = ridge(num_steps=3)
    estimate = hypergradient_of(oracle, hg.Unrolled(window=1))
    start = oracle.problem.init(oracle.hyper, oracle.key)
    before = hg.rollout(
        oracle.problem,
        oracle.hyper,
        start,
        jax.tree.map(lambda x: x[:2], oracle.train),
        oracle.key,
    )
    slope = jax.grad(oracle.problem.valid_loss)(
        estimate.inner.params, oracle.hyper, oracle.valid, None
    )
    np.testing.assert_allclose(
        estimate.grad["l2"], -0.2 * jnp.vdot(slope, before.params), rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("length", "at"), [(1, "last"), (2, "last"), (3, 2), (3, "mean")])
def test_a_run_cut_short_is_differentiated_where_it_ends(length: int, at: Any) -> None:
    """Training stood still in the window, so that its gradient was a zero that looked calm."""
    oracle, estimator = momentum_quadratic(8), hg.Unrolled(window=length, validate_at=at)
    inner = oracle.problem.init(oracle.hyper, oracle.key)
    steps = jax.tree.leaves(oracle.train)[0].shape[0]

    @jax.jit
    def found(train: Any, limit: int | None) -> hg.Estimate:
        window = hg.Window(oracle.problem, inner, train, oracle.valid, oracle.key)
        window = dataclasses.replace(window, limit=limit)
        return estimator.estimate(window, oracle.hyper, ())[0]

    whole = found(oracle.train, None)
    assert relative_error(found(oracle.train, steps).grad, whole.grad) == 0
    cut = found(oracle.train, steps - 2)
    shorter = found(jax.tree.map(lambda x: x[: steps - 2], oracle.train), None)
    assert relative_error(cut.grad, shorter.grad) < 1e-6
    assert relative_error(cut.inner.params, shorter.inner.params) < 1e-6
    assert relative_error(cut.grad, whole.grad) > 1e-3
    if length == 3:  # of which the last two stand still, where the first one led
        window = hg.Window(oracle.problem, inner, oracle.train[:1], oracle.valid, oracle.key)
        alone = jax.jit(hg.Unrolled().estimate)(window, oracle.hyper, ())[0]
        still = found(oracle.train, 1).grad
        if at == 2:
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-9), still, alone.grad
            )
        assert any(float(jnp.abs(g)) > 1e-3 for g in still.values())


def test_truncation_keeps_the_last_terms_only() -> None:
    """A window of 5 is the full unroll of the last 5 steps, from where the first ones led."""
    oracle = momentum_quadratic(12)
    head = oracle.train[:7]
    inner = oracle.problem.init(oracle.hyper, oracle.key)
    middle = hg.rollout(oracle.problem, oracle.hyper, inner, head, oracle.key)
    arguments = (oracle.train[7:], oracle.valid, oracle.key)
    tail = hg.hypergradient(oracle.problem, oracle.hyper, middle, *arguments)
    truncated = hypergradient_of(oracle, hg.Unrolled(window=5))
    assert relative_error(truncated.grad, tail.grad) < 1e-12
    assert relative_error(truncated.grad, oracle.grad) > 1e-2
    np.testing.assert_allclose(truncated.inner.params, tail.inner.params, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_truncation_bias_falls_by_the_slowest_direction() -> None:
    """(1 - lr mu)^K on a quadratic: of dw/dtarget = 1 - (1 - lr c)^T the window sees K terms."""
    curvature = jnp.array([0.3, 1.0, 2.0])
    problem = hg.bilevel(
        lambda key: jnp.zeros(3),
        lambda w, h, batch, key: 0.5 * jnp.sum(curvature * (w - h["target"]) ** 2),
        lambda w, h, batch, key: 0.5 * jnp.sum((w - 1) ** 2),
        lambda h: optax.sgd(0.1),
    )
    hyper, train = {"target": jnp.array([2.0, 3.0, -1.0])}, jnp.zeros((1200, 1))
    oracle = ridge(1)._replace(problem=problem, hyper=hyper, train=train)
    full = hypergradient_of(oracle, hg.Unrolled()).grad
    errors = [
        relative_error(hypergradient_of(oracle, hg.Unrolled(window=window)).grad, full)
        for window in (60, 160)
    ]
    slope = np.log(errors[1] / errors[0]) / 100
    assert slope == pytest.approx(np.log(1 - 0.1 * 0.3), rel=0.05)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [None, 4])
def test_carried_tangents_make_two_windows_one(chunk: int | None) -> None:
    oracle = momentum_quadratic(10)
    estimator = hg.Forward(carry=True, chunk=chunk)
    inner = oracle.problem.init(oracle.hyper, oracle.key)
    state = estimator.init(hg.Window(oracle.problem, inner, None, None, oracle.key), oracle.hyper)
    for half in (oracle.train[:5], oracle.train[5:]):
        window = hg.Window(oracle.problem, inner, half, oracle.valid, oracle.key)
        estimate, state = estimator.estimate(window, oracle.hyper, state)
        inner = estimate.inner
    assert relative_error(estimate.grad, oracle.grad) < 1e-10


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_state_whose_constructor_checks_its_parts_carries_tangents(chunk: int | None) -> None:
    """Tangents were once put into the state's own class, None for what has none."""

    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["params", "step"], meta_fields=[]
    )
    @dataclasses.dataclass(frozen=True)
    class Checked:
        params: jax.Array
        step: jax.Array

        def __post_init__(self) -> None:
            if self.step is None:
                raise ValueError("no step")

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum((w - batch) ** 2) + hyper["l2"] * jnp.sum(w**2)

    def step(inner: Checked, hyper: Any, batch: Any, key: Any) -> Checked:
        grads = jax.grad(loss)(inner.params, hyper, batch, key)
        return Checked(inner.params - hyper["rate"] * grads, inner.step + 1)

    problem = hg.Problem(lambda hyper, key: Checked(jnp.ones(2), jnp.int32(0)), step, loss, loss)
    hyper = {"rate": jnp.float32(0.1), "l2": jnp.float32(0.2)}
    key = jax.random.key(0)
    inner = problem.init(hyper, key)
    arguments = (problem, hyper, inner, jnp.zeros((3, 2)), jnp.full(2, 0.5), key)
    carried = hg.hypergradient(*arguments, hg.Forward(carry=True, chunk=chunk))
    assert relative_error(carried.grad, hg.hypergradient(*arguments).grad) < 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "estimator", [hg.Unrolled(validate_at="mean"), hg.Forward(validate_at="mean")]
)
def test_validation_at_the_window_mean(estimator: hg.Estimator) -> None:
    oracle = momentum_quadratic(8)
    differences = hypergradient_of(oracle, hg.FiniteDifference(validate_at="mean"))
    estimate = hypergradient_of(oracle, estimator)
    assert relative_error(estimate.grad, differences.grad) < 1e-8
    assert relative_error(estimate.grad, oracle.grad) > 1e-2
    inner = oracle.problem.init(oracle.hyper, oracle.key)
    points = []
    for t in range(8):
        inner = oracle.problem.step(inner, oracle.hyper, None, oracle.key)
        points.append(inner.params)
        del t
    mean = jnp.mean(jnp.stack(points), 0)
    np.testing.assert_allclose(estimate.loss, 0.5 * jnp.sum((mean - 1) ** 2), rtol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_two_windows_walk_as_one(name: str) -> None:
    """Keys and minibatches go on where the last window stopped."""
    problem = _small_problem(OPTIMIZERS["momentum"][0])
    hyper, key = OPTIMIZERS["momentum"][1], jax.random.key(3)
    data, valid = _digits_like(jax.random.key(0)), _digits_like(jax.random.key(5))

    @functools.partial(jax.jit, static_argnums=1)
    def advance(inner: Any, steps: int) -> Any:
        train = hg.Minibatches(data, 8, steps)
        return hg.hypergradient(problem, hyper, inner, train, valid, key, EXACT[name]).inner

    inner = problem.init(hyper, key)
    one, two = advance(inner, 10), advance(advance(inner, 5), 5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_bfloat16_parameters_have_float32_hypergradients() -> None:
    base = _small_problem(OPTIMIZERS["momentum"][0])
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    data, valid = _digits_like(jax.random.key(0)), _digits_like(jax.random.key(5))
    wide = base.init({"lr": 0.1, "m": 0.9}, jax.random.key(1))
    inner = wide._replace(params=narrow(wide.params), opt_state=narrow(wide.opt_state))
    train = hg.Minibatches(data, 8, 6)
    arguments = (train, valid, jax.random.key(2))
    reference = hg.hypergradient(base, {"lr": 0.1, "m": 0.9}, wide, *arguments).grad
    for estimator in (hg.Unrolled(), hg.Forward()):
        hyper = {"lr": jnp.bfloat16(0.1), "m": jnp.bfloat16(0.9)}
        estimate = hg.hypergradient(base, hyper, inner, *arguments, estimator)
        assert {g.dtype for g in jax.tree.leaves(estimate.grad)} == {jnp.dtype("float32")}
        assert estimate.inner.params["w"].dtype == jnp.bfloat16
        assert relative_error(estimate.grad, reference) < 0.2  # eight bits of mantissa


def test_growth_tells_chaos_from_calm() -> None:
    oracle = momentum_quadratic(30)
    calm = hypergradient_of(oracle, hg.Unrolled())
    np.testing.assert_allclose(calm.info["growth"], 1.0, rtol=1e-5)
    hyper = dict(oracle.hyper, learning_rate=jnp.float32(2.0))  # above 2 (1 + m) / c for c = 2
    wild = hg.hypergradient(oracle.problem, hyper, None, oracle.train, oracle.valid, oracle.key)
    assert float(wild.info["growth"]) > 100


@pytest.mark.parametrize(
    ("share", "checkpoint"), [(1.0, "none"), (0.99, "step"), (0.3, "sqrt"), (1e-3, "")]
)
def test_auto_takes_the_cheapest_checkpoint_that_fits(share: float, checkpoint: str) -> None:
    """Of 400 steps, in shares of what storing every step needs; asked inside a jit too."""
    problem = _small_problem(OPTIMIZERS["momentum"][0])
    hyper, key = jax.tree.map(jnp.float32, OPTIMIZERS["momentum"][1]), jax.random.key(3)
    train = hg.Minibatches(_digits_like(jax.random.key(0)), 8, 400)
    valid = _digits_like(jax.random.key(5))
    window = hg.Window(problem, problem.init(hyper, key), train, valid, key)
    whole = temporary_bytes(compiled_estimate(hg.Unrolled(), window, hyper))
    auto = hg.Unrolled(checkpoint="auto", memory_limit=int(share * whole))
    if not checkpoint:
        with pytest.raises(ValueError, match=r"memory_limit=\d+ bytes is too little"):
            auto.resolve(window, hyper)
        return
    assert auto.resolve(window, hyper) == hg.Unrolled(checkpoint=checkpoint)
    seen = []
    jax.jit(lambda *a: seen.append(auto.resolve(*a)))(window, hyper)
    assert seen == [hg.Unrolled(checkpoint=checkpoint)]


def test_auto_gives_the_same_hypergradient() -> None:
    oracle = momentum_quadratic()
    estimate = hypergradient_of(oracle, hg.Unrolled(checkpoint="auto"))
    assert relative_error(estimate.grad, oracle.grad) < 1e-5


def test_nan_batch_is_reported_with_its_step() -> None:
    oracle = ridge(num_steps=6)
    inputs, targets = oracle.train
    train = (inputs.at[4].set(jnp.nan), targets)
    arguments = (oracle.problem, oracle.hyper, None, train, oracle.valid, oracle.key)
    estimators = (*EXACT.values(), hg.Unrolled(window=1))
    for estimate in jax.jit(lambda: [hg.hypergradient(*arguments, e) for e in estimators])():
        assert not bool(estimate.info["finite"])
        assert int(estimate.info["first_bad_step"]) == 4


def test_wrong_arguments_are_named() -> None:
    oracle = momentum_quadratic(4)
    with pytest.raises(ValueError, match=r"window=5 exceeds the K=4 steps"):
        hypergradient_of(oracle, hg.Unrolled(window=5))
    with pytest.raises(ValueError, match=r"window=0 must be at least 1"):
        hg.Unrolled(window=0)
    with pytest.raises(ValueError, match=r"checkpoint='all' is unknown"):
        hg.Unrolled(checkpoint="all")
    with pytest.raises(ValueError, match=r"validate_at='first' is no place"):
        hg.Unrolled(validate_at="first")
    with pytest.raises(ValueError, match=r"validate_at=5 is not possible in a window of 4 steps"):
        hypergradient_of(oracle, hg.Unrolled(validate_at=5))
    with pytest.raises(ValueError, match=r"memory_limit=5 is read by checkpoint='auto' only"):
        hg.Unrolled(memory_limit=5)
    with pytest.raises(ValueError, match=r"chunk=0 must be at least 1"):
        hg.Forward(chunk=0)
    with pytest.raises(ValueError, match=r"step=0 must be positive"):
        hg.FiniteDifference(0)
    integer = oracle._replace(hyper=dict(oracle.hyper, learning_rate=1))
    with pytest.raises(ValueError, match=r"'learning_rate' is of dtype int32"):
        hypergradient_of(integer, hg.Unrolled())
    unused = oracle._replace(hyper=dict(oracle.hyper, width=1.0))
    with pytest.raises(ValueError, match=r"'width' never reaches the validation loss"):
        hypergradient_of(unused, hg.Unrolled())


def test_differences_in_float32_choose_their_step_by_the_noise() -> None:
    """At the default step the losses were equal to the last bit: an exact 0 was returned."""
    oracle = ridge(50)
    flat = lambda w, h, b, k: oracle.problem.valid_loss(w, h, b, k) + 100.0  # noqa: E731
    problem = oracle.problem._replace(valid_loss=flat)
    arguments = (oracle.hyper, None, oracle.train, oracle.valid, oracle.key)
    exact = float(hg.hypergradient(oracle.problem, *arguments).grad["l2"])
    near = hg.hypergradient(problem, *arguments, estimator=hg.FiniteDifference()).grad["l2"]
    assert abs(float(near) / exact - 1) < 0.05
    lost = problem._replace(valid_loss=lambda *a: oracle.problem.valid_loss(*a) + 1e7)
    estimate = hg.hypergradient(lost, *arguments, estimator=hg.FiniteDifference())
    assert jnp.isnan(estimate.grad["l2"]) and not bool(estimate.info["finite"])
    still = problem._replace(step=lambda inner, hyper, batch, key: inner._replace(
        params=inner.params + 0 * jnp.maximum(hyper["l2"] - 9, 0)
    ))  # fmt: skip
    estimate = hg.hypergradient(still, *arguments, estimator=hg.FiniteDifference())
    assert float(estimate.grad["l2"]) == 0.0
