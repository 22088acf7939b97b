"""Checkpoints of `hypergrad.fit`: the same bits after any kill, torn and foreign ones refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.training.arrays import (
    TornError,
    read_checkpoint,
    saved_updates,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent
SPACE = hg.Space({"rate": hg.Float(1e-4, 2.0, scale="log")})
START = {"rate": 1e-3}

# Where one of a checkpoint's files is unreadable, orbax closes its event loop while it still reads
# the others, and the loop complains where nobody can catch it.
orbax_complains = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((params + 0.1 * jax.random.normal(key, (2,)) - batch) ** 2)


def _problem(loss: Any = _loss, size: int = 2) -> hg.Problem:
    return hg.bilevel(
        lambda key: jnp.zeros(size), loss, loss, lambda hyper: optax.sgd(hyper["rate"])
    )


TUNER = hg.alternating(_problem(), SPACE)
BATCHES = [np.full(2, 1.0 + i % 5, np.float32) for i in range(23)]


def _start(seed: int = 0) -> Any:
    return TUNER.init(START, jax.random.key(seed))


def _fit(num_updates: int, checkpoint: Any, train: Any = BATCHES, **more: Any) -> Any:
    return hg.fit(
        TUNER,
        _start(),
        train,
        BATCHES,
        num_updates,
        steps_per_update=3,
        checkpoint=checkpoint,
        **more,
    )


def _bits(result: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(result.state)
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]
    return [np.asarray(x) for x in (*leaves, *result.history.columns.values())]


def assert_same_run(a: Any, b: Any) -> None:
    assert len(a.history) == len(b.history)
    assert list(a.history.columns) == list(b.history.columns)
    for x, y in zip(_bits(a), _bits(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole() -> Any:
    """The run that nothing interrupts."""
    return _fit(20, None)


def test_more_updates_go_on_from_the_checkpoint(tmp_path: Path, whole: Any) -> None:
    checkpoint = hg.Checkpoint(tmp_path / "run", every=4, keep=2)
    _fit(10, checkpoint)
    assert saved_updates(checkpoint.path) == [10, 8]
    seen: list[int] = []
    result = _fit(20, checkpoint, callbacks=[lambda record: seen.append(record.update)])
    assert seen == list(range(10, 20))
    assert_same_run(result, whole)
    assert saved_updates(checkpoint.path) == [20, 16]
    # once more: nothing is left to do, and all is there
    assert_same_run(_fit(20, checkpoint), whole)
    with pytest.raises(ValueError, match="has done 20 updates, more than the 15"):
        _fit(15, checkpoint)


class Loader:
    """Remembers where it is, as torchdata's StatefulDataLoader does."""

    def __init__(self) -> None:
        self.at = self.read = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(BATCHES):
            self.at += 1
            self.read += 1
            yield BATCHES[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Iterating:
    """Its iterators remember where they are, as grain's do."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Any:
        return _Iterator(self)


class _Iterator:
    def __init__(self, source: Iterating) -> None:
        self.source, self.at = source, 0

    def __next__(self) -> Any:
        if self.at == len(BATCHES):
            raise StopIteration
        self.at += 1
        self.source.read += 1
        return BATCHES[self.at - 1]

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("make", [Loader, Iterating])
def test_a_source_with_a_state_is_not_read_again(tmp_path: Path, whole: Any, make: Any) -> None:
    checkpoint = hg.Checkpoint(tmp_path / "run", every=4)
    _fit(14, checkpoint, train=make())
    again = make()
    assert_same_run(_fit(20, checkpoint, train=again), whole)
    # 6 updates of 3 batches, and those since the state was taken behind update 12
    assert again.read == 6 * 3 + 2 * 3
    with pytest.raises(ValueError, match=r"train has no state to restore"):
        _fit(21, checkpoint)


def test_a_one_shot_generator_is_found_again(tmp_path: Path, whole: Any) -> None:
    stream = lambda: (BATCHES[i % 23] for i in range(999))  # noqa: E731
    _fit(9, tmp_path / "run", train=stream())
    assert_same_run(_fit(20, tmp_path / "run", train=stream()), whole)


def _torch_loader() -> Any:
    torch = pytest.importorskip("torch")
    shuffled = torch.Generator().manual_seed(3)
    return torch.utils.data.DataLoader(BATCHES, batch_size=4, shuffle=True, generator=shuffled)


def _stateful_loader() -> Any:
    torch = pytest.importorskip("torch")
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    torch.manual_seed(3)
    return stateful.StatefulDataLoader(BATCHES, batch_size=4, shuffle=True)


def _grain() -> Any:
    grain = pytest.importorskip("grain")
    return (
        grain.MapDataset.source(BATCHES).seed(1).shuffle().repeat(None).batch(4).to_iter_dataset()
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("make", [_torch_loader, _stateful_loader, _grain])
def test_real_loaders_resume(tmp_path: Path, make: Any) -> None:
    checkpoint = hg.Checkpoint(tmp_path / "run", every=4)
    problem = _problem(lambda p, hyper, batch, key: jnp.mean((p - batch) ** 2))
    tuner = hg.alternating(problem, SPACE)

    def run(num_updates: int, checkpoint: Any) -> Any:
        state = tuner.init(START, jax.random.key(0))
        valid = np.ones((4, 2), np.float32)
        return hg.fit(
            tuner, state, make(), valid, num_updates, steps_per_update=3, checkpoint=checkpoint
        )

    for num_updates in (9, 13):
        run(num_updates, checkpoint)
    assert_same_run(run(20, checkpoint), run(20, None))


def test_sigterm_saves_and_stops(tmp_path: Path, whole: Any) -> None:
    checkpoint = hg.Checkpoint(tmp_path / "run", every=1000)
    closed: list[bool] = []

    class Terminating:
        def __call__(self, record: Any) -> None:
            if record.update == 6:
                signal.raise_signal(signal.SIGTERM)

        def close(self) -> None:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        _fit(20, checkpoint, callbacks=[Terminating()])
    assert end.value.code == 143 and closed == [True]
    assert signal.getsignal(signal.SIGTERM) == before
    (done,) = saved_updates(checkpoint.path)
    assert 7 <= done <= 12
    assert_same_run(_fit(20, checkpoint), whole)


def test_sigterm_is_handed_on_to_an_earlier_handler(tmp_path: Path) -> None:
    handed_on: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: handed_on.append(number))
    try:
        with pytest.raises(SystemExit):
            _fit(5, tmp_path / "run", callbacks=[lambda r: signal.raise_signal(signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handed_on == [signal.SIGTERM]
    assert saved_updates(tmp_path / "run")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@orbax_complains
def test_a_torn_checkpoint_is_skipped(
    tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kept = hg.Checkpoint(tmp_path / "kept", every=4, keep=3)
    _fit(11, kept)
    checkpoint = hg.Checkpoint(tmp_path / "run", every=4, keep=3)
    shutil.copytree(kept.path, checkpoint.path)
    largest = max(_files(checkpoint.path / "11"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    for path in _files(checkpoint.path / "8"):
        os.truncate(path, 0)
    assert_same_run(_fit(20, checkpoint), whole)
    assert "update 11" in caplog.text and "update 8" in caplog.text and "torn" in caplog.text
    assert (checkpoint.path / "11.torn").is_dir() and (checkpoint.path / "8.torn").is_dir()
    # All of them torn: nobody begins at 0 without having said so, and all stay as they are.
    for path in _files(checkpoint.path):
        os.truncate(path, 0)
    before = sorted(path.name for path in checkpoint.path.iterdir())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of those in .* can be used .*update 20"):
            _fit(20, checkpoint)
        assert sorted(path.name for path in checkpoint.path.iterdir()) == before


@orbax_complains
def test_every_file_of_a_checkpoint_that_matters_is_watched(tmp_path: Path) -> None:
    """Cut short, or with one byte changed, it is refused or still reads as what was written."""
    arrays = [np.arange(6.0), np.zeros((2, 0), np.int32), np.random.default_rng(0).random(50_000)]
    write_checkpoint(tmp_path, 3, arrays, {"name": "run"})
    read, about = read_checkpoint(tmp_path, 3)
    assert about == {"name": "run"}
    for x, y in zip(arrays, read, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    refused = 0
    for path in _files(tmp_path / "3"):
        content = path.read_bytes()
        flipped = bytearray(content)
        if content:
            flipped[len(content) // 2] ^= 4
        for torn in (content[: len(content) // 2], bytes(flipped)):
            path.write_bytes(torn)
            try:
                for x, y in zip(arrays, read_checkpoint(tmp_path, 3)[0], strict=True):
                    np.testing.assert_array_equal(x, y)
            except TornError:
                refused += 1
        path.write_bytes(content)
    assert refused >= 6
    read_checkpoint(tmp_path, 3)


def test_another_run_is_refused(tmp_path: Path) -> None:
    def other(loss: Any = _loss, space: Any = SPACE, size: int = 2, **more: Any) -> None:
        tuner = hg.alternating(_problem(loss, size), space, **more.pop("tuner", {}))
        hyper = more.pop("start", START)
        state = tuner.init(hyper, jax.random.key(more.pop("seed", 0)))
        arguments = {"steps_per_update": 3, "checkpoint": tmp_path / "run"} | more
        hg.fit(tuner, state, BATCHES, BATCHES, 6, **arguments)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match) as error:
            other(**changes)
        assert "name another folder" in str(error.value)

    other()
    other()  # the same problem, made anew, is the same
    wider = hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log")})
    refused(r"'rate' has high 2.0 there and 1.0 here", space=wider)
    refused(
        "'rate' has scale 'log' there and 'linear' here",
        space=hg.Space({"rate": hg.Float(1e-4, 2.0)}),
    )
    more = hg.Space({**SPACE, "l2": hg.Float(0.0, 1.0)})
    refused("it does not tune 'l2'", space=more, start={**START, "l2": 0.5})
    named = lambda p, hyper, batch, key: _loss(p, hyper, batch, key) * hyper["scale"]  # noqa: E731
    other_name = hg.Space({**SPACE, "scale": hg.Float(0.5, 2.0)})
    refused("'scale'", loss=named, space=other_name, start={**START, "scale": 1.0})
    refused(r"'rate' starts at \[0.001\] there and at \[0.002\] here", start={"rate": 2e-3})
    refused("its key is", seed=1)
    refused("K steps per update", steps_per_update=4)
    refused(r"leaf now/outer_state\S* is", tuner={"outer_optimizer": optax.sgd(0.1)})
    wide = lambda p, hyper, batch, key: _loss(p[:2], hyper, batch, key)  # noqa: E731
    refused(r"leaf now/inner/params is float32\[2\] there and float32\[3\]", loss=wide, size=3)
    absolute = lambda p, hyper, batch, key: jnp.mean(jnp.abs(p - batch))  # noqa: E731
    refused("its update computes", loss=absolute)
    doubled = lambda p, hyper, batch, key: jnp.mean((p - 3.0 * batch) ** 2)  # noqa: E731
    refused("its update computes", loss=doubled)
    refused("other constants or in another order", tuner={"max_move": 0.04})
    assert saved_updates(tmp_path / "run") == [6]


def test_a_weakly_typed_start_is_no_other_program(tmp_path: Path) -> None:
    """Under `jnp.array(0.0)` the first update is another program than every later one."""

    class State(NamedTuple):
        params: Any
        seen: Any

    def step(inner: State, hyper: Any, batch: Any, key: Any) -> State:
        slope = jax.grad(loss)(inner.params, hyper, batch, key)
        return State(inner.params - hyper["rate"] * slope, inner.seen + 1)

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((params - batch) ** 2)

    init = lambda hyper, key: State(jnp.array(0.0), jnp.asarray(0))  # noqa: E731
    assert init(None, None).params.weak_type
    tuner = hg.alternating(hg.Problem(init, step, loss, loss), SPACE)

    def run(num_updates: int, checkpoint: Any) -> Any:
        state = tuner.init(START, jax.random.key(0))
        data = jnp.ones((3, 2)), jnp.ones(2)
        return hg.fit(tuner, state, *data, num_updates, checkpoint=checkpoint)

    run(3, tmp_path / "run")
    assert_same_run(run(8, tmp_path / "run"), run(8, None))


def test_another_jax_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fit(3, tmp_path / "run")
    monkeypatch.setattr(jax, "__version__", "0.99")
    _fit(4, tmp_path / "run")
    assert "going on under 0.99" in caplog.text


def test_what_goes_wrong_while_saving_is_raised(tmp_path: Path) -> None:
    def vanish(record: Any) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").write_text("in the way")

    with pytest.raises(Exception, match=r"run"):
        _fit(3, tmp_path / "run", callbacks=[vanish])


def _worker(folder: Path, pause: float = 0.0) -> Any:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.resume_worker", str(folder), str(pause)]
    environment = {**os.environ, "PYTHONHASHSEED": "random"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_three_times_a_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five processes of one program: the first one compiles it, which is half of the time.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    out, error = _worker(undisturbed).communicate()
    assert out.endswith("done\n"), error
    for kill_at, number in ((12, signal.SIGKILL), (25, signal.SIGTERM), (41, signal.SIGKILL)):
        process = _worker(killed, pause=0.01)
        for line in process.stdout:
            if line == f"at {kill_at}\n":
                process.send_signal(number)
                break
        _, error = process.communicate()
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), error
        if number == signal.SIGTERM:
            # saved where it stood, not at the last multiple of 7
            assert saved_updates(killed / "run")[0] > 25
    out, error = _worker(killed).communicate()
    assert out.endswith("done\n") and "at 41\n" not in out.split("at 44\n")[1], error
    with np.load(undisturbed / "result.npz") as one, np.load(killed / "result.npz") as other:
        assert one.files == other.files and "hyper|0" in one.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])
        assert one["loss"][-1] < 0.01 * one["loss"][0]
    lines = (killed / "history.jsonl").read_text()
    assert lines == (undisturbed / "history.jsonl").read_text()
    assert [json.loads(line)["update"] for line in lines.splitlines()] == list(range(60))
