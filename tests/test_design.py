"""First points of a sweep that are spread over its space."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.knowledge.design import spread_points

SPACE = hg.Space(
    {
        "layers": hg.Int(1, 3),
        "momentum": hg.Float(0.5, 0.99, scale="reverse_log", when={"optimizer": "sgd"}),
        "optimizer": hg.Categorical(["sgd", "adam", "lion", "rms"]),
        "rate": hg.Float(1e-4, 1.0, scale="log"),
        "width": hg.Int(16, 256, scale="log", traced=True),
    }
)


@pytest.mark.parametrize("seed", range(5))
def test_each_range_and_each_choice_is_covered_evenly(seed: int) -> None:
    points = spread_points(SPACE, 12, seed)
    counts = {n: collections.Counter(p[n] for p in points) for n in ("optimizer", "layers")}
    assert set(counts["optimizer"].values()) == {3} and set(counts["layers"].values()) == {4}
    parts = sorted(int(12 * (np.log10(p["rate"]) / 4 + 1)) for p in points)
    assert parts == list(range(12))
    assert all(("momentum" in p) == (p["optimizer"] == "sgd") for p in points)
    assert all(0.5 <= p["momentum"] <= 0.99 for p in points if "momentum" in p)
    assert len({p["width"] for p in points}) > 8
    assert points == spread_points(SPACE, 12, seed) != spread_points(SPACE, 12, seed + 1)


def _loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((params - batch) ** 2) + hyper["l2"] * params**2


def _swept(**options: Any) -> list[dict[str, Any]]:
    def make(choices: dict[str, Any]) -> hg.Problem:
        return hg.bilevel(lambda key: jnp.zeros(()), _loss, _loss, lambda hyper: optax.sgd(0.1))

    space = hg.Space({"kind": hg.Categorical(list("abcde")), "l2": hg.Float(0.0, 1.0)})
    data = hg.Splits(jnp.ones(8), jnp.ones(4))
    options = {"num_trials": 11, "seed": 3, "sampler": "auto", "progress": False} | options
    result = hg.sweep(make, space, data, num_steps=2, batch_size=4, **options)
    return [trial.params for trial in result.study.trials]


def test_a_sweep_by_auto_begins_with_them(tmp_path: Any) -> None:
    found = _swept()
    assert set(collections.Counter(p["kind"] for p in found[:10]).values()) == {2}
    # Those that the user knows count among them, and come first.
    known = [{"kind": "a", "l2": 0.25}, {"kind": "b"}]
    given = _swept(enqueue=known, num_trials=10)
    assert given[0] == known[0] and given[1]["kind"] == "b"
    assert set(collections.Counter(p["kind"] for p in given[2:]).values()) == {1, 2}
    # What is named proposes as it does in Optuna alone.
    named = _swept(sampler="tpe")
    assert named == _swept(sampler=optuna.samplers.TPESampler(seed=3)) and named[:10] != found[:10]
    # What goes on has had them.
    storage = f"sqlite:///{tmp_path / 'sweep.db'}"
    first = _swept(storage=storage, num_trials=6)
    after = _swept(storage=storage, num_trials=12)
    assert after[:6] == first and len(after) == 12
    assert len({tuple(p.values()) for p in after}) == 12
