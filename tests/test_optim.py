"""Rates adapted in the user's own loop, and numbers per layer, by closed forms and differences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.optim.transforms import decay_by_tree, hypergradient_descent, scale_by_tree
from hypergrad.testing import relative_error

CURVATURE = np.array([1.0, 2.0, 5.0])


def quadratic(w: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.asarray(CURVATURE, w.dtype) * (w - 1) ** 2)


def trained(optimizer: Any, loss: Any, params: Any, steps: int) -> tuple[Any, Any, jax.Array]:
    """(params, state, rates [steps]) after plain training with the value handed over."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value, grad=grads)
        rate = optax.tree.get(state, "learning_rate")
        return (optax.apply_updates(params, updates), state), rate

    run = jax.jit(lambda params, state: jax.lax.scan(step, (params, state), length=steps))
    (params, state), rates = run(params, optimizer.init(params))
    return params, state, rates


def baydin(
    rule: str, momentum: float, rate: float, beta: float, steps: int
) -> tuple[np.ndarray, list[float]]:
    """The rule written out in NumPy for momentum SGD, whose update's derivative is -velocity."""
    w, velocity, rates = np.zeros(3), np.zeros(3), []
    for _ in range(steps):
        grad = CURVATURE * (w - 1)
        if rule == "additive":
            rate = rate + beta * grad @ velocity
        elif np.any(velocity):
            sizes = np.linalg.norm(grad) * np.linalg.norm(velocity)
            rate = rate * np.exp(beta * grad @ velocity / sizes)
        velocity = grad + momentum * velocity
        w = w - rate * velocity
        rates.append(rate)
    return w, rates


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rates_are_those_of_the_paper(rule: str, momentum: float) -> None:
    """Also after the minimum is passed, where gradient and velocity disagree in sign."""
    beta = 3e-4 if rule == "additive" else 0.03
    optimizer = hypergradient_descent(
        lambda rate: optax.sgd(rate, momentum=momentum), 0.05, beta, rule=rule
    )
    w, _, rates = trained(optimizer, quadratic, jnp.zeros(3), 15)
    expected_w, expected_rates = baydin(rule, momentum, 0.05, beta, 15)
    np.testing.assert_allclose(rates, expected_rates, rtol=1e-12)
    np.testing.assert_allclose(w, expected_w, rtol=1e-12)
    falls = np.diff(expected_rates) < 0
    assert falls.any() == (momentum > 0) and not falls.all()
    assert max(expected_rates) > 1.05 * expected_rates[0]


FACTORIES: dict[str, Any] = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.1),
    "lars": lambda rate: optax.lars(rate, momentum=0.9),
    # not linear in the rate, and in need of the loss
    "momo": lambda rate: optax.contrib.momo(rate, lower_bound=-10.0),
    "trapezoid": lambda rate: optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(rate), optax.scale_by_learning_rate(rate)
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FACTORIES)
def test_the_rate_follows_the_gradient_of_the_loss_one_step_on(name: str) -> None:
    """Against reverse mode through the last step as a whole."""
    factory, beta = FACTORIES[name], 1e-3
    optimizer = hypergradient_descent(factory, 0.05, beta)
    w, state, _ = trained(optimizer, quadratic, jnp.array([0.2, 3.0, 0.5]), 3)
    value, grads = jax.value_and_grad(quadratic)(w)
    rate = state.learning_rate - beta * jnp.vdot(grads, state.tangent)

    def next_loss(rate: jax.Array) -> jax.Array:
        plain = optax.with_extra_args_support(factory(rate))
        updates = plain.update(grads, state.optimizer_state, w, value=value, grad=grads)[0]
        return quadratic(w + updates)

    updates, after = optimizer.update(grads, state, w, value=value, grad=grads)
    np.testing.assert_allclose(after.learning_rate, rate, rtol=1e-12)
    grads_next = jax.grad(quadratic)(w + updates)
    slope = jax.grad(next_loss)(after.learning_rate)
    assert abs(float(slope)) > 1e-3
    np.testing.assert_allclose(jnp.vdot(grads_next, after.tangent), slope, rtol=1e-10)


