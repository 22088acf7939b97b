"""An objective of trial, as Optuna's JAX and flax examples write it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from sklearn.datasets import load_digits

import hypergrad as hg

STEPS, BATCH, TRIALS = 120, 32, 3

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
valid = images[400:700], labels[400:700]
test = images[700:], labels[700:]
order = np.random.default_rng(0).integers(400, size=(STEPS, BATCH))
batches = images[order], labels[order]


def predict(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def loss_fn(params, hyper, batch, key):
    logits = predict(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def objective(trial):
    width = trial.suggest_categorical("width", [16, 32])
    rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)

    def init(key):
        keys = jax.random.split(key)
        scale = {"w1": 0.2, "w2": 0.2}
        shapes = {"w1": (64, width), "w2": (width, 10)}
        return {
            n: scale[n] * jax.random.normal(k, shapes[n]) for n, k in zip(scale, keys, strict=True)
        }

    problem = hg.bilevel(init, loss_fn, loss_fn, lambda hyper: optax.adam(hyper["rate"]))
    tuner = hg.alternating(problem, hg.Space({"rate": hg.Float(1e-5, 1e-1, scale="log")}))
    state = tuner.init({"rate": rate}, jax.random.key(0))
    for t in range(0, STEPS, 10):
        window = jax.tree.map(lambda x, t=t: x[t : t + 10], batches)
        state, info = tuner.update(state, window, valid)
    params = state.inner.params
    hits = jnp.mean(predict(params, test[0]).argmax(1) == test[1])
    trial.set_user_attr("test accuracy", float(hits))
    return float(info.loss)


study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
study.optimize(objective, n_trials=TRIALS)
accuracy = study.best_trial.user_attrs["test accuracy"]
print(f"test accuracy {accuracy:.3f}")
