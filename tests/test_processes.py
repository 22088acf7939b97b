"""One run over two processes on the loopback interface, with weights that neither holds whole."""

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
import jax.numpy as jnp, numpy as np, optax
import hypergrad as hg
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

SHAPE = (8, 16)
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

def loss(w, hyper, batch, key):
    return jnp.mean(jnp.tanh(batch @ w) ** 2)

init = lambda key: jax.random.normal(key, SHAPE)
problem = hg.bilevel(init, loss, loss, lambda h: optax.sgd(h["rate"]))
tuner = hg.alternating(problem, hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log")}))
start = lambda: tuner.init({"rate": 1e-2}, jax.random.key(0))
place = lambda x: NamedSharding(mesh, P(None, "d") if x.shape == SHAPE else P())
state = jax.jit(start, out_shardings=jax.tree.map(place, jax.eval_shape(start)))()
batches = [np.random.default_rng(i).normal(size=(4, 8)).astype("f4") for i in range(3)]
more = dict(steps_per_update=3, sharding=NamedSharding(mesh, P()), progress=False)
try:
    hg.fit(tuner, state, batches, batches[:1], 3, checkpoint=sys.argv[3], **more)
except ValueError as error:
    assert "state's leaf now/inner/params is spread over 2 processes" in str(error), error
result = hg.fit(tuner, state, batches, batches[:1], 3, **more)
assert not result.state.inner.params.is_fully_addressable
assert result.state.inner.params.sharding.spec == P(None, "d")
print("rate", float(result.hyper["rate"]), result.history[-1].loss)
if jax.process_index() == 0:
    alone = hg.fit(tuner, start(), batches, batches[:1], 3, steps_per_update=3, progress=False)
    print("alone", float(alone.hyper["rate"]), alone.history[-1].loss)
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(i), port, str(tmp_path / "run")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [
        [x.split() for x in out.splitlines() if x[:5] in ("rate ", "alone")] for out, _ in said
    ]
    assert [len(x) for x in lines] == [2, 1], said
    (together, alone), (other,) = lines
    assert together == other
    for ours, theirs in zip(together[1:], alone[1:], strict=True):
        assert abs(float(ours) - float(theirs)) < 1e-4 * abs(float(theirs))
    assert float(alone[1]) > 0.011  # it was tuned