def logistic(params: Any) -> jax.Array:
    """Logistic regression with 60 labels, two constant columns, and 5% of the labels wrong."""
    key = jax.random.key(4)
    inputs = jax.random.normal(key, (60, 6)).at[:, jnp.array([0, 3])].set(0)
    labels = (inputs @ jnp.arange(6.0) > 0) ^ (jnp.arange(60) % 20 == 0)
    logits = inputs @ params["w"] + params["b"]
    losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
    return jnp.mean(losses) + 0.005 * jnp.sum(params["w"] ** 2)


START = {"w": jnp.zeros(6), "b": jnp.zeros(())}


def excess(optimizer: Any, steps: int = 200) -> float:
    """How far above the best loss training ends."""
    best = trained(hypergradient_descent(optax.sgd, 1.0, 1e-9), logistic, START, 2000)[0]
    return float(logistic(trained(optimizer, logistic, START, steps)[0]) - logistic(best))


@pytest.mark.parametrize(
    "factory, rate, beta, rule",
    [
        (optax.sgd, 1e-4, 0.5, "additive"),
        (optax.sgd, 1e-4, 0.1, "multiplicative"),
        (lambda rate: optax.sgd(rate, momentum=0.9), 1e-5, 0.1, "multiplicative"),
        (optax.adam, 1e-6, 1e-3, "additive"),
        (optax.adam, 1e-6, 0.1, "multiplicative"),
        (optax.sign_sgd, 3.0, 0.1, "multiplicative"),  # far too high: it jumps about
    ],
    ids=["sgd additive", "sgd", "momentum", "adam additive", "adam", "too high"],
)
def test_a_bad_rate_is_mended(factory: Any, rate: float, beta: float, rule: str) -> None:
    adapted = excess(hypergradient_descent(factory, rate, beta, rule=rule))
    plain = excess(hypergradient_descent(factory, rate, 1e-12, rule="multiplicative"))
    assert 0 <= adapted + 1e-6 < 0.03 * plain


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("factory", [optax.adam, optax.sgd], ids=["adam", "sgd"])
def test_the_multiplicative_rule_knows_no_scale(factory: Any) -> None:
    """A loss times 1000: under Adam the same rates, under SGD the same if it starts 1000 lower."""
    scale = 1000.0
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), START)
    lower = 1.0 if factory is optax.adam else scale
    rates = [
        trained(
            hypergradient_descent(factory, 1e-3 / low, 0.05, "multiplicative"),
            lambda params, c=c: c * logistic(params),
            start,
            30,
        )[2]
        * low
        for c, low in ((1.0, 1.0), (scale, lower))
    ]
    assert float(rates[0][-1]) > 2e-3
    np.testing.assert_allclose(rates[1], rates[0], rtol=1e-4)  # Adam's own eps has a scale


def test_gradients_of_zero_leave_everything_finite() -> None:
    """Two columns are constant; then the whole gradient is zero, from the first step on."""
    for rule in ("additive", "multiplicative"):
        optimizer = hypergradient_descent(optax.adam, 1e-2, 1e-2, rule=rule)
        params, state, _ = trained(optimizer, logistic, START, 5)
        assert jnp.isfinite(params["w"]).all() and jnp.isfinite(state.learning_rate)
        flat, state, rates = trained(optimizer, lambda p: 0.0 * jnp.sum(p["w"]), START, 3)
        np.testing.assert_array_equal(rates, np.full(3, 1e-2, np.float32))
        np.testing.assert_array_equal(flat["w"], START["w"])


def test_the_additive_rate_stops_at_its_floor() -> None:
    """Training with a negative rate would climb; at the floor it waits for agreement."""
    for floor in (0.0, 1e-3):
        optimizer = hypergradient_descent(optax.sgd, 0.01, 0.1, min_learning_rate=floor)
        state, rates = optimizer.init(jnp.zeros(1)), []
        for grad in (1.0, -1.0, 1.0, 1.0):
            _, state = optimizer.update(jnp.array([grad]), state)
            rates.append(float(state.learning_rate))
        np.testing.assert_allclose(rates, [0.01, floor, floor, floor + 0.1], rtol=1e-6)


