"""Sharded weights and data on eight devices: no collective that plain training does not have."""

import os
import subprocess
import sys
from pathlib import Path

SHARDED = """
import re, sys, tempfile
import jax, jax.numpy as jnp, numpy as np, optax
import hypergrad as hg
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

SHAPE, KEY = (32, 64), jax.random.key(0)
SPACE = hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log"), "l2": hg.Float(1e-6, 1.0, scale="log")})
START = {"lr": 1e-2, "l2": 1e-3}

def loss(w, hyper, batch, key):
    return jnp.mean(jnp.tanh(batch @ w) ** 2) + hyper["l2"] * jnp.sum(w * w)

init = lambda key: jax.random.normal(key, SHAPE)
problem = hg.bilevel(init, loss, loss, lambda h: optax.sgd(h["lr"], momentum=0.9))

def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()

def collectives(program):
    text = program.as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?[(]", text)
    return {(kind, size) for what, kind in found for size in re.findall(r"[[](.*?)[]]", what)}

def place(mesh, tree, how=P(None, "d")):
    put = lambda x: jax.device_put(x, NamedSharding(mesh, how if jnp.shape(x) == SHAPE else P()))
    return jax.tree.map(put, tree)


for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    draw = np.random.default_rng(0).normal(size=(6, 16, 32)).astype("f4")
    train, valid = place(mesh, draw[1:]), place(mesh, draw[0])
    hyper = place(mesh, {name: jnp.float32(x) for name, x in START.items()})
    inner = place(mesh, problem.init(hyper, KEY))
    run = lambda inner, train: hg.rollout(problem, hyper, inner, train, KEY)
    plain = collectives(compiled(run, inner, train))
    assert plain == {("all-reduce", "")}, plain
    tuner = hg.alternating(problem, SPACE)
    first = tuner.init(START, KEY)
    state = place(mesh, first)
    update = compiled(tuner.update, state, train, valid)
    assert collectives(update) == plain, (kind, collectives(update))
    if kind is AxisType.Explicit:
        for mode in ("step", "log"):
            tuner = hg.alternating(problem, SPACE, hg.Unrolled(None, mode, "mean"))
            update = compiled(tuner.update, state, train, valid)
            assert collectives(update) == plain, (mode, collectives(update))
        continue
    tuner = hg.alternating(problem, SPACE, hg.Unrolled(window=1))
    state = place(mesh, tuner.init(START, KEY))
    # A batch that is drawn on the mesh, examples split over it, against the same steps by hand.
    rows = jax.device_put(draw.reshape(96, 32), NamedSharding(mesh, P("d")))
    draws = hg.Minibatches(rows, 16, 5)
    drawn = collectives(compiled(tuner.update, state, draws, valid))
    assert not {size for _, size in drawn} & {"32,64", "32,8", "5,32,64"}, drawn

    # fit keeps shardings, places host batches, and goes on from a checkpoint on another mesh.
    split = NamedSharding(mesh, P(None, "d"))
    batches, folder = [draw[i] for i in range(6)], tempfile.mkdtemp()
    more = dict(steps_per_update=3, sharding=split, progress=False)
    result = hg.fit(tuner, state, batches, batches, 4, checkpoint=folder, **more)
    weights = result.state.inner.params
    assert weights.sharding.spec == P(None, "d"), weights.sharding
    assert not state.inner.params.is_deleted()
    half = jax.make_mesh((4,), ("d",), axis_types=(kind,), devices=jax.devices()[:4])
    other = dict(more, sharding=NamedSharding(half, P()))
    begin = place(half, tuner.init(START, KEY))
    again = hg.fit(tuner, begin, batches, batches, 4, checkpoint=folder, **other)
    assert len(again.state.inner.params.sharding.device_set) == 4
    assert np.array_equal(np.asarray(again.state.inner.params), np.asarray(weights))
    begin, more["sharding"] = tuner.init(START, KEY), None
    alone = hg.fit(tuner, begin, batches, batches, 4, **more)
    np.testing.assert_allclose(alone.state.inner.params, np.asarray(weights), rtol=1e-4, atol=1e-6)
    assert np.abs(np.asarray(weights - first.inner.params)).max() > 1e-4
    from hypergrad.data.streams import open_source
    placed = open_source("train", batches, 3, None, split).take()
    assert placed.shape == (3, 16, 32) and placed.sharding.spec == P(None, None, "d")
print("kept")
"""


def test_eight_devices_gather_nothing() -> None:
    """An update gathered each weight whole, and failed under an Explicit mesh."""
    here = Path(__file__).resolve().parent
    eight = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {eight}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(here.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("kept\n"), done.stderr
