"""Attribution is what jax.grad and retraining say; metasmoothness tells where it predicts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import attribution as benchmark
from hypergrad.analysis.smoothness import REMEDIES, sign_agreement

KEY = jax.random.key(0)
SIZE, STEPS = 12, 30
X = jax.random.normal(KEY, (SIZE + 5, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + 0.3 * jax.random.normal(jax.random.key(1), (SIZE + 5,))


def weighted(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    x, y, index = batch
    return jnp.mean(hyper["weight"][index] * (x @ w - y) ** 2) + 0.01 * jnp.sum(w**2)


def squares(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def regression(train_loss: Any = weighted) -> hg.Problem:
    return hg.bilevel(
        lambda key: jnp.zeros(3, X.dtype), train_loss, squares, lambda h: optax.sgd(0.1)
    )


PROBLEM = regression()
TESTS = [(X[i : i + 1], Y[i : i + 1]) for i in range(SIZE, SIZE + 5)]
ONES = {"weight": jnp.ones(SIZE)}
TRAIN = hg.Minibatches((X[:SIZE], Y[:SIZE], jnp.arange(SIZE)), 4, STEPS)


class Grid(NamedTuple):
    """A hand-filled training state: many numbers, each on its own."""

    params: jax.Array


def logistic(growth: float) -> hg.Problem:
    """Each step maps p to r p (1 - p), r a little below `growth`: chaos near 4, rest below 3."""

    def step(inner: Grid, hyper: Any, batch: Any, key: Any) -> Grid:
        p = inner.params
        return Grid((growth - 0.01 * hyper["push"]) * p * (1 - p))

    loss = lambda params, hyper, batch, key: jnp.mean((params - batch) ** 2)  # noqa: E731
    start = lambda hyper, key: Grid(jnp.linspace(0.2, 0.7, 200))  # noqa: E731
    return hg.Problem(start, step, loss, loss)


PUSH, GIVEN = {"push": jnp.float32(1.0)}, (jnp.zeros(60), KEY)


def test_attribution_is_plain_autodiff_and_predicts_retraining(x64: None) -> None:
    """In float64 the gradient of an unrolled loop, and central differences of retraining."""
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    problem = hg.bilevel(lambda key: jnp.zeros(3), weighted, squares, lambda h: optax.sgd(0.1))
    train = hg.Minibatches((x[:SIZE], y[:SIZE], jnp.arange(SIZE)), 4, STEPS)
    tests = [(x[i : i + 1], y[i : i + 1]) for i in range(SIZE, SIZE + 5)]
    ones = {"weight": jnp.ones(SIZE)}
    found = hg.attribution(problem, ones, train, tests, KEY, chunk=2)["weight"]
    assert found.shape == (5, SIZE) and np.abs(found).min() > 1e-12

    def retrained(weight: jax.Array) -> jax.Array:
        inner = problem.init(ones, KEY)
        params = hg.rollout(problem, {"weight": weight}, inner, train, KEY).params
        return jnp.stack([squares(params, None, test, None) for test in tests])

    np.testing.assert_allclose(found, jax.jacrev(retrained)(ones["weight"]), rtol=1e-10)
    ends = jax.jit(jax.vmap(retrained))(
        1 + 1e-5 * jnp.stack([jnp.eye(SIZE), -jnp.eye(SIZE)]).reshape(-1, SIZE)
    )
    differences = (ends[:SIZE] - ends[SIZE:]) / 2e-5
    np.testing.assert_allclose(found, differences.T, rtol=1e-6, atol=1e-9)


def test_chunks_estimators_and_lazy_tests_agree() -> None:
    """Uneven shapes are computed apart, and no more tests than a chunk are held."""
    held: list[int] = []

    def stream() -> Iterator[Any]:
        for i, test in enumerate([*TESTS[:3], (X[:2], Y[:2]), TESTS[3]]):
            held.append(i)
            yield test

    lazily = hg.attribution(PROBLEM, ONES, TRAIN, stream(), KEY, chunk=2, check=False)
    assert held == list(range(5))
    one = hg.attribution(PROBLEM, ONES, TRAIN, TESTS, KEY, hg.Unrolled(checkpoint="sqrt"))
    close = {"rtol": 1e-4, "atol": 1e-7}
    np.testing.assert_allclose(lazily["weight"][[0, 1, 2, 4]], one["weight"][:4], **close)
    alone = hg.hypergradient(PROBLEM, ONES, None, TRAIN, (X[:2], Y[:2]), KEY).grad["weight"]
    np.testing.assert_allclose(lazily["weight"][3], alone, **close)


def test_metasmoothness_of_rest_and_of_chaos() -> None:
    """A line is 1; a logistic map is smooth below its chaos and near chance above."""
    here = jnp.zeros(4)
    assert float(sign_agreement(here - 1, here, here + jnp.array([1.0, 1, 1, 3]))) == 1
    # one of four turns back, and the way from end to end is its weight
    turned = sign_agreement(here - 1, here, jnp.array([1.0, 1, 1, -0.5]))
    assert float(turned) == pytest.approx((6 - 0.5) / 6.5)
    rest, chaos = (hg.metasmoothness(logistic(r), PUSH, *GIVEN) for r in (2.8, 4.0))
    assert rest.value > 0.99 and rest.verdict == "smooth" and rest.remedies == ()
    assert abs(chaos.value) < 0.4 and chaos.verdict == "rough" and chaos.remedies == REMEDIES
    assert rest.noise == chaos.noise == 0
    assert "rough" in str(chaos) and "average pooling" in str(chaos)
    assert hg.metasmoothness(PROBLEM, ONES, TRAIN, KEY).value > 0.9
    # over a distance at which the map has no time to fold, the same training is smooth
    near = {"push": jnp.float32(1e-3)}
    short = hg.metasmoothness(logistic(4.0), PUSH, jnp.zeros(4), KEY, direction=near)
    assert short.value > chaos.value + 0.3


def test_attribution_warns_where_training_is_rough() -> None:
    with pytest.warns(UserWarning, match=r"attribution: metasmoothness .*, rough"):
        found = hg.attribution(logistic(4.0), PUSH, jnp.zeros(60), [0.3, 0.5], KEY)
    assert found["push"].shape == (2,) and (found["push"] != 0).all()


def own_dice() -> Any:
    """A loss that draws its own numbers while it is traced."""
    rng = np.random.default_rng()

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return weighted(w, hyper, batch, key) + w[0] * float(rng.normal())

    return loss


def host_order() -> Any:
    """A loss whose data come from the host, in another order at each call."""
    rng = np.random.default_rng(0)

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        draw = lambda: rng.permutation(SIZE).astype(np.int32)  # noqa: E731
        index = jax.pure_callback(draw, jax.ShapeDtypeStruct((SIZE,), jnp.int32))[:4]
        return weighted(w, hyper, (X[index], Y[index], batch[2]), key)

    return loss


@pytest.mark.parametrize("loss", [own_dice, host_order])
def test_a_run_that_is_not_deterministic_is_refused(loss: Callable[[], Any]) -> None:
    problem = regression(loss())
    for call in (
        lambda: hg.metasmoothness(problem, ONES, TRAIN, KEY),
        lambda: hg.attribution(problem, ONES, TRAIN, TESTS, KEY),
    ):
        with pytest.raises(ValueError, match="Training is not deterministic: ") as caught:
            call()
        assert str(caught.value).count("\n") == 0


def test_a_loader_is_refused() -> None:
    """Batches from a generator may come in another order, or not at all, at the next run."""
    loader = ((X[:4], Y[:4], jnp.arange(4)) for _ in range(STEPS))
    for call in (
        lambda: hg.metasmoothness(PROBLEM, ONES, loader, KEY),
        lambda: hg.attribution(PROBLEM, ONES, loader, TESTS, KEY),
    ):
        with pytest.raises(TypeError, match="train is or holds a generator, which may hand out"):
            call()


def test_metasmoothness_names_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match=r"direction changes no trained weight: training does"):
        hg.metasmoothness(regression(lambda w, h, b, k: weighted(w, ONES, b, k)), ONES, TRAIN, KEY)
    with pytest.raises(ValueError, match=r"not finite at hyper - direction: give a direction"):
        hg.metasmoothness(logistic(4.0), PUSH, *GIVEN, direction={"push": jnp.float32(500.0)})
    with pytest.raises(ValueError, match="direction is 0 or not finite"):
        hg.metasmoothness(PROBLEM, ONES, TRAIN, KEY, {"weight": jnp.zeros(SIZE)})
    with pytest.raises(ValueError, match=r"direction has the shapes \{'weight': \(3,\)\}, but"):
        hg.metasmoothness(PROBLEM, ONES, TRAIN, KEY, {"weight": jnp.ones(3)})


def test_inside_of_jit_both_say_so() -> None:
    for call in (
        lambda w: hg.metasmoothness(PROBLEM, {"weight": w}, TRAIN, KEY).value,
        lambda w: hg.attribution(PROBLEM, {"weight": w}, TRAIN, TESTS, KEY),
    ):
        with pytest.raises(ValueError, match=r"is called inside of jax\.jit or another"):
            jax.jit(call)(ONES["weight"])


def test_attribution_names_the_test_that_is_not_finite() -> None:
    tests = [TESTS[0], (jnp.full((1, 3), jnp.nan), jnp.zeros(1))]
    with pytest.raises(ValueError, match=r"tests\[1\]: The hypergradient of weight is not finite"):
        hg.attribution(PROBLEM, ONES, TRAIN, tests, KEY, check=False)
    # The slope of a mean over nothing is 0, and looks like an answer.
    empty = [(X[:0], Y[:0])]
    with pytest.raises(ValueError, match=r"tests\[0\]: The validation loss is .* holds 0 examples"):
        hg.attribution(PROBLEM, ONES, TRAIN, empty, KEY, check=False)
    with pytest.raises(ValueError, match="tests is empty: give at least one batch"):
        hg.attribution(PROBLEM, ONES, TRAIN, [], KEY)


def test_choose_and_check_tell_metasmoothness(capsys: Any) -> None:
    """Their answers stay what they were; the value is beside them."""
    space = hg.Space({"weight": hg.Float(0.0, 2.0)})
    arguments = PROBLEM, space, None, ONES, TRAIN, TESTS[0], KEY
    assert isinstance(hg.choose_estimator(*arguments), hg.Estimator)
    assert "; metasmoothness " in capsys.readouterr().out
    # at its bound a number has a neighbour on one side only
    for weight in (ONES["weight"], jnp.full(SIZE, 2.0)):
        report = hg.check_hypergradient(
            PROBLEM, {"weight": weight}, None, TRAIN, TESTS[0], KEY, space=space, max_entries=1
        )
        assert len(report.rows) == 1 and report.metasmoothness is not None
        assert report.metasmoothness > 0.9
        assert "metasmoothness " in str(report)


def test_the_benchmark_measures_small(tmp_path: Path, capsys: Any) -> None:
    """100 digits, 60 steps: the hypergradient ranks subsets well, and every rival has a row."""
    out = tmp_path / "rows.json"
    benchmark.main(argv=["--quick", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["lds"]) == {"hypergradient", "influence", "TracIn", "TRAK-like"}
    assert row["lds"]["hypergradient"]["0.05"]["mean"] > 0.8
    assert row["verdict"] == "smooth" and row["examples"] == 100
    assert "TRAK-like" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--tasks conv: give --data FOLDER with MNIST's"):
        benchmark.main(argv=["--quick", "--tasks", "conv"])


def test_one_array_is_no_list_of_batches() -> None:
    loss = lambda w, hyper, batch, key: jnp.mean(hyper["a"] * (w - batch) ** 2)  # noqa: E731
    problem = hg.bilevel(lambda key: jnp.zeros(2), loss, loss, lambda h: optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"tests is a .*list of batches"):
        hg.attribution(problem, {"a": 1.0}, jnp.ones((3, 2)), jnp.ones((4, 2)), jax.random.key(0))
    one = tuple(jax.tree.map(jnp.squeeze, TESTS[0]))
    with pytest.raises(TypeError, match=r"tests is a tuple of arrays, which is one batch: give a"):
        hg.attribution(PROBLEM, ONES, TRAIN, one, KEY)
