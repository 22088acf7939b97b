"""A network on digits, as Equinox's MNIST example writes it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import hypergrad as hg

STEPS, BATCH, LEARNING_RATE = 300, 32, 3e-4

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 16
valid_ds, test_ds = (images[400:700], labels[400:700]), (images[700:], labels[700:])
order = np.random.default_rng(0).integers(400, size=(STEPS, BATCH))
trainloader = [(images[rows], labels[rows]) for rows in order]


class CNN(eqx.Module):
    layers: list

    def __init__(self, key):
        key1, key2 = jax.random.split(key)
        self.layers = [
            eqx.nn.Conv2d(1, 4, kernel_size=3, key=key1),
            eqx.nn.MaxPool2d(kernel_size=2, stride=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(36, 10, key=key2),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model, x, y):
    pred_y = jax.vmap(model)(x)
    return -jnp.mean(jnp.take_along_axis(pred_y, jnp.expand_dims(y, 1), axis=1))


model = CNN(jax.random.key(0))
hyper = {"rate": LEARNING_RATE, "decay": 1e-4}
space = hg.Space({name: hg.Float(1e-5, 0.1, scale="log") for name in hyper})


def batch_loss(model, hyper, batch, key):
    return loss(model, *batch)


def adamw(hyper):
    return optax.adamw(hyper["rate"], weight_decay=hyper["decay"])


tuner = hg.alternating(hg.nn.equinox_problem(CNN, batch_loss, batch_loss, adamw), space)
start = tuner.init(hyper, jax.random.key(0))
result = hg.fit(tuner, start, trainloader, valid_ds, STEPS // 10, steps_per_update=10)
model = hg.nn.to_equinox(result.state.inner, model)

accuracy = float(jnp.mean(jax.vmap(model)(test_ds[0]).argmax(1) == test_ds[1]))
print(f"test accuracy {accuracy:.3f}")
