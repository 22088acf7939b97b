"""The gauntlet's tasks: small, real, of different kinds; `task(name, decay)` makes one.

Regression on three UCI sets (50 relu units, full batches), classifiers (MLPs and small CNNs) on
mnist1d, digits, wine and three sets of time series, digits-200 with two variants, MNIST-10k, and a
character transformer on tiny Shakespeare. Each has one fixed split, a space, an ordinary default
and bad starts. `decay` is "none", or "cosine": the tuned rate is then the peak of a warm-up over 5%
of the steps and a cosine to 0, as most people train.

`mnist1d` generates its data (`pip install mnist1d`); scikit-learn bundles digits and wine; the rest
is read from a folder (`--data`): `gauntlet.npz`, MNIST's idx files, tinyshakespeare.txt.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import hypergrad as hg
from hypergrad.nn import LinenDropout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import digits200
import tiny_transformer

# Chosen on: defaults, recipes and thresholds may be compared on these and on no others.
FREE = (
    "mnist1d-sgd",
    "mnist1d-adamw",
    "digits1000-sgd",
    "digits1000-adamw",
    "wine-adamw",
    "digits200",
    "digits200-100",
    "digits200-flipped",
)
WITH_DATA = (
    "concrete",
    "wine-quality-red",
    "yacht",
    "gunpoint-cnn-sgd",
    "arrowhead-cnn-adamw",
    "basicmotions-sgd",
    "mnist10k-adamw",
    "shakespeare-adamw",
)
NAMES = FREE + WITH_DATA
DECAYS = ("none", "cosine")
Rate = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: with its decay.
      make_problem: `optimizer -> problem`, where `optimizer` maps hyperparameters to an optax
        transformation; None for the task's own, whose rate is tuned.
      space: what is tuned.
      data: its splits.
      steps: of a full run.
      batch: examples per step.
      starts: by name, "default" first.
      error: `(params, batch) -> error rate` of a classifier, or None.
    """

    name: str
    make_problem: Callable[[Any], hg.Problem]
    space: hg.Space
    data: hg.Splits
    steps: int
    batch: int
    starts: dict[str, dict[str, Any]]
    error: Callable[[Any, Any], jax.Array] | None = None

    @functools.cached_property
    def problem(self) -> hg.Problem:
        """The task's own, whose rate is tuned."""
        return self.make_problem(None)


def task(name: str, decay: str = "none", folder: Path | None = None) -> Task:
    """One task by its name; `folder` holds the data that no package brings."""
    if decay not in DECAYS:
        raise ValueError(f"decay={decay!r} is unknown: choose one of {DECAYS}.")
    if name in WITH_DATA and folder is None:
        raise ValueError(f"name={name!r} needs data that no package brings: give --data FOLDER.")
    kind, _, rest = name.partition("-")
    optimizer = rest.rpartition("-")[2]
    if kind in ("concrete", "yacht") or name == "wine-quality-red":
        return _regression(name, decay, folder)
    if kind == "digits200":
        return _digits200(name, rest, decay)
    if kind == "shakespeare":
        return _shakespeare(name, decay, folder)
    mlp = {"mnist1d": (100, 100), "digits1000": (128, 128), "wine": (32, 32)}
    mlp |= {"basicmotions": (64, 64), "mnist10k": (128, 128)}
    data, classes, steps, batch = {
        "mnist1d": lambda: (mnist1d(4000, 1000, 2000), 10, 1000, 100),
        "digits1000": lambda: (_bundled("digits", 1000, 300), 10, 500, 64),
        "wine": lambda: (_bundled("wine", 60, 59), 3, 300, 20),
        "gunpoint": lambda: (_series(folder, "gunpoint", 60, 60), 2, 500, 20),
        "arrowhead": lambda: (_series(folder, "arrowhead", 80, 60), 3, 500, 20),
        "basicmotions": lambda: (_series(folder, "basicmotions", 30, 25), 4, 300, 10),
        "mnist10k": lambda: (_mnist10k(folder), 10, 1000, 100),
    }[kind]()
    model = MLP(mlp[kind], classes) if kind in mlp else CNN(classes)
    return _classifier(name, model, data, optimizer, steps, batch, decay)


def _rate(decay: str, steps: int, name: str = "lr") -> Rate:
    if decay == "none":
        return lambda hyper: hyper[name]
    return lambda hyper: hg.warmup_cosine(hyper[name], 0.05 * steps, decay_steps=steps)


def _splits(
    x: Any, y: Any, train: int, valid: int, test: int | None = None, *, standardise: bool = True
) -> hg.Splits:
    order = np.random.default_rng(0).permutation(len(x))
    x, y = np.asarray(x, np.float32)[order], np.asarray(y)[order]
    if standardise:
        x = (x - x[:train].mean(0)) / (x[:train].std(0) + 1e-6)
    last = len(x) if test is None else train + valid + test
    ends = ((0, train), (train, train + valid), (train + valid, last))
    return hg.Splits(*((jnp.asarray(x[i:j]), jnp.asarray(y[i:j])) for i, j in ends))


