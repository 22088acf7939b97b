"""What people write out of habit works, or is answered by one sentence with its remedy."""

import copy
import functools
import gc
import pickle
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import hypergrad as hg
from hypergrad.testing import relative_error
from hypergrad.training.identity import program_of

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 4))
Y = jnp.tanh(X[:, 0])
TRAIN, VALID = hg.Minibatches((X, Y), 8, 3), (X, Y)
SPACE = hg.Space({"rate": hg.Float(1e-4, 0.3, scale="log")})
HYPER = {"rate": 0.01}


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def adam(hyper: Any) -> Any:
    return optax.adam(hyper["rate"])


def zeros(key: Any) -> jax.Array:
    return jnp.zeros(4)


def linear(optimizer: Any = adam, init: Any = zeros, train: Any = loss, **kwargs: Any) -> Any:
    return hg.bilevel(init, train, kwargs.pop("valid", loss), optimizer, **kwargs)


def gradient(problem: Any, hyper: Any = HYPER, train: Any = TRAIN, valid: Any = VALID) -> Any:
    return hg.hypergradient(problem, hyper, None, train, valid, KEY).grad


def traced(problem: Any, hyper: Any = HYPER, train: Any = TRAIN, valid: Any = VALID) -> Any:
    """As `gradient`, but only traced: what is refused is refused there."""
    return jax.eval_shape(lambda hyper: gradient(problem, hyper, train, valid), hyper)


def fitted(train: Any, valid: Any) -> Any:
    tuner = hg.alternating(linear(), SPACE)
    return hg.fit(tuner, tuner.init(HYPER, KEY), train, valid, 1)


class Net(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)[:, 0]


class Keyword(Net):
    def __init__(self, width: int = 1, *, rngs: nnx.Rngs) -> None:
        super().__init__(width, rngs=rngs)


class Optional(Net):
    def __init__(self, width: int = 1, rngs: nnx.Rngs | None = None) -> None:
        super().__init__(width, rngs=rngs)


def with_logits(model: Any, hyper: Any, batch: Any, key: Any) -> Any:
    out = model(batch[0])
    out = out if out.ndim == 1 else out[:, 0]
    return jnp.mean((out - batch[1]) ** 2), {"logits": out}


DENSE = linen.Dense(1)


def nnx_problem(make: Any) -> Any:
    return hg.nn.nnx_problem(make, with_logits, with_logits, adam)


def test_adapters_take_a_loss_with_aux_and_rngs_by_keyword() -> None:
    def plain(*args: Any) -> Any:
        return with_logits(*args)[0]

    init = lambda key: DENSE.init(key, X[:1])  # noqa: E731
    pairs = [
        [hg.nn.linen_problem(DENSE, init, loss, loss, adam) for loss in (with_logits, plain)],
        [hg.nn.nnx_problem(Keyword, loss, loss, adam) for loss in (with_logits, plain)],
    ]
    for problem, same in pairs:
        inner = jax.jit(problem.init)(HYPER, KEY)
        after = [jax.jit(p.step)(inner, HYPER, VALID, KEY) for p in (problem, same)]
        assert after[0].loss > 1e-3
        assert jax.tree.all(jax.tree.map(lambda a, b: jnp.all(a == b), *after))
        assert problem.valid_loss(inner.params, HYPER, VALID, KEY) == after[0].loss
    for make in (Optional, lambda r: Net(1, rngs=r)):
        assert jax.eval_shape(nnx_problem(make).init, HYPER, KEY).params["params"]


class Branching:
    """A callable object, a line of whose code is named."""

    def __call__(self, hyper: Any) -> Any:
        return optax.adam(hyper["rate"] if hyper["rate"] < 0.3 else 0.3)


