"""Schedules with a gradient in every number: values, derivatives, edges, and FDS on top of them."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.optim.schedules import (
    exponential_decay,
    piecewise_constant,
    piecewise_cosine,
    piecewise_linear,
    polynomial_decay,
    warmup_cosine,
)
from hypergrad.testing import relative_error

STEPS = jnp.arange(0, 60)
# name: (ours from its numbers, the numbers, optax's own of the same numbers)
SAME: dict[str, tuple[Any, tuple[Any, ...], Callable[..., Any]]] = {
    "warmup_cosine": (
        warmup_cosine,
        (0.3, 10, 50, 0.01, 0.02),
        lambda peak, warmup, decay, floor, start: optax.warmup_cosine_decay_schedule(
            start, peak, warmup, decay, floor
        ),
    ),
    "no warm-up": (
        warmup_cosine,
        (0.3, 0, 50, 0.01, 0.02),
        lambda peak, warmup, decay, floor, start: optax.warmup_cosine_decay_schedule(
            start, peak, warmup, decay, floor
        ),
    ),
    "exponential_decay": (
        exponential_decay,
        (0.3, 0.7, 13),
        lambda initial, rate, steps: optax.exponential_decay(initial, steps, rate),
    ),
    "growth": (
        exponential_decay,
        (0.3, 1.7, 13),
        lambda initial, rate, steps: optax.exponential_decay(initial, steps, rate),
    ),
    "linear": (
        lambda a, b, steps: piecewise_linear([a, b], steps),
        (0.3, 0.1, 50),
        optax.linear_schedule,
    ),
    "linear, several legs": (
        lambda a, b, c: piecewise_linear([a, b, c], positions=[0, 10, 50]),
        (0.3, 0.1, 0.2),
        lambda a, b, c: optax.piecewise_interpolate_schedule("linear", a, {10: b / a, 50: c / b}),
    ),
    "constant": (
        lambda *values: piecewise_constant(values, 20),
        (0.3, 0.03, 0.06),
        lambda a, b, c: optax.join_schedules(
            [optax.constant_schedule(x) for x in (a, b, c)], [20, 40]
        ),
    ),
    "cosine with an exponent": (
        warmup_cosine,
        (0.3, 0, 50, 0.03, 0.0, 1.5),
        lambda peak, _, steps, floor, __, exponent: optax.cosine_decay_schedule(
            peak, steps, floor / peak, exponent
        ),
    ),
    "exponential_decay, all": (
        exponential_decay,
        (0.3, 0.7, 7, 5, 0.1),
        lambda initial, rate, steps, begin, end: optax.exponential_decay(
            initial, steps, rate, begin, end_value=end
        ),
    ),
    "staircase": (
        lambda *numbers: exponential_decay(*numbers, staircase=True),
        (0.3, 0.7, 7, 5),
        lambda initial, rate, steps, begin: optax.exponential_decay(
            initial, steps, rate, begin, staircase=True
        ),
    ),
    "polynomial": (polynomial_decay, (0.3, 0.1, 2.5, 30, 5), optax.polynomial_schedule),
    "warm-up, then exponential": (
        lambda start, peak, warmup, steps, rate: optax.join_schedules(
            [piecewise_linear([start, peak], warmup), exponential_decay(peak, rate, steps)],
            [warmup],
        ),
        (0.01, 0.3, 8, 20, 0.4),
        optax.warmup_exponential_decay_schedule,
    ),
    "warm-up, then constant": (
        lambda *numbers: piecewise_linear(numbers[:2], numbers[2]),
        (0.01, 0.3, 8),
        optax.warmup_constant_schedule,
    ),
    "one cycle of lines": (
        lambda peak, start, end, third: piecewise_linear(
            jnp.stack([peak / start, peak, peak / start, peak / start / end]),
            positions=jnp.array([0, third, 2 * third, 50]),
        ),
        (0.3, 25, 100, 20),
        lambda peak, start, end, third: optax.linear_onecycle_schedule(
            50, peak, third / 50, 2 * third / 50, start, end
        ),
    ),
    "one cycle of cosines": (
        lambda peak, start, end, third: piecewise_cosine(
            jnp.stack([peak / start, peak, peak / start / end]),
            positions=jnp.array([0, third, 50]),
        ),
        (0.3, 25, 100, 20),
        lambda peak, start, end, third: optax.cosine_onecycle_schedule(
            50, peak, third / 50, start, end
        ),
    ),
    "warm restarts": (
        lambda peak, warmup, steps: optax.join_schedules(
            [warmup_cosine(peak, warmup, steps)] * 2, [steps]
        ),
        (0.3, 5, 30),
        lambda peak, warmup, steps: optax.sgdr_schedule(
            [{"init_value": 0.0, "peak_value": peak, "warmup_steps": warmup, "decay_steps": steps}]
            * 2
        ),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_values_are_those_of_optax(name: str) -> None:
    """With the numbers known, and with all of them traced, which optax's own refuse."""
    ours, numbers, theirs = SAME[name]
    expected, known = jax.jit(
        lambda: [jax.vmap(make(*numbers))(STEPS) for make in (theirs, ours)]
    )()
    traced = jax.jit(lambda *numbers: jax.vmap(ours(*numbers))(STEPS))(*map(float, numbers))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(known, expected, rtol=2e-6, atol=1e-8)
    np.testing.assert_allclose(traced, expected, rtol=2e-6, atol=1e-8)


