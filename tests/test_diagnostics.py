"""check_hypergradient: quiet where the gradient is right, and by name where it is not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.data.keys import SHUFFLE
from hypergrad.testing import momentum_quadratic, ridge

KEY = jax.random.key(0)


def check(oracle: Any, **kwargs: Any) -> Any:
    arguments = (oracle.problem, oracle.hyper, None, oracle.train, oracle.valid, oracle.key)
    return hg.check_hypergradient(*arguments, **kwargs)


def test_a_right_problem_is_a_table(dtype: Any, capsys: Any) -> None:
    """Raw coordinates, array entries by index, against the closed form; no false alarm."""
    oracle = momentum_quadratic(20)
    report = check(oracle)
    print(report)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n" and printed.count("validation loss") == 1
    entries = [f"target[{i}]" for i in range(4)]
    assert [row.name for row in report.rows] == ["learning_rate", "momentum", *entries]
    assert {row.verdict for row in report.rows} == {"agrees"}
    exact = np.array(
        [oracle.grad["learning_rate"], oracle.grad["momentum"], *oracle.grad["target"]]
    )
    tight, loose = (1e-10, 1e-6) if dtype == jnp.float64 else (1e-4, 5e-2)
    size = np.abs(exact).max()
    for column, tolerance in (("raw", tight), ("forward", tight), ("difference", loose)):
        found = [getattr(row, column) for row in report.rows]
        np.testing.assert_allclose(found, exact, rtol=tolerance, atol=tolerance * size)
    lines = printed.splitlines()
    head = ["hyperparameter", "value", "raw", "unit", "forward", "differences", "verdict"]
    assert lines[0].startswith(f"validation loss {oracle.loss:.4g}"[:19])
    assert lines[1].split() == head
    assert lines[2].split()[:2] == ["learning_rate", "0.2"]
    assert lines[-1].split()[0] == "target[3]"


def test_unit_coordinates(dtype: Any) -> None:
    """The chain rule of a log and a linear scale, and an unbounded one, by hand."""
    oracle = momentum_quadratic(20)
    space = hg.Space(
        {
            "learning_rate": hg.Float(1e-3, 1.0, scale="log"),
            "momentum": hg.Float(0.0, 0.7),  # 0.7 is the value: a one-sided difference
            "target": hg.Float(),  # unbounded, with values above 1 and below 0
        }
    )
    rows = {row.name: row for row in check(oracle, space=space).rows}
    assert {row.verdict for row in rows.values()} == {"agrees"}
    rtol = 1e-9 if dtype == jnp.float64 else 1e-3
    chain = {"learning_rate": 0.2 * np.log(1e3), "momentum": 0.7, "target[3]": 1.0}
    for name, slope in chain.items():
        np.testing.assert_allclose(rows[name].estimate, slope * rows[name].raw, rtol=rtol)
        assert rows[name].raw != 0


def scalar_problem(train_loss: Any, valid_loss: Any = None) -> hg.Problem:
    def plain(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
        return jnp.mean((w - batch) ** 2)

    return hg.bilevel(
        lambda key: jnp.zeros(2),
        lambda w, hyper, batch, key: plain(w, hyper, batch, key) + train_loss(w, hyper),
        valid_loss or plain,
        lambda hyper: optax.sgd(hyper["lr"]),
    )


def check_scalar(problem: hg.Problem, hyper: Any, **kwargs: Any) -> Any:
    train = jnp.linspace(0.5, 2.0, 8).reshape(4, 2)
    return hg.check_hypergradient(problem, hyper, None, train, jnp.ones(2), KEY, **kwargs)


@jax.custom_vjp
def wrong(x: jax.Array) -> jax.Array:
    return 1.0 * x


wrong.defvjp(lambda x: (1.0 * x, None), lambda _, c: (3.0 * c,))


@pytest.mark.parametrize("place", ["train", "valid"])
def test_a_wrong_rule_is_named(place: str, dtype: Any, capsys: Any) -> None:
    """And only the hyperparameter behind it; a custom_vjp has no forward mode to compare with."""
    train = lambda w, h: (wrong(h["l2"]) if place == "train" else h["l2"]) * jnp.sum(w**2)  # noqa: E731
    valid = lambda w, h, b, k: jnp.sum(w**2) * (wrong(h["l2"]) if place == "valid" else 1.0)  # noqa: E731
    hyper = {"lr": 0.1, "l2": 0.5}
    with pytest.raises(ValueError, match=r"The hypergradient of l2 by Unrolled.* disagrees with"):
        check_scalar(scalar_problem(train, valid), hyper)
    table = capsys.readouterr().out
    assert "disagrees" in next(line for line in table.splitlines() if line.startswith("l2"))
    assert "disagrees" not in next(line for line in table.splitlines() if line.startswith("lr"))
    assert "impossible" in table


@pytest.mark.usefixtures("x64")
def test_a_wrong_rule_is_named_however_small_its_gradient() -> None:
    """A gradient 1e-8 of the largest one is still compared, in float64."""
    tiny = lambda w, h: 1e-8 * wrong(h["l2"]) * jnp.sum(w**2)  # noqa: E731
    with pytest.raises(ValueError, match=r"hypergradient of l2 "):
        check_scalar(scalar_problem(tiny), {"lr": 0.1, "l2": 0.5})


def test_a_loss_that_hides_in_rounding_raises_no_false_alarm() -> None:
    """In float32 a loss of about 1e3 does not show a change of 1e-9."""

    def valid(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
        return 1e3 + jnp.mean((w - batch) ** 2)

    problem = scalar_problem(lambda w, h: h["l2"] * jnp.sum(w**2), valid)
    report = check_scalar(problem, {"lr": 1e-4, "l2": 1e-5})
    assert {row.verdict for row in report.rows} == {"agrees"}
    assert all(row.estimate != 0 for row in report.rows)


def test_a_biased_estimator_disagrees_with_its_bias() -> None:
    with pytest.raises(ValueError, match=r"learning_rate.* by Unrolled\(window=1.*truncated"):
        check(momentum_quadratic(10), estimator=hg.Unrolled(window=1))


def test_an_exact_zero_warns_in_the_table() -> None:
    """A barrier that these weights never touch: a path by structure, without a slope here."""
    problem = scalar_problem(lambda w, h: h["barrier"] * jnp.sum(jnp.maximum(w - 100, 0)))
    report = check_scalar(problem, {"barrier": 0.5, "lr": 0.1})
    assert [row.verdict for row in report.rows] == ["warning: exactly 0 here", "agrees"]
    assert "warning: exactly 0" in str(report)


def test_at_most_max_entries_are_checked() -> None:
    report = check(momentum_quadratic(5), max_entries=2)
    assert len(report.rows) == 2


def test_unused_and_integer_hyperparameters_are_named() -> None:
    oracle = momentum_quadratic(5)
    for extra, message in ((1.0, "'extra' never reaches"), (2, "'extra' is of dtype int32")):
        with pytest.raises(ValueError, match=message):
            check(oracle._replace(hyper={**oracle.hyper, "extra": extra}))


def test_a_nan_batch_is_named_by_step_and_leaf() -> None:
    oracle = ridge(num_steps=6)
    inputs, targets = oracle.train
    broken = oracle._replace(train=(inputs, targets.at[4, 3].set(jnp.nan)))
    message = r"of l2 is not finite.*step 4 of 6, in 'params'.*batch of step 4 .* in leaf 1\."
    with pytest.raises(ValueError, match=message):
        check(broken)
    data = hg.Minibatches({"x": inputs[0], "y": targets[0].at[3].set(jnp.inf)}, 40, 6)
    as_dict = lambda loss: lambda w, h, b, k: loss(w, h, (b["x"], b["y"]), k)  # noqa: E731
    problem = hg.bilevel(
        lambda key: jnp.zeros(5),
        as_dict(oracle.problem.train_loss),
        oracle.problem.valid_loss,
        lambda hyper: optax.sgd(0.1),
    )
    with pytest.raises(ValueError, match=r"step 0 of 6.*the data, .* step 0, holds .* in leaf y\."):
        check(oracle._replace(problem=problem, train=data))


def test_a_nan_validation_batch_is_named() -> None:
    oracle = ridge(num_steps=3)
    inputs, targets = oracle.valid
    with pytest.raises(
        ValueError, match=r"though training is: the validation batch .* in leaf 0\."
    ):
        check(oracle._replace(valid=(inputs.at[0, 0].set(jnp.nan), targets)))


def test_training_that_diverges_is_said_to() -> None:
    oracle = momentum_quadratic(60)
    hyper = {**oracle.hyper, "learning_rate": jnp.float32(500.0)}
    with pytest.raises(
        ValueError, match=r"training itself is not\. First at step \d+ of 60.*diverges"
    ):
        check(oracle._replace(hyper=hyper))


class Counted(NamedTuple):
    """A hand-filled state; a PRNG key and a counter in it must not disturb the search."""

    key: jax.Array
    seen: jax.Array
    params: Any
    second: Any


def adam_like(protect: Any, start: Any = lambda hyper: jnp.ones(3)) -> hg.Problem:
    def loss(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
        return jnp.sum(batch * (w - 0.5) ** 2)

    def step(inner: Counted, hyper: Any, batch: jax.Array, key: Any) -> Counted:
        grads = protect(jax.grad(loss)(inner.params, hyper, batch, key))
        second = hyper["decay"] * inner.second + (1 - hyper["decay"]) * grads**2
        moved = inner.params - hyper["lr"] * grads / (jnp.sqrt(second) + 1e-8)
        return Counted(inner.key, inner.seen + 1, moved, second)

    def init(hyper: Any, key: jax.Array) -> Counted:
        return Counted(key, jnp.int32(0), start(hyper), jnp.zeros(3))

    return hg.Problem(init, step, loss, loss)


def test_an_infinite_slope_is_named_by_step_leaf_and_cause() -> None:
    """The second weight's first gradients are zero; training never shows it."""
    train = jnp.ones((4, 3)).at[:2, 1].set(0).at[:, 2].add(1)
    arguments = ({"lr": 0.1, "decay": 0.9}, None, train, jnp.ones(3), KEY)
    message = (
        r"of decay, lr is not finite, though training is: the derivative of 'params' in 'decay' "
        r"is lost at step 0 of 4\..*square root in Adam.*nonzero_gradient"
    )
    with pytest.raises(ValueError, match=message):
        hg.check_hypergradient(adam_like(lambda g: g), *arguments)
    report = hg.check_hypergradient(adam_like(hg.nonzero_gradient), *arguments)
    assert [row.verdict for row in report.rows] == ["agrees", "agrees"]


