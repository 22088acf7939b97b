"""Equinox models: static fields, functions, state, dropout; into a problem, and back."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.testing import relative_error

KEY = jax.random.key(0)
HYPER = {"lr": 0.05, "rate": 0.2}
SPACE = hg.Space({"lr": hg.Float(1e-4, 0.3, scale="log"), "rate": hg.Float(0.0, 0.8)})


class Net(eqx.Module):
    """With all that a module may hold: a lambda of its own, a name, an integer, counters."""

    layers: list[eqx.nn.Linear]
    dropout: Any
    activation: Callable[[jax.Array], jax.Array]
    name: str = eqx.field(static=True)
    counts: jax.Array
    width: int

    def __init__(self, key: jax.Array, dropout: Any = None) -> None:
        keys = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 6, key=keys[0]), eqx.nn.Linear(6, 1, key=keys[1])]
        self.dropout = hg.nn.EquinoxDropout(form="gaussian") if dropout is None else dropout
        self.activation = lambda x: jnp.tanh(x)
        self.name, self.counts, self.width = "net", jnp.arange(3), 6

    def __call__(self, x: jax.Array, rate: Any, key: Any = None) -> jax.Array:
        x = self.dropout(self.activation(self.layers[0](x)), p=rate, key=key)
        return self.layers[1](x)[0]


class Normalised(eqx.Module):
    dense: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.dense = eqx.nn.Linear(4, 6, use_bias=False, key=keys[0])
        self.norm = eqx.nn.BatchNorm(6, "batch", momentum=0.8, mode="batch")
        self.head = eqx.nn.Linear(6, 1, key=keys[1])

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> Any:
        x, state = self.norm(self.dense(x), state)
        return self.head(jnp.tanh(x))[0], state


def dropped(model: Net, hyper: Any, batch: Any, key: Any) -> Any:
    keys = jax.random.split(key, len(batch[0]))
    out = jax.vmap(lambda x, k: model(x, hyper["rate"], k))(batch[0], keys)
    return jnp.mean((out - batch[1]) ** 2), out


def normalised(pair: Any, hyper: Any, batch: Any, key: Any) -> Any:
    model, state = pair
    mapped = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    out, state = mapped(batch[0], state)
    return jnp.mean((out - batch[1]) ** 2), state


def adamw(hyper: Any) -> Any:
    return optax.adamw(hyper["lr"], eps=1e-2, weight_decay=hyper["rate"])


def data() -> tuple[Any, Any]:
    x = jax.random.normal(KEY, (32, 4))
    return hg.Minibatches((x, jnp.tanh(x[:, 0])), 8, 4), (x, jnp.tanh(x[:, 0]))


make_normalised = eqx.nn.make_with_state(Normalised)
PROBLEMS = {
    "static fields and dropout": lambda: hg.nn.equinox_problem(
        Net, dropped, dropped, lambda h: optax.adam(h["lr"], eps=1e-2)
    ),
    "batch statistics": lambda: hg.nn.equinox_problem(
        lambda key: make_normalised(key), normalised, normalised, adamw
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PROBLEMS)
def test_hypergradients_are_those_of_differences(name: str) -> None:
    """The running averages, through which validation sees the training, included."""
    problem = PROBLEMS[name]()
    arguments = HYPER, None, *data(), KEY
    reference = hg.hypergradient(problem, *arguments, hg.FiniteDifference(1e-5)).grad
    assert min(abs(g) for g in reference.values()) > 1e-3
    for estimator in (hg.Unrolled(), hg.Forward()):
        found = hg.hypergradient(problem, *arguments, estimator).grad
        assert relative_error(found, reference) < 1e-6


def test_training_is_that_of_a_plain_script() -> None:
    """Step for step, with state; then back into a model, and from a model on."""
    problem = PROBLEMS["batch statistics"]()
    train, _ = data()
    inner = problem.init(HYPER, KEY)
    model, state = make_normalised(KEY)
    optimizer = adamw(HYPER)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any, opt_state: Any, batch: Any) -> Any:
        gradient = eqx.filter_grad(lambda m, s: normalised((m, s), None, batch, None), has_aux=True)
        grads, state = gradient(model, state)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, opt_state

    for t in range(3):
        batch = train.batch(t, KEY)
        model, state, opt_state = step(model, state, opt_state, batch)
        inner = jax.jit(problem.step)(inner, HYPER, batch, KEY)
    ours = hg.nn.to_equinox(inner, make_normalised(jax.random.key(7)))
    for one, other in zip(
        jax.tree.leaves(eqx.filter(ours, eqx.is_array)),
        jax.tree.leaves(eqx.filter((model, state), eqx.is_array)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)
    again = hg.nn.from_equinox(ours, inner.opt_state, inner.step)
    assert jax.tree.structure(again) == jax.tree.structure(inner)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: jnp.all(a == b), again.params, inner.params))
    )


def test_a_tuner_goes_on_from_a_script() -> None:
    problem = PROBLEMS["static fields and dropout"]()
    model = Net(KEY)
    opt_state = optax.adam(0.05).init(eqx.filter(model, eqx.is_inexact_array))
    tuner = hg.alternating(problem, SPACE)
    start = hg.nn.from_equinox(model, opt_state)
    state, info = tuner.update(tuner.init(HYPER, KEY, inner=start), *data())
    tuned = hg.nn.to_equinox(state.inner, Net(KEY))
    assert jnp.isfinite(info.loss) and tuned.width == 6 and tuned.counts.tolist() == [0, 1, 2]
    assert bool(jnp.any(tuned.layers[0].weight != model.layers[0].weight))
    quiet = eqx.nn.inference_mode(tuned)
    assert quiet(jnp.ones(4), 0.5) == quiet(jnp.ones(4), None)


def test_dropout_keeps_the_mean_and_has_a_gradient() -> None:
    layer, x = hg.nn.EquinoxDropout(0.3), jnp.ones(20_000)
    assert abs(layer(x, key=KEY).mean() - 1) < 0.03
    assert layer(x, key=KEY, p=0.5).mean() != layer(x, key=KEY).mean()
    assert jnp.all(layer(x, inference=True) == x)
    grad = jax.grad(lambda p: jnp.sum(hg.nn.EquinoxDropout()(x, p=p, key=KEY) ** 2))(0.3)
    # E[sum(y^2)] is n / (1 - p)
    assert abs(grad / (20_000 / 0.7**2) - 1) < 0.1


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a model": (lambda: problem_of(Net(KEY)), "make_model is the model Net itself"),
    "other arguments": (lambda: problem_of(eqx.nn.MLP), r"make_model takes \(in_size"),
    "no state": (
        lambda: traced(problem_of(make_normalised, lambda *a: normalised(*a)[0])),
        r"train_loss no state: return \(loss, state\)",
    ),
    "raw in bilevel": (
        lambda: traced(hg.bilevel(Net, dropped, dropped, adamw)),
        "an Equinox module, Net, that holds .* give it to hypergrad.nn.equinox_problem",
    ),
    "its own dropout": (
        lambda: traced(problem_of(lambda key: Net(key, lambda x, p, key: own(x, p, key)))),
        "stop_gradient.*hypergrad.nn.EquinoxDropout",
    ),
    "no rate": (lambda: hg.nn.EquinoxDropout()(jnp.ones(3), key=KEY), "got no rate"),
    "no key": (lambda: hg.nn.EquinoxDropout(0.1)(jnp.ones(3)), "has no key"),
    "a rate of 1": (lambda: hg.nn.EquinoxDropout(1.0), "rate"),
}  # fmt: skip


def problem_of(make: Any, loss: Any = dropped) -> Any:
    return hg.nn.equinox_problem(make, loss, loss, lambda hyper: optax.adam(hyper["lr"]))


def own(x: Any, p: Any, key: Any) -> Any:
    return x if key is None else eqx.nn.Dropout(p)(x, key=key)


def traced(problem: Any) -> Any:
    return jax.eval_shape(
        lambda hyper: hg.hypergradient(problem, hyper, None, *data(), KEY).grad, HYPER
    )


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    done, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        done()
