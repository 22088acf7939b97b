"""bilevel, hand-filled problems and rollout: what flows, what is kept, what is refused."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hypergrad as hg
from hypergrad.testing import relative_error

KEY = jax.random.key(0)


def squares(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
    return jnp.mean((w - batch) ** 2)


def quadratic(optimizer: Any = lambda h: optax.sgd(h["lr"]), **kwargs: Any) -> hg.Problem:
    arguments = {"train_loss": squares, "valid_loss": squares, **kwargs}
    return hg.bilevel(lambda key: jnp.zeros(2), optimizer=optimizer, **arguments)


def gradient(problem: hg.Problem, hyper: Any, train: Any, valid: Any, inner: Any = None) -> Any:
    run = jax.jit(lambda h: hg.hypergradient(problem, h, inner, train, valid, KEY))
    return run(hyper).grad


def differences(problem: hg.Problem, hyper: Any, train: Any, valid: Any) -> Any:
    estimator = hg.FiniteDifference()
    run = jax.jit(lambda h: hg.hypergradient(problem, h, None, train, valid, KEY, estimator))
    return run(hyper).grad


TRAIN, VALID = jnp.arange(1.0, 9.0).reshape(4, 2), jnp.array([2.0, 3.0])


def test_aux_of_the_training_loss_may_have_any_shape() -> None:
    """Dropped without absorb, it changes nothing; a pair from valid_loss is a loss with aux too."""
    with_aux = lambda *a: (squares(*a), {"names": [jnp.ones(3), 1]})  # noqa: E731
    problem = quadratic(train_loss=with_aux, valid_loss=with_aux)
    assert jnp.shape(problem.train_loss(jnp.zeros(2), {}, VALID, KEY)) == ()
    ours = gradient(problem, {"lr": 0.1}, TRAIN, VALID)
    assert relative_error(ours, gradient(quadratic(), {"lr": 0.1}, TRAIN, VALID)) < 1e-6


class Net(nn.Module):
    """A batch-normalised network whose running mean matters to the validation loss."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        # A bias here would have gradients of pure rounding, which Adam blows up.
        x = nn.Dense(3, use_bias=False, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=not training, momentum=0.8, param_dtype=x.dtype)(x)
        return nn.Dense(1, param_dtype=x.dtype)(jnp.tanh(x))[:, 0]


def batch_norm_problem(absorbs: bool = True) -> tuple[hg.Problem, Any, Any, Any]:
    net = Net()
    inputs = jax.random.normal(KEY, (5, 6, 2)) * 2 + 1

    def train_loss(variables: Any, hyper: Any, batch: Any, key: Any) -> Any:
        out, state = net.apply(variables, batch, True, mutable=["batch_stats"])
        penalty = hyper["l2"] * optax.tree_utils.tree_l2_norm(variables["params"], squared=True)
        return jnp.mean((out - batch[:, 0]) ** 2) + penalty, state["batch_stats"]

    def valid_loss(variables: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((net.apply(variables, batch, False) - batch[:, 0]) ** 2)

    def init(key: jax.Array) -> Any:  # flax's statistics start in float32, whatever the inputs are
        return jax.tree.map(lambda x: x.astype(inputs.dtype), net.init(key, inputs[0], True))

    problem = hg.bilevel(
        init,
        train_loss,
        valid_loss,
        # At the default eps the third derivative in l2 is so large that differences stop at 1e-4.
        lambda h: optax.adamw(h["lr"], eps=1e-2, weight_decay=h["decay"]),
        trainable="params",
        absorb=(lambda variables, stats: {**variables, "batch_stats": stats}) if absorbs else None,
    )
    return problem, {"lr": 0.05, "decay": 0.1, "l2": 0.01}, inputs[:4], inputs[4]


@pytest.mark.usefixtures("x64")
def test_batch_statistics_move_and_carry_the_hypergradient() -> None:
    problem, hyper, train, valid = batch_norm_problem()
    inner = problem.init(hyper, KEY)
    end = hg.rollout(problem, hyper, inner, train, KEY)
    start_mean, end_mean = (s.params["batch_stats"]["BatchNorm_0"]["mean"] for s in (inner, end))
    assert jnp.all(jnp.abs(end_mean - start_mean) > 1e-3)
    assert jax.tree.structure(end) == jax.tree.structure(inner)
    ours = gradient(problem, hyper, train, valid)
    assert relative_error(ours, differences(problem, hyper, train, valid)) < 1e-6
    # Through frozen statistics the gradient is another one: the path through them is real.
    frozen = gradient(batch_norm_problem(absorbs=False)[0], hyper, train, valid)
    assert relative_error(frozen, ours) > 1e-2


def test_what_is_not_trainable_is_neither_decayed_nor_given_optimiser_state() -> None:
    problem, hyper, train, _ = batch_norm_problem(absorbs=False)
    inner = problem.init(hyper, KEY)
    end = hg.rollout(problem, hyper, inner, train, KEY)
    before, after = inner.params["batch_stats"], end.params["batch_stats"]
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.all(a == b), before, after))
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), inner.params["params"], end.params["params"])
    assert jax.tree.all(moved)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(inner.opt_state)]
    assert any("Dense_0" in name for name in names)
    assert not any("batch_stats" in name for name in names)


