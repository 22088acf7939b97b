"""Metasmoothness, three runs, against what hypergradients then predict, under 28 recipes.

One MLP on scikit-learn's digits under 28 recipes (activations, optimisers, rates, `eps_root`,
normalisation, output scales). For each: `hypergrad.metasmoothness` over a tenth of every example's
weight, and the LDS of one hypergradient (benchmarks.attribution), mean of eight test images, with
1% and with 5% of the examples left out. The verdict is right where it says "smooth" and the LDS is
above .8, or "rough" and it is not: at 1%, as 3 of 300 weights that fall to 0 are as far away as 300
that move by a tenth, and at 5% for comparison. All recipes are values of one traced program.

  python -m benchmarks.metasmoothness [--quick] [--out FILE]    quick: three recipes
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import hypergrad as hg

KEY = jax.random.key(0)
SIZE, TESTS, WIDTH, BATCH, STEPS, SUBSETS = 300, 8, 64, 50, 200, 32
LEFT_OUT = (0.01, 0.05)
ACTIVATIONS = ("tanh", "relu", "gelu", "softplus")
Row = dict[str, Any]


class Recipe(NamedTuple):
    """How the network is trained."""

    activation: str
    optimizer: str
    rate: float
    eps_root: float = 0.0
    norm: float = 0.0
    scale: float = 1.0

    def hyper(self) -> Any:
        """The recipe in numbers, with one weight per example."""
        numbers = {name: getattr(self, name) for name in ("rate", "eps_root", "norm", "scale")}
        return {
            "weight": jnp.ones(SIZE),
            "activation": jnp.asarray([float(a == self.activation) for a in ACTIVATIONS]),
            "adam": jnp.float32(self.optimizer == "adam"),
            **{name: jnp.float32(value) for name, value in numbers.items()},
        }


def recipes() -> list[Recipe]:
    """All of them; a first run of them set the verdict's threshold, see docs/metasmoothness.md."""
    found = []
    for activation in ACTIVATIONS:
        found += [
            Recipe(activation, "sgd", 0.1),
            Recipe(activation, "adam", 3e-3),
            Recipe(activation, "adam", 1e-2),
            Recipe(activation, "adam", 3e-3, eps_root=1e-6),
            Recipe(activation, "adam", 3e-3, norm=1.0),
            Recipe(activation, "sgd", 0.1, norm=1.0),
            Recipe(activation, "adam", 3e-3, scale=4.0),
        ]
    return found


