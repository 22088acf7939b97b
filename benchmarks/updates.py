"""Measure the time of an online update beside the training that it holds.

Run: `python -m benchmarks.updates` (two minutes on one core; `main(quick=True)`: one batch size).

Task: an MLP 784-340-100-10 with tanh (302,010 weights) under AdamW, data at random; learning rate
and weight decay tuned by `alternating`, K = 10 steps, the validation batch of the size of the
training batches, states donated. All programs are compiled first, then called in turn, round after
round; the ratio to K steps of plain training (`rollout`, donated) is taken within a round and its
median printed. Targets: <= 1.10 for a window of 1, <= 3.6 for the default; a validation gradient
alone is .10.

What an update costs beside gradients is passes over the weights (Adam's derivative), which do not
grow with the batch: hence several batch sizes. On a CPU much of it is memory that the C library
gives back after each call and takes anew: measure also with it kept,
`MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000 python -m benchmarks.updates`,
and on one core with one thread for steady figures:
`taskset -c 1 env OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m ...`
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from benchmarks.speed import interleaved

SIZES, K, BATCHES, ROUNDS = (784, 340, 100, 10), 10, (64, 256, 1024), 25
SPACE = hg.Space(
    {
        "learning_rate": hg.Float(1e-4, 1e-1, scale="log"),
        "weight_decay": hg.Float(1e-5, 1e-1, scale="log"),
    }
)
START = {"learning_rate": 1e-3, "weight_decay": 1e-3}
# (name, estimator, what goes back, target)
TUNERS: tuple[tuple[str, hg.Estimator, Any, float | None], ...] = (
    ("Unrolled(window=1)", hg.Unrolled(window=1), "all", None),
    ("Unrolled(window=1)", hg.Unrolled(window=1), "hyper", 1.10),
    ("the default", hg.Unrolled(validate_at=0.8), "all", 3.6),
    ('checkpoint="step"', hg.Unrolled(validate_at=0.8, checkpoint="step"), "all", None),
)


def problem() -> hg.Problem:
    """The network and its optimiser."""

    def init(key: jax.Array) -> list[Any]:
        layers = zip(jax.random.split(key, len(SIZES) - 1), itertools.pairwise(SIZES), strict=True)
        return [(jax.random.normal(k, ab) / np.sqrt(ab[0]), jnp.zeros(ab[1])) for k, ab in layers]

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        x, labels = batch
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        logits = x @ params[-1][0] + params[-1][1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def optimizer(hyper: Any) -> optax.GradientTransformation:
        return optax.adamw(hyper["learning_rate"], weight_decay=hyper["weight_decay"])

    return hg.bilevel(init, loss, loss, optimizer)


def repeated(step: Callable[..., Any], state: Any, *args: Any) -> Callable[[], None]:
    """`state = step(state, *args)` at each call, compiled, the state donated."""
    program = jax.jit(step, donate_argnums=0).lower(state, *args).compile()
    held = [state]

    def call() -> None:
        held[0] = jax.block_until_ready(program(held[0], *args))

    return call


def main(quick: bool = False) -> list[tuple[int, str, float, float]]:
    """Print and return rows (batch size, program, ms, over plain training)."""
    draw, key, trained = np.random.default_rng(0), jax.random.key(0), problem()
    rows = []
    print(f"{'batch':>6} {'program':50}{'ms':>8}{'x training':>11}")
    for size in BATCHES[:1] if quick else BATCHES:
        images = jnp.asarray(draw.normal(size=(K + 1, size, SIZES[0])), jnp.float32)
        labels = jnp.asarray(draw.integers(0, SIZES[-1], (K + 1, size)), jnp.int32)
        train, valid = (images[1:], labels[1:]), (images[0], labels[0])
        hyper = {name: jnp.float32(value) for name, value in START.items()}
        inner = trained.init(hyper, key)
        run = lambda inner, train: hg.rollout(trained, hyper, inner, train, key)  # noqa: B023, E731
        calls = {"plain training": repeated(run, inner, train)}
        targets: dict[str, float | None] = {}
        for name, estimator, rewinds, target in TUNERS:
            name = f'{name}, rewinds="{rewinds}"'
            tuner = hg.alternating(trained, SPACE, estimator, trust=hg.Trust(rewinds=rewinds))
            update = lambda *args, tuner=tuner: tuner.update(*args)[0]  # noqa: E731
            calls[name] = repeated(update, tuner.init(START, key), train, valid)
            targets[name] = target
        times = interleaved(calls, 3 if quick else ROUNDS)
        for name, measured in times.items():
            ratio = float(np.median(measured / times["plain training"]))
            rows.append((size, name, 1e3 * float(np.median(measured)), ratio))
            target = targets.get(name)
            missed = "   MISSED" if target is not None and ratio > target + 0.005 else ""
            note = "" if target is None else f"   target {target:.2f}{missed}"
            print("{:6d} {:50}{:8.1f}{:11.2f}".format(*rows[-1]) + note, flush=True)
    return rows


if __name__ == "__main__":
    main()