def test_several_trainable_keys() -> None:
    problem = hg.bilevel(
        lambda key: {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.full(2, 3.0)},
        lambda p, *rest: squares(p["a"] + p["b"] * p["c"], *rest),
        lambda p, *rest: squares(p["a"] + p["b"] * p["c"], *rest),
        lambda h: optax.sgd(h["lr"]),
        trainable=("a", "b"),
    )
    end = hg.rollout(problem, {"lr": 0.1}, problem.init({"lr": 0.1}, KEY), TRAIN, KEY).params
    np.testing.assert_array_equal(end["c"], [3, 3])
    np.testing.assert_allclose(end["b"], 3 * end["a"], rtol=1e-6)
    assert float(end["a"][0]) > 0.1


def test_integer_leaves_of_params_survive_training() -> None:
    """Decay would make 5 - 0.01 = 4 of a counter; as a traced integer it must pass the gradient."""
    problem = hg.bilevel(
        lambda key: {"w": jnp.ones(2), "count": jnp.int32(5)},
        lambda p, *rest: squares(p["w"] * p["count"], *rest),
        lambda p, *rest: squares(p["w"] * p["count"], *rest),
        lambda h: optax.adamw(h["lr"], weight_decay=0.5),
    )
    inner = problem.init({"lr": 0.1}, KEY)
    end = hg.rollout(problem, {"lr": 0.1}, inner, TRAIN, KEY).params
    assert (int(end["count"]), end["count"].dtype) == (5, jnp.int32)
    assert float(jnp.abs(gradient(problem, {"lr": 0.1}, TRAIN, VALID)["lr"])) > 1


class ByHand(NamedTuple):
    params: jax.Array
    velocity: jax.Array


def by_hand() -> hg.Problem:
    """SGD with momentum, with plain jax.grad; its state counts no steps and keeps no loss."""

    def step(inner: ByHand, hyper: Any, batch: Any, key: Any) -> ByHand:
        grads = jax.grad(squares)(inner.params, hyper, batch, key)
        velocity = hyper["m"] * inner.velocity + grads
        return ByHand(inner.params - hyper["lr"] * velocity, velocity)

    init = lambda hyper, key: ByHand(jnp.zeros(2), jnp.zeros(2))  # noqa: E731
    return hg.Problem(init, step, squares, squares)


@pytest.mark.usefixtures("x64")
def test_a_problem_filled_by_hand_equals_bilevel() -> None:
    hyper = {"lr": 0.1, "m": 0.8}
    filled = quadratic(lambda h: optax.sgd(h["lr"], momentum=h["m"]))
    ours = gradient(by_hand(), hyper, TRAIN, VALID)
    assert relative_error(ours, gradient(filled, hyper, TRAIN, VALID)) < 1e-12
    assert relative_error(ours, differences(by_hand(), hyper, TRAIN, VALID)) < 1e-6