def test_dtypes_are_kept_and_one_compilation_serves() -> None:
    """bfloat16 parameters, a chain, extra arguments, and the rate in float32."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        hypergradient_descent(FACTORIES["momo"], 0.01, 0.05, rule="multiplicative"),
    )
    traces = []

    @jax.jit
    def step(w: jax.Array, state: Any) -> Any:
        traces.append(1)
        value, grads = jax.value_and_grad(quadratic)(w)
        updates, state = optimizer.update(grads, state, w, value=value.astype(jnp.float32))
        assert updates.dtype == w.dtype
        return optax.apply_updates(w, updates), state

    w = jnp.zeros(3, jnp.bfloat16)
    state = optimizer.init(w)
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    for _ in range(4):
        w, state = step(w, state)
    assert len(traces) == 1
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    rate = optax.tree.get(state, "learning_rate")
    assert rate.dtype == jnp.float32 and not rate.weak_type and float(rate) != 0.01


def test_members_of_a_population_have_rates_of_their_own() -> None:
    starts = jnp.array([0.001, 0.1])

    def run(rate: jax.Array) -> jax.Array:
        optimizer = hypergradient_descent(optax.adam, rate, 0.05, rule="multiplicative")
        return trained(optimizer, logistic, START, 10)[2]

    together = jax.vmap(run)(starts)
    np.testing.assert_allclose(together, [run(starts[0]), run(starts[1])], rtol=1e-5)


def test_groups_have_rates_of_their_own() -> None:
    adaptive = lambda rate: hypergradient_descent(optax.adam, rate, 0.05, "multiplicative")  # noqa: E731
    optimizer = optax.partition({"w": adaptive(1e-3), "b": adaptive(1e-2)}, {"w": "w", "b": "b"})
    optimizer = optax.with_extra_args_support(optimizer)
    params, state = START, optimizer.init(START)
    step = jax.jit(optimizer.update)
    for _ in range(5):
        updates, state = step(jax.grad(logistic)(params), state, params)
        params = optax.apply_updates(params, updates)
    rates = [state.inner_states[name].inner_state.learning_rate for name in ("w", "b")]
    assert rates[0] > 1.1e-3 and rates[1] != 1e-2 and rates[1] > 5 * rates[0]


def test_keys_in_the_state_and_steps_that_are_not_finite() -> None:
    noisy = hypergradient_descent(lambda rate: optax.noisy_sgd(rate, key=3), 0.01, 0.01)
    assert float(trained(noisy, quadratic, jnp.zeros(3), 5)[2][-1]) != 0.01
    optimizer = optax.apply_if_finite(hypergradient_descent(optax.adam, 0.01, 0.01), 5)
    state = optimizer.init(jnp.zeros(3))
    for grads in (jnp.ones(3), jnp.full(3, jnp.nan), jnp.ones(3)):
        _, state = optimizer.update(grads, state, jnp.zeros(3))
    assert float(optax.tree.get(state, "learning_rate")) > 0.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_its_own_numbers_have_hypergradients(rule: str) -> None:
    problem, train, valid = two_layers(
        lambda h: hypergradient_descent(optax.adam, h["first"], h["beta"], rule=rule)
    )
    beta = 1e-3 if rule == "additive" else 0.1
    assert agreement(problem, {"first": 0.01, "beta": beta}, train, valid) < 1e-6


def test_wrong_arguments_of_hypergradient_descent_are_named() -> None:
    for arguments, message in (
        ((optax.sgd, 0.1, 0.1, "mixed"), "rule='mixed' is unknown"),
        ((optax.sgd, 0.0, 0.1), "learning_rate=0.0 must be positive"),
        ((optax.sgd, 0.1, -1.0), "hyper_learning_rate=-1.0 must be positive"),
        ((optax.sgd, optax.constant_schedule(0.1), 0.1), "learning_rate=.*is a schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            hypergradient_descent(*arguments)
    for factory in (optax.rprop, optax.inject_hyperparams(optax.sgd)):
        optimizer = hypergradient_descent(factory, 0.1, 0.1)
        with pytest.raises(ValueError, match="would never be adapted"):
            optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)), jnp.ones(3))


def two_layers(optimizer: Any) -> tuple[hg.Problem, Any, Any]:
    """(a network with two layers and constant columns, 8 training batches, a validation batch)."""

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        hidden = jnp.tanh(batch @ params["body"]["w"] + params["body"]["b"])
        return jnp.mean((hidden @ params["head"]["w"] - jnp.sin(batch.sum(-1))) ** 2)

    def init(key: jax.Array) -> Any:
        w, v = jax.random.normal(key, (2, 4, 4)) / 2
        return {"body": {"w": w, "b": jnp.zeros(4)}, "head": {"w": v[0]}}

    train, valid = (
        jax.random.normal(jax.random.key(seed), shape).at[..., 2].set(0)
        for seed, shape in ((0, (8, 6, 4)), (1, (20, 4)))
    )
    return hg.bilevel(init, loss, loss, optimizer), train, valid


def agreement(problem: hg.Problem, hyper: Any, train: Any, valid: Any) -> float:
    """The relative error of reverse mode against differences."""
    hyper = jax.tree.map(jnp.asarray, hyper)
    ours, differences = jax.jit(
        lambda hyper: [
            hg.hypergradient(problem, hyper, None, train, valid, jax.random.key(2), e).grad
            for e in (hg.Unrolled(), hg.FiniteDifference())
        ]
    )(hyper)
    return relative_error(ours, differences)


def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


LAYERS: dict[str, tuple[Any, Any]] = {
    "multi_transform": (
        lambda h: optax.multi_transform(
            {
                "body": optax.sgd(h["body"]["lr"], momentum=h["body"]["momentum"]),
                "head": optax.adam(h["head"]["lr"], b1=h["head"]["b1"]),
            },
            labels,
        ),
        {"body": {"lr": 0.1, "momentum": 0.9}, "head": {"lr": 0.03, "b1": 0.8}},
    ),
    "per layer": (
        lambda h: optax.chain(optax.scale_by_adam(), scale_by_tree(h["rates"]), optax.scale(-1.0)),
        {"rates": {"body": 0.01, "head": 0.03}},
    ),
    "per weight": (
        lambda h: optax.chain(optax.sgd(1.0, momentum=0.9), scale_by_tree(h["rates"])),
        {
            "rates": {
                "body": {"w": np.linspace(0.01, 0.02, 16).reshape(4, 4), "b": 0.01},
                "head": 0.1,
            }
        },
    ),
    "masked weight decay": (
        lambda h: optax.adamw(
            h["lr"],
            weight_decay=h["decay"],
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
        {"lr": 0.01, "decay": 0.1},
    ),
    "weight decay per layer": (
        lambda h: optax.chain(
            optax.scale_by_adam(), decay_by_tree(h["decay"]), optax.scale_by_learning_rate(0.03)
        ),
        {"decay": {"body": {"w": 0.1, "b": 0.2}, "head": {"w": np.linspace(0.1, 0.4, 4)}}},
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LAYERS)
def test_numbers_per_layer_have_hypergradients(name: str) -> None:
    optimizer, hyper = LAYERS[name]
    assert agreement(two_layers(optimizer)[0], hyper, *two_layers(optimizer)[1:]) < 1e-6


def test_a_tree_that_does_not_fit_is_named() -> None:
    params = {"body": jnp.ones((2, 2)), "head": jnp.ones(2)}
    for tree, message in (
        ({"body": 1.0}, r"rates with leaves \['body'\] does not fit .* \['body', 'head'\]"),
        ({"body": jnp.ones(3), "head": 1.0}, r"shape \(3,\) does not broadcast to \(2, 2\)"),
        ({"body": 1.0, "head": jnp.ones((2, 2))}, r"shape \(2, 2\) does not broadcast to \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_by_tree(tree).update(params, optax.EmptyState())
    with pytest.raises(ValueError, match="params=None: decay needs them"):
        decay_by_tree(0.1).update(params, optax.EmptyState())
    narrow, _ = scale_by_tree({"body": jnp.float32(2), "head": 1.0}).update(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), optax.EmptyState()
    )
    assert narrow["body"].dtype == jnp.bfloat16
