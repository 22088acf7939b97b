"""Sixty trials over what people search: batch size, depth, width, optimizer, activation, kernel.

A convolution (kernel size 1 to 7), then one or two layers of 16 to 256 units, on 2,000 examples of
mnist1d, or with `--data FOLDER` on 6,000 of MNIST's 10,000 (28 rows of 28 channels); five Floats
(learning rate, momentum, L2, dropout, noise on the input). Widths, depths and kernel sizes are
traced, so that optimizer, activation and batch size are all that compiles: 8 programs.

* hybrid: 57 plain trials by TPE, then the best three refined, where starts and ends compete (the
  recipe of docs/sweeps.md for a sweep that must be right the first time); and these 57 alone;
* refined from the start: 54 refined trials, halved, and 6 that go on from where the best ended;
* TPE + Hyperband, plain, until it has cost as much as the hybrid (gradient evaluations of the
  largest batch, so equal examples), and the same sweep going on until four times that.

Every method's best three are trained again with their values frozen (`result.confirm`, about nine
full runs more for each); its choice counts, by the mean test loss of fresh seeds (`result.audit`).

  python -m benchmarks.sixty_trials [--data FOLDER] [--seeds 3] [--methods NAME ...] [--quick]

Full: about ten minutes on a quiet core for each of the two tasks; quick: one seed, a quarter of
the steps.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna

import hypergrad as hg
from benchmarks.gauntlet_tasks import mnist1d, task
from hypergrad.nn import unit_mask

SPACE = hg.Space(
    {
        "optimizer": hg.Categorical(["sgd", "adam"]),
        "activation": hg.Categorical(["relu", "tanh"]),
        "batch_size": hg.Categorical([32, 128]),
        "width": hg.Int(16, 256, scale="log", traced=True),
        "depth": hg.Int(1, 2, traced=True),
        "kernel": hg.Int(1, 7, step=2, traced=True),
        "learning_rate": hg.Float(1e-4, 1.0, scale="log"),
        "momentum": hg.Float(0.5, 0.99, scale="reverse_log"),
        "l2": hg.Float(1e-7, 1e-2, scale="log"),
        "dropout": hg.Float(0.0, 0.7),
        "noise": hg.Float(1e-2, 1.0, scale="log"),
    }
)
CHANNELS, WIDEST, LONGEST = 8, 256, 7
# Of the largest batch.
STEPS, FIRST_RUNG = 100, 10
UNREFINED = ("TPE + Hyperband", "TPE + ASHA", "TPE + learning curves")
# A sweep's result, its trials and what they have cost.
Found = tuple[Any, int, float]
METHODS = ("hybrid", "TPE + Hyperband", "refined from the start", *UNREFINED[1:])


def init(hyper: Any, key: jax.Array, length: int, channels: int) -> dict[str, jax.Array]:
    """The largest network, each layer at the scale of the part that is on."""
    flat, width = -(-length // 2) * CHANNELS, hyper["width"]
    inputs = [hyper["kernel"] * channels, flat, width, width]
    shapes = [(LONGEST * channels, CHANNELS), (flat, WIDEST), (WIDEST, WIDEST), (WIDEST, 10)]
    params = {f"b{i}": jnp.zeros(shape[1]) for i, shape in enumerate(shapes)}
    for i, mask in enumerate(_on(hyper, shapes)):
        start = jax.random.normal(jax.random.fold_in(key, i), shapes[i])
        params[f"w{i}"] = start * mask * jnp.sqrt(2 / inputs[i])
    return params


def _on(hyper: Any, shapes: list[tuple[int, int]]) -> list[jax.Array]:
    """1 where a weight is on, by layer."""
    taps = jnp.abs(jnp.arange(LONGEST) - LONGEST // 2) <= hyper["kernel"] // 2
    conv = jnp.repeat(taps, shapes[0][0] // LONGEST)[:, None].astype(jnp.float32)
    width = unit_mask(hyper["width"], WIDEST)
    ones = jnp.ones(shapes[1][0])
    second = jnp.where(hyper["depth"] > 1, width[:, None] * width, 0.0)
    return [conv * jnp.ones(CHANNELS), ones[:, None] * width, second, width[:, None] * jnp.ones(10)]


def logits(
    params: Any, hyper: Any, x: jax.Array, act: Any, key: jax.Array | None = None
) -> jax.Array:
    """`[batch, 10]` of `x` `[batch, length, channels]`; with a key under noise and dropout."""
    on = _on(hyper, [params[f"w{i}"].shape for i in range(4)])
    w = [params[f"w{i}"] * mask for i, mask in enumerate(on)]
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
    if keys[0] is not None:
        x = x + hyper["noise"] * jax.random.normal(keys[0], x.shape)
    padded = jnp.pad(x, ((0, 0), (LONGEST // 2,) * 2, (0, 0)))
    shifts = [padded[:, i : i + x.shape[1] : 2] for i in range(LONGEST)]
    hidden = act(jnp.concatenate(shifts, -1) @ w[0] + params["b0"]).reshape(len(x), -1)
    width = unit_mask(hyper["width"], WIDEST)
    hidden = act(_dropped(hidden, hyper, keys[1]) @ w[1] + params["b1"]) * width
    deeper = act(_dropped(hidden, hyper, keys[2]) @ w[2] + params["b2"]) * width
    hidden = jnp.where(hyper["depth"] > 1, deeper, hidden)
    return hidden @ w[3] + params["b3"]


def _dropped(x: jax.Array, hyper: Any, key: jax.Array | None) -> jax.Array:
    return x if key is None else hg.dropout(x, hyper["dropout"], key)


def make_problem(choices: dict[str, Any], length: int, channels: int) -> hg.Problem:
    """One of the eight programs."""
    act = {"relu": jax.nn.relu, "tanh": jnp.tanh}[choices["activation"]]

    def valid_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        return _cross_entropy(logits(params, hyper, batch[0], act), batch[1])

    def train_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        found = _cross_entropy(logits(params, hyper, batch[0], act, key), batch[1])
        on = _on(hyper, [params[f"w{i}"].shape for i in range(4)])
        squares = sum(jnp.sum((params[f"w{i}"] * mask) ** 2) for i, mask in enumerate(on))
        return found + hyper["l2"] * squares

    def optimizer(hyper: Any) -> Any:
        if choices["optimizer"] == "sgd":
            return optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"])
        return optax.adam(hyper["learning_rate"], b1=hyper["momentum"])

    def begin(hyper: Any, key: jax.Array) -> Any:
        start = lambda key: init(hyper, key, length, channels)  # noqa: E731
        return hg.bilevel(start, train_loss, valid_loss, optimizer).init(hyper, key)

    some = {"width": 16, "depth": 1, "kernel": 1}
    first = hg.bilevel(
        lambda key: init(some, key, length, channels), train_loss, valid_loss, optimizer
    )
    return first._replace(init=begin)


def _cross_entropy(found: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()


def splits(folder: Path | None) -> hg.Splits:
    """Examples as `[n, length, channels]`."""
    if folder is None:
        data, shape = mnist1d(2000, 500, 2000), (40, 1)
    else:
        data, shape = task("mnist10k-adamw", "none", folder).data, (28, 28)
    return hg.Splits(*((x.reshape(-1, *shape), y) for x, y in data))


class Bench:
    """Sweeps of one task; `made` are the programs that were asked for."""

    def __init__(self, folder: Path | None, quick: bool) -> None:
        self.data, self.made = splits(folder), set[tuple[Any, ...]]()
        self.steps = STEPS // 4 if quick else STEPS
        self.first = max(FIRST_RUNG * self.steps // STEPS, 5)
        _, *shape = self.data.train[0].shape
        self._make = functools.partial(make_problem, length=shape[0], channels=shape[1])

    def sweep(self, seed: int, **options: Any) -> Any:
        """One sweep."""

        def make(choices: dict[str, Any]) -> hg.Problem:
            self.made.add(tuple(sorted(choices.items())))
            return self._make(choices)

        return hg.sweep(
            make,
            SPACE,
            self.data,
            num_steps=lambda choices: self.steps * 128 // choices["batch_size"],
            batch_size="batch_size",
            seed=seed,
            population=1,
            progress=False,
            **options,
        )

    def plain(self, seed: int) -> Found:
        """57 full trials by TPE."""
        result = self.sweep(seed, num_trials=57)
        return result, 57, cost_of(result)

    def hybrid(self, seed: int, plain: Found) -> Found:
        """The best three of them refined."""
        best = [found.hyper for found in plain[0].top(3)]
        result = self.sweep(seed + 1000, num_trials=3, refine=hg.Refine(), enqueue=best)
        return result, plain[1] + 3, plain[2] + cost_of(result)

    def refined(self, seed: int) -> Found:
        """Sixty refined trials, six of them polish."""
        scheduler = hg.SuccessiveHalving(min_steps=self.first)
        refine = hg.Refine(steps_per_update=5)
        result = self.sweep(seed, num_trials=60, polish=6, refine=refine, scheduler=scheduler)
        return result, 60, cost_of(result)

    def unrefined(self, name: str, seed: int, cost: float, storage: Any) -> Found:
        """Plain trials until they have cost so much; with the same storage it goes on."""
        kind = {
            "TPE + Hyperband": hg.Hyperband,
            "TPE + ASHA": hg.ASHA,
            "TPE + learning curves": hg.LearningCurves,
        }[name]
        scheduler = kind(min_steps=self.first)
        most = {"num_trials": 100_000, "max_evaluations": cost}
        result = self.sweep(seed, scheduler=scheduler, storage=storage, **most)
        return result, len(result.study.trials), cost_of(result)


def cost_of(result: Any) -> float:
    """Gradient evaluations of all trials."""
    return sum(trial.user_attrs.get("evaluations", 0.0) for trial in result.study.trials)


def row(name: str, seed: int, found: Found, seeds: int, begin: float) -> dict[str, Any]:
    """What a sweep has come to, confirmed, on fresh seeds."""
    result, trials, cost = found
    best = result.confirm()
    audit = result.audit(seeds, best.hyper)
    line = {
        "method": name,
        "seed": seed,
        "trials": trials,
        "evaluations": cost,
        "test": audit.mean,
        "seconds": time.perf_counter() - begin,
    }
    print(
        f"{name:28} seed {seed}: {trials:4d} trials, {cost:8,.0f} "
        f"evaluations, test {audit.mean:.4f} ({audit.std_error:.4f}), {line['seconds']:.0f} s",
        flush=True,
    )
    return line


def main(
    folder: Path | None = None,
    seeds: int = 3,
    methods: tuple[str, ...] = METHODS[:2],
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Print a line per method, seed and cost, then the medians."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bench, rows, fresh = Bench(folder, quick), [], 3 if quick else 5
    for seed in range(1 if quick else seeds):
        begin = time.perf_counter()
        plain = bench.plain(seed)
        hybrid = bench.hybrid(seed, plain)
        rows.append(row("hybrid", seed, hybrid, fresh, begin))
        rows.append(row("its plain trials alone", seed, plain, fresh, begin))
        if "refined from the start" in methods:
            begin = time.perf_counter()
            rows.append(row("refined from the start", seed, bench.refined(seed), fresh, begin))
        for name in (name for name in UNREFINED if name in methods):
            begin, storage = time.perf_counter(), optuna.storages.InMemoryStorage()
            for times in (1, 4):
                found = bench.unrefined(name, seed, times * hybrid[-1], storage)
                rows.append(row(f"{name}, {times} x", seed, found, fresh, begin))
    print(f"programs: {len(bench.made)}")
    for name in dict.fromkeys(one["method"] for one in rows):
        tests = [one["test"] for one in rows if one["method"] == name]
        print(f"{name:28} median {np.median(tests):.4f}, worst {max(tests):.4f}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="MNIST's idx files; without, mnist1d")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS[:2])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.data, options.seeds, tuple(options.methods), options.quick)
