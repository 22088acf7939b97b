"""A convolutional network on digits, as flax's linen MNIST example writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

import hypergrad as hg

STEPS, BATCH = 100, 32

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
valid_ds = {"image": images[400:700], "label": labels[400:700]}
test_ds = {"image": images[700:], "label": labels[700:]}
order = np.random.default_rng(0).integers(400, size=(STEPS, BATCH))
train_batches = [{"image": images[rows], "label": labels[rows]} for rows in order]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(features=8, kernel_size=(3, 3), strides=2)(x))
        return nn.Dense(features=10)(x.reshape((x.shape[0], -1)))


cnn = CNN()
params = cnn.init(jax.random.key(0), jnp.ones([1, 8, 8, 1]))["params"]
tx = optax.sgd(0.01, momentum=0.5)
state = train_state.TrainState.create(apply_fn=cnn.apply, params=params, tx=tx)


def loss_fn(model, hyper, batch, key):
    logits = model(batch["image"])
    one_hot = jax.nn.one_hot(batch["label"], 10)
    return jnp.mean(optax.softmax_cross_entropy(logits=logits, labels=one_hot))


hyper, rates = {"rate": 0.01, "momentum": 0.5}, hg.Float(1e-4, 1.0, scale="log")
problem = hg.nn.linen_problem(
    cnn, lambda key: cnn.init(key, images[:1]), loss_fn, loss_fn,
    lambda hyper: optax.sgd(hyper["rate"], momentum=hyper["momentum"]),
)  # fmt: skip
tuner = hg.alternating(problem, hg.Space({"rate": rates, "momentum": hg.Float(0.0, 0.99)}))
start = tuner.init(hyper, jax.random.key(1), inner=hg.nn.from_train_state(state))
result = hg.fit(tuner, start, train_batches, valid_ds, STEPS // 10, steps_per_update=10)
state = hg.nn.to_train_state(result.state.inner, state)

test_logits = cnn.apply({"params": state.params}, test_ds["image"])
accuracy = float(jnp.mean(test_logits.argmax(1) == test_ds["label"]))
print(f"test accuracy {accuracy:.3f}")
