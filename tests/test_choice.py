"""choose_estimator on problems whose right answer is known, and "auto" in the tuners."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg

KEY = jax.random.key(0)
DATA = jax.random.normal(KEY, (40, 6))
TARGETS = DATA @ jnp.arange(6.0) + jax.random.normal(jax.random.key(1), (40,))
VALID = (DATA[:20] + 0.1, TARGETS[:20])


def squares(w: Any, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def regression(optimizer: Any) -> hg.Problem:
    """Linear regression with penalties, 6 or a multiple, if `hyper` has them."""

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        l2 = jnp.reshape(hyper.get("l2", jnp.zeros(6)), (6, -1)).mean(1)
        return squares(w, batch) + jnp.sum(l2 * w**2)

    valid_loss = lambda w, hyper, batch, key: squares(w, batch)  # noqa: E731
    return hg.bilevel(lambda key: jnp.zeros(6), train_loss, valid_loss, optimizer)


RATE = hg.Float(1e-4, 1.0, scale="log")
MOMENTUM = hg.Float(0.5, 0.999, scale="reverse_log")
L2 = hg.Float(1e-4, 10.0, scale="log")


def choose(space: Any, hyper: Any, problem: hg.Problem, steps: int, **options: Any) -> Any:
    train = hg.Minibatches((DATA, TARGETS), 10, steps)
    arguments = (problem, hg.Space(space), None, hyper, train, VALID, KEY)
    return hg.choose_estimator(*arguments, **options)


def test_few_hyperparameters_and_memory_enough(capsys: Any) -> None:
    problem = regression(lambda h: optax.sgd(h["rate"], momentum=h["m"]))
    hyper = {"rate": 0.01, "m": 0.6}
    assert choose({"rate": RATE, "m": MOMENTUM}, hyper, problem, 30) == hg.Unrolled()
    said = capsys.readouterr().out
    assert "Unrolled(" in said
    assert "2 hyperparameters over 30 steps; the cheapest exact one that fits" in said
    assert "of what it promises" in said


def test_one_hyperparameter_of_a_long_run_goes_forward() -> None:
    problem = regression(lambda h: optax.sgd(h["rate"]))
    found = choose({"rate": RATE}, {"rate": 0.01}, problem, 2000, memory_limit=60_000)
    assert found == hg.Forward()


def test_little_memory_takes_checkpoints() -> None:
    def optimizer(hyper: Any) -> Any:
        return optax.sgd(hyper["rate"], momentum=hyper["m"])

    space = {"rate": RATE, "m": MOMENTUM, "l2": L2}
    hyper = {"rate": 0.01, "m": 0.6, "l2": jnp.full(6, 0.1)}
    problem = regression(optimizer)
    found = choose(space, hyper, problem, 2000, memory_limit=60_000)
    assert found == hg.Unrolled(checkpoint="sqrt")
    with pytest.raises(ValueError, match=r"memory_limit=10 bytes is too little for every exact"):
        choose(space, hyper, problem, 2000, memory_limit=10)


@pytest.mark.parametrize(("count", "limit"), [(6, None), (120, 12_000)])
def test_loss_hyperparameters_of_a_long_run_are_implicit(
    count: int, limit: int | None, capsys: Any
) -> None:
    """Agreeing with the exact gradient, or at a stationary point where nothing exact fits."""
    problem = regression(lambda h: optax.sgd(0.3))
    hyper = {"l2": jnp.full(count, 0.1)}
    train = hg.Minibatches((DATA, TARGETS), 40, 1000)
    arguments = (problem, hg.Space({"l2": L2}), None, hyper, train, VALID, KEY)
    found = hg.choose_estimator(*arguments, memory_limit=limit)
    assert isinstance(found, hg.Implicit)
    said = capsys.readouterr().out
    assert f"all {count} hyperparameters act through the loss" in said
    assert ("nothing exact fits" in said) == (limit is not None)


def test_chaos_is_detected(capsys: Any) -> None:
    """The logistic map at r = 3.9: the gradient grows by 1.6 a step, the loss stays below 1."""

    def step(inner: Any, hyper: Any, batch: Any, key: Any) -> Any:
        x = inner.params
        return inner._replace(params=hyper["r"] * x * (1 - x), step=inner.step + 1)

    loss = lambda x, hyper, batch, key: x  # noqa: E731
    base = hg.bilevel(lambda key: jnp.full((), 0.3), loss, loss, lambda h: optax.sgd(0.1))
    problem = base._replace(step=step)
    space = hg.Space({"r": hg.Float(2.0, 4.0)})
    train = jnp.zeros((60, 1))

    def found(r: float) -> hg.Estimator:
        return hg.choose_estimator(problem, space, None, {"r": r}, train, jnp.zeros(1), KEY)

    assert isinstance(found(3.9), hg.Evolution)
    assert "training is chaotic here" in capsys.readouterr().out
    assert found(2.8) == hg.Unrolled()


def test_a_loss_that_is_not_finite_is_no_chaos() -> None:
    """No estimator has its gradient; of a mean over nothing it is 0, with "nothing to probe"."""
    problem, space = regression(lambda h: optax.sgd(h["rate"])), hg.Space({"rate": RATE})
    train = hg.Minibatches((DATA, TARGETS), 10, 5)
    nan = jnp.full_like(DATA[:2], jnp.nan)
    empty = (DATA[:0], TARGETS[:0])
    for valid, why in (((nan, TARGETS[:2]), "in leaf 0"), (empty, "holds 0 examples")):
        with pytest.raises(ValueError, match=f"The validation loss is not finite, .*{why}"):
            hg.choose_estimator(problem, space, None, {"rate": 0.1}, train, valid, KEY)


def test_a_path_without_derivative_is_for_evolution(capsys: Any) -> None:
    problem = regression(lambda h: optax.lion(0.01, b1=h["b1"]))
    found = choose({"b1": hg.Float(0.5, 0.99)}, {"b1": 0.9}, problem, 10)
    assert isinstance(found, hg.Evolution)
    assert "the path of 'b1' has no derivative (sign)" in capsys.readouterr().out


def test_single_loop_methods_are_named_where_they_would_do(capsys: Any) -> None:
    """A hard mask in the loss; and penalties for which nothing fits. Never for the optimiser's."""

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        keep = jax.random.uniform(key, batch[0].shape) >= hyper["drop"]
        return squares(w, (jnp.where(keep, batch[0], 0), batch[1]))

    valid_loss = regression(lambda h: optax.sgd(0.1)).valid_loss
    noisy = hg.bilevel(lambda key: jnp.zeros(6), train_loss, valid_loss, lambda h: optax.sgd(0.1))
    found = choose({"drop": hg.Float(0.0, 0.8)}, {"drop": 0.2}, noisy, 10)
    assert isinstance(found, hg.Evolution)
    assert "in alternating, SelfTuning sees it too" in capsys.readouterr().out

    for space, hyper in (({"l2": L2}, {"l2": jnp.full(6, 0.1)}), ({"rate": RATE}, {"rate": 0.1})):
        problem = regression(lambda h: optax.sgd(h.get("rate", 0.1)))
        with pytest.raises(ValueError, match="memory_limit=10 bytes is too little") as error:
            choose(space, hyper, problem, 20, memory_limit=10)
        notes = " ".join(getattr(error.value, "__notes__", ()))
        assert ("hypergrad.F2SA(step_size) takes no second derivative" in notes) == ("l2" in space)


