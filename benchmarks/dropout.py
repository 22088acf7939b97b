"""Measure whether the dropout rate's hypergradient is right, and what the noise costs.

Run: `python -m benchmarks.dropout` (about ten minutes on two cores; `main(quick=True)` two).

`fixed`: derivative of the expected training loss with respect to 64 per-unit rates at fixed
parameters. `unrolled`: derivative of the expected validation loss after 30 steps of SGD with
respect to 16 rates (8 groups of units in two layers). Both compare the mean over 256 keys with
differences of true Bernoulli dropout under common random numbers (central; second order one-sided
at rate 0), and give the reference's own standard error over its norm. Cosine hides scale, so the
ratio of norms stands beside it; entries share a sign, so the correlation (no mean) does too.
`noise/key` is the standard deviation of one key's estimate over the reference's norm.
`cost`: time of a step with dropout over the same step without, interleaved, compiled beforehand.
"""

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from hypergrad.problem import noise

UNITS, GROUPS = 32, 8
SIZES = (64, UNITS, UNITS, 10)
RATES = (0.0, 0.1, 0.5)
Array = jax.Array


def digits() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """1000 training and 300 validation digits, pixels in [-.3, .7]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = jnp.asarray(data.data[order] / 16 - 0.3, jnp.float32)
    y = jnp.asarray(data.target[order])
    return (x[:1000], y[:1000]), (x[1000:1300], y[1000:1300])


def init(key: Array, sizes: tuple[int, ...] = SIZES) -> Any:
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(itertools.pairwise(sizes))
    scale = [(2 / m) ** 0.5 for m, _ in shapes]
    weights = [s * jax.random.normal(k, mn) for k, mn, s in zip(keys, shapes, scale, strict=True)]
    return [(w, jnp.zeros(w.shape[1])) for w in weights]


def loss(params: Any, x: Array, y: Array, drop: Callable[[Array, int], Array]) -> Array:
    """Cross-entropy of an MLP whose i-th hidden layer goes through `drop(activations, i)`."""
    for i, (w, b) in enumerate(params[:-1]):
        x = drop(jax.nn.relu(x @ w + b), i)
    logits = x @ params[-1][0] + params[-1][1]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
    return -jnp.mean(picked)


def kept(x: Array, layer: int) -> Array:
    return x


def true_dropout(rates: Array, key: Array) -> Callable[[Array, int], Array]:
    """Reference: Bernoulli dropout with jax.random, common random numbers for a given key."""

    def drop(x: Array, layer: int) -> Array:
        u = jax.random.uniform(jax.random.fold_in(key, layer), x.shape)
        return jnp.where(u >= rates[layer], x / (1 - rates[layer]), 0)

    return drop


def ours(rates: Array, key: Array, form: str = "bernoulli") -> Callable[[Array, int], Array]:
    def drop(x: Array, layer: int) -> Array:
        return noise.dropout(x, rates[layer], jax.random.fold_in(key, layer), form)

    return drop


def trained(
    first: int, steps: int, key: Array, start: Any, rates: Array | None, layer_drop: Any
) -> Any:
    """`steps` steps of SGD (rate .1, batch 32) from `start`; batches follow the key."""
    (x, y), _ = digits()

    def step(params: Any, t: Array) -> tuple[Any, None]:
        k = jax.random.fold_in(key, t)
        i = jax.random.randint(jax.random.fold_in(k, 99), (32,), 0, len(y))
        grad = jax.grad(loss)(params, x[i], y[i], layer_drop(rates, k))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad), None

    return jax.lax.scan(step, start, first + jnp.arange(steps))[0]


def fixed_loss(start: Any, rates: Array, key: Array, layer_drop: Any) -> Array:
    """Expected over keys: the training loss of 64 examples; rates [2, UNITS]."""
    (x, y), _ = digits()
    return loss(start, x[:64], y[:64], layer_drop(rates, key))


def unrolled_loss(start: Any, rates: Array, key: Array, layer_drop: Any, steps: int = 30) -> Array:
    """Expected over keys: the validation loss after `steps` steps of SGD; rates [2, GROUPS]."""
    _, (x, y) = digits()
    per_unit = jnp.repeat(rates, UNITS // GROUPS, axis=1)
    return loss(trained(0, steps, key, start, per_unit, layer_drop), x, y, kept)


def means(f: Callable[[Array], Array], seed: int, count: int, chunk: int = 64) -> Any:
    """Mean and standard error over `count` keys of a vector-valued f(key)."""
    keys = jax.random.split(jax.random.key(seed), count).reshape(-1, min(chunk, count))
    values = jax.jit(partial(jax.lax.map, jax.vmap(f)))(keys)
    values = np.asarray(values, np.float64).reshape(count, -1)
    return values.mean(0), values.std(0) / count**0.5


def differences(f: Callable[[Array, Array], Array], rate: float, shape: Any, delta: float) -> Any:
    """Return key -> quotients of f(rates, key) along every rate; at 0 there is no left side."""
    base = jnp.full(shape, rate)
    moves = jnp.eye(base.size).reshape(-1, *shape) * delta
    points = ((-1, -0.5), (1, 0.5)) if rate > 0 else ((0, -1.5), (1, 2.0), (2, -0.5))

    def quotient(key: Array) -> Array:
        along = [w * jax.vmap(lambda m, s=s: f(base + s * m, key))(moves) for s, w in points]
        return sum(along[1:], along[0]) / delta

    return quotient


def start_params() -> Any:
    """Partly trained without dropout: 150 steps, validation loss about .4."""
    return jax.jit(lambda: trained(-150, 150, jax.random.key(5), init(jax.random.key(0)), None,
                                   lambda rates, key: kept))()  # fmt: skip


def compare(name: str, f: Any, shape: Any, delta: float, keys: int, forms: Any) -> list[Any]:
    """Rows (name, rate, form, cosine, correlation, ratio, reference's error, one key's noise)."""
    start = start_params()
    rows = []
    for rate in RATES:
        true = partial(f, start, layer_drop=true_dropout)
        wanted, error = means(differences(true, rate, shape, delta), 1, keys)
        for form in forms:
            drop = partial(ours, form=form)
            grad = jax.grad(lambda r, k, drop=drop: f(start, r, k, drop))
            got, spread = means(lambda k, g=grad, r=rate: g(jnp.full(shape, r), k).ravel(), 2, 256)
            norm = np.linalg.norm(wanted)
            row = (name, rate, form, cosine(got, wanted),
                   cosine(got - got.mean(), wanted - wanted.mean()), np.linalg.norm(got) / norm,
                   np.linalg.norm(error) / norm, 16 * np.linalg.norm(spread) / norm)  # fmt: skip
            rows.append(row)
            print(
                "{:9s} {:4.1f} {:10s} {:7.3f} {:7.3f} {:7.3f} {:9.3f} {:9.2f}".format(*row),
                flush=True,
            )
    return rows


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def cost(repeats: int) -> list[Any]:
    """Rows (program, dropout, microseconds per step, ratio): MLP 64-128-128-10, batch 64, SGD."""
    key = jax.random.key(0)
    params = init(key, (64, 128, 128, 10))
    (x, y), _ = digits()
    x, y, rates = x[:64], y[:64], jnp.full(2, 0.3)
    drops: dict[str, Any] = {"none": lambda r, k: kept, "threefry": true_dropout}
    for form in noise.FORMS:
        drops[form] = partial(ours, form=form)

    def step(params: Any, rates: Array, key: Array, t: Array, drop: Any) -> Any:
        grad = jax.grad(loss)(params, x, y, drop(rates, jax.random.fold_in(key, t)))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)

    def scan(params: Any, rates: Array, key: Array, drop: Any) -> Any:
        body = lambda p, t: (step(p, rates, key, t, drop), None)  # noqa: E731
        return jax.lax.scan(body, params, jnp.arange(100))[0]

    programs: dict[Any, Any] = {}
    for name, drop in drops.items():
        f = jax.jit(partial(scan, drop=drop))
        programs["scan of 100", name] = (partial(f, params, rates, key), 1, 100)
        g = jax.jit(partial(step, drop=drop))
        programs["one call", name] = (partial(g, params, rates, key, jnp.int32(3)), 50, 50)
    times: dict[Any, list[float]] = {name: [] for name in programs}
    for call, _, _ in programs.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, (call, calls, steps) in programs.items():
            begin = time.perf_counter()
            for _ in range(calls):
                out = call()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - begin) / steps * 1e6)
    rows = []
    for (program, name), measured in times.items():
        base = np.array(times[program, "none"])
        row = (program, name, min(measured), min(measured) / base.min(),
               float(np.median(np.array(measured) / base)))  # fmt: skip
        rows.append(row)
        print("{:12s} {:10s} {:8.1f} {:8.2f} {:8.2f}".format(*row), flush=True)
    return rows


def main(quick: bool = False) -> dict[str, list[Any]]:
    """Print and return the tables; `quick`: fewer reference keys, the default form only."""
    forms = ("bernoulli",) if quick else tuple(noise.FORMS)
    print("what      rate form        cosine correl.   ratio ref.error noise/key")
    tables = {
        "fixed": compare("fixed", fixed_loss, (2, UNITS), 0.02, 512 if quick else 4096, forms),
        "unrolled": compare(
            "unrolled", unrolled_loss, (2, GROUPS), 0.05, 256 if quick else 1024, forms
        ),
    }
    print("program      dropout     us/step  of none  median ratio")
    tables["cost"] = cost(5 if quick else 30)
    return tables


if __name__ == "__main__":
    main()
