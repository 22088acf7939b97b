"""A small character transformer, as Haiku's example writes it."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

STEPS, BATCH, LENGTH = 120, 8, 16

text = "the quick brown fox jumps over the lazy dog and runs back home again; " * 60
vocabulary = sorted(set(text))
tokens = np.array([vocabulary.index(c) for c in text], np.int32)
rng = np.random.default_rng(0)


def sample(count, low, high):
    starts = rng.integers(low, high - LENGTH - 1, size=count)
    return np.stack([tokens[s : s + LENGTH + 1] for s in starts])


train_data = [sample(BATCH, 0, 3000) for _ in range(STEPS)]
valid_data, test_data = sample(32, 3000, 3600), sample(32, 3600, len(tokens))


def forward(tokens):
    x = hk.Embed(len(vocabulary), 16)(tokens)
    x = x + hk.get_parameter("positions", [LENGTH, 16], init=hk.initializers.TruncatedNormal(0.02))
    mask = np.tril(np.ones((1, 1, LENGTH, LENGTH)))
    h = hk.LayerNorm(-1, True, True)(x)
    x = x + hk.MultiHeadAttention(2, 8, w_init=hk.initializers.VarianceScaling(0.5))(h, h, h, mask)
    h = hk.LayerNorm(-1, True, True)(x)
    x = x + hk.Linear(16)(jax.nn.gelu(hk.Linear(32)(h)))
    return hk.Linear(len(vocabulary))(hk.LayerNorm(-1, True, True)(x))


model = hk.without_apply_rng(hk.transform(forward))


def loss_fn(params, hyper, batch, key):
    logits = model.apply(params, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


space = hg.Space({"rate": hg.Float(1e-5, 0.1, scale="log"), "b1": hg.Float(0.0, 0.99)})
problem = hg.bilevel(
    lambda key: model.init(key, test_data[:1, :-1]), loss_fn, loss_fn,
    lambda hyper: optax.adam(hyper["rate"], b1=hyper["b1"]),
)  # fmt: skip
tuner = hg.alternating(problem, space)
start = tuner.init({"rate": 3e-4, "b1": 0.9}, jax.random.key(0))
result = hg.fit(tuner, start, train_data, valid_data, STEPS // 5, steps_per_update=5)
params = result.state.inner.params

accuracy = float(jnp.mean(model.apply(params, test_data[:, :-1]).argmax(-1) == test_data[:, 1:]))
print(f"test accuracy {accuracy:.3f}")
