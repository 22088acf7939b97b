"""Dropout: the mask's law, the rate's derivative against exact and differenced ones, the noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from hypergrad.problem import noise
from hypergrad.problem.noise import dropout, random_bits

KEY = jax.random.key(0)


# --- the derivative, against the exact one -----------------------------------------------------


def digits_net(units=16):
    """A 64-units-units-10 net, partly trained without dropout, and its loss."""
    data = load_digits()
    x, y = jnp.asarray(data.data[:256] / 16 - 0.3, jnp.float32), jnp.asarray(data.target[:256])
    sizes = (64, units, units, 10)
    params = [
        jax.random.normal(jax.random.fold_in(KEY, m + i), (m, n)) * (2 / m) ** 0.5
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    ]

    def loss(params, x, y, drop):
        for i, w in enumerate(params[:-1]):
            x = drop(jax.nn.relu(x @ w), i)
        picked = jnp.take_along_axis(jax.nn.log_softmax(x @ params[-1]), y[:, None], 1)
        return -jnp.mean(picked)

    def step(params, _):
        grad = jax.grad(loss)(params, x, y, lambda x, i: x)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grad), None

    params, _ = jax.jit(lambda p: jax.lax.scan(step, p, None, 100))(params)
    return params, loss, x[:32], y[:32]


def cosine(a, b):
    return float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_rate_derivative_of_the_expected_training_loss(rate):
    """Per-unit rates at fixed parameters, 256 keys, against the exact derivative of true dropout.

    With the other masks fixed, E loss = p L(0) + (1 - p) L(a), so that d/dp is
    L(0) - L(a) + a L'(a), a = 1 / (1 - p): no differences, and little noise.
    """
    units = 16
    params, loss, x, y = digits_net(units)
    kept = 1 / (1 - rate)

    def exact(key):
        u = jax.random.uniform(key, (2, len(y), units))
        masks = jnp.where(u >= rate, kept, 0.0)

        def along(layer, unit):
            def at(value):
                moved = masks.at[layer, :, unit].set(value)
                return loss(params, x, y, lambda h, i: h * moved[i])

            on, slope = jax.jvp(at, (jnp.float32(kept),), (jnp.float32(kept),))
            return at(jnp.float32(0)) - on + slope

        return jax.vmap(jax.vmap(along, (None, 0)), (0, None))(jnp.arange(2), jnp.arange(units))

    def estimate(rates, key):
        keys = jax.random.split(key)
        return loss(params, x, y, lambda h, i: dropout(h, rates[i], keys[i]))

    wanted = jax.jit(jax.vmap(exact))(jax.random.split(jax.random.key(1), 64)).mean(0)
    rates = jnp.full((2, units), rate)
    keys = jax.random.split(jax.random.key(2), 256)
    got = jax.jit(jax.vmap(jax.grad(estimate), (None, 0)))(rates, keys).mean(0)
    assert cosine(got, wanted) > 0.9
    assert cosine(got - got.mean(), wanted - wanted.mean()) > 0.8
    assert 0.75 < float(jnp.linalg.norm(got) / jnp.linalg.norm(wanted)) < 1.4


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_rate_derivative_through_training(rate):
    """Mean over 256 keys through 20 SGD steps, against differences of true dropout's mean.

    Linear regression with one rate per input: the expected parameters obey a closed recursion
    (dropout adds rate / (1 - rate) diag(x^2) to the Hessian), so the reference is exact.
    """
    x = jax.random.normal(jax.random.key(3), (40, 6)) * jnp.arange(1, 7) / 4
    y = x @ jnp.array([1.0, -1, 0.5, 2, 0, 1]) + 0.3
    validation = jnp.array([0.5, -0.5, 1.0, 1, 0.3, -1])

    def step(w, rates, key):
        def loss(w):
            return 0.5 * jnp.mean((dropout(x, rates, key) @ w - y) ** 2)

        return w - 0.1 * jax.grad(loss)(w)

    def unrolled(rates, key):
        body = lambda w, t: (step(w, rates, jax.random.fold_in(key, t)), None)  # noqa: E731
        w, _ = jax.lax.scan(jax.checkpoint(body), jnp.zeros(6), jnp.arange(20))
        return w @ validation

    def expected(rates):
        hessian = x.T @ x / 40
        hessian = hessian + jnp.diag(rates / (1 - rates) * jnp.diag(hessian))
        w = jnp.zeros(6)
        for _ in range(20):
            w = w - 0.1 * (hessian @ w - x.T @ y / 40)
        return w @ validation

    rates = jnp.full(6, rate)
    keys = jax.random.split(jax.random.key(4), 256)
    got = jax.jit(jax.vmap(jax.grad(unrolled), (None, 0)))(rates, keys)
    wanted = jax.grad(expected)(rates)
    error = jnp.linalg.norm(got.std(0)) / 16 / jnp.linalg.norm(wanted)
    assert error < 0.2
    assert cosine(got.mean(0), wanted) > 0.97
    off = jnp.linalg.norm(got.mean(0) - wanted) / jnp.linalg.norm(wanted)
    assert float(off) < 3 * float(error) + 0.04


@pytest.mark.parametrize("form", noise.FORMS)
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6])
def test_a_quadratic_loss_leaves_no_bias(form, rate):
    """E (m - .2)^2 = 1 / (1 - p) + const: exact for two moments; the relaxation is off by a bit."""

    def loss(rate, key):
        return jnp.mean((dropout(jnp.ones(4096), rate, key, form) - 0.2) ** 2)

    keys = jax.random.split(jax.random.key(5), 256)
    got = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(rate, keys)
    wanted = 1 / (1 - rate) ** 2
    tolerance = 0.2 * wanted if form == "relaxed" else 4 * float(got.std()) / 16
    assert tolerance < 0.25 * wanted
    assert abs(float(got.mean()) - wanted) < tolerance


def test_rate_zero_is_unbiased_to_third_order():
    """E m^3 of true dropout is 1 / (1 - p)^2: derivative 2 at 0; Gaussian noise reads 3."""

    def slope(form):
        keys = jax.random.split(jax.random.key(6), 256)
        loss = lambda rate, key: jnp.mean(dropout(jnp.ones(8192), rate, key, form) ** 3)  # noqa: E731
        return float(jax.vmap(jax.grad(loss), (None, 0))(0.0, keys).mean())

    assert abs(slope("bernoulli") - 2) < 0.15
    assert slope("gaussian") > 2.7


def test_mixed_second_derivative_is_reverse_over_reverse_and_forward_over_reverse():
    x, w = jax.random.normal(KEY, (32, 5)), jnp.arange(5.0)

    def loss(w, rate):
        return jnp.mean(jnp.tanh(dropout(x, rate, KEY) @ w))

    def grad(rate):
        return jax.grad(loss)(w, rate)

    forward = jax.jit(jax.jacfwd(grad))(0.2)
    reverse = jax.jit(jax.jacrev(grad))(0.2)
    np.testing.assert_allclose(forward, reverse, rtol=2e-4, atol=1e-5)
    assert float(jnp.linalg.norm(forward)) > 1e-2


# --- the mask's law ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.8])
def test_moments_of_the_masks(rate):
    x = jnp.ones((1000, 1000))
    for form in ("bernoulli", "gaussian"):
        mask = np.asarray(dropout(x, jnp.float32(rate), KEY, form), np.float64)
        variance = max(rate, noise.VARIANCE_FLOOR) if form == "bernoulli" else rate
        variance = max(variance / (1 - rate), noise.VARIANCE_FLOOR)
        assert abs(mask.mean() - 1) < 5 * variance**0.5 / 1000
        assert abs(mask.var() / variance - 1) < 0.08
    if rate >= noise.VARIANCE_FLOOR:
        mask = dropout(x, rate, KEY)
        np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-6)
        dropped = float((mask == 0).mean())
        assert abs(dropped - rate) < 5 * (rate * (1 - rate)) ** 0.5 / 1000


def test_traced_concrete_and_zero_rates():
    x = jnp.ones((64, 64))
    for rate in (0.0, 0.3):
        eager = dropout(x, jnp.float32(rate), KEY)
        jitted = jax.jit(lambda r: dropout(x, r, KEY))(rate)
        np.testing.assert_allclose(eager, jitted, rtol=1e-6)
    assert dropout(x, 0.0, KEY) is x
    assert float(jnp.abs(dropout(x, jnp.float32(0), KEY) - x).max()) > 0.5


def test_extreme_rates_stay_finite_and_nan_shows():
    def loss(rate):
        return jnp.sum(dropout(jnp.ones(4096), rate, KEY) ** 2)

    for rate in (0.0, 1e-8, 0.99, 1.0, 1.5, -0.5):
        value, grad = jax.jit(jax.value_and_grad(loss))(rate)
        assert np.isfinite(value)
        assert np.isfinite(grad)
        assert grad != 0
    assert np.isnan(jax.jit(loss)(np.nan))


@pytest.mark.parametrize("rate", [1.0, -0.1, np.array([0.2, 1.5]), np.float32(2)])
def test_concrete_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match=r"\[0, 1\).*rate="):
        dropout(jnp.ones((3, 2)), rate, KEY)


def test_other_errors_name_the_remedy():
    with pytest.raises(ValueError, match="does not broadcast"):
        dropout(jnp.ones((3, 2)), jnp.ones(3) / 2, KEY)
    with pytest.raises(ValueError, match="unknown dropout form 'hard'"):
        dropout(jnp.ones(3), 0.5, KEY, "hard")
    with pytest.raises(TypeError, match="cast x"):
        dropout(jnp.ones(3, int), 0.5, KEY)


def test_dtypes_vmap_scan_and_checkpoint():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jnp.ones((64, 32), dtype)
        for form in noise.FORMS:
            assert dropout(x, jnp.float32(0.5), KEY, form).dtype == dtype
        assert dropout(x, jnp.asarray(0.5, jnp.bfloat16), KEY).dtype == dtype
    with jax.enable_x64(True):
        x = jnp.ones((64, 32), jnp.float64)
        assert dropout(x, 0.3, KEY).dtype == jnp.float64
        np.testing.assert_allclose(dropout(x, 0.3, KEY).max(), 1 / 0.7, rtol=1e-15)
    x, rates = jnp.ones((8, 4)), jnp.array([0.1, 0.5, 0.7])
    keys = jax.random.split(KEY, 3)
    batched = jax.vmap(dropout, (None, 0, 0))(x, rates, keys)
    for i in range(3):
        np.testing.assert_allclose(batched[i], dropout(x, rates[i], keys[i]), rtol=1e-6)
    _, scanned = jax.lax.scan(
        lambda c, k: (c, jax.checkpoint(dropout)(x, jnp.float32(0.5), k)), 0, keys
    )
    np.testing.assert_array_equal(scanned[1], dropout(x, 0.5, keys[1]))


def test_a_form_of_ones_own():
    halves = lambda rate, bits: 1 - rate * jnp.where(bits >> 31, 1.0, -1.0)  # noqa: E731
    out = dropout(jnp.ones(256), 0.25, KEY, halves)
    assert set(np.unique(out).tolist()) == {0.75, 1.25}


# --- the noise ---------------------------------------------------------------------------------


def normal_score(values):
    """Return |correlation| sqrt(n) over pairs of rows: half-normal if they are independent."""
    z = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    c = z @ z.T / z.shape[1] ** 0.5
    return np.abs(c[np.triu_indices(len(c), 1)])


def uniform(key, shape):
    return np.asarray(random_bits(key, shape), np.float64) * 2.0**-32


NEIGHBOURS = {
    "fold_in": lambda i: jax.random.fold_in(KEY, i),
    "seed": jax.random.key,  # raw words (0, i): the hash alone must separate them
    "legacy": lambda i: jax.random.wrap_key_data(jnp.array([i, 7], jnp.uint32)),
    "high bits": lambda i: jax.random.wrap_key_data(jnp.array([i << 26, 7], jnp.uint32)),
}


@pytest.mark.parametrize("keys", NEIGHBOURS)
def test_neighbouring_keys_are_independent(keys):
    rows = np.stack([uniform(NEIGHBOURS[keys](i), (4096,)) for i in range(48)])
    pairs = 48 * 47 / 2
    for values in (rows, (rows < 0.1).astype(float), (rows < 0.5).astype(float)):
        scores = normal_score(values)
        assert scores.max() < 5.0
        assert abs((scores**2).mean() - 1) < 6 * (2 / pairs) ** 0.5
    # Means over keys at one position: uniform, no position preferred.
    means = (rows.mean(0) - 0.5) * (12 * 48) ** 0.5
    assert abs(means.std() - 1) < 0.06
    assert np.abs(means).max() < 5


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_positions_are_uniform_and_uncorrelated(seed):
    n = 1 << 17
    u = uniform(jax.random.key(seed), (n,))
    counts = np.histogram(u, 256, (0, 1))[0]
    assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * (2 * 255) ** 0.5
    # Every lag at once, by the spectrum's inverse: no pattern along rows or columns of any width.
    for values in (u - 0.5, (u < 0.05) - (u < 0.05).mean()):
        spectrum = np.abs(np.fft.rfft(values)) ** 2
        lags = np.fft.irfft(spectrum)[1 : n // 2] / values.var() / n**0.5
        assert np.abs(lags).max() < 5.5
        assert abs(lags.std() - 1) < 0.02
        assert spectrum[1:].max() / spectrum[1:].mean() < 20


def test_every_bit_is_fair_and_independent():
    bits = np.asarray(random_bits(KEY, (1 << 16,)))
    planes = ((bits[None] >> np.arange(32, dtype=np.uint32)[:, None]) & 1).astype(float)
    assert np.abs(planes.mean(1) - 0.5).max() * 2 * 256 < 4.5
    assert normal_score(planes).max() < 4.5


def test_keys_of_all_kinds_and_under_vmap():
    legacy, typed = jax.random.PRNGKey(3), jax.random.key(3)
    np.testing.assert_array_equal(random_bits(legacy, (9,)), random_bits(typed, (9,)))
    assert random_bits(jax.random.key(3, impl="rbg"), (9,)).shape == (9,)
    keys = jax.random.split(typed, 4)
    stacked = jax.vmap(lambda k: random_bits(k, (3, 5)))(keys)
    np.testing.assert_array_equal(stacked[2], random_bits(keys[2], (3, 5)))
    assert len(np.unique(stacked)) == 60
    assert random_bits(typed, ()).shape == ()
