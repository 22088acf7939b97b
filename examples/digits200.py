"""digits-200: a small task on which hyperparameters decide, and the network it tunes.

200 training, 200 validation and 1397 test images of scikit-learn's digits; an MLP 64-128-128-10 in
flax, 500 steps of momentum SGD on batches of 64. Seven continuous hyperparameters: learning rate,
momentum, one L2 coefficient per layer, two dropout rates.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import hypergrad as hg
from hypergrad.nn import LinenDropout

STEPS, BATCH, WINDOW = 500, 64, 10

SPACE = hg.Space(
    {
        "learning_rate": hg.Float(1e-4, 1.0, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
        "l2": hg.Float(1e-6, 1.0, scale="log"),
        "dropout": hg.Float(0.0, 0.8),
    }
)
STARTS = {
    "def": {
        "learning_rate": 1e-2,
        "momentum": 0.9,
        "l2": np.full(3, 1e-4, np.float32),
        "dropout": np.full(2, 0.1, np.float32),
    },
    "bad": {
        "learning_rate": 1e-3,
        "momentum": 0.5,
        "l2": np.full(3, 1e-6, np.float32),
        "dropout": np.zeros(2, np.float32),
    },
    # diverges: its training loss is infinite within a few steps
    "div": {
        "learning_rate": 0.5,
        "momentum": 0.95,
        "l2": np.full(3, 1e-4, np.float32),
        "dropout": np.full(2, 0.1, np.float32),
    },
}


class MLP(nn.Module):
    """A two-hidden-layer network whose dropout rates are arguments, so that they can be traced."""

    @nn.compact
    def __call__(self, x: jax.Array, dropout: jax.Array, deterministic: bool) -> jax.Array:
        """x: [batch, 64], dropout: [2]; returns logits [batch, 10]."""
        for layer in range(2):
            x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_normal())(x))
            x = LinenDropout(dropout[layer])(x, deterministic=deterministic)
        return nn.Dense(10, kernel_init=nn.initializers.he_normal())(x)


class Data(NamedTuple):
    """The three splits, each (images [n, 64], labels [n])."""

    train: tuple[jax.Array, jax.Array]
    valid: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load(num_train: int = 200, flipped: float = 0.0) -> Data:
    """The splits; `flipped` is the share of training labels drawn anew at random."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16 - 0.3).astype(np.float32), labels[order]
    rng = np.random.default_rng(1)
    train_labels = labels[:num_train].copy()
    flip = rng.random(num_train) < flipped
    train_labels[flip] = rng.integers(0, 10, flip.sum())
    n = num_train
    split = lambda x, y: (jnp.asarray(x), jnp.asarray(y))  # noqa: E731
    return Data(
        split(images[:n], train_labels),
        split(images[n : 2 * n], labels[n : 2 * n]),
        split(images[2 * n :], labels[2 * n :]),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def valid_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
    """Cross-entropy without dropout or penalty."""
    images, labels = batch
    return cross_entropy(MLP().apply(params, images, jnp.zeros(2), True), labels)


def train_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
    """Cross-entropy under dropout, plus one L2 penalty per layer's kernel."""
    images, labels = batch
    logits = MLP().apply(params, images, hyper["dropout"], False, rngs={"dropout": key})
    layers = params["params"].values()
    squares = jnp.stack([jnp.sum(layer["kernel"] ** 2) for layer in layers])
    return cross_entropy(logits, labels) + 0.5 * jnp.vdot(hyper["l2"], squares)


PROBLEM = hg.bilevel(
    init_params=lambda key: MLP().init(key, jnp.zeros((1, 64)), jnp.zeros(2), True),
    train_loss=train_loss,
    valid_loss=valid_loss,
    optimizer=lambda hyper: optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
)


def num_hyper() -> int:
    """Continuous numbers that are tuned: 7."""
    return ravel_pytree(STARTS["def"])[0].size


def evaluations(steps: int, estimates: int) -> float:
    """Gradient evaluations of `steps` differentiated training steps and `estimates` validations.

    A step counts 1, its way back (a Hessian-vector product) 2, a gradient on 200 images 200/64.
    """
    return 3 * steps + estimates * 200 / BATCH


def constant(hyper: Any) -> hg.Schedule:
    """The schedule that never changes; of a tuned one's shape, as both are then one program."""
    repeat = lambda x: jnp.tile(jnp.float32(x), (STEPS // WINDOW,) + (1,) * jnp.ndim(x))  # noqa: E731
    return hg.Schedule(jax.tree.map(repeat, hyper), WINDOW)


@jax.jit
def retrain(schedule: hg.Schedule, data: Data, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(validation, test) losses [seeds] of fresh runs of 500 steps under a frozen schedule."""

    def run(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        inner = PROBLEM.init(schedule(0), key)
        train = hg.Minibatches(data.train, BATCH, STEPS)
        params = hg.replay(PROBLEM, schedule, inner, train, key).params
        return tuple(valid_loss(params, None, split, key) for split in (data.valid, data.test))

    return jax.lax.map(run, keys)


def fresh_test_loss(schedule: hg.Schedule, data: Data, seeds: int = 10) -> float:
    """The mean test loss over seeds that no tuner has seen; infinite for a run that diverged."""
    losses = retrain(schedule, data, jax.random.split(jax.random.key(2**20), seeds))[1]
    return float(jnp.mean(jnp.where(jnp.isfinite(losses), losses, jnp.inf)))