# Regression as Clarke et al. 2022 do it: SGD with momentum and decay, standardised target.
_REGRESSION_SPACE = hg.Space(
    {
        "lr": hg.Float(1e-6, 0.1, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
        "wd": hg.Float(1e-7, 1e-2, scale="log"),
    }
)


def _regression(name: str, decay: str, folder: Path | None) -> Task:
    stored = np.load(Path(folder or ".") / "gauntlet.npz")
    x, y = (stored[f"{name.replace('-', '_')}_{part}"] for part in "xy")
    steps = 1000 if name == "wine-quality-red" else 4000
    data = _splits(x, y, int(0.8 * len(x)), int(0.1 * len(x)))
    mean, std = float(data.train[1].mean()), float(data.train[1].std())
    data = hg.Splits(*((a, (b - mean) / std) for a, b in data))
    width = x.shape[1]

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)

        def uniform(key: jax.Array, inputs: int, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-1, maxval=1) / np.sqrt(inputs)

        return {
            "w1": uniform(keys[0], width, (width, 50)),
            "b1": uniform(keys[1], width, (50,)),
            "w2": uniform(keys[2], 50, (50, 1)),
            "b2": uniform(keys[3], 50, (1,)),
        }

    def loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(batch[0] @ params["w1"] + params["b1"])
        return jnp.mean(((hidden @ params["w2"] + params["b2"])[:, 0] - batch[1]) ** 2)

    rate = _rate(decay, steps)

    def own(hyper: Any) -> Any:
        descent = optax.sgd(rate(hyper), momentum=hyper["momentum"])
        return optax.chain(optax.add_decayed_weights(hyper["wd"]), descent)

    rng = np.random.default_rng(1)
    starts = {"default": {"lr": 1e-2, "momentum": 0.9, "wd": 1e-4}}
    for i in range(3):
        starts[f"random{i}"] = {
            "lr": 10 ** rng.uniform(-6, -1),
            "momentum": min(rng.uniform(0, 1), 0.99),
            "wd": 10 ** rng.uniform(-7, -2),
        }
    make = lambda optimizer: hg.bilevel(init, loss, loss, optimizer or own)  # noqa: E731
    batch = len(data.train[1])
    return Task(f"{name}:{decay}", make, _REGRESSION_SPACE, data, steps, batch, starts)


