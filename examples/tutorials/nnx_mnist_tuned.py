"""A convolutional network on digits, as flax's nnx tutorials write it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import hypergrad as hg

STEPS, BATCH = 100, 32

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
train_ds = {"image": images[:400], "label": labels[:400]}
valid_ds = {"image": images[400:700], "label": labels[400:700]}
test_ds = {"image": images[700:], "label": labels[700:]}
order = np.random.default_rng(0).integers(400, size=(STEPS, BATCH))
train_batches = [{k: v[rows] for k, v in train_ds.items()} for rows in order]


class CNN(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 8, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.1, rngs=rngs)
        self.linear = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).reshape(x.shape[0], -1)
        return self.linear(self.dropout(x))


def loss_fn(model, hyper, batch, key):
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, logits


model = CNN(rngs=nnx.Rngs(0))
hyper = {"rate": 1e-4, "decay": 1e-4}
space = hg.Space({k: hg.Float(1e-5, 0.1, scale="log") for k in hyper})


def adamw(hyper):
    return optax.adamw(hyper["rate"], weight_decay=hyper["decay"])


tuner = hg.alternating(hg.nn.nnx_problem(CNN, loss_fn, loss_fn, adamw), space)
start = tuner.init(hyper, jax.random.key(0))
result = hg.fit(tuner, start, train_batches, valid_ds, STEPS // 10, steps_per_update=10)
nnx.update(model, *result.state.inner.params.values())

model.eval()
test_logits = model(test_ds["image"])
accuracy = float(jnp.mean(test_logits.argmax(1) == test_ds["label"]))
print(f"test accuracy {accuracy:.3f}")