@pytest.mark.usefixtures("x64")
def test_a_learned_start_has_a_gradient() -> None:
    """inner=None differentiates init; a given inner does not see the start and is refused."""
    base = quadratic()

    def init(hyper: Any, key: jax.Array) -> Any:
        return base.init(hyper, key)._replace(params=hyper["start"] ** 2)

    problem = base._replace(init=init)
    hyper = {"lr": 0.1, "start": jnp.array([0.5, -2.0])}
    ours = gradient(problem, hyper, TRAIN, VALID)
    assert relative_error(ours, differences(problem, hyper, TRAIN, VALID)) < 1e-7
    # Each step contracts w by 1 - lr (the mean of two squares has curvature 1).
    end = hg.rollout(problem, hyper, problem.init(hyper, KEY), TRAIN, KEY).params
    np.testing.assert_allclose(
        ours["start"], (end - VALID) * 0.9**4 * 2 * hyper["start"], rtol=1e-10
    )
    with pytest.raises(ValueError, match="'start' never reaches"):
        gradient(problem, hyper, TRAIN, VALID, problem.init(hyper, KEY))


def test_step_t_receives_the_key_folded_with_t() -> None:
    """Also in a second window, as the state counts; a state that does not count starts at 0."""
    noise = lambda key: jax.random.normal(key, (2,))  # noqa: E731
    noisy = lambda w, hyper, batch, key: jnp.sum(w * noise(key))  # noqa: E731
    counted = quadratic(lambda h: optax.sgd(1.0), train_loss=noisy)
    drawn = jnp.stack([noise(jax.random.fold_in(KEY, t)) for t in range(5)])
    middle = hg.rollout(counted, {}, counted.init({}, KEY), jnp.zeros((3, 1)), KEY)
    np.testing.assert_allclose(middle.params, -drawn[:3].sum(0), rtol=1e-5)
    end = hg.rollout(counted, {}, middle, jnp.zeros((2, 1)), KEY)
    np.testing.assert_allclose(end.params, -drawn.sum(0), rtol=1e-5)
    assert int(end.step) == 5
    step = lambda inner, hyper, batch, key: ByHand(inner.params - noise(key), batch)  # noqa: E731
    uncounted = by_hand()._replace(step=step)
    inner = hg.rollout(uncounted, {}, by_hand().init({}, KEY), jnp.ones((3, 2)), KEY)
    np.testing.assert_allclose(inner.params, -drawn[:3].sum(0), rtol=1e-5)


def test_rollout_takes_minibatches_and_shuffles_by_its_key() -> None:
    problem = quadratic(lambda h: optax.sgd(0.1))
    data = hg.Minibatches(jnp.arange(10.0)[:, None], batch_size=2, num_steps=3)
    ends = [
        hg.rollout(problem, {}, problem.init({}, KEY), data, jax.random.key(k)).params
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(ends[0], ends[1])
    assert float(jnp.abs(ends[0] - ends[2])[0]) > 1e-3


def test_valid_may_be_minibatches() -> None:
    """One batch per estimate: of the whole data it is the loss there, of a part it is noisy."""
    points = jnp.arange(20.0).reshape(10, 2)
    whole = hg.Minibatches(points, batch_size=10)
    ours = gradient(quadratic(), {"lr": 0.1}, TRAIN, whole)
    assert relative_error(ours, gradient(quadratic(), {"lr": 0.1}, TRAIN, points)) < 1e-5
    losses = {
        float(
            hg.hypergradient(
                quadratic(), {"lr": 0.1}, None, TRAIN, hg.Minibatches(points, 2), jax.random.key(k)
            ).loss
        )
        for k in range(3)
    }
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"x": jnp.zeros((4, 2)), "y": jnp.zeros((3, 2))}, r"disagree.*\(4, 2\).*\(3, 2\)"),
        ({"x": jnp.zeros((4, 2)), "rate": 0.5}, r"'rate': \(\).*leading axis K"),
        ((), r"leading axis K"),
    ],
)
def test_train_without_one_leading_axis(train: Any, message: str) -> None:
    problem = quadratic()
    with pytest.raises(ValueError, match=message):
        hg.rollout(problem, {"lr": 0.1}, problem.init({"lr": 0.1}, KEY), train, KEY)
    with pytest.raises(ValueError, match=message):
        hg.hypergradient(problem, {"lr": 0.1}, None, train, VALID, KEY)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: optax.chain(optax.clip(1.0), t)])
