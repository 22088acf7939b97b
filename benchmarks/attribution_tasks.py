"""The trainings of benchmarks.attribution: one weight per training example in each."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import mnist_schedule

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
}


class Task(NamedTuple):
    """A training with one weight per example.

    Attributes:
      name: what it is.
      problem: `hyper` is {"weight": [examples]}; its validation loss is `loss` of one example.
      train: draws (example, index).
      tests: [tests, ...], the examples whose losses are predicted.
      loss: `(params, example) -> scalar`.
      rate: the learning rate, for TracIn.
    """

    name: str
    problem: hg.Problem
    train: hg.Minibatches
    tests: Any
    loss: Callable[[Any, Any], jax.Array]
    rate: float

    @property
    def examples(self) -> Any:
        """The training examples, without their indices."""
        return self.train.arrays[0]

    @property
    def size(self) -> int:
        """How many of them there are."""
        return len(self.train.arrays[1])


class Recipe(NamedTuple):
    """How it is trained; the defaults are smooth."""

    activation: str = "tanh"
    optimizer: str = "adam"
    rate: float = 3e-3
    eps_root: float = 0.0
    norm: bool = False
    pool: str = "average"
    batch: int = 50
    steps: int = 150
    scale: float = 1.0
    warmup: float = 0.0
    decay: float = 1e-3

    def transformation(self) -> optax.GradientTransformation:
        """The optimiser."""
        rate = self.rate
        if self.warmup:
            line = hg.piecewise_linear([0.05 * rate, rate], max(self.warmup * self.steps, 1))
            rate = lambda step: line(step)  # noqa: E731
        if self.optimizer == "sgd":
            return optax.sgd(rate, momentum=0.9)
        return optax.adam(rate, eps_root=self.eps_root)


def _task(name: str, init: Any, loss: Any, examples: Any, tests: Any, recipe: Recipe) -> Task:
    size = len(jax.tree.leaves(examples)[0])

    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        examples, index = batch
        losses = jax.vmap(loss, (None, 0))(params, examples)
        matrices = [x for x in jax.tree.leaves(params) if x.ndim > 1]
        penalty = recipe.decay * sum(jnp.sum(x**2) for x in matrices)
        return jnp.mean(hyper["weight"][index] * losses) + penalty

    def valid_loss(params: Any, hyper: Any, example: Any, key: Any) -> jax.Array:
        return loss(params, example)

    problem = hg.bilevel(init, train_loss, valid_loss, lambda hyper: recipe.transformation())
    arrays = (jax.tree.map(jnp.asarray, examples), jnp.arange(size))
    train = hg.Minibatches(arrays, min(recipe.batch, size), recipe.steps)
    return Task(name, problem, train, jax.tree.map(jnp.asarray, tests), loss, recipe.rate)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))


def _normalised(x: jax.Array, axes: Any = -1) -> jax.Array:
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axes, keepdims=True) + 1e-5)


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def digits(recipe: Recipe, size: int = 1000, num_tests: int = 32, seed: int = 0) -> Task:
    """Scikit-learn's digits, an MLP 64-128-10."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    act = ACTIVATIONS[recipe.activation]

    def init(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return {
            "w1": _normal(first, 64, 128),
            "b1": jnp.zeros(128),
            "w2": _normal(second, 128, 10),
            "b2": jnp.zeros(10),
        }

    def loss(w: Any, example: Any) -> jax.Array:
        image, label = example
        x = image @ w["w1"] + w["b1"]
        x = _normalised(x) if recipe.norm else x
        return cross_entropy(recipe.scale * (act(x) @ w["w2"] + w["b2"]), label)

    tests = images[-num_tests:], labels[-num_tests:]
    return _task("digits", init, loss, (images[:size], labels[:size]), tests, recipe)


def convolutional(
    folder: str, recipe: Recipe, size: int = 1000, num_tests: int = 32, seed: int = 0
) -> Task:
    """MNIST-10k at 14 x 14: two convolutions (8 and 16 channels), each pooled, a dense layer."""
    data = mnist_schedule.load(folder)
    chosen = np.random.default_rng(seed).permutation(len(data.train[1]))[:size]
    halved = lambda x: x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))  # noqa: E731
    images, labels = (np.asarray(x)[chosen] for x in data.train)
    test_images, test_labels = (np.asarray(x)[:num_tests] for x in data.test)
    act = ACTIVATIONS[recipe.activation]

    def layer(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        """A 3 x 3 convolution as one product with all patches, and pooling by 2."""
        h, w, _ = x.shape
        padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
        parts = [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)]
        x = jnp.concatenate(parts, -1) @ kernel + bias
        x = act(_normalised(x, (0, 1, 2)) if recipe.norm else x)
        x = x[: h // 2 * 2, : w // 2 * 2].reshape(h // 2, 2, w // 2, 2, -1)
        return x.mean((1, 3)) if recipe.pool == "average" else x.max((1, 3))

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        return {
            "k1": _normal(keys[0], 9, 8),
            "b1": jnp.zeros(8),
            "k2": _normal(keys[1], 72, 16),
            "b2": jnp.zeros(16),
            "w": _normal(keys[2], 144, 10),
            "b": jnp.zeros(10),
        }

    def loss(w: Any, example: Any) -> jax.Array:
        image, label = example
        x = layer(layer(image, w["k1"], w["b1"]), w["k2"], w["b2"])  # [3, 3, 16]
        return cross_entropy(recipe.scale * (x.reshape(-1) @ w["w"] + w["b"]), label)

    examples = halved(images), labels
    return _task("conv", init, loss, examples, (halved(test_images), test_labels), recipe)


CONTEXT, WIDTH, HEADS = 12, 16, 2


def transformer(
    folder: str, recipe: Recipe, size: int = 1000, num_tests: int = 32, seed: int = 0
) -> Task:
    """Tiny Shakespeare, windows of 12 characters, two pre-norm blocks of width 16."""
    path = Path(folder) / "tinyshakespeare.txt"
    if not path.is_file():
        raise SystemExit(f"--data {folder}: there is no tinyshakespeare.txt in it (char-rnn's).")
    characters, text = np.unique(np.frombuffer(path.read_bytes(), np.uint8), return_inverse=True)
    cut = len(text) * 9 // 10
    rng = np.random.default_rng(seed)

    def windows(part: np.ndarray, count: int) -> np.ndarray:
        every = np.lib.stride_tricks.sliding_window_view(part, CONTEXT + 1)
        return every[rng.integers(0, len(every), count)].astype(np.int32)

    examples, tests = windows(text[:cut], size), windows(text[cut:], num_tests)
    act, vocabulary = ACTIVATIONS[recipe.activation], len(characters)
    past = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))

    def init(key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, 16))
        block = lambda: {  # noqa: E731
            "qkv": _normal(next(keys), WIDTH, 3 * WIDTH),
            "out": 0.5 * _normal(next(keys), WIDTH, WIDTH),
            "up": _normal(next(keys), WIDTH, 4 * WIDTH),
            "down": 0.5 * _normal(next(keys), 4 * WIDTH, WIDTH),
        }
        return {
            "embed": 0.5 * jax.random.normal(next(keys), (vocabulary, WIDTH)),
            "place": 0.1 * jax.random.normal(next(keys), (CONTEXT, WIDTH)),
            "blocks": [block(), block()],
            "head": _normal(next(keys), WIDTH, vocabulary),
        }

    def loss(w: Any, window: Any) -> jax.Array:
        x = w["embed"][window[:-1]] + w["place"]
        for b in w["blocks"]:
            qkv = (_normalised(x) @ b["qkv"]).reshape(CONTEXT, 3, HEADS, -1)
            q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
            scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(WIDTH // HEADS)
            scores = jax.nn.softmax(jnp.where(past, scores, -1e9))
            x = x + jnp.einsum("hqk,khd->qhd", scores, v).reshape(CONTEXT, WIDTH) @ b["out"]
            x = x + act(_normalised(x) @ b["up"]) @ b["down"]
        return cross_entropy(recipe.scale * (_normalised(x) @ w["head"]), window[1:]).mean()

    return _task("transformer", init, loss, examples, tests, recipe)
