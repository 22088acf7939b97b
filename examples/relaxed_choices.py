"""Activation and kernel size of each layer: relaxed and tuned by gradients, or swept.

Two convolutions on MNIST-10k (14 x 14 pixels), each with a kernel of 1, 3 or 5 and tanh, relu or no
activation: 81 networks. `hg.Mixed` runs all options of a layer and mixes them by the softmax of
logits, which `hg.alternating` tunes while the network trains; the largest weights are the choice.
Beside it DARTS' own step, whose second derivatives are finite differences, written as an estimator,
and TPE over the 81 networks, by itself and with the relaxed choice as its first trial.

  python examples/relaxed_choices.py --data FOLDER [--quick] [--trials N]

FOLDER holds MNIST's published test split, as for examples/mnist_schedule.py. Choices are retrained
from 2 fresh starts each. The table has a row per method: losses and accuracy of the retrained
networks, the cost in plain runs, and what was chosen by each of 3 seeds (six minutes of half a
core; --quick: one seed, 20 steps, no sweeps). docs/relaxed_choices.md has it.
"""

import argparse
import dataclasses
import logging
from functools import partial
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
from mnist_schedule import Data, load
from rich.console import Console
from rich.table import Table

import hypergrad as hg
from hypergrad.linear.base import axpy
from hypergrad.trees import norm

STEPS, BATCH, WINDOW, TRIALS, RATE = 100, 50, 5, 8, 0.02
CHANNELS, SIZES = (1, 6, 12), ("1", "3", "5")
compiled = partial(jax.jit, compiler_options=compiling.OPTIONS)


def convolve(size: str, params: Any, x: jax.Array) -> jax.Array:
    """Stride 2; every size gives the same shape, as a mixture must."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, params[size], (2, 2), "SAME", dimension_numbers=layout)


KERNEL = hg.Mixed({size: partial(convolve, size) for size in SIZES})
ACTIVATION = hg.Mixed({"tanh": jnp.tanh, "relu": jax.nn.relu, "none": lambda x: x})
LAYERS = (0, 1)


def init_params(key: jax.Array) -> Any:
    """All kernels of both layers, and the last layer."""
    draw, keys = jax.nn.initializers.he_normal(), iter(jax.random.split(key, 7))
    shape = lambda layer, size: (int(size), int(size), *CHANNELS[layer : layer + 2])  # noqa: E731
    convolutions = [{s: draw(next(keys), shape(layer, s)) for s in SIZES} for layer in LAYERS]
    dense = jax.nn.initializers.lecun_normal()(next(keys), (16 * CHANNELS[-1], 10))
    return {"convolutions": convolutions, "dense": dense, "bias": jnp.zeros(10)}


def logits_of(params: Any, hyper: Any, x: jax.Array) -> jax.Array:
    """x: [batch, 14, 14, 1]; hyper: logits {"kernel", "activation"}, each [layers, options]."""
    for layer in LAYERS:
        x = KERNEL(hyper["kernel"][layer], params["convolutions"][layer], x)
        x = ACTIVATION(hyper["activation"][layer], x)
    return x.reshape(len(x), -1) @ params["dense"] + params["bias"]


def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    """Cross-entropy."""
    logits = logits_of(params, hyper, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


PROBLEM = hg.bilevel(init_params, loss, loss, lambda hyper: optax.sgd(RATE, momentum=0.9))
START = {"kernel": jnp.zeros((2, 3)), "activation": jnp.zeros((2, 3))}


@dataclasses.dataclass(frozen=True)
class DARTS(hg.Estimator):
    """The second-order step of Liu et al. 2019, eq. 7 and 8, whose product is a difference."""

    rate: float
    step: float = 0.01

    def estimate(self, window: hg.Window, hyper: Any, state: Any) -> tuple[hg.Estimate, Any]:
        """K plain steps; then one step w' of plain gradient descent is looked through."""
        _, end = window.objective(hyper)
        w, key = end.inner.params, window.key
        batch = window.train.batch(0, jax.random.fold_in(key, end.inner.step))
        train = lambda w, hyper: window.problem.train_loss(w, hyper, batch, key)  # noqa: E731
        valid = lambda w, hyper: window.loss(w, hyper, end.inner.step)  # noqa: E731
        ahead = axpy(-self.rate, jax.grad(train)(w, hyper), w)
        value, (v, direct) = jax.value_and_grad(valid, (0, 1))(ahead, hyper)
        step = self.step / norm(v)
        up, down = (jax.grad(train, 1)(axpy(side * step, v, w), hyper) for side in (1, -1))
        product = jax.tree.map(lambda a, b: (a - b) / (2 * step), up, down)
        grad = axpy(-self.rate, product, direct)
        info = {"finite": jnp.isfinite(value), "first_bad_step": end.first_bad_step}
        return hg.Estimate(value, grad, end.inner, info), state