def test_a_derivative_lost_later_is_dated() -> None:
    """sqrt(|w - c|) has an infinite slope where w meets c, here after exactly two steps."""

    def step(inner: Counted, hyper: Any, batch: jax.Array, key: Any) -> Counted:
        gap = jnp.sqrt(jnp.abs(inner.params - 3.0))
        return inner._replace(params=inner.params + hyper["lr"] + 0 * gap)

    problem = adam_like(lambda g: g)._replace(step=step)
    with pytest.raises(ValueError, match=r"'params' in 'lr' is lost at step 2 of 4"):
        hg.check_hypergradient(problem, {"lr": 1.0}, None, jnp.ones((4, 3)), jnp.ones(3), KEY)


def test_a_derivative_lost_in_the_start_is_found() -> None:
    problem = adam_like(hg.nonzero_gradient, lambda hyper: jnp.sqrt(hyper["start"]) * jnp.ones(3))
    hyper = {"lr": 0.1, "decay": 0.9, "start": 0.0}
    with pytest.raises(
        ValueError, match=r"of start is not finite.*in 'start' is lost at step 0, in problem.init"
    ):
        hg.check_hypergradient(problem, hyper, None, jnp.ones((2, 3)), jnp.ones(3), KEY)


def test_a_loss_that_breaks_only_in_validation() -> None:
    def valid(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
        return jnp.sum(jnp.where(w > 100, jnp.sqrt(w - 100), w))  # NaN in the untaken branch

    problem = scalar_problem(lambda w, h: 0.0, valid)
    with pytest.raises(
        ValueError, match=r"no tangent is lost.*valid_loss.*jnp\.where does not take"
    ):
        check_scalar(problem, {"lr": 0.1})


def test_adams_first_steps_are_no_alarm() -> None:
    """They are nearly signs: the steps that float32 needs flip some of many, and smoothly so."""

    def loss(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
        return jnp.sum((w - hyper["shift"]) ** 2 * batch)

    problem = hg.bilevel(
        lambda key: 0.1 + 3e-6 * (jnp.arange(2000) - 999.5),
        loss,
        lambda w, h, b, k: jnp.mean((w - 1) ** 2) + h["shift"] * b,
        lambda h: optax.adam(0.01),
    )
    train, valid = jnp.ones((1, 1)), jnp.ones(())
    report = hg.check_hypergradient(problem, {"shift": 0.1}, None, train, valid, KEY)
    (row,) = report.rows
    assert abs(row.difference / row.estimate - 1) > 0.1
    assert row.verdict.startswith("agrees, at a step of 1e-0") and "not smooth" in row.verdict


@pytest.mark.usefixtures("x64")
def test_a_kink_at_the_very_point_is_no_alarm() -> None:
    """Both modes take one side's slope, a central difference the mean of both."""
    valid = lambda w, h, b, k: jnp.mean((w - b) ** 2) + jnp.maximum(h["l2"] - 0.5, 0)  # noqa: E731
    problem = scalar_problem(lambda w, h: 0.3 * jnp.abs(h["l2"] - 0.5) * jnp.sum(w), valid)
    report = check_scalar(problem, {"lr": 0.1, "l2": 0.5})
    assert [row.verdict for row in report.rows] == [
        "not smooth here: differences do not settle; both modes agree",
        "agrees",
    ]


def test_a_wrong_rule_on_which_both_modes_agree_is_named(dtype: Any) -> None:
    """Differences settle, on another number: training is smooth, and the rule is wrong."""

    @jax.custom_jvp
    def tripled(x: jax.Array) -> jax.Array:
        return 1.0 * x

    tripled.defjvp(lambda x, t: (tripled(*x), 3.0 * t[0]))
    problem = scalar_problem(lambda w, h: tripled(h["l2"]) * jnp.sum(w**2))
    with pytest.raises(ValueError, match=r"hypergradient of l2 .*disagrees with differences"):
        check_scalar(problem, {"lr": 0.1, "l2": 0.5})


def causes(loss: Any, start: Any, data: Any, hyper: Any = None) -> str:
    problem = hg.bilevel(
        lambda key: start, loss, lambda w, h, b, k: jnp.mean(w**2), lambda h: optax.sgd(h["lr"])
    )
    with pytest.raises(ValueError, match="is not finite") as found:
        hg.check_hypergradient(problem, hyper or {"lr": 0.1}, None, data, jnp.ones(2), KEY)
    return str(found.value)


def test_the_cause_that_is_named_is_the_true_one() -> None:
    plain = lambda w, h, b, k: jnp.mean((w - b) ** 2)  # noqa: E731
    data, zero = jnp.ones((5, 2)), jnp.zeros(2)
    assert "init_params" in causes(plain, zero.at[1].set(jnp.nan), data)
    assert "batch of step 3" in causes(plain, zero, data.at[3, 0].set(jnp.inf))
    root = lambda w, h, b, k: plain(w, h, b, k) + jnp.sqrt(jnp.sum(w**2))  # noqa: E731
    assert "infinite slope of train_loss" in causes(root, zero, data)
    early = lambda w, h, b, k: plain(w, h, b, k) + jnp.sqrt(w[0])  # noqa: E731
    assert "train_loss, which is not finite at parameters" in causes(early, -jnp.ones(2), data)
    assert "value of lr" in causes(plain, zero, data, {"lr": jnp.float32(jnp.nan)})
    # The bad example is never drawn: divergence is the cause, and not the data.
    rows = hg.Minibatches(jnp.arange(1000), 2, 60)
    drawn = {int(i) for t in range(60) for i in rows.batch(t, jax.random.fold_in(KEY, SHUFFLE))}
    bad = min(set(range(1000)) - drawn)
    broken = hg.Minibatches(jnp.ones((1000, 2)).at[bad].set(jnp.nan), 2, 60)
    assert "training diverges" in causes(plain, zero, broken, {"lr": 1e6})
