"""The task that speed, memory and compile time are measured on, and four ways without hypergrad.

Digits, 1000 training and 400 validation images; an MLP 64-128-128-10 with tanh (26,122 weights),
batches of 128, momentum SGD with coupled weight decay (g + wd * w; momentum .9), float32.
Hyperparameters: learning rate .03 and weight decay 1e-3. `plain_training`, `naive_reverse` and
`adjoint` are written by hand in JAX; `adjoint` is the hand-derived backward pass, which stores the
weights of each step and nothing else: the limit for reverse mode on this task. So is
`checkpointed_reverse`, what a user of JAX alone would write.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import hypergrad as hg

SIZES = (64, 128, 128, 10)
BATCH, MOMENTUM = 128, 0.9
HYPER = {"learning_rate": jnp.float32(0.03), "weight_decay": jnp.float32(1e-3)}
Split = tuple[jax.Array, jax.Array]


@functools.cache
def load() -> tuple[Split, Split]:
    """Standardised (images, labels) for training and validation."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    images, labels = images[order], labels[order]
    mean, std = images[:1000].mean(0), images[:1000].std(0)
    x = jnp.asarray((images - mean) / np.where(std == 0, 1, std), jnp.float32)
    y = jnp.asarray(labels, jnp.int32)
    return (x[:1000], y[:1000]), (x[1000:1400], y[1000:1400])


def indices(num_steps: int) -> jax.Array:
    """Which images each batch holds, [num_steps, BATCH]."""
    return jnp.asarray(np.random.RandomState(1).randint(0, 1000, (num_steps, BATCH)), jnp.int32)


def init(key: Any = None) -> list[jax.Array]:
    """Weights and biases, always the same start."""
    rng = np.random.RandomState(0)
    params = []
    for a, b in itertools.pairwise(SIZES):
        params += [rng.randn(a, b) / np.sqrt(a), np.zeros(b)]
    return [jnp.asarray(p, jnp.float32) for p in params]


def cross_entropy(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    for i in range(0, len(params), 2):
        x = x @ params[i] + params[i + 1]
        x = jnp.tanh(x) if i + 2 < len(params) else x
    return jnp.mean(jax.nn.logsumexp(x, -1) - jnp.take_along_axis(x, y[:, None], 1)[:, 0])


def problem(train: Split | None = None) -> hg.Problem:
    """The same training through hypergrad and optax.

    Batches are rows of images and labels, or with `train` given, indices into it.
    """

    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        x, y = batch if train is None else (train[0][batch], train[1][batch])
        return cross_entropy(params, x, y)

    def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return cross_entropy(params, *batch)

    def optimizer(hyper: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(hyper["weight_decay"]),
            optax.sgd(hyper["learning_rate"], momentum=MOMENTUM),
        )

    return hg.bilevel(init, train_loss, valid_loss, optimizer)


def step(carry: Any, batch: jax.Array, hyper: Any, train: Split) -> Any:
    """One step by hand: (weights, velocity) at the images `batch`."""
    params, velocity = carry
    grads = jax.grad(cross_entropy)(params, train[0][batch], train[1][batch])
    rate, decay = hyper["learning_rate"], hyper["weight_decay"]
    velocity = [
        MOMENTUM * v + g + decay * p for v, g, p in zip(velocity, grads, params, strict=True)
    ]
    return [p - rate * v for p, v in zip(params, velocity, strict=True)], velocity


def plain_training(hyper: Any, params: Any, batches: jax.Array, train: Split, valid: Split) -> Any:
    """The trained weights; no hypergradient."""
    start = (params, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(lambda c, b: (step(c, b, hyper, train), None), start, batches)[0][0]


def naive_reverse(hyper: Any, *args: Any) -> Any:
    """`jax.grad` of the validation loss after training: reverse over reverse."""
    valid = args[-1]
    return jax.grad(lambda hyper: cross_entropy(plain_training(hyper, *args), *valid))(hyper)


def checkpointed_reverse(
    hyper: Any, params: Any, batches: jax.Array, train: Split, valid: Split
) -> Any:
    """The same with each step under `jax.checkpoint`."""
    start = (params, jax.tree.map(jnp.zeros_like, params))

    def loss(hyper: Any) -> jax.Array:
        again = jax.checkpoint(lambda c, b: step(c, b, hyper, train), prevent_cse=False)
        end, _ = jax.lax.scan(lambda c, b: (again(c, b), None), start, batches)
        return cross_entropy(end[0], *valid)

    return jax.grad(loss)(hyper)


def adjoint(hyper: Any, params: Any, batches: jax.Array, train: Split, valid: Split) -> Any:
    """The hand-derived adjoint of momentum SGD with coupled decay."""
    rate, decay = hyper["learning_rate"], hyper["weight_decay"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    forth = lambda carry, batch: (step(carry, batch, hyper, train), carry[0])  # noqa: E731
    (last, _), trajectory = jax.lax.scan(forth, (params, zeros), batches)

    def back(carry: Any, x: Any) -> Any:
        a, z, after, to_rate, to_decay = carry
        batch, before = x
        # a = dE/dweights, z = dE/dvelocity; the velocity is read off two weights in a row
        to_rate += sum(map(jnp.vdot, a, [n - p for n, p in zip(after, before, strict=True)]))
        z = [zi - rate * ai for zi, ai in zip(z, a, strict=True)]
        to_decay += sum(map(jnp.vdot, z, before))
        gradient = lambda p: jax.grad(cross_entropy)(p, train[0][batch], train[1][batch])  # noqa: E731
        _, curved = jax.jvp(gradient, (before,), (z,))
        a = [ai + h + decay * zi for ai, h, zi in zip(a, curved, z, strict=True)]
        return (a, [MOMENTUM * zi for zi in z], before, to_rate, to_decay), None

    nothing = jnp.float32(0)
    start = (jax.grad(cross_entropy)(last, *valid), zeros, last, nothing, nothing)
    (*_, to_rate, to_decay), _ = jax.lax.scan(back, start, (batches, trajectory), reverse=True)
    return {"learning_rate": to_rate / rate, "weight_decay": to_decay}


def through_hypergrad(estimator: hg.Estimator, batches: str = "indices") -> Callable[..., Any]:
    """The signature of the functions above; batches by "indices", or drawn by "minibatches".

    Returns (gradient, loss, info).
    """

    def hypergradient(hyper: Any, params: Any, index: Any, train: Split, valid: Split) -> Any:
        # A loss may close over data, but not over traced data: hence load(), not `train`.
        by_index = batches == "indices"
        use = problem(load()[0] if by_index else None)
        rows = index if by_index else hg.Minibatches(train, BATCH, index.shape[0])
        key = jax.random.key(0)
        inner = use.init(hyper, key)._replace(params=params)
        estimate = hg.hypergradient(use, hyper, inner, rows, valid, key, estimator)
        # with all that a tuner reads, or XLA would drop what it costs
        return estimate.grad, estimate.loss, estimate.info

    return hypergradient
