"""Dropout whose rate has a gradient: right in expectation, at rate 0 too, and cheap to draw.

A mask multiplies the activations, `y = x * m`, with mean 1 and, in true dropout of rate p, variance
p / (1 - p). The loss sees p only through the distribution of m, so a mask that is 0 or 1 / (1 - p)
has no derivative of its own. Holding the standardised noise eps = (m - 1) / sd(m) fixed gives one:

    m(p) = 1 + sqrt(p / (1 - p)) eps,      dm/dp = (m - 1) / (2 (1 - p)^2 Var m)

which is the derivative of the mask's first two moments whatever the law of eps. It is written with
`stop_gradient`, no custom rule: jvp, reverse mode, vmap, checkpoint, scan and the mixed second
derivative (with respect to the rate, of a training step's own gradient) all go through.

What is left over is the law of eps. A loss with third derivative L''' along one unit's mask leaves
a bias of L''' (v' mu3 / (4 v) - mu3' / 6): v and mu3 are the second and third moments of the mask
drawn, v' and mu3' the derivatives of true dropout's. At rate 0 that vanishes for a noise that takes
a unit to a third of its value (the Gauss-Radau rule with nodes 1/3 and 1): `bernoulli` uses it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from hypergrad import checks
from hypergrad.data.batches import mix_bits
from hypergrad.trees import Key

# Noise of variance v has a derivative of variance 1 / (4 v) per unit: without a floor, infinite
# at rate 0. benchmarks/dropout.py shows what the floor costs in bias and buys in variance.
VARIANCE_FLOOR = 0.02
# A traced rate is held here in the forward pass (masks up to 1000); its gradient passes on.
MAX_RATE = 0.999
TEMPERATURE = 0.1  # of the concrete relaxation, as in Gal (2017)

Form = Callable[[jax.Array, jax.Array], jax.Array]


def dropout(
    x: ArrayLike,
    rate: ArrayLike,
    key: Key,
    form: str | Form = "bernoulli",
    broadcast_dims: Sequence[int] = (),
) -> jax.Array:
    """Drop units of `x` at a rate that has a gradient, traced or not.

    x: [...] of a real floating dtype, which the result keeps. rate: in [0, 1), a scalar or anything
    that broadcasts against `x` (one rate per unit: [units] against [batch, units]). key: typed or
    legacy. broadcast_dims: axes of `x` along which one mask is shared.

    form: `"bernoulli"` (default: ordinary dropout in the forward pass), `"gaussian"`, `"relaxed"`,
    each documented under its name in `hypergrad.problem.noise`, or a function
    `(rate, bits) -> mask`, with `bits` uniform uint32 of the mask's shape.

    Rate 0. A mask of ones tells nothing about a rate, so below `VARIANCE_FLOOR` (0.02) a JAX rate,
    traced or not, is trained with noise of that variance. A Python or NumPy 0 has no gradient to
    lose and returns `x` untouched. Evaluate without `dropout`.

    Bias and variance (per unit, against true dropout): see the form. Averaging n keys, steps or
    examples divides the variance by n. Second derivatives in the rate alone are those of a linear
    function, that is 0.

    Adam with batches below about 16: a unit dropped in a whole batch has a gradient of exactly 0,
    where Adam's first step has the slope 1 / eps; the rate's hypergradient is then 1e3 to 1e5 times
    too large in the first window. Use larger batches, a larger eps, or SGD.

    Cost: about ten integer operations per unit, no threefry; memory of one mask.

    Raises `ValueError` for a concrete rate outside [0, 1) and for a rate that does not broadcast to
    the shape of `x`. A traced rate is clipped to [0, 0.999] in the forward pass; NaN stays NaN.

    Source: inverted dropout, Srivastava (2014); the derivative is that of variational dropout
    (Kingma 2015), here applied to the Bernoulli mask.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((512, 8))
    >>> y = dropout(x, 0.5, jax.random.key(0))
    >>> sorted(set(y.ravel().tolist()))
    [0.0, 2.0]
    >>> loss = lambda rate, key: jnp.mean(dropout(x, rate, key) ** 2)  # expectation 1 / (1 - rate)
    >>> gradient = jax.vmap(jax.grad(loss), (None, 0))(0.5, jax.random.split(jax.random.key(1), 64))
    >>> bool(abs(gradient.mean() - 4.0) < 0.1)
    True
    """
    checks.numbers("x", x)
    checks.random_key("key", key)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"dropout needs a floating x, got dtype {x.dtype}: cast x before dropout")
    check_rate(rate)
    sizes = zip(jnp.shape(rate)[::-1], x.shape[::-1], strict=False)
    if jnp.ndim(rate) > x.ndim or any(r not in (1, n) for r, n in sizes):
        raise ValueError(
            f"dropout rate of shape {jnp.shape(rate)} does not broadcast to x of shape {x.shape}: "
            "give a scalar, or one rate per unit along the last axis"
        )
    if isinstance(rate, (int, float, np.ndarray, np.generic)) and not np.any(rate):
        return x
    # The mask is computed in at least float32: 1 - rate in bfloat16 has two digits.
    rate = jnp.asarray(rate)
    rate = rate.astype(jnp.promote_types(rate.dtype, jnp.float32))
    shared = {d % x.ndim for d in broadcast_dims}
    shape = tuple(1 if axis in shared else size for axis, size in enumerate(x.shape))
    mask = resolve(form)(rate, random_bits(key, shape))
    return x * mask.astype(x.dtype)


def bernoulli(rate: jax.Array, bits: jax.Array) -> jax.Array:
    """True dropout's mask, 0 or 1 / (1 - rate), with `dm/dp = (m - 1) / (2 p (1 - p))`.

    Below `VARIANCE_FLOOR` the variance that is missing is made up by units that drop to a third:
    m in {0, a/3, a} with probabilities {p, q, 1-p-q}; q = 9(floor - p)/4, a = 1/(1 - p - 2q/3).

    Bias: at rates above the floor L'''/(12 (1 - p)^3) per unit (the trapezoid rule's remainder; on
    digits +10 to +25% in magnitude, cosine .99); at rate 0 only O(floor), from the noise itself.
    Variance: of dm/dp, 1 / (4 p (1 - p)^3) above the floor and about 1 / (4 floor) below.
    """
    p = _held(rate)
    q = 2.25 * jnp.maximum(VARIANCE_FLOOR - p, 0)
    kept = 1 / (1 - p - q * (2 / 3))
    full, partial = _threshold(p), _threshold(p + q)
    mask = jnp.where(bits < full, 0, jnp.where(bits < partial, kept / 3, kept))
    variance = kept**2 * (1 - p - q * (8 / 9)) - 1
    return _standardised(mask, variance, rate)


def gaussian(rate: jax.Array, bits: jax.Array) -> jax.Array:
    """Gaussian dropout, `m = 1 + sqrt(p / (1 - p)) eps`, of variance `VARIANCE_FLOOR` or more.

    eps is the standardised number of ones in 32 random bits: mean 0, variance 1, kurtosis 2.94.
    Bias: none against Gaussian dropout; against true dropout L'''/6 at rate 0 (on digits -20%), and
    the forward pass is another regulariser: masks may be negative. Variance: of dm/dp as for
    `bernoulli`; in practice half of it, as eps is rarely far from 0.
    Source: Srivastava (2014), section 10; Kingma (2015).
    """
    p = _held(rate)
    variance = jnp.maximum(p / (1 - p), VARIANCE_FLOOR)
    ones = jax.lax.population_count(bits).astype(p.dtype)
    return _standardised(1 + jnp.sqrt(variance) * (ones - 16) * 8**-0.5, variance, rate)


def relaxed(rate: jax.Array, bits: jax.Array) -> jax.Array:
    """The concrete relaxation, `m = (1 - z) / (1 - p)`, `z = sigmoid((logit p + logit u) / 0.1)`.

    Differentiable as it stands, second derivatives included. Below `VARIANCE_FLOOR` the rate is
    held there and its gradient passes on: at rate 0 the sigmoid saturates and has no gradient.
    Bias: small above the floor (the mask's mean is not exactly 1); near 0 that of the floor.
    Variance: about three times `bernoulli`'s. Source: Gal (2017), equation 5.
    """
    p = rate + jax.lax.stop_gradient(jnp.clip(rate, VARIANCE_FLOOR, MAX_RATE) - rate)
    u = (bits.astype(p.dtype) + 0.5) * 2.0**-32
    u = jnp.minimum(u, 1 - jnp.finfo(p.dtype).epsneg)
    logit = jnp.log(p) - jnp.log1p(-p) + jnp.log(u) - jnp.log1p(-u)
    return jax.nn.sigmoid(-logit / TEMPERATURE) / (1 - p)


FORMS: dict[str, Form] = {"bernoulli": bernoulli, "gaussian": gaussian, "relaxed": relaxed}


def resolve(form: str | Form) -> Form:
    """The mask function named by `form`; a function is returned as it is."""
    if callable(form):
        return form
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(
            f"unknown dropout form {form!r}: use one of {sorted(FORMS)} "
            "or a function (rate, bits) -> mask"
        )
    return FORMS[form]


def check_rate(rate: ArrayLike) -> None:
    """Raise `ValueError` for a concrete rate outside [0, 1); a traced one passes unread."""
    if isinstance(rate, jax.core.Tracer):
        return
    checks.numbers("rate", rate)
    value = np.asarray(rate, dtype=np.float64)
    if not np.all((value >= 0) & (value < 1)):
        raise ValueError(
            f"dropout rate must lie in [0, 1), got rate={rate}: it is the share of units dropped, "
            "not kept; declare it as Float(0.0, 0.8) or clip it"
        )


def random_bits(key: Key, shape: Sequence[int]) -> jax.Array:
    """Uniform uint32 of `shape` from a key: a keyed hash of the position (not cryptographic).

    Threefry took more than half of a small training step on CPU; XLA vectorises this. The key's
    words are mixed into two seeds, and one of them enters in the middle of the hash, so that two
    keys do not draw shifted copies of one stream. An element depends on key and position only.
    Source: the finaliser is Ettinger's lowbias32 (bias .17, nullprogram.com/blog/2018/07/31).
    """
    words = key if jnp.issubdtype(key.dtype, jnp.integer) else jax.random.key_data(key)
    first, second = jnp.uint32(0x9E3779B9), jnp.uint32(0x85EBCA6B)
    for i in range(words.shape[-1]):
        first, second = mix_bits(first ^ words[i]), mix_bits(second + words[i])
    position = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(tuple(shape))
    return mix_bits(position + first, second)


def _held(rate: jax.Array) -> jax.Array:
    """The rate as the forward pass sees it: inside [0, MAX_RATE], constant for differentiation."""
    return jnp.clip(jax.lax.stop_gradient(rate), 0, MAX_RATE)


def _threshold(probability: jax.Array) -> jax.Array:
    return (probability * 2.0**32).astype(jnp.uint32)


def _standardised(mask: jax.Array, variance: jax.Array, rate: jax.Array) -> jax.Array:
    """`mask` with the derivative that holds its standardised noise fixed (top of the file)."""
    p = _held(rate)
    slope = jax.lax.stop_gradient((mask - 1) / (2 * (1 - p) ** 2 * variance))
    return jax.lax.stop_gradient(mask) + (rate - jax.lax.stop_gradient(rate)) * slope
