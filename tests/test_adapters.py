"""Models of linen and nnx: batch statistics, random streams, running states, bfloat16."""

from typing import Any

import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.testing import relative_error

KEY = jax.random.key(0)
HYPER = {"lr": 0.05, "decay": 0.1, "rate": 0.2}
SPACE = hg.Space(
    {
        "lr": hg.Float(1e-4, 1.0, scale="log"),
        "decay": hg.Float(1e-4, 1.0, scale="log"),
        "rate": hg.Float(0.0, 0.8),
    }
)


def adamw(hyper: Any) -> optax.GradientTransformation:
    # At the default eps the third derivative is so large that differences stop at 1e-4.
    return optax.adamw(hyper["lr"], eps=1e-2, weight_decay=hyper["decay"])


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, rate: Any = None, *, train: bool) -> jax.Array:
        # A bias here would have gradients of pure rounding, which Adam blows up.
        x = linen.Dense(3, use_bias=False, param_dtype=x.dtype)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.8, param_dtype=x.dtype)(x)
        x = jnp.tanh(x)
        if rate is not None:  # the Gaussian form is smooth, so that differences are exact
            x = hg.nn.LinenDropout(form="gaussian")(x, rate=rate, deterministic=not train)
        return linen.Dense(1, param_dtype=x.dtype)(x)[:, 0]


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        kwargs = {"param_dtype": jnp.result_type(float), "rngs": rngs}
        self.layers = nnx.List([nnx.Linear(2, 3, use_bias=False, **kwargs)])
        self.norm = hg.nn.NNXBatchNorm(3, momentum=0.8, **kwargs)
        self.norm.mean = nnx.BatchStat(jnp.zeros(3))  # flax's are float32, whatever is wanted
        self.norm.var = nnx.BatchStat(jnp.ones(3))
        self.dropout = hg.nn.NNXDropout(form="gaussian", rngs=rngs)
        self.head = nnx.Linear(3, 1, **kwargs)
        self.rngs = rngs  # the graph holds random state in two places

    def __call__(self, x: jax.Array, rate: Any = None) -> jax.Array:
        x = jnp.tanh(self.norm(self.layers[0](x)))
        x = x if rate is None else self.dropout(x, rate=rate)
        return self.head(x)[:, 0]


def squares(out: jax.Array, batch: jax.Array) -> jax.Array:
    return jnp.mean((out - batch[:, 0] ** 2) ** 2)


def data(steps: int = 4) -> tuple[jax.Array, jax.Array]:
    inputs = jax.random.normal(KEY, (steps + 1, 6, 2)) * 2 + 1
    return inputs[:steps], inputs[steps]