def relaxed(estimator: hg.Estimator, data: Data, seed: int, steps: int) -> Any:
    """The choice after one run: index of each layer's options, {"kernel": [2], ...}."""
    space = hg.Space({"kernel": hg.Float(), "activation": hg.Float()})
    tuner = hg.alternating(PROBLEM, space, estimator, optax.adam(0.1))
    train, valid = hg.Minibatches(data.train, BATCH, WINDOW), hg.Minibatches(data.valid, BATCH)

    @compiled
    def run(state: Any) -> Any:
        update = lambda state, _: (tuner.update(state, train, valid)[0], None)  # noqa: E731
        return jax.lax.scan(update, state, length=steps // WINDOW)[0]

    state = run(tuner.init(START, jax.random.key(seed)))
    return {name: jnp.argmax(x, -1) for name, x in tuner.best(state).items()}


def fixed(index: Any) -> Any:
    """Logits whose softmax is one option exactly: the chosen network, in the same program."""
    return {name: 1e3 * jax.nn.one_hot(x, 3) for name, x in index.items()}


def problem_of(choices: Any) -> hg.Problem:
    """For the sweep: traced numbers of options, so that all 81 networks are one program."""

    def index(hyper: Any) -> Any:
        of = lambda name: jnp.stack([hyper[f"{name}_{layer}"] for layer in LAYERS])  # noqa: E731
        return fixed({"kernel": of("kernel"), "activation": of("activation")})

    judged = lambda params, hyper, batch, key: loss(params, index(hyper), batch, key)  # noqa: E731
    return hg.bilevel(init_params, judged, judged, lambda hyper: optax.sgd(RATE, momentum=0.9))


def swept(data: Data, seed: int, steps: int, trials: int, first: Any = None) -> Any:
    """TPE's choice; `first` is what it begins with."""
    names = [f"{name}_{layer}" for name in ("kernel", "activation") for layer in LAYERS]
    space = hg.Space({name: hg.Int(0, 2, traced=True) for name in names})
    flat = lambda index: dict(zip(names, np.concatenate([*index.values()]).tolist(), strict=True))  # noqa: E731
    result = hg.sweep(
        problem_of,
        space,
        hg.Splits(data.train, data.valid, data.test),
        num_trials=trials,
        num_steps=steps,
        batch_size=BATCH,
        enqueue=[] if first is None else [flat(first)],
        seed=seed,
        progress=False,
    )
    best = [int(result.best.hyper[name]) for name in names]
    return {"kernel": jnp.array(best[:2]), "activation": jnp.array(best[2:])}


@partial(compiled, static_argnums=3)
def retrained(index: Any, data: Data, key: jax.Array, steps: int) -> jax.Array:
    """(validation loss, test loss, test accuracy) of a fresh network of this choice."""
    hyper = fixed(index)
    train = hg.Minibatches(data.train, BATCH, steps)
    params = hg.rollout(PROBLEM, hyper, PROBLEM.init(hyper, key), train, key).params
    hits = logits_of(params, hyper, data.test[0]).argmax(-1) == data.test[1]
    losses = [loss(params, hyper, split, key) for split in (data.valid, data.test)]
    return jnp.stack([*losses, hits.mean()])


def named(index: Any) -> str:
    """Kernel and activation of both layers."""
    of = lambda mixed, i: list(mixed.options)[int(i)]  # noqa: E731
    pairs = zip(index["kernel"], index["activation"], strict=True)
    return ", ".join(f"{of(KERNEL, k)} {of(ACTIVATION, a)}" for k, a in pairs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with MNIST's t10k idx files")
    parser.add_argument("--quick", action="store_true", help="one seed, short runs, no sweeps")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each sweep; 0 for none")
    options = parser.parse_args()
    logging.getLogger("hypergrad").setLevel(logging.WARNING)
    seeds, steps, trials, fresh = (1, 20, 0, 1) if options.quick else (3, STEPS, options.trials, 2)
    data = load(options.data)
    half = lambda x: x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))  # noqa: E731
    data = Data(*((half(x), y) for x, y in data))
    one = jnp.ones(2, jnp.int32)
    gradient = partial(relaxed, hg.Unrolled(window=1), data, steps=steps)
    darts = partial(relaxed, DARTS(RATE), data, steps=steps)
    alone = partial(swept, data, steps=steps, trials=trials)
    rows = {
        "3 relu, 3 relu": (lambda seed: {"kernel": one, "activation": one}, 0),
        "Mixed, Unrolled(window=1)": (lambda seed: gradient(seed=seed), 1.8),
        "Mixed, DARTS' differences": (lambda seed: darts(seed=seed), 1.8),
    }
    sweeps = {
        f"TPE, {trials} trials": (lambda seed: alone(seed=seed), trials),
        f"TPE, {trials // 2} trials, Mixed first": (
            lambda seed: swept(data, seed, steps, trials // 2, gradient(seed=seed)),
            1.8 + trials // 2,
        ),
    }
    rows |= sweeps if trials else {}
    table = Table(title=f"MNIST-10k, {steps} steps, {seeds} seeds", title_justify="left")
    for name in ("", "valid", "test", "accuracy", "runs", "choices, by seed"):
        table.add_column(name, justify="left" if name in ("", "choices, by seed") else "right")
    keys = jax.random.split(jax.random.key(2**20), fresh)
    for name, (choose, runs) in rows.items():
        chosen = [choose(seed) for seed in range(seeds)]
        scores = [retrained(index, data, key, steps) for index in chosen for key in keys]
        cells = [f"{score:.3f}" for score in np.mean(scores, axis=0)]
        table.add_row(name, *cells, f"{runs:g}", "\n".join(dict.fromkeys(map(named, chosen))))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