def hard(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((batch[0] @ w > 0) == (batch[1] > 0))


def hits(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.sum(jnp.argsort(batch[0] @ w) == jnp.argsort(batch[1]))


def by_hand(inner: Any, hyper: Any, batch: Any, key: Any) -> Any:
    return inner if hyper["rate"] > 0.3 else inner._replace(step=inner.step + 1)


LINE = r"test_habits.py:\d+, `"
# what is done: the sentence that answers it
ANSWERED: dict[str, tuple[Callable[[], Any], str]] = {
    "an optimiser": (lambda: linear(optax.adam(0.1)), "give a function of hyper that builds it"),
    "optax's factory": (lambda: linear(optax.adam), r"optimizer=optax.adam would .*lambda hyper"),
    "no optimiser": (lambda: traced(linear(lambda h: h["rate"])), "return an optax transformation"),
    "parameters": (lambda: linear(init=jnp.zeros(4)), r"init_params is a \w+: give a function"),
    "a loss of two": (
        lambda: linear(train=lambda w, batch: 0.0),
        r"train_loss takes \(w, batch\) and is called with \(params, hyper, batch, key\)",
    ),
    "an nnx model": (lambda: nnx_problem(Keyword(rngs=nnx.Rngs(0))), "make_model is a Keyword: .*"),
    "an nnx class of two": (lambda: nnx_problem(Net), r"make_model=Net wants \['width', 'rngs'\]"),
    "nnx in bilevel": (
        lambda: traced(linear(init=lambda key: Keyword(rngs=nnx.Rngs(key)))),
        "flax.nnx module, Keyword: give it to hypergrad.nn.nnx_problem",
    ),
    "linen in bilevel": (
        lambda: traced(linear(init=lambda key: DENSE)),
        "flax.linen module, Dense: give it to hypergrad.nn.linen_problem",
    ),
    "nnx in linen": (
        lambda: hg.nn.linen_problem(Net, zeros, with_logits, with_logits, adam),
        "module=Net is no flax.linen module",
    ),
    "a function among parameters": (
        lambda: traced(linear(init=lambda key: {"w": jnp.zeros(4), "f": jnp.tanh})),
        r"init_params returns 'tanh' .* which is no array",
    ),
    "a key among parameters": (
        lambda: traced(linear(init=lambda key: {"w": jnp.zeros(4), "key": key})),
        "a PRNG key among what is trained.*trainable=",
    ),
    "lookahead": (
        lambda: traced(linear(lambda h: optax.lookahead(adam(h), 3, 0.5))),
        "optax.LookaheadParams.init_synced",
    ),
    "a line search": (
        lambda: traced(linear(lambda h: optax.chain(optax.lbfgs(), optax.scale(h["rate"])))),
        r"lax.while_loop, .*use hypergrad.Forward\(\)",
    ),
    "if": (lambda: traced(linear(Branching())), rf"optimizer branches.*{LINE}return optax.*where"),
    "max": (lambda: traced(linear(lambda h: optax.adam(max(h["rate"], 0.1)))), "jnp.maximum"),
    "float": (
        lambda: traced(linear(lambda h: optax.adam(float(h["rate"])))),
        rf"makes a Python number of a traced value at .*{LINE}.*leave out float",
    ),
    "range": (
        lambda: traced(linear(lambda h: next(adam(h) for _ in range(h["rate"])))),
        "hypergrad.Int of a sweep",
    ),
    "a shape": (
        lambda: traced(linear(lambda h: optax.adam(jnp.zeros(h["rate"])[0]))),
        "hypergrad.Int of a sweep",
    ),
    "a format": (lambda: traced(linear(lambda h: adam(f"{h['rate']:.3f}"))), "jax.debug.print"),
    "a dict": (lambda: traced(linear(lambda h: {0: 1}[h["rate"]])), "looks a traced value up"),
    "numpy": (
        lambda: traced(linear(lambda h: optax.adam(np.exp(h["rate"])))),
        "optimizer hands a traced value to NumPy.*use jax.numpy",
    ),
    "a mask": (
        lambda: traced(linear(train=lambda w, h, b, k: jnp.sum(w[b[1][:4] > 0]))),
        r"train_loss indexes with a traced mask.*jnp.where\(mask, x, 0\)",
    ),
    "by hand": (
        lambda: traced(linear()._replace(step=by_hand)),
        f"A function of the problem branches in Python.*{LINE}return inner if",
    ),
    "an accuracy": (
        lambda: traced(linear(valid=hard)),
        "valid_loss is piecewise constant.*a comparison.*smooth loss.*metrics=",
    ),
    "an accuracy, trained": (lambda: traced(linear(train=hard)), "train_loss is piecewise const"),
    "an integer": (lambda: traced(linear(valid=hits)), "valid_loss is piecewise constant"),
    "no axis K": (lambda: gradient(linear(), train=VALID), "lack the leading axis K of steps"),
    "no axis K, lists": (lambda: gradient(linear(), train=[X, Y]), "lack the leading axis K"),
    "no axis K, against batches": (
        lambda: gradient(linear(), train=VALID, valid=hg.Minibatches(VALID, 8)),
        "lack the leading axis K",
    ),
    "nested lists": (
        lambda: hg.Minibatches((X.tolist(), Y.tolist()), 8),
        r"'0/0/0': \(\), .*, \.\.\.\}.*numpy.asarray",
    ),
    "strings": (
        lambda: hg.Minibatches({"x": X, "y": np.array(["a", "b"] * 16)}, 8),
        r"arrays holds the leaf 'y' of dtype <U1.*numpy.unique",
    ),
    "strings, in a sweep": (
        lambda: hg.sweep(
            lambda choices: linear(), SPACE, hg.Splits((X, np.array(["a"] * 32)), VALID),
            num_trials=1, num_steps=10, batch_size=8, progress=False,
        ),
        "data holds the leaf 'train/1' of dtype <U1",
    ),
    "a text beside a batch": (
        lambda: gradient(linear(), valid=(X, Y, "valid")),
        "valid holds the leaf '2' of str, .* leave it out",
    ),
    "a partial of optax": (
        lambda: linear(functools.partial(optax.adam, b1=0.5)),
        "optimizer=optax.adam would be called with hyper",
    ),
    "a batch as a list": (lambda: fitted(TRAIN, [X, Y]), r"as a tuple, valid=\(inputs, targets\)"),
    "a list of one shape": (lambda: fitted(TRAIN, [X, X]), "valid is a list of 2 arrays"),
    "K batches as a list": (lambda: fitted([X[None], Y[None]], VALID), "train is a list of 2 arr"),
    "strings, stacked": (
        lambda: gradient(linear(), train=(X[None], np.array([["a"]])), valid=VALID),
        "train holds the leaf '1' of dtype <U1",
    ),
    "Float(log=True)": (lambda: hg.Float(1e-4, 1.0, log=True), "Optuna's: write scale='log'"),
    "Int(log=False)": (lambda: hg.Int(1, 8, log=False), "Optuna's: write scale='linear'"),
    "Float(step=0.3)": (lambda: hg.Float(0.0, 1.0, step=0.3), "give high=0.9"),
    "Int(step=4)": (lambda: hg.Int(1, 10, step=4), "give high=9"),
    "a log scale with steps": (
        lambda: hg.Float(0.1, 1.0, scale="log", step=0.1),
        "equal steps on an unequal scale",
    ),
    "a step of 0": (lambda: hg.Float(0.0, 1.0, step=0.0), "step=0.0 must be positive"),
    "a step alone": (lambda: hg.Float(step=0.1), "starts at low: give low and high"),
}  # fmt: skip


@pytest.mark.parametrize("habit", ANSWERED)
def test_a_habit_is_answered_by_a_sentence(habit: str) -> None:
    done, sentence = ANSWERED[habit]
    with pytest.raises((ValueError, TypeError), match=sentence) as found:
        done()
    assert "\n" not in str(found.value)


def sam(opaque: bool) -> Callable[[Any], Any]:
    def optimizer(hyper: Any) -> Any:
        return optax.contrib.sam(
            optax.sgd(hyper["rate"]), optax.sgd(hyper["other"]), opaque_mode=opaque
        )

    return optimizer


def average(decay: Any) -> optax.GradientTransformation:
    def update(updates: Any, mean: Any, params: Any) -> Any:
        new = optax.apply_updates(params, updates)
        return updates, optax.incremental_update(new, mean, 1 - decay)

    return optax.GradientTransformation(lambda params: params, update)


def pair(key: Any) -> Any:
    return optax.LookaheadParams.init_synced(jnp.ones(4))


def fast(params: Any, *rest: Any) -> jax.Array:
    return loss(params.fast, *rest)


def line_search(hyper: Any) -> Any:
    search = optax.scale_by_backtracking_linesearch(3)
    return optax.chain(optax.sgd(hyper["rate"]), optax.scale(hyper["other"]), search)


OPTIMISERS: dict[str, Callable[[], hg.Problem]] = {
    "sam": lambda: linear(sam(False)),
    "sam, opaque": lambda: linear(sam(True)),
    "within a chain": lambda: linear(lambda h: optax.chain(optax.clip(9.0), sam(True)(h))),
    "polyak": lambda: linear(lambda h: optax.polyak_sgd(h["rate"], h["other"])),
    "lookahead": lambda: linear(
        lambda h: optax.lookahead(optax.sgd(h["rate"]), 2, h["other"]),
        pair,
        fast,
        evaluate=lambda params, opt_state: params.slow,
    ),
    "an average": lambda: linear(
        lambda h: optax.chain(optax.sgd(h["rate"]), average(h["other"])),
        lambda key: jnp.ones(4),
        evaluate=lambda params, opt_state: opt_state[1],
    ),
    "schedule-free": lambda: linear(
        lambda h: optax.contrib.schedule_free_adamw(h["rate"], b2=1 - h["other"] / 10),
        lambda key: jnp.ones(4),
        evaluate=lambda params, state: optax.contrib.schedule_free_eval_params(state, params),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_that_want_other_arguments(name: str) -> None:
    """Hypergradients are those of differences, also of the parameters that are judged."""
    problem, hyper = OPTIMISERS[name](), {"rate": 0.05, "other": 0.3}
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    arguments = hyper, None, hg.Minibatches((x, y), 8, 4), (x, y), KEY
    exact = hg.hypergradient(problem, *arguments)
    reference = hg.hypergradient(problem, *arguments, hg.FiniteDifference(1e-5))
    assert min(abs(g) for g in exact.grad.values()) > 1e-5
    assert relative_error(exact.grad, reference.grad) < 1e-6
    if name == "an average":
        mean = hg.hypergradient(problem, *arguments, hg.Unrolled(validate_at="mean"))
        forward = hg.hypergradient(problem, *arguments, hg.Forward(validate_at="mean"))
        assert relative_error(mean.grad, forward.grad) < 1e-10
        assert mean.loss != exact.loss
        judged = problem.evaluate(exact.inner)
        assert problem.valid_loss(judged, hyper, (x, y), KEY) == pytest.approx(exact.loss)


def test_an_implicit_estimator_refuses_other_parameters_than_the_trained() -> None:
    with pytest.raises(ValueError, match="use of='fixed_point', Unrolled or Forward"):
        hg.hypergradient(
            linear(evaluate=lambda params, state: params), HYPER, None, TRAIN, VALID, KEY,
            hg.Implicit(),
        )  # fmt: skip


def test_forward_mode_passes_a_line_search() -> None:
    """What wants `value_fn=` gets it."""
    hyper = {"rate": 0.05, "other": 0.3}
    arguments = linear(line_search), hyper, None, TRAIN, VALID, KEY
    assert abs(hg.hypergradient(*arguments, hg.Forward()).grad["rate"]) > 0


def test_leaves_of_odd_kinds_are_carried() -> None:
    """Typed keys in data and in what is not trained, lists of arrays, NumPy's numbers."""
    keys = jax.random.split(KEY, 32)

    def noisy(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        noise = 0.1 * jax.vmap(jax.random.normal)(batch[2])
        return jnp.mean((batch[0] @ w["w"] + noise - batch[1]) ** 2)

    problem = linear(
        init=lambda key: {"w": jnp.zeros(4), "key": key}, train=noisy, valid=noisy, trainable="w"
    )
    train, valid = hg.Minibatches([X, Y, keys], np.int64(8), np.int32(3)), [X, Y, keys]
    for estimator in (hg.Unrolled(), hg.Forward()):
        found = hg.hypergradient(problem, HYPER, None, train, valid, KEY, estimator)
        assert abs(found.grad["rate"]) > 1e-3
    stacked = [X.reshape(4, 8, 4), np.asarray(Y).reshape(4, 8)]
    assert abs(gradient(linear(), {"rate": np.float32(0.01)}, stacked, [X, Y])["rate"]) > 1e-3


def test_strict_promotion_is_kept_from_optax_and_from_us() -> None:
    tuner = hg.restarting(linear(), SPACE, num_seeds=2)
    with jax.numpy_dtype_promotion("strict"):
        strict = gradient(linear())["rate"]
        state = tuner.init(HYPER, KEY)
        state, info = tuner.update(state, TRAIN, VALID)
        best = tuner.best(state)["rate"]
    assert strict == gradient(linear())["rate"]
    assert jnp.isfinite(info.loss) and jnp.isfinite(best)


def test_a_step_keeps_to_its_grid() -> None:
    """The value is on the grid, its derivative that between the steps; a study holds the same."""
    step = hg.Float(0.0, 0.8, step=0.1)
    units = jnp.linspace(0.0, 1.0, 37)
    on_grid = 10 * jax.vmap(step.from_unit)(units)
    np.testing.assert_allclose(on_grid, jnp.round(on_grid), atol=1e-6)
    assert len(set(np.asarray(on_grid).round().tolist())) == 9
    np.testing.assert_allclose(jax.vmap(jax.grad(step.from_unit))(units), 0.8, rtol=1e-6)
    assert [hg.Int(16, 64, step=16).admits(n) for n in (16, 24, 64, 80)] == [1, 0, 1, 0]
    for one in (step, hg.Int(16, 64, step=16)):
        assert pickle.loads(pickle.dumps(one)) == one == eval(repr(one), vars(hg))

    def penalised(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return loss(w, hyper, batch, key) + hyper["l2"] * jnp.sum(w**2)

    space = hg.Space({"l2": step, "width": hg.Int(16, 48, step=16)})
    result = hg.sweep(
        lambda choices: linear(lambda h: optax.sgd(0.1), train=penalised),
        space, hg.Splits(VALID, VALID, VALID), num_trials=9, num_steps=10, batch_size=8,
        sampler="grid", refine=hg.Refine(), progress=False,
    )  # fmt: skip
    widths = {t.params["width"] for t in result.study.trials}
    assert widths <= {16, 32, 48} and len(widths) > 1
    l2 = [10 * t.params["l2"] for t in result.study.trials]
    np.testing.assert_allclose(l2, np.round(l2), atol=1e-9)


def eager_and_jitted() -> list[tuple[Callable[[], Any], Callable[[], Any]]]:
    problem = linear()
    inner = problem.init(HYPER, KEY)
    tuner = hg.alternating(problem, SPACE)
    state = tuner.init(HYPER, KEY)
    hyper = {"rate": jnp.float32(0.01)}

    def estimate(hyper: Any, inner: Any, train: Any) -> Any:
        return hg.hypergradient(problem, hyper, inner, train, VALID, KEY)

    def roll(hyper: Any, inner: Any, train: Any) -> Any:
        return hg.rollout(problem, hyper, inner, train, KEY)

    arguments = hyper, inner, TRAIN
    return [
        (lambda: estimate(*arguments), lambda: jax.jit(estimate)(*arguments)),
        (lambda: roll(*arguments), lambda: jax.jit(roll)(*arguments)),
        (
            lambda: tuner.update(state, TRAIN, VALID),
            lambda: jax.jit(tuner.update)(state, TRAIN, VALID),
        ),
    ]


def test_eager_calls_compile_once() -> None:
    """They took 475 to 750 ms each, on eight weights: every call compiled all of it anew."""
    for eager, jitted in eager_and_jitted():
        first = eager()
        seconds = []
        for _ in range(10):
            begin = time.perf_counter()
            jax.block_until_ready(eager())
            seconds.append(time.perf_counter() - begin)
        assert min(seconds) < 2e-3
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first, jitted())
        assert all(jax.tree.leaves(same))


def test_what_is_compiled_goes_with_its_problem() -> None:
    class Data:
        rows = jnp.ones(4)

    def use(name: str) -> weakref.ref[Any]:
        data = Data()

        def closing(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
            return jnp.sum((w - data.rows) ** 2)

        problem = linear(train=closing, valid=closing)
        if name == "rollout":
            hg.rollout(problem, HYPER, problem.init(HYPER, KEY), TRAIN, KEY)
        elif name == "update":
            tuner = hg.alternating(problem, SPACE)
            tuner.update(tuner.init(HYPER, KEY), TRAIN, VALID)
        else:
            gradient(problem)
        assert copy.deepcopy(problem) == problem
        return weakref.ref(data)

    for name in ("hypergradient", "rollout", "update"):
        kept = use(name)
        gc.collect()
        assert kept() is None, name


def test_eager_caches_are_bounded() -> None:
    problem = linear()
    train = hg.Minibatches(VALID, 8, 10)
    for window in range(1, 11):
        jax.eval_shape(
            lambda h, w=window: (
                hg.hypergradient(problem, h, None, train, VALID, KEY, hg.Unrolled(window=w)).grad
            ),
            HYPER,
        )
    assert len(vars(problem)["_compiled"]) == 8


def test_the_first_state_may_be_donated() -> None:
    """Its buffers were shared among its parts, and with the caller's key and values."""
    hyper, key = {"rate": jnp.float32(0.01)}, jax.random.key(3)
    for tuner in (hg.alternating(linear(), SPACE), hg.restarting(linear(), SPACE)):
        expected = jax.jit(tuner.update)(tuner.init(hyper, key), TRAIN, VALID)
        update = jax.jit(tuner.update, donate_argnums=0)
        for init in (tuner.init, jax.jit(tuner.init)):
            state, info = update(init(hyper, key), TRAIN, VALID)
            assert info.loss == expected[1].loss
            state, info = update(state, TRAIN, VALID)
            assert jnp.isfinite(info.loss)
        assert float(hyper["rate"]) > 0 and jax.random.normal(key).shape == ()


def test_inside_a_trace_nothing_is_compiled_by_itself() -> None:
    """A nested jit would change the program, and with it the digest that checkpoints hold."""
    tuner = hg.alternating(linear(), SPACE)
    state = tuner.init(HYPER, KEY)
    used = program_of(jax.jit(tuner.update).trace(state, TRAIN, VALID))["used"]
    plain = program_of(jax.jit(tuner.update.__wrapped__).trace(state, TRAIN, VALID))["used"]
    assert used == plain