class MLP(nn.Module):
    """Relu layers under one dropout rate."""

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, deterministic: bool) -> jax.Array:
        """Logits [batch, classes]."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = LinenDropout(rate)(nn.relu(nn.Dense(width)(x)), deterministic=deterministic)
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """Three strided convolutions along time, dropout before the last layer."""

    classes: int
    channels: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, deterministic: bool) -> jax.Array:
        """Logits [batch, classes]."""
        for _ in range(3):
            x = nn.relu(nn.Conv(self.channels, (5,), strides=2)(x))
        x = LinenDropout(rate)(x.reshape(len(x), -1), deterministic=deterministic)
        return nn.Dense(self.classes)(x)


_SPACES = {
    "sgd": hg.Space(
        {
            "lr": hg.Float(1e-4, 1.0, scale="log"),
            "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
            "l2": hg.Float(1e-6, 0.1, scale="log"),
            "dropout": hg.Float(0.0, 0.8),
        }
    ),
    "adamw": hg.Space(
        {
            "lr": hg.Float(1e-5, 0.1, scale="log"),
            "b1": hg.Float(0.5, 0.99, scale="reverse_log"),
            "b2": hg.Float(0.9, 0.9999, scale="reverse_log"),
            "wd": hg.Float(1e-4, 10.0, scale="log"),
            "dropout": hg.Float(0.0, 0.8),
        }
    ),
}
_DEFAULTS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "l2": 1e-4, "dropout": 0.1},
    "adamw": {"lr": 1e-3, "b1": 0.9, "b2": 0.999, "wd": 1e-2, "dropout": 0.1},
}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _classifier(
    name: str, model: Any, data: hg.Splits, optimizer: str, steps: int, batch: int, decay: str
) -> Task:
    def train_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        logits = model.apply(params, batch[0], hyper["dropout"], False, rngs={"dropout": key})
        loss = _cross_entropy(logits, batch[1])
        if optimizer == "sgd":
            kernels = [layer["kernel"] for layer in params["params"].values()]
            loss += 0.5 * hyper["l2"] * sum(jnp.sum(kernel**2) for kernel in kernels)
        return loss

    def valid_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        return _cross_entropy(model.apply(params, batch[0], 0.0, True), batch[1])

    def error(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(model.apply(params, batch[0], 0.0, True), -1) != batch[1])

    rate = _rate(decay, steps)

    def own(hyper: Any) -> Any:
        if optimizer == "sgd":
            return optax.sgd(rate(hyper), momentum=hyper["momentum"])
        b1, b2 = hyper["b1"], hyper["b2"]
        return optax.adamw(rate(hyper), b1=b1, b2=b2, weight_decay=hyper["wd"])

    def make(optimizer: Any) -> hg.Problem:
        init = lambda key: model.init(key, data.train[0][:1], 0.0, True)  # noqa: E731
        return hg.bilevel(init, train_loss, valid_loss, optimizer or own)

    default = _DEFAULTS[optimizer]
    hot = {"sgd": {"lr": 0.5, "momentum": 0.97}, "adamw": {"lr": 30 * default["lr"]}}[optimizer]
    starts = {"default": default, "low": default | {"lr": default["lr"] / 100}}
    starts["high"] = default | hot
    space = _SPACES[optimizer]
    return Task(f"{name}:{decay}", make, space, data, steps, batch, starts, error)


def _digits200(name: str, variant: str, decay: str) -> Task:
    options: dict[str, dict[str, Any]] = {
        "": {},
        "100": {"num_train": 100},
        "flipped": {"flipped": 0.3},
    }
    data = hg.Splits(*digits200.load(**options[variant]))
    rate = _rate(decay, digits200.STEPS, "learning_rate")

    def own(hyper: Any) -> Any:
        return optax.sgd(rate(hyper), momentum=hyper["momentum"])

    def init(key: jax.Array) -> Any:
        return digits200.MLP().init(key, jnp.zeros((1, 64)), jnp.zeros(2), True)

    def make(optimizer: Any) -> hg.Problem:
        losses = digits200.train_loss, digits200.valid_loss
        return hg.bilevel(init, *losses, optimizer or own)

    starts = dict(zip(("default", "low", "high"), digits200.STARTS.values(), strict=True))
    about = (digits200.SPACE, data, digits200.STEPS, digits200.BATCH, starts)
    return Task(f"{name}:{decay}", make, *about)


def _shakespeare(name: str, decay: str, folder: Path | None) -> Task:
    # The character transformer of the example, whose own schedule is tuned in five numbers there.
    data = tiny_transformer.load(str(folder))
    example = tiny_transformer.problem(data.vocabulary)
    steps, batch = tiny_transformer.STEPS, tiny_transformer.BATCH
    rate = _rate(decay, steps)

    def own(hyper: Any) -> Any:
        b1, b2 = hyper["b1"], hyper["b2"]
        return optax.adamw(rate(hyper), b1=b1, b2=b2, weight_decay=hyper["wd"])

    def make(optimizer: Any) -> hg.Problem:
        init = lambda key: example.init(tiny_transformer.DEFAULT, key).params  # noqa: E731
        losses = example.train_loss, example.valid_loss
        return hg.bilevel(init, *losses, optimizer or own)

    default = _DEFAULTS["adamw"] | {"dropout": 0.2}
    starts = {"default": default, "low": default | {"lr": 1e-5}, "high": default | {"lr": 3e-2}}
    # Whole splits are judged at once here: an eighth of them.
    splits = hg.Splits(data.train, data.valid[::8], data.test[::8])
    return Task(f"{name}:{decay}", make, _SPACES["adamw"], splits, steps, batch, starts)


def mnist1d(train: int, valid: int, test: int) -> hg.Splits:
    """mnist1d's signals, generated by its package."""
    # The package imports `requests` for a download that is not made here.
    sys.modules.setdefault("requests", types.ModuleType("requests"))
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise ImportError("mnist1d-* needs its package: pip install mnist1d.") from error
    about = get_dataset_args()
    about.num_samples, about.train_split = train + valid + test, 1.0
    made = make_dataset(about)
    labels = np.asarray(made["y"]).astype(int)
    return _splits(made["x"], labels, train, valid, test, standardise=False)


def _bundled(name: str, train: int, valid: int) -> hg.Splits:
    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    # Standardising digits would divide pixels that are constant in training by almost 0.
    digits = name == "digits"
    return _splits(x / 16 if digits else x, y, train, valid, standardise=not digits)


def _series(folder: Path | None, name: str, train: int, valid: int) -> hg.Splits:
    stored = np.load(Path(folder or ".") / "gauntlet.npz")
    return _splits(stored[f"{name}_x"], stored[f"{name}_y"], train, valid)


def _mnist10k(folder: Path | None) -> hg.Splits:
    import mnist_schedule

    images, labels = (
        mnist_schedule.read_idx(str(folder), kind) for kind in ("images-idx3", "labels-idx1")
    )
    flat = images.reshape(len(images), -1) / 255.0
    return _splits(flat, labels.astype(int), 6000, 1000, 3000, standardise=False)