def activated(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """The chosen one of ACTIVATIONS, by a sum whose other terms are 0."""
    functions = (jnp.tanh, jax.nn.relu, jax.nn.gelu, jax.nn.softplus)
    return sum(chosen[i] * function(x) for i, function in enumerate(functions))


def loss(w: Any, hyper: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """Cross-entropy of one image."""
    x = image @ w["w1"] + w["b1"]
    centred = x - x.mean()
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2) + 1e-5)
    x = activated(hyper["norm"] * normal + (1 - hyper["norm"]) * x, hyper["activation"])
    logits = hyper["scale"] * (x @ w["w2"] + w["b2"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def losses(w: Any, hyper: Any, examples: Any) -> jax.Array:
    """[examples]."""
    return jax.vmap(loss, (None, None, 0, 0))(w, hyper, *examples)


def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    """Weighted cross-entropy and a little weight decay."""
    *examples, index = batch
    penalty = 1e-3 * (jnp.sum(w["w1"] ** 2) + jnp.sum(w["w2"] ** 2))
    return jnp.mean(hyper["weight"][index] * losses(w, hyper, examples)) + penalty


def optimizer(hyper: Any) -> optax.GradientTransformation:
    """Adam or momentum SGD, by a sum whose other term is 0."""
    adam = optax.scale_by_adam(eps_root=hyper["eps_root"])
    momentum = optax.trace(0.9)

    def init(params: Any) -> Any:
        return adam.init(params), momentum.init(params)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        first, adam_state = adam.update(grads, state[0], params)
        second, trace = momentum.update(grads, state[1], params)
        share, rate = hyper["adam"], hyper["rate"]
        mix = lambda a, m: -rate * (share * a + (1 - share) * m)  # noqa: E731
        return jax.tree.map(mix, first, second), (adam_state, trace)

    return optax.GradientTransformation(init, update)


def init(key: jax.Array) -> Any:
    """64-64-10."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (64, WIDTH)) / 8,
        "b1": jnp.zeros(WIDTH),
        "w2": jax.random.normal(second, (WIDTH, 10)) / np.sqrt(WIDTH),
        "b2": jnp.zeros(10),
    }


PROBLEM = hg.bilevel(
    init, train_loss, lambda w, hyper, batch, key: losses(w, hyper, batch).mean(), optimizer
)


def measured(recipe: Recipe, train: hg.Minibatches, tests: Any, retrain: Any, kept: Any) -> Row:
    """One row: the value, its verdict, and the LDS that follows."""
    hyper = recipe.hyper()
    still = jax.tree.map(jnp.zeros_like, hyper)
    signs = jax.random.rademacher(jax.random.key(1), (SIZE,), jnp.float32)
    direction = {**still, "weight": 0.1 * signs}
    found = hg.metasmoothness(PROBLEM, hyper, train, KEY, direction)
    batches = [jax.tree.map(lambda x, i=i: x[i : i + 1], tests) for i in range(TESTS)]
    scores = hg.attribution(PROBLEM, hyper, train, batches, KEY, chunk=TESTS, check=False)
    after = np.asarray(retrain(hyper, kept))
    predicted = np.asarray((kept[1:] - 1) @ scores["weight"].T)
    change, parts = after[1:] - after[0], {"metasmoothness": found.value, "verdict": found.verdict}
    for i, share in enumerate(LEFT_OUT):
        rows = slice(i * SUBSETS, (i + 1) * SUBSETS)
        pairs = zip(predicted[rows].T, change[rows].T, strict=True)
        lds = float(np.mean([spearmanr(p, t).statistic for p, t in pairs]))
        parts |= {
            f"lds at {share}": lds,
            f"right at {share}": (found.verdict == "smooth") == (lds > 0.8),
        }
    return {**recipe._asdict(), **parts, "loss": float(after[0].mean())}


def main(quick: bool = False, argv: list[str] | None = None) -> list[Row]:
    """Measures every recipe, prints the table and writes `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", help="JSON with every row")
    args = parser.parse_args([] if argv is None else argv)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    train = hg.Minibatches(
        (jnp.asarray(images[:SIZE]), jnp.asarray(labels[:SIZE]), jnp.arange(SIZE)), BATCH, STEPS
    )
    tests = jnp.asarray(images[-TESTS:]), jnp.asarray(labels[-TESTS:])
    rng = np.random.default_rng(1)
    kept = np.ones((1 + len(LEFT_OUT) * SUBSETS, SIZE), np.float32)
    for i, mask in enumerate(kept[1:]):
        count = round(LEFT_OUT[i // SUBSETS] * SIZE)
        mask[rng.choice(SIZE, count, replace=False)] = 0

    @jax.jit
    def retrain(hyper: Any, kept: jax.Array) -> jax.Array:
        def run(weight: jax.Array) -> jax.Array:
            given = {**hyper, "weight": weight}
            inner = PROBLEM.init(given, KEY)
            params = hg.rollout(PROBLEM, given, inner, train, KEY).params
            return losses(params, given, tests)

        return jax.lax.map(run, kept, batch_size=13)

    rows, begin = [], time.perf_counter()
    head = f"{'activation':11}{'optimizer':10}{'rate':>6}{'eps_root':>9}{'norm':>5}{'scale':>6}"
    print(f"{head}{'smooth':>8}{'at 1%':>7}{'at 5%':>7}  verdict")
    for recipe in recipes()[: 3 if quick or args.quick else None]:
        row = measured(recipe, train, tests, retrain, jnp.asarray(kept))
        rows.append(row)
        print(
            f"{row['activation']:11}{row['optimizer']:10}{row['rate']:6.3f}{row['eps_root']:9.0e}"
            f"{row['norm']:5.0f}{row['scale']:6.1f}{row['metasmoothness']:8.3f}"
            f"{row['lds at 0.01']:7.3f}{row['lds at 0.05']:7.3f}"
            f"  {row['verdict']}{'' if row['right at 0.01'] else ', WRONG at 1%'}",
            flush=True,
        )
        if args.out:
            Path(args.out).write_text(json.dumps({"rows": rows}, indent=1))
    one, five = (sum(r[f"right at {share}"] for r in rows) for share in LEFT_OUT)
    print(f"verdict right in {one} of {len(rows)} at 1%, in {five} at 5%")
    print(f"{time.perf_counter() - begin:.0f} s")
    return rows


if __name__ == "__main__":
    main(argv=sys.argv[1:])
