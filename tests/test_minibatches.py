"""Minibatches: every example once an epoch, in orders that look random, under every transform."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hypergrad import Minibatches

KEY = jax.random.key(0)


def stream(size: int, batch_size: int, epochs: int, key: jax.Array = KEY) -> np.ndarray:
    """The indices drawn over whole epochs, [epochs, size]."""
    data = Minibatches(jnp.arange(size), batch_size)
    steps = jnp.arange(-(-size * epochs // batch_size))
    drawn = jax.jit(jax.vmap(lambda t: data.batch(t, key)))(steps).ravel()
    return np.asarray(drawn[: size * epochs]).reshape(epochs, size)


@pytest.mark.parametrize(
    ("size", "batch_size"), [(1, 1), (2, 1), (7, 3), (16, 16), (17, 5), (97, 64), (257, 100)]
)
def test_every_example_once_an_epoch(size: int, batch_size: int) -> None:
    """Also where batches straddle epochs, as all but (16, 16) and the first two do."""
    for epoch in stream(size, batch_size, 4):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_orders_differ_by_epoch_and_key_and_repeat_by_key() -> None:
    first, second, third = stream(50, 7, 3)
    other = stream(50, 7, 1, jax.random.key(1))[0]
    orders = [first, second, third, other, np.arange(50)]
    for a, b in itertools.combinations(orders, 2):
        assert np.mean(a == b) < 0.2  # random orders agree in one place of fifty
    np.testing.assert_array_equal(stream(50, 7, 3), [first, second, third])


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("over", ["keys", "epochs"])
def test_all_orders_are_equally_likely(size: int, over: str) -> None:
    """Chi-square over all size! orders; the seeds are fixed, so this cannot flake."""
    draws = 3000
    if over == "epochs":
        orders = stream(size, size, draws)
    else:
        data = Minibatches(jnp.arange(size), size)
        orders = np.asarray(jax.vmap(lambda k: data.batch(0, k))(jax.random.split(KEY, draws)))
    numbers = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
    counts = np.bincount([numbers[tuple(o)] for o in orders.tolist()], minlength=len(numbers))
    assert counts.sum() == draws
    assert stats.chisquare(counts).pvalue > 1e-3


def test_neighbours_in_the_data_are_not_neighbours_in_the_stream() -> None:
    """Where example 0 lands, and how far from it example 1 lands, are uniform (13 of 16 used)."""
    places = np.argsort(stream(13, 13, 4000), axis=1)
    for cells, count in ((places[:, 0], 13), ((places[:, 1] - places[:, 0]) % 13 - 1, 12)):
        assert stats.chisquare(np.bincount(cells, minlength=count)).pvalue > 1e-3


def test_leaves_are_drawn_together_and_numpy_arrays_are_welcome() -> None:
    arrays = {"x": np.arange(12.0).reshape(6, 2), "y": np.arange(6)}
    data = Minibatches(arrays, batch_size=4, num_steps=3)
    scanned = jax.lax.scan(lambda c, t: (c, data.batch(t, KEY)), None, jnp.arange(3))[1]
    assert scanned["x"].shape == (3, 4, 2)
    np.testing.assert_array_equal(scanned["x"][..., 0], 2 * scanned["y"])
    assert len(np.unique(scanned["y"])) == 6


def test_is_a_pytree_with_static_integers() -> None:
    data = Minibatches({"x": jnp.arange(6.0)}, batch_size=3, num_steps=2)
    leaves, treedef = jax.tree.flatten(data)
    assert len(leaves) == 1
    assert jax.tree.unflatten(treedef, leaves) == data
    assert treedef != jax.tree.structure(Minibatches({"x": jnp.arange(6.0)}, 3, 4))
    doubled = jax.tree.map(lambda x: 2 * x, data)
    assert (doubled.batch_size, doubled.num_steps) == (3, 2)
    np.testing.assert_array_equal(doubled.batch(0, KEY)["x"], 2 * data.batch(0, KEY)["x"])
    [(path, _)] = jax.tree_util.tree_leaves_with_path(data)
    assert jax.tree_util.keystr(path) == ".arrays['x']"


def test_one_compilation_where_only_values_change() -> None:
    traces = []

    @jax.jit
    def draw(data: Minibatches, step: jax.Array, key: jax.Array) -> Any:
        traces.append(step)
        return data.batch(step, key)

    first = draw(Minibatches(jnp.arange(9.0), 4), jnp.int32(0), KEY)
    second = draw(Minibatches(jnp.arange(9.0) + 100, 4), jnp.int32(0), KEY)
    draw(Minibatches(jnp.arange(9.0), 4), jnp.int32(5), jax.random.key(3))
    assert len(traces) == 1
    np.testing.assert_array_equal(second, first + 100)
    draw(Minibatches(jnp.arange(9.0), 5), jnp.int32(0), KEY)
    assert len(traces) == 2


def test_vmap_over_keys() -> None:
    data, keys = Minibatches(jnp.arange(11), 4), jax.random.split(KEY, 5)
    together = jax.jit(jax.vmap(lambda k: data.batch(2, k)))(keys)
    alone = jnp.stack([data.batch(2, k) for k in keys])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together, axis=0)) > 1


def test_stacked_data_sets_under_vmap() -> None:
    """Two folds of more examples each than there are folds, drawn in the same order."""
    fold = Minibatches(jnp.arange(5.0), 3)
    folds = jax.tree.map(lambda x: jnp.stack([x, 10 + x]), fold)
    drawn = jax.vmap(lambda data: data.batch(1, KEY))(folds)
    np.testing.assert_array_equal(drawn[0], fold.batch(1, KEY))
    np.testing.assert_array_equal(drawn[1], fold.batch(1, KEY) + 10)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_derivatives_through_a_scan(wrap: Any) -> None:
    """Reverse and forward, in a scalar and in the data, against the sums written out."""
    data = Minibatches(jnp.linspace(1.0, 2.0, 7), 3, num_steps=5)

    def total(scale: jax.Array, data: Minibatches) -> jax.Array:
        body = wrap(lambda c, t: (c + jnp.sum((scale * data.batch(t, KEY)) ** 2), None))
        return jax.lax.scan(body, 0.0, jnp.arange(data.num_steps))[0]

    drawn = np.concatenate([data.batch(t, KEY) for t in range(5)])
    grad, data_grad = jax.jit(jax.grad(total, (0, 1)))(3.0, data)
    np.testing.assert_allclose(grad, 6 * np.sum(drawn**2), rtol=1e-5)
    times = np.sum(np.isclose(drawn[:, None], data.arrays), axis=0)
    assert times.sum() == 15
    np.testing.assert_allclose(data_grad.arrays, 18 * data.arrays * times, rtol=1e-5)
    tangent = jax.jvp(lambda s: total(s, data), (3.0,), (1.0,))[1]
    np.testing.assert_allclose(tangent, grad, rtol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "batch_size", "num_steps", "message"),
    [
        (np.zeros(4), 5, 1, r"batch_size=5 exceeds the 4 examples"),
        ({"x": np.zeros(4), "y": np.zeros(5)}, 2, 1, r"disagree.*'x': 4, 'y': 5"),
        (np.zeros(4), 2.0, 1, r"batch_size=2\.0 is no integer: .*a shape of the compiled"),
        (np.zeros(4), 0, 1, r"batch_size=0 must be at least 1"),
        (np.zeros(4), 2, np.float32(3), r"num_steps=.* is no integer"),
        ({"x": np.zeros(4), "rate": 0.5}, 2, 1, r"'rate': \(\).*leading axis of examples"),
        ((), 2, 1, r"leading axis of examples"),
    ],
)
def test_wrong_arguments(arrays: Any, batch_size: Any, num_steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Minibatches(arrays, batch_size, num_steps)
