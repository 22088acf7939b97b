"""A tiny run with a checkpoint, for the tests that kill it: `python -m tests.resume_worker DIR`.

`benchmarks/resume.py` kills it too. Prints `ready` when updates begin and `done` at the end, and
leaves the end of the run in DIR/result.npz.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

UPDATES, EVERY = 60, 7


def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    noise = 0.01 * jax.random.normal(key, batch["x"].shape)
    return jnp.mean(((batch["x"] + noise) @ params - batch["y"]) ** 2)


def problem() -> hg.Problem:
    return hg.bilevel(
        lambda key: 0.1 * jax.random.normal(key, (4,)),
        loss,
        loss,
        lambda hyper: optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
    )


SPACE = hg.Space(
    {
        "learning_rate": hg.Float(1e-4, 1.0, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
    }
)
START = {"learning_rate": 1e-3, "momentum": 0.5}


class Batches:
    """Batches of 8 from 43 examples, shuffled anew in each epoch: the last one of 3 is left out."""

    def __init__(self, seed: int, pause: float = 0.0) -> None:
        self._random, self._pause = np.random.default_rng(seed), pause
        self._x = np.random.default_rng(5).normal(size=(43, 4))

    def __iter__(self) -> Iterator[Any]:
        order = self._random.permutation(43)
        for i in range(0, 43, 8):
            time.sleep(self._pause)
            x = self._x[order[i : i + 8]]
            yield {"x": x, "y": x @ np.arange(4.0)}


def main(folder: Path, pause: float) -> None:
    tuner = hg.alternating(problem(), SPACE)
    state = tuner.init(START, jax.random.key(3))
    result = hg.fit(
        tuner,
        state,
        Batches(0, pause),
        Batches(1),
        UPDATES,
        steps_per_update=3,
        callbacks=[hg.callbacks.JSONLines(folder / "history.jsonl"), announce],
        checkpoint=hg.Checkpoint(folder / "run", every=EVERY),
    )
    leaves = [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(result.state)
    ]
    columns = result.history.columns
    np.savez(folder / "result.npz", *leaves, **{k.replace("/", "|"): v for k, v in columns.items()})
    print("done", flush=True)


def announce(record: Any) -> None:
    print("at", record.update, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
