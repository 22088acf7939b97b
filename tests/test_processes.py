"""One run over two processes on the loopback interface, with weights that neither holds whole."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import hypergrad as hg
from hypergrad.training.arrays import saved_updates

ROOT = str(Path(__file__).resolve().parent.parent)
SHAPE, UPDATES = (8, 16), 40
BATCHES = [np.random.default_rng(i).normal(size=(4, 8)).astype("f4") for i in range(3)]


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    """Of all columns."""
    return (jax.numpy.tanh(batch @ w) ** 2).mean()


def tuner_of() -> hg.Tuner:
    """The same in all processes."""
    init = lambda key: jax.random.normal(key, SHAPE)  # noqa: E731
    problem = hg.bilevel(init, loss, loss, lambda h: optax.sgd(h["rate"]))
    return hg.alternating(problem, hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log")}))


def start(tuner: hg.Tuner) -> Any:
    """Where training begins."""
    return tuner.init({"rate": 1e-2}, jax.random.key(0))


def worker(index: int, port: str, folder: str, stop_at: int) -> None:
    """One of the two; it sends itself SIGTERM at an update, or says how the run ended."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    tuner = tuner_of()
    begin = lambda: start(tuner)  # noqa: E731
    place = lambda x: NamedSharding(mesh, P(None, "d") if x.shape == SHAPE else P())  # noqa: E731
    state = jax.jit(begin, out_shardings=jax.tree.map(place, jax.eval_shape(begin)))()

    def terminate(record: Any) -> None:
        if record.update == stop_at and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {"steps_per_update": 3, "progress": False}
    result = hg.fit(
        tuner,
        state,
        BATCHES,
        BATCHES[:1],
        UPDATES,
        callbacks=[terminate],
        checkpoint=hg.Checkpoint(folder, every=7),
        sharding=NamedSharding(mesh, P()),
        **options,
    )
    params = result.state.inner.params
    assert not params.is_fully_addressable and params.sharding.spec == P(None, "d")
    print("rate", float(result.hyper["rate"]), result.history[-1].loss, len(result.history))


def both(folder: Path, stop_at: int) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT, "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(i), port, str(folder), str(stop_at)],
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
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def test_two_processes_train_as_one_through_a_sigterm(tmp_path: Path) -> None:
    folder, tuner = tmp_path / "run", tuner_of()
    options: dict[str, Any] = {"steps_per_update": 3, "progress": False}
    # What one process has written, two read.
    hg.fit(tuner, start(tuner), BATCHES, BATCHES[:1], 7, checkpoint=folder, **options)
    ended = both(folder, stop_at=10)
    assert all("going on under" in errors for _, _, errors in ended), ended
    assert [status for status, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    (saved, *_) = saved_updates(folder)
    assert 10 < saved < UPDATES
    assert all(f"{saved} updates are saved" in errors for _, _, errors in ended), ended

    ended = both(folder, stop_at=-1)
    assert [status for status, _, _ in ended] == [0, 0], ended
    lines = [[x.split() for x in out.splitlines() if x.startswith("rate ")] for _, out, _ in ended]
    assert lines[0] == lines[1]
    _, rate, last, updates = lines[0][0]
    assert int(updates) == UPDATES

    alone = hg.fit(tuner, start(tuner), BATCHES, BATCHES[:1], UPDATES, **options)
    assert abs(float(rate) - float(alone.hyper["rate"])) < 1e-4 * float(rate)
    assert abs(float(last) - alone.history[-1].loss) < 1e-4 * float(last)
    assert float(rate) > 0.02  # it was tuned

    # What two have written, one reads.
    (folder / str(UPDATES)).rename(tmp_path / "last")
    again = hg.fit(tuner, start(tuner), BATCHES, BATCHES[:1], UPDATES, checkpoint=folder, **options)
    assert np.abs(again.state.inner.params - alone.state.inner.params).max() < 1e-5
    assert len(again.history) == UPDATES


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