@pytest.mark.parametrize("make", [hg.alternating, hg.restarting])
def test_auto_in_the_tuners(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="hypergrad")
    problem = regression(lambda h: optax.sgd(h["rate"], momentum=h["m"]))
    space = hg.Space({"rate": RATE, "m": MOMENTUM})
    train = hg.Minibatches((DATA, TARGETS), 10, 10)
    infos = []
    for estimator in ("auto", hg.Unrolled(validate_at=0.8 if make is hg.alternating else "last")):
        tuner = make(problem, space, estimator)
        state, update = tuner.init({"rate": 1e-3, "m": 0.6}, KEY), jax.jit(tuner.update)
        for _ in range(3):
            state, info = update(state, train, VALID)
        infos.append(info)
    assert float(infos[0].loss) == pytest.approx(float(infos[1].loss), rel=1e-5)
    assert caplog.text.count('estimator="auto": Unrolled(') == 1  # one compilation
    with pytest.raises(ValueError, match=r"estimator='fast' is no estimator"):
        make(problem, space, "fast")


def test_an_estimator_that_perturbs_works_in_unit_coordinates() -> None:
    """Evolution on a sign step inside a tuner, where its std is a share of the range."""
    problem = regression(lambda h: optax.lion(h["rate"], b1=h["b1"]))
    space = hg.Space({"rate": RATE, "b1": hg.Float(0.5, 0.99)})
    tuner = hg.restarting(problem, space, hg.Evolution(pairs=4, std=0.03, method="es"))
    state, update = tuner.init({"rate": 1e-3, "b1": 0.9}, KEY), jax.jit(tuner.update)
    train = hg.Minibatches((DATA, TARGETS), 10, 40)
    losses = []
    for _ in range(8):
        state, info = update(state, train, VALID)
        losses.append(float(info.loss))
    assert losses[-1] < 0.9 * losses[0]
    differences = hg.restarting(problem, space, hg.FiniteDifference(1e-2))
    unit = jax.jit(differences.update)(
        differences.init({"rate": 1e-3, "b1": 0.9}, KEY), train, VALID
    )[1].grad
    assert float(unit["rate"]) < 0