def linen_problem(**kwargs: Any) -> hg.Problem:
    net, batch = LinenNet(), data()[1]

    def init(key: jax.Array) -> Any:  # flax's statistics start in float32, whatever the inputs are
        return jax.tree.map(lambda x: x.astype(batch.dtype), net.init(key, batch, train=False))

    def train_loss(model: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return squares(model(batch, hyper.get("rate"), train=True), batch)

    def valid_loss(model: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return squares(model(batch, train=False), batch)

    arguments = {"init": init, "train_loss": train_loss, "valid_loss": valid_loss, **kwargs}
    return hg.nn.linen_problem(net, optimizer=adamw, **arguments)


def nnx_problem(**kwargs: Any) -> hg.Problem:
    def loss(model: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return squares(model(batch, hyper.get("rate")), batch)

    return hg.nn.nnx_problem(NNXNet, loss, loss, adamw, **kwargs)


def statistics(params: Any) -> Any:
    linen_or_nnx = ("batch_stats", "BatchNorm_0") if "batch_stats" in params else ("rest", "norm")
    return params[linen_or_nnx[0]][linen_or_nnx[1]]


@pytest.mark.usefixtures("x64")
def test_hypergradients_through_nnx_batch_norm_agree_with_differences() -> None:
    """Those of linen: test_batch_statistics_move_and_carry_the_hypergradient in test_problem."""
    problem, (train, valid) = nnx_problem(), data()
    hyper = jax.tree.map(jnp.asarray, HYPER)

    def grad(estimator: hg.Estimator) -> Any:
        run = jax.jit(lambda h: hg.hypergradient(problem, h, None, train, valid, KEY, estimator))
        return run(hyper).grad

    assert relative_error(grad(hg.Unrolled()), grad(hg.FiniteDifference())) < 1e-6


@pytest.mark.parametrize("make", [linen_problem, nnx_problem])
def test_statistics_are_carried_not_decayed_and_used_for_evaluation(make: Any) -> None:
    """At a rate of 0 nothing moves but the running mean, whose recurrence is known."""
    problem, (train, valid) = make(), data(5)
    hyper = {"lr": 0.0, "decay": 5.0}
    inner = problem.init(hyper, KEY)
    params = inner.params["params"]
    (kernel,) = (x for x in jax.tree.leaves(params) if jnp.shape(x) == (2, 3))
    mean = 0.0
    for batch in train:
        mean = 0.8 * mean + 0.2 * jnp.mean(batch @ kernel, 0)
    end = jax.jit(lambda i: hg.rollout(problem, hyper, i, train, KEY))(inner)
    np.testing.assert_allclose(statistics(end.params)["mean"], mean, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(end) == jax.tree.structure(inner)
    # Evaluation reads them, and does so per example: batch statistics would tie examples together.
    loss = lambda params, batch: problem.valid_loss(params, hyper, batch, KEY)  # noqa: E731
    one_by_one = jnp.mean(jnp.stack([loss(end.params, valid[i : i + 1]) for i in range(6)]))
    np.testing.assert_allclose(loss(end.params, valid), one_by_one, rtol=1e-5)
    assert abs(float(loss(inner.params, valid) - loss(end.params, valid))) > 1e-3
    sizes = [np.size(x) for x in jax.tree.leaves(inner.opt_state)]
    assert sum(sizes) == 2 * ravel_pytree(params)[0].size + 1  # Adam's two moments and a counter


@pytest.mark.parametrize("make", [linen_problem, nnx_problem])
def test_streams_follow_the_key_and_update_compiles_once(make: Any) -> None:
    problem, (train, valid) = make(), data()
    hyper = jax.tree.map(jnp.float32, HYPER)
    inner = problem.init(hyper, KEY)
    roll = jax.jit(lambda batches, inner, key: hg.rollout(problem, hyper, inner, batches, key))
    whole = roll(train, inner, KEY)
    half = roll(train[2:], roll(train[:2], inner, KEY), KEY)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    other = roll(train, inner, jax.random.key(9))
    assert float(jnp.abs(other.loss - whole.loss)) > 1e-3

    if make is linen_problem:  # its compilations are counted with bfloat16, below
        return
    traces = []
    tuner = hg.alternating(problem, SPACE)

    @jax.jit
    def update(state: Any, train: Any, valid: Any) -> Any:
        traces.append(state)
        return tuner.update(state, train, valid)

    state = tuner.init(HYPER, KEY)
    for _ in range(3):
        state, info = update(state, train, valid)
    assert len(traces) == 1
    assert all(bool(g != 0) for g in jax.tree.leaves(info.grad))


class TrainState(train_state.TrainState):
    batch_stats: Any


def linen_script(frozen: bool = False) -> tuple[TrainState, Any]:
    """What a user has: a state and a step of his own."""
    net, batch = LinenNet(), data()[1]
    variables = net.init(jax.random.key(4), batch, train=False)
    variables = flax.core.freeze(variables) if frozen else variables
    state = TrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        tx=adamw({**HYPER, "lr": jnp.float32(0.05)}),
        batch_stats=variables["batch_stats"],
    )

    @jax.jit
    def step(state: TrainState, batch: Any) -> TrainState:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, new = net.apply(
                variables, batch, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
            )
            return squares(out, batch), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        stats = flax.core.freeze(stats) if frozen else stats
        return state.apply_gradients(grads=grads, batch_stats=stats)

    return state, step


@pytest.mark.parametrize("frozen", [False, True])
def test_a_train_state_goes_in_and_comes_out(frozen: bool) -> None:
    """Three of the user's steps, two of ours, then his again, equal six of his."""
    state, step = linen_script(frozen)
    problem, (train, valid) = linen_problem(), data(6)
    hyper = {"lr": 0.05, "decay": 0.1}
    for batch in train[:3]:
        state = step(state, batch)
    space = hg.Space({name: SPACE[name] for name in hyper})
    tuner = hg.alternating(problem, space)
    tuning = tuner.init(hyper, KEY, inner=hg.nn.from_train_state(state))
    assert int(tuning.inner.step) == 3
    end = jax.jit(lambda i: hg.rollout(problem, hyper, i, train[3:5], KEY))(tuning.inner)
    back = hg.nn.to_train_state(end, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    ours = step(back, train[5])
    for batch in train[3:]:
        state = step(state, batch)
    assert int(ours.step) == int(state.step) == 6
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    moved = jax.tree.leaves(state.params)[0] - jax.tree.leaves(tuning.inner.params["params"])[0]
    assert float(jnp.max(jnp.abs(moved))) > 1e-2
    if not frozen:
        new, info = jax.jit(tuner.update)(tuning, train[3:], valid)
        assert int(new.inner.step) == 6
        assert float(jnp.abs(info.grad["decay"])) > 1e-5


def test_nnx_model_and_optimizer_go_in_and_come_out() -> None:
    model = NNXNet(nnx.Rngs(4))
    optimizer = nnx.Optimizer(model, adamw({**HYPER, "lr": jnp.float32(0.05)}), wrt=nnx.Param)
    problem, (train, _) = nnx_problem(), data(5)
    hyper = {"lr": 0.05, "decay": 0.1}

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> None:
        grads = nnx.grad(lambda model: squares(model(batch), batch))(model)
        optimizer.update(model, grads)

    for batch in train[:2]:
        step(model, optimizer, batch)
    inner = hg.nn.from_nnx(model, optimizer)
    for batch in train[2:]:
        step(model, optimizer, batch)
    assert int(inner.step) == 2
    end = jax.jit(lambda i: hg.rollout(problem, hyper, i, train[2:], KEY))(inner)
    fresh = NNXNet(nnx.Rngs(4))
    like = nnx.Optimizer(fresh, optimizer.tx, wrt=nnx.Param)
    hg.nn.to_nnx(end, fresh, like)
    values = nnx.Not(nnx.RngState)
    got = jax.tree.leaves(nnx.as_pure(nnx.state((fresh, like), values)))
    wanted = jax.tree.leaves(nnx.as_pure(nnx.state((model, optimizer), values)))
    assert len(got) == len(wanted) > 10
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    moved = fresh.norm.mean[...] - statistics(inner.params)["mean"]
    assert float(jnp.max(jnp.abs(moved))) > 0.1
    alone = NNXNet(nnx.Rngs(5))
    hg.nn.to_nnx(end, alone)
    jax.tree.map(
        np.testing.assert_array_equal, *(nnx.as_pure(nnx.state(m, values)) for m in (alone, fresh))
    )


def test_a_running_state_of_another_optimiser_is_refused_by_name() -> None:
    state, _ = linen_script()
    other = TrainState.create(
        apply_fn=state.apply_fn,
        params=state.params,
        batch_stats=state.batch_stats,
        tx=optax.sgd(0.1, momentum=0.9),
    )
    problem = linen_problem()
    tuner, inner = hg.alternating(problem, SPACE), hg.nn.from_train_state(other)
    with pytest.raises(ValueError, match=r"inner is no training state.*opt_state.*start its state"):
        tuner.init(HYPER, KEY, inner=inner)
    mended = inner._replace(opt_state=problem.init(HYPER, KEY).opt_state)
    assert tuner.init(HYPER, KEY, inner=mended).inner.opt_state is not None
    small = jax.tree.map(lambda x: x[:1] if jnp.ndim(x) else x, mended)
    with pytest.raises(ValueError, match=r"Dense_0/kernel: float32\(1, 3\), not float32\(2, 3\)"):
        tuner.init(HYPER, KEY, inner=small)


def test_a_state_of_another_kind_is_refused_with_the_remedy() -> None:
    state, _ = linen_script()
    tuner = hg.alternating(linen_problem(), SPACE)
    with pytest.raises(TypeError, match=r"inner is a .*TrainState.*from_train_state"):
        tuner.init(HYPER, KEY, inner=state)
    with pytest.raises(TypeError, match=r"inner is a TunerState.*state\.inner"):
        hg.nn.to_train_state(tuner.init(HYPER, KEY), state)


def test_a_plain_optax_loop_goes_on() -> None:
    def loss(w: jax.Array, hyper: Any, batch: jax.Array, key: Any) -> jax.Array:
        return jnp.mean((batch @ w - 1) ** 2)

    tx, (train, valid) = optax.adam(jnp.float32(0.05)), data(8)
    params = jnp.array([1.0, -1.0])
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(loss)(params, {}, batch, None), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for batch in train[:4]:
        params, opt_state = step(params, opt_state, batch)
    problem = hg.bilevel(lambda key: jnp.zeros(2), loss, loss, lambda h: optax.adam(h["lr"]))
    tuner = hg.alternating(problem, hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")}))
    inner = hg.Inner(params, opt_state, 4, jnp.float32(0.0))  # its step a Python integer
    state, info = jax.jit(tuner.update)(tuner.init({"lr": 0.05}, KEY, inner), train[4:], valid)
    for batch in train[4:]:
        params, opt_state = step(params, opt_state, batch)
    np.testing.assert_allclose(state.inner.params, params, rtol=1e-4)
    assert (int(state.inner.step), float(info.grad["lr"]) != 0) == (8, True)


@pytest.mark.parametrize("kind", [dict, flax.core.FrozenDict, nnx.State])
def test_trainable_keeps_the_mapping_that_it_is_given(kind: Any) -> None:
    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> Any:
        out = batch @ params["params"]["w"] - params["shift"]["b"]
        return jnp.mean((out - 1) ** 2), params["shift"]["b"] + 1

    def absorb(params: Any, b: Any) -> Any:
        return kind({**getattr(params, "raw_mapping", params), "shift": {"b": b}})

    start = kind({"params": {"w": jnp.ones(2)}, "shift": {"b": jnp.zeros(())}})
    problem = hg.bilevel(lambda key: start, loss, loss, adamw, trainable="params", absorb=absorb)
    inner = problem.init(HYPER, KEY)
    end = hg.rollout(problem, HYPER, inner, data()[0], KEY)
    assert isinstance(end.params, kind)
    assert jax.tree.structure(end) == jax.tree.structure(inner)
    assert float(end.params["shift"]["b"]) == 4
    assert float(jnp.max(jnp.abs(end.params["params"]["w"] - 1))) > 0.1


def test_absorb_that_changes_the_structure_is_refused() -> None:
    problem = hg.bilevel(
        lambda key: {"params": jnp.ones(2), "count": jnp.zeros(())},
        lambda p, *rest: (jnp.sum(p["params"] ** 2), p["count"] + 1),
        lambda p, *rest: jnp.sum(p["params"] ** 2),
        adamw,
        trainable="params",
        absorb=lambda p, count: {"params": p["params"], "counter": count},
    )
    with pytest.raises(ValueError, match=r"absorb returned params of the structure.*counter"):
        hg.rollout(problem, HYPER, problem.init(HYPER, KEY), data()[0], KEY)


class Sowing(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = linen.Dense(1)(x)[:, 0]
        self.sow("losses", "size", jnp.mean(x**2))
        return x


def test_linen_mistakes_are_named() -> None:
    net, (train, valid) = Sowing(), data()
    loss = lambda model, hyper, batch, key: squares(model(batch, train=True), batch)  # noqa: E731
    sowing = hg.nn.linen_problem(
        net, lambda key: net.init(key, valid, train=True), loss, loss, adamw
    )
    with pytest.raises(ValueError, match=r"leaves 'losses' behind with another structure.*sow"):
        hg.rollout(sowing, HYPER, sowing.init(HYPER, KEY), train, KEY)
    # A model that is judged in training mode would move its statistics: flax's own error.
    training = linen_problem(valid_loss=loss)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        training.valid_loss(training.init(HYPER, KEY).params, HYPER, valid, KEY)


def test_nnx_trains_what_wrt_selects() -> None:
    only = lambda path, value: isinstance(value, nnx.Param) and "head" in path  # noqa: E731
    problem, (train, _) = nnx_problem(wrt=only), data()
    inner = problem.init(HYPER, KEY)
    end = hg.rollout(problem, HYPER, inner, train, KEY)
    assert sorted(inner.params["params"]) == ["head"]
    before, after = (x.params["rest"]["layers"][0]["kernel"] for x in (inner, end))
    np.testing.assert_array_equal(before, after)
    assert float(jnp.max(jnp.abs(end.params["params"]["head"]["kernel"]))) > 0
    moved = end.params["params"]["head"]["bias"] - inner.params["params"]["head"]["bias"]
    assert float(jnp.max(jnp.abs(moved))) > 1e-2


@pytest.mark.parametrize("average", [True, False])
def test_nnx_batch_norm_has_the_values_of_flax(average: bool) -> None:
    batch, mask = data()[1][:, None] * jnp.ones((1, 4, 1)), jnp.arange(4) < 3
    kwargs = {"momentum": 0.7, "use_running_average": average, "rngs": nnx.Rngs(0)}
    ours, flaxs = hg.nn.NNXBatchNorm(2, **kwargs), nnx.BatchNorm(2, **kwargs)
    for _ in range(2):
        outs = [layer(batch, mask=mask[None, :, None]) for layer in (ours, flaxs)]
        np.testing.assert_array_equal(*outs)
    states = [jax.tree.leaves(nnx.as_pure(nnx.state(layer))) for layer in (ours, flaxs)]
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert (float(jnp.max(jnp.abs(ours.mean[...]))) > 0.1) != average


def test_nnx_batch_norm_of_flax_is_warned_of() -> None:
    loss = lambda model, hyper, batch, key: jnp.mean(model(batch) ** 2)  # noqa: E731
    make = lambda rngs: nnx.Sequential(nnx.BatchNorm(2, rngs=rngs))  # noqa: E731
    with pytest.warns(UserWarning, match=r"stops the gradient.*hypergrad\.nn\.NNXBatchNorm"):
        hg.nn.nnx_problem(make, loss, loss, adamw)


def test_metrics_get_the_model_in_evaluation_mode() -> None:
    loss = lambda model, hyper, batch, key: {"mse": squares(model(batch), batch)}  # noqa: E731
    problem, valid = nnx_problem(metrics=loss), data()[1]
    params = problem.init(HYPER, KEY).params
    mse = problem.metrics(params, HYPER, valid, KEY)["mse"]
    np.testing.assert_allclose(mse, problem.valid_loss(params, HYPER, valid, KEY), rtol=1e-6)


class Mixed(linen.Module):
    """Computes in `dtype`; its parameters are what it is given."""

    dtype: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Dense(16, dtype=self.dtype, param_dtype=self.dtype)(x))
        return linen.Dense(3, dtype=self.dtype, param_dtype=self.dtype)(x).astype(jnp.float32)


BF16_HYPER = {"lr": np.float32(0.1), "momentum": np.float32(0.9), "l2": np.float32(1e-2)}
BF16_SPACE = hg.Space(
    {
        "lr": hg.Float(1e-4, 1.0, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
        "l2": hg.Float(1e-6, 1.0, scale="log"),
    }
)


def mixed_problem(compute: Any, params: Any) -> hg.Problem:
    start = Mixed(jnp.float32)

    def init(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(params), start.init(key, jnp.zeros((1, 8))))

    def valid_loss(model: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        logits = model(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def train_loss(model: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(model.variables["params"])]
        penalty = sum(jnp.sum(x**2) for x in leaves)
        return valid_loss(model, hyper, batch, key) + 0.5 * hyper["l2"] * penalty

    return hg.nn.linen_problem(
        Mixed(compute),
        init,
        train_loss,
        valid_loss,
        lambda h: optax.sgd(h["lr"], momentum=h["momentum"]),
    )


@pytest.mark.parametrize(
    ("estimator", "computed"),
    [
        (hg.Unrolled(validate_at=0.8), False),
        (hg.Forward(), True),
        (hg.Implicit(hg.Identity(), of="fixed_point"), False),
    ],
    ids=["unrolled", "forward", "implicit"],
)
def test_bfloat16_keeps_its_dtypes_and_float32_hypergradients(
    estimator: Any, computed: bool
) -> None:
    """Ten steps; parameters in bfloat16, or (`computed`) float32 ones that compute in it."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(11, 64, 8)).astype(np.float32)
    labels = np.argmax(inputs @ rng.normal(size=(8, 3)) + rng.gumbel(size=(11, 64, 3)), -1)
    train, valid = (inputs[:10], labels[:10]), (inputs[10], labels[10])

    def reference(compute: Any) -> Any:
        """In unit coordinates, as a tuner's."""
        problem = mixed_problem(compute, jnp.float32)
        hyper, pull_back = jax.vjp(BF16_SPACE.from_unit, BF16_SPACE.to_unit(BF16_HYPER))
        inner = problem.init(hyper, KEY)
        run = jax.jit(lambda i: hg.hypergradient(problem, hyper, i, train, valid, KEY, estimator))
        return as_vector(pull_back(run(inner).grad)[0])

    exact = reference(jnp.float32)
    problem, traces = mixed_problem(jnp.bfloat16, jnp.bfloat16), []
    tuner = hg.alternating(problem, BF16_SPACE, estimator)

    @jax.jit
    def update(state: Any) -> Any:
        traces.append(state)
        return tuner.update(state, train, valid)

    state = tuner.init(BF16_HYPER, KEY)
    assert {x.dtype.name for x in jax.tree.leaves(state.inner.params)} == {"bfloat16"}
    dtypes = jax.tree.map(jnp.result_type, state)
    state, info = update(state)
    assert int(update(state)[0].inner.step) == 20
    assert len(traces) == 1
    assert jax.tree.map(jnp.result_type, state) == dtypes
    outer = (state.now.unit, state.now.outer_state, info.grad, info.hyper, info.loss)
    floats = {x.dtype for x in jax.tree.leaves(outer) if jnp.issubdtype(x.dtype, jnp.inexact)}
    assert floats == {jnp.dtype("float32")}
    assert np.all(np.abs(exact) > 1e-4)
    for grad in [as_vector(info.grad), *([reference(jnp.bfloat16)] if computed else [])]:
        assert np.linalg.norm(grad - exact) < 0.05 * np.linalg.norm(exact)
        assert grad @ exact > 0.999 * np.linalg.norm(grad) * np.linalg.norm(exact)


def as_vector(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def test_the_mean_of_many_bfloat16_parameters_keeps_growing() -> None:
    """A sum of 600 ones in bfloat16 stops at 256."""
    problem = hg.bilevel(
        lambda key: jnp.ones(3, jnp.bfloat16),
        lambda w, hyper, batch, key: hyper["lr"] * jnp.sum(w.astype(jnp.float32)) * 0,
        lambda w, hyper, batch, key: jnp.mean(w.astype(jnp.float32)) + 0 * hyper["lr"],
        lambda h: optax.sgd(h["lr"]),
    )
    arguments = (problem, {"lr": 0.0}, None, jnp.zeros((600, 1)), jnp.zeros(1), KEY)
    estimate = hg.hypergradient(*arguments, hg.FiniteDifference(validate_at="mean"))
    assert float(estimate.loss) == 1.0


def test_a_model_without_streams_splits_no_key() -> None:
    """A split into no keys would change the traced program, by which checkpoints know their own."""
    net, x = flax.linen.Dense(1), jnp.ones((2, 3))

    def loss(model: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean(model(batch) ** 2)

    problem = hg.nn.linen_problem(
        net, lambda key: net.init(key, x), loss, loss, lambda hyper: optax.sgd(0.1), rngs=()
    )
    inner = problem.init({}, jax.random.key(0))
    assert "random_split" not in str(jax.make_jaxpr(problem.step)(inner, {}, x, jax.random.key(1)))