def test_injected_rates_are_refused_by_name(wrap: Any) -> None:
    injected = lambda h: wrap(optax.inject_hyperparams(optax.adam)(h["lr"], b1=0.8))  # noqa: E731
    message = r"'learning_rate'.*in its state \(optax\.inject_hyperparams\).*directly"
    with pytest.raises(ValueError, match=message):
        quadratic(injected).init({"lr": 0.1}, KEY)


class FlaxDropout(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, rate: Any) -> jax.Array:
        return nn.Dropout(rate, deterministic=False)(nn.Dense(1)(x))


@pytest.mark.parametrize("place", ["train_loss", "valid_loss"])
def test_linen_dropout_on_a_traced_rate_names_ours(place: str) -> None:
    net = FlaxDropout()

    def dropped(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean(net.apply(params, batch, hyper["rate"], rngs={"dropout": key}) ** 2)

    dry = lambda p, h, b, k: jnp.mean(b @ p["params"]["Dense_0"]["kernel"]) ** 2  # noqa: E731
    problem = hg.bilevel(
        lambda key: net.init({"params": key, "dropout": key}, VALID[None], 0.0),
        **{"train_loss": dry, "valid_loss": dry, place: dropped},
        optimizer=lambda h: optax.sgd(0.1),
    )
    with pytest.raises(ValueError, match=r"flax's Dropout.*hypergrad\.nn\.LinenDropout"):
        hg.hypergradient(problem, {"rate": 0.3}, None, TRAIN[:, None], VALID[None], KEY)


def test_nnx_dropout_on_a_traced_rate_names_ours() -> None:
    def dropped(w: jax.Array, hyper: Any, batch: Any, key: Any) -> jax.Array:
        layer = nnx.Dropout(hyper["rate"])
        return jnp.mean((layer(w, rngs=nnx.Rngs(key)) - batch) ** 2)

    problem = quadratic(lambda h: optax.sgd(0.1), train_loss=dropped)
    with pytest.raises(ValueError, match=r"flax's Dropout.*hypergrad\.nn\.NNXDropout"):
        hg.hypergradient(problem, {"rate": 0.3}, None, TRAIN, VALID, KEY)


def test_a_branch_in_python_is_named_with_its_line() -> None:
    def branching(w: jax.Array, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return squares(w, hyper, batch, key) if hyper["lr"] > 0 else jnp.sum(w)

    line = r"test_problem.py:\d+, `return squares\(w, hyper, batch, key\) if hyper"
    with pytest.raises(ValueError, match=f"train_loss branches in Python.*{line}.*jnp.where"):
        gradient(quadratic(train_loss=branching), {"lr": 0.1}, TRAIN, VALID)


def test_a_missing_trainable_key_is_named() -> None:
    problem = hg.bilevel(
        lambda key: {"weights": jnp.zeros(2)},
        squares,
        squares,
        lambda h: optax.sgd(0.1),
        trainable="params",
    )
    with pytest.raises(ValueError, match=r"trainable='params' names \['params'\].*\['weights'\]"):
        problem.init({}, KEY)


@pytest.mark.parametrize("place", ["train_loss", "valid_loss"])
def test_a_loss_that_is_no_scalar_is_named(place: str) -> None:
    def per_example(w: jax.Array, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return (w - batch) ** 2

    with pytest.raises(ValueError, match=r"per_example returned an array of shape \(2,\)"):
        gradient(quadratic(**{place: per_example}), {"lr": 0.1}, TRAIN, VALID)
    if place == "valid_loss":
        problem = by_hand()._replace(valid_loss=per_example)
        with pytest.raises(ValueError, match=r"valid_loss returned an array of shape \(2,\)"):
            gradient(problem, {"lr": 0.1, "m": 0.5}, TRAIN, VALID)


@pytest.mark.parametrize("narrow", [jnp.float32, jnp.bfloat16])
def test_nonzero_gradient_keeps_dtype_and_derivative(narrow: Any) -> None:
    """sqrt(g^2) has slope +-1 where it had none, and slope and value elsewhere stay the same."""
    at = jnp.array([0.0, -0.0, 2.0, -3.0, 1e-25, -1e-25], narrow)
    tree = {"g": at, "count": jnp.int32(0)}
    lifted = hg.nonzero_gradient(tree)
    assert (lifted["g"].dtype, lifted["count"].dtype) == (narrow, jnp.int32)
    assert int(lifted["count"]) == 0
    np.testing.assert_array_equal(lifted["g"][2:4], at[2:4])
    small = lifted["g"][jnp.array([0, 1, 4, 5])].astype(jnp.float32)
    np.testing.assert_allclose(small, [1e-16, 1e-16, 1e-16, -1e-16], rtol=1e-2)
    size = lambda g: jnp.sum(jnp.sqrt(hg.nonzero_gradient(g) ** 2))  # noqa: E731
    slopes = jax.grad(size)(at).astype(jnp.float32)
    np.testing.assert_allclose(slopes, [1, 1, 1, -1, 1, -1], rtol=1e-2)
    np.testing.assert_allclose(jax.jvp(size, (at,), (jnp.ones_like(at),))[1], 2, rtol=1e-2)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda h: optax.sgd(h["lr"], momentum=h["m"]),
        lambda h: optax.adamw(h["lr"], b1=h["m"], weight_decay=0.1),
    ],
    ids=["momentum", "adamw"],
)
def test_bfloat16_params_keep_their_dtypes_under_float32_rates(optimizer: Any) -> None:
    base = quadratic(optimizer)
    problem = hg.bilevel(
        lambda key: jnp.zeros(2, jnp.bfloat16), squares, squares, optimizer
    )._replace(metrics=None)
    hyper = {"lr": jnp.float32(0.1), "m": jnp.float32(0.8)}
    inner = problem.init(hyper, KEY)
    end = jax.jit(lambda h: hg.rollout(problem, h, inner, TRAIN, KEY))(hyper)
    assert [x.dtype for x in jax.tree.leaves(end)] == [x.dtype for x in jax.tree.leaves(inner)]
    assert end.params.dtype == jnp.bfloat16
    wide = hg.rollout(base, hyper, base.init(hyper, KEY), TRAIN, KEY).params
    np.testing.assert_allclose(end.params.astype(jnp.float32), wide, rtol=0.03)
    ours = gradient(problem, hyper, TRAIN, VALID)
    assert {g.dtype for g in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
    assert relative_error(ours, gradient(base, hyper, TRAIN, VALID)) < 0.1


def test_a_start_in_python_numbers_is_strong() -> None:
    """A weakly typed state would compile its second window anew."""
    problem = hg.bilevel(lambda key: {"w": 0.5}, lambda p, *a: squares(p["w"], *a), squares,
                         lambda h: optax.adam(h["lr"]))  # fmt: skip
    inner = problem.init({"lr": 0.1}, KEY)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(inner))
    traces = []

    @jax.jit
    def advance(inner: Any) -> Any:
        traces.append(inner)
        return hg.rollout(problem, {"lr": 0.1}, inner, TRAIN, KEY)

    assert float(advance(advance(inner)).params["w"]) > 0.6
    assert len(traces) == 1


def test_metrics_and_extra_arguments_reach_their_functions() -> None:
    """Optimisers that read the loss (`reduce_on_plateau`) receive it."""
    metrics = lambda w, hyper, batch, key: {"mean": jnp.mean(w)}  # noqa: E731
    plateau = lambda h: optax.chain(  # noqa: E731
        optax.sgd(h["lr"]), optax.contrib.reduce_on_plateau(patience=1, factor=0.1)
    )
    problem = quadratic(plateau, metrics=metrics)
    assert float(problem.metrics(jnp.ones(2), {}, None, KEY)["mean"]) == 1
    ones = jnp.ones((6, 2))
    inner = hg.rollout(problem, {"lr": 1e-7}, problem.init({"lr": 1e-7}, KEY), ones, KEY)
    assert float(inner.opt_state[1].scale) < 0.5  # a loss that does not fall cuts the rate
    np.testing.assert_allclose(inner.loss, 1.0, rtol=1e-4)