# name: (schedule from one flat vector of numbers, the numbers). No step lies on a kink.
SMOOTH: dict[str, tuple[Callable[[jax.Array], Any], list[float]]] = {
    "warmup_cosine": (lambda x: warmup_cosine(*x), [0.3, 9.5, 51.5, 0.01, 0.02]),
    "exponential_decay": (lambda x: exponential_decay(*x), [0.3, 0.7, 13.0]),
    "evenly spread": (lambda x: piecewise_linear(x[:4], x[4]), [0.3, 0.1, 0.5, 0.2, 50.5]),
    "positions": (
        lambda x: piecewise_linear(x[:3], positions=x[3:]),
        [0.3, 0.1, 0.5, 4.5, 20.5, 50.5],
    ),
    "vectors": (
        lambda x: piecewise_linear(x[:6].reshape(3, 2), positions=x[6:]),
        [0.3, 0.1, 0.5, 0.7, 0.1, 0.2, 4.5, 20.5, 50.5],
    ),
    "constant": (lambda x: piecewise_constant(x, 20), [0.3, 0.1, 0.5]),
    "cosine's exponent": (lambda x: warmup_cosine(*x), [0.3, 9.5, 51.5, 0.01, 0.02, 1.3]),
    "decay's begin and end": (lambda x: exponential_decay(*x), [0.3, 0.7, 7.0, 5.5, 0.1]),
    "polynomial": (lambda x: polynomial_decay(*x), [0.3, 0.1, 0.7, 30.2, 5.5]),
    "cosines": (
        lambda x: piecewise_cosine(x[:3], positions=x[3:]),
        [0.3, 0.1, 0.5, 4.5, 20.5, 50.5],
    ),
    "joined": (
        lambda x: optax.join_schedules(
            [piecewise_linear(x[:2], x[2]), exponential_decay(x[1], 0.7, 9.0)], [x[2]]
        ),
        [0.1, 0.3, 8.5],
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_in_each_number(name: str) -> None:
    make, numbers = SMOOTH[name]
    x = jnp.array(numbers)
    weights = jnp.cos(jnp.arange(60.0))  # so that no derivative cancels over the steps

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tensordot(weights, jax.vmap(make(x))(STEPS), 1))

    reverse, forward = jax.jit(lambda x: (jax.grad(total)(x), jax.jacfwd(total)(x)))(x)
    run = jax.jit(total)
    differences = []
    for i, value in enumerate(numbers):
        up, down = (x.at[i].add(s * 1e-6 * value) for s in (1, -1))
        differences.append((run(up) - run(down)) / (up[i] - down[i]))
    assert min(abs(float(d)) for d in differences) > 1e-4
    np.testing.assert_allclose(reverse, jnp.stack(differences), rtol=1e-6)
    np.testing.assert_allclose(forward, reverse, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_derivative_on_a_kink_is_the_mean_of_both_sides() -> None:
    """Lengths and positions are mostly whole numbers, so steps do fall on knots."""
    cases = [
        (lambda x: warmup_cosine(0.3, x, 50.0), 10.0, 10),
        (lambda x: warmup_cosine(0.3, 10.0, x), 50.0, 50),
        (lambda x: piecewise_linear([0.3, 0.1, 0.5], x), 20.0, 10),
        (lambda x: piecewise_linear([0.3, 0.1, 0.5], x), 20.0, 20),
        (lambda x: piecewise_linear([0.3, 0.1, 0.5], positions=[0.0, x, 20.0]), 10.0, 10),
        (lambda x: piecewise_linear([0.3, 0.1, 0.5], positions=[x, 10.0, 20.0]), 0.0, 0),
    ]

    def pairs() -> list[tuple[Any, Any]]:
        return [
            (
                jax.grad(lambda x, make=make, step=step: make(x)(step))(x),
                (make(x + 1e-6)(step) - make(x - 1e-6)(step)) / 2e-6,
            )
            for make, x, step in cases
        ]

    slopes, differences = np.array(jax.jit(pairs)()).T
    np.testing.assert_allclose(slopes, differences, rtol=1e-5, atol=1e-8)
    assert np.sum(np.abs(slopes) > 1e-4) == 5  # a cosine ends flat


def test_no_edge_gives_nan() -> None:
    """Values and gradients stay finite where a length is zero, negative or out of order."""
    edges = [
        (lambda x: warmup_cosine(*x), [0.3, 0.0, 50.0, 0.01, 0.02]),
        (lambda x: warmup_cosine(*x), [0.3, 10.0, 10.0, 0.01, 0.02]),
        (lambda x: warmup_cosine(*x), [0.3, 10.0, 5.0, 0.01, 0.02]),
        (lambda x: exponential_decay(*x), [0.3, 0.5, 0.0]),
        (lambda x: exponential_decay(*x), [0.0, 0.5, 10.0]),
        (lambda x: piecewise_linear(x[:3], x[3]), [0.3, 0.1, 0.5, 0.0]),
        (lambda x: piecewise_linear(x[:3], positions=x[3:]), [0.3, 0.1, 0.5, 0.0, 20.0, 20.0]),
        (lambda x: piecewise_linear(x[:3], positions=x[3:]), [0.3, 0.1, 0.5, 20.0, 10.0, 0.0]),
    ]
    curves = []
    for make, numbers in edges:

        @jax.jit
        def run(x: jax.Array, make: Any = make) -> Any:
            curve = lambda x: jax.vmap(make(x))(STEPS)  # noqa: E731
            return curve(x), jax.jacfwd(curve)(x), jax.vjp(curve, x)[1](jnp.cos(STEPS))[0]

        curve, *slopes = run(jnp.array(numbers))
        assert all(jnp.isfinite(x).all() for x in (curve, *slopes))
        assert curve.min() >= 0 and curve.max() <= 0.5 + 1e-6
        curves.append(curve)
    no_warmup, no_decay, crossed = (np.asarray(curves[i]) for i in (0, 2, 7))
    np.testing.assert_allclose(no_warmup[0], 0.3, rtol=1e-6)
    np.testing.assert_allclose(no_decay[[5, 10]], [0.16, 0.01], rtol=1e-6)
    np.testing.assert_allclose(crossed[[19, 20]], [0.3, 0.5], rtol=1e-6)
    jump = piecewise_linear([1.0, 1.0, 0.1, 0.1], positions=[0, 10, 10, 20])
    np.testing.assert_allclose([jump(9), jump(10)], [1.0, 0.1], rtol=1e-6)


def test_a_small_last_value_keeps_its_digits() -> None:
    """Adding up differences would leave 1e-7 of the peak in it."""
    assert float(piecewise_linear([1e-7, 1.0, 1e-9], 20)(99)) == np.float32(1e-9)
    assert float(warmup_cosine(1.0, 5, 20, floor=1e-9)(99)) == np.float32(1e-9)


def test_wrong_arguments_are_named() -> None:
    for make, message in (
        (lambda: piecewise_linear([1.0, 2.0]), "num_steps=None and positions=None: give one"),
        (lambda: piecewise_linear([1.0, 2.0], 5, positions=[0, 1]), "give one of the two"),
        (lambda: piecewise_linear([1.0], 5), r"shape \(1,\) need a leading axis of at least 2"),
        (lambda: piecewise_linear(1.0, 5), r"shape \(\) need a leading axis"),
        (lambda: piecewise_linear([1.0, 2.0], 0), "num_steps=0 must be positive"),
        (lambda: piecewise_linear([1.0, 2.0], positions=[1, 2, 3]), r"\(3,\) for 2 knots"),
        (lambda: piecewise_linear([1.0, 2.0], positions=[3, 2]), "decrease: sort them"),
        (lambda: piecewise_constant([1.0], 0), "steps_each=0 must be at least 1"),
        (lambda: piecewise_constant([1.0], 2.5), "piecewise_linear"),
        (
            lambda: jax.jit(lambda n: piecewise_constant([1.0], n)(0))(3),
            "is no integer",
        ),
        (lambda: piecewise_constant(1.0, 3), "leading axis of windows"),
        (lambda: warmup_cosine(0.1, -1, 5), "warmup_steps=-1 must be 0 or more"),
        (lambda: warmup_cosine(0.1, 5, 5), "decay_steps=5 must exceed warmup_steps=5"),
        (lambda: exponential_decay(1.0, 0.0, 5), r"rate=0.0 must be positive"),
        (lambda: exponential_decay(1.0, 0.5, 0), "transition_steps=0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def blobs(optimizer: Any) -> tuple[hg.Problem, Any, Any]:
    """(logistic regression, 20 training batches, a validation batch)."""

    def batch(key: jax.Array, shape: tuple[int, ...]) -> Any:
        labels = jax.random.bernoulli(key, 0.5, shape).astype(float)
        noise = jax.random.normal(jax.random.fold_in(key, 1), (*shape, 4))
        return (2 * labels[..., None] - 1) * jnp.arange(1.0, 5.0) / 4 + noise, labels

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        inputs, labels = batch
        logits = inputs @ params["w"] + params["b"]
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    init = lambda key: {"w": jnp.zeros(4), "b": jnp.zeros(())}  # noqa: E731
    train, valid = batch(jax.random.key(0), (20, 8)), batch(jax.random.key(1), (64,))
    return hg.bilevel(init, loss, loss, optimizer), train, valid


# name: (optimiser from nested hyper, start): every number of the schedule has a hypergradient
NESTED: dict[str, tuple[Any, Any]] = {
    "warmup_cosine": (
        lambda h: optax.adamw(
            warmup_cosine(h["lr"]["peak"], h["lr"]["warmup"], h["lr"]["decay"], h["lr"]["floor"]),
            weight_decay=h["wd"],
        ),
        {"lr": {"peak": 0.1, "warmup": 4.5, "decay": 18.5, "floor": 0.01}, "wd": 0.1},
    ),
    "exponential_decay": (
        lambda h: optax.sgd(exponential_decay(h["lr"], h["rate"], h["steps"]), momentum=0.9),
        {"lr": 0.1, "rate": 0.5, "steps": 10.0},
    ),
    "positions": (
        lambda h: optax.sgd(piecewise_linear(jnp.stack(h["values"]), positions=jnp.stack(h["at"]))),
        {"values": [0.1, 1.0, 0.2], "at": [1.5, 6.5, 17.5]},
    ),
    "weight decay": (
        lambda h: optax.chain(
            optax.add_decayed_weights(piecewise_constant(jnp.stack(h["wd"]), 7)), optax.sgd(0.3)
        ),
        {"wd": [0.1, 0.2, 0.3]},
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NESTED)
def test_hypergradient_through_a_schedule(name: str) -> None:
    optimizer, hyper = NESTED[name]
    problem, train, valid = blobs(optimizer)
    ours, differences = jax.jit(
        lambda: [
            hg.hypergradient(problem, hyper, None, train, valid, jax.random.key(2), e).grad
            for e in (hg.Unrolled(), hg.FiniteDifference())
        ]
    )()
    assert relative_error(ours, differences) < 1e-6


def test_fds() -> None:
    """Forward mode over shared rates, whole runs, sign steps that halve on a flip: rprop."""
    problem, train, valid = blobs(lambda h: optax.sgd(piecewise_constant(h["rates"], 5)))
    hyper = {"rates": jnp.full(4, 0.05)}
    arguments = (hyper, None, train, valid, jax.random.key(2))
    forward, reverse = jax.jit(
        lambda: [
            hg.hypergradient(problem, *arguments, e).grad["rates"]
            for e in (hg.Forward(), hg.Unrolled())
        ]
    )()
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)
    fds = optax.rprop(0.1, eta_minus=0.5, eta_plus=1.0)
    space = hg.Space({"rates": hg.Float(1e-3, 10.0, scale="log")})
    tuner = hg.restarting(problem, space, hg.Forward(), outer_optimizer=fds)
    state, update = tuner.init(hyper, jax.random.key(2)), jax.jit(tuner.update)
    infos = []
    for _ in range(15):
        state, info = update(state, train, valid)
        infos.append(info)
    assert max(int(info.refused) for info in infos) == 0
    untrained = np.log(2)
    assert untrained - infos[-1].loss > 1.5 * (untrained - infos[0].loss)
    # nothing but signs: after the first update moves are 0.1 of the range, later halves of it
    unit = jnp.stack([space.to_unit(info.hyper)["rates"] for info in infos])
    moves = np.abs(np.diff(np.asarray(unit), axis=0))
    np.testing.assert_allclose(moves[1], 0.1, rtol=1e-4)
    halvings = np.log2(0.1 / moves[(moves > 1e-6) & (unit[1:] > 0) & (unit[1:] < 1)])
    np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-2)
    assert halvings.max() > 0.5


def test_rprop_is_the_sign_rule_that_the_docstring_says() -> None:
    fds = optax.rprop(0.1, eta_minus=0.5, eta_plus=1.0)
    state, moves = fds.init(jnp.zeros(())), []
    for slope in (3.0, 0.2, -1.0, -1.0, -5.0, 2.0, 2.0):
        move, state = fds.update(jnp.float32(slope), state)
        moves.append(float(move))
    np.testing.assert_allclose(moves, [0, -0.1, 0, 0, 0.05, 0, 0], rtol=1e-6)


OPTAX = {
    "constant_schedule": {"value": 0.1},
    "linear_schedule": {
        "init_value": 0.1, "end_value": 0.01, "transition_steps": 20.0, "transition_begin": 3.0,
    },
    "polynomial_schedule": {
        "init_value": 0.1, "end_value": 0.01, "power": 2.0, "transition_steps": 20.0,
        "transition_begin": 3.0,
    },
    "exponential_decay": {
        "init_value": 0.1, "end_value": 0.03, "transition_steps": 10.0, "decay_rate": 0.6,
        "transition_begin": 3.0,
    },
    "cosine_decay_schedule": {
        "init_value": 0.1, "alpha": 0.1, "exponent": 1.5, "decay_steps": 25.0,
    },
    "warmup_constant_schedule": {"init_value": 0.01, "peak_value": 0.1, "warmup_steps": 5.0},
    "warmup_cosine_decay_schedule": {
        "init_value": 0.01, "end_value": 0.02, "exponent": 1.5, "peak_value": 0.1,
        "warmup_steps": 5.0, "decay_steps": 25.0,
    },
    "warmup_exponential_decay_schedule": {
        "init_value": 0.01, "peak_value": 0.1, "end_value": 0.03, "warmup_steps": 5.0,
        "transition_steps": 10.0, "decay_rate": 0.6, "transition_begin": 2.0,
    },
    "linear_onecycle_schedule": {
        "peak_value": 0.1, "transition_steps": 25.0, "pct_start": 0.3, "pct_final": 0.8,
        "div_factor": 20.0, "final_div_factor": 1e3,
    },
    "cosine_onecycle_schedule": {
        "peak_value": 0.1, "transition_steps": 25.0, "pct_start": 0.3, "div_factor": 20.0,
        "final_div_factor": 1e3,
    },
    "piecewise_constant_schedule": {"init_value": 0.1, "boundaries_and_scales": 0.5},
    "piecewise_interpolate_schedule": {"init_value": 0.1, "boundaries_and_scales": 0.5},
    "sgdr_schedule": {"cosine_kwargs": 15.0},
}  # fmt: skip


def from_optax(name: str, argument: str, value: Any) -> Any:
    numbers = OPTAX[name] | {argument: value}
    if name == "piecewise_interpolate_schedule":
        numbers["interpolate_type"] = "linear"
    if "boundaries_and_scales" in numbers:
        numbers["boundaries_and_scales"] = {5: numbers["boundaries_and_scales"], 20: 0.2}
    if name == "sgdr_schedule":
        one = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "decay_steps": value}
        numbers = {"cosine_kwargs": [one] * 2}
    return getattr(optax.schedules, name)(**numbers)


def in_the_docs() -> dict[str, tuple[set[str], set[str]]]:
    page = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|", page, flags=re.MULTILINE)
    names = lambda cell: set(re.findall(r"`(\w+)`", cell))  # noqa: E731
    return {name: (names(may), names(may_not)) for name, may, may_not in rows}


@pytest.mark.usefixtures("x64")
def test_the_table_of_optaxs_own_schedules_is_true() -> None:
    """What may be traced has its gradient; what may not is an error that names the counterpart."""
    table = in_the_docs()
    everything = {n for n in dir(optax.schedules) if n[0] != "_" and n.endswith("_schedule")}
    # It keeps a schedule's output in the optimiser's state.
    assert set(table) == (everything | {"exponential_decay", "join_schedules"})
    for name in OPTAX:
        may, may_not = table[name]
        assert may | may_not == set(OPTAX[name]), name

        def total(value: Any, name: str, argument: str) -> jax.Array:
            rates = jax.vmap(from_optax(name, argument, value))(STEPS.astype(float) + 0.4)
            return jnp.sum(jnp.sin(STEPS.astype(float)) * rates)

        for argument in may:
            run = partial(total, name=name, argument=argument)
            value = OPTAX[name][argument]
            grad = jax.jit(jax.grad(run))(value)
            difference = (run(value + 1e-6) - run(value - 1e-6)) / 2e-6
            np.testing.assert_allclose(grad, difference, rtol=1e-6, atol=1e-9)
        for argument in may_not:

            def optimizer(hyper: Any, name: str = name, argument: str = argument) -> Any:
                return optax.sgd(from_optax(name, argument, hyper["value"]))

            problem = hg.bilevel(
                lambda key: jnp.ones(()), *[lambda w, h, b, k: w**2] * 2, optimizer
            )
            with pytest.raises(ValueError, match=rf"optimizer gives optax.{name} .*hypergrad\."):
                jax.eval_shape(problem.init, {"value": OPTAX[name][argument]}, jax.random.key(0))
