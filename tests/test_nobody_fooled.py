"""What a sweep and a run say of themselves: comparable scores, reasons, ends, secrets, pickles."""

import contextlib
import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import hypergrad as hg
from hypergrad.checks import without_passwords
from hypergrad.cli import main
from hypergrad.data import prefetch
from hypergrad.study import workers
from hypergrad.study.storage import dashboard_command, open_storage, told_in_one_sentence
from hypergrad.study.study import open_study

SPACE = hg.Space({"rate": hg.Float(1e-3, 0.3, scale="log")})
X = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
Y = X @ np.arange(4, dtype=np.float32)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def make(choices: Any, loss: Any = _loss) -> hg.Problem:
    return hg.bilevel(lambda key: jnp.zeros(4), loss, loss, lambda h: optax.sgd(h["rate"]))


def splits(x: Any = X, y: Any = Y) -> hg.Splits:
    return hg.Splits(*((x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)))


def sweep(storage: Any = None, num_trials: int = 2, make: Any = make, **options: Any) -> Any:
    given: dict[str, Any] = {"space": SPACE, "data": splits(), "num_steps": 20, "batch_size": 8}
    given |= {"num_trials": num_trials, "progress": False, "sampler": "random"}
    return hg.sweep(make, storage=storage, **(given | options))


REFINE = hg.Refine(steps_per_update=5)


def test_scores_of_another_kind_are_refused_by_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One table ranked losses of 1.8 and 1.8e5."""
    storage = str(tmp_path / "a.journal")
    refine = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    sweep(storage, refine=refine)
    test = X.copy()
    test[70, 2] += 1e-3
    for match, changes in {
        r"data\.train\.1='float32\[32\], checksum": {"data": splits(y=100 * Y)},
        r"data\.test\.0='float32\[32, 4\], checksum": {"data": splits(test)},
        r"data\.train\.0='float64": {"data": splits(X.astype(np.float64))},
        "refine=None": {"refine": None},
        r"refine\.max_move": {"refine": dataclasses.replace(refine, max_move=0.01)},
        r"refine\.estimator": {"refine": dataclasses.replace(refine, estimator=hg.Forward())},
        r"refine\.outer_optimizer": {
            "refine": dataclasses.replace(refine, outer_optimizer=optax.adam(0.2))
        },
        "told='best'": {"told": "best"},
        "batch_size=16": {"batch_size": 16},
    }.items():
        if "float64" in match and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            continue
        with pytest.raises(ValueError, match=match):
            sweep(storage, 3, **({"refine": refine} | changes))
    caplog.clear()
    again = hg.Refine(hg.Unrolled(), optax.adam(0.1), steps_per_update=5)
    sweep(storage, 3, lambda c: make(c), refine=again)
    assert "compute something else" not in caplog.text
    other = lambda w, h, b, key: _loss(w, h, b, key) + jnp.sum(w**2)  # noqa: E731
    result = sweep(storage, 4, lambda c: make(c, other), refine=again)
    assert "compute something else" in caplog.text and len(result.top()) == 4


def test_a_checkpoint_knows_its_data(tmp_path: Path) -> None:
    tuner = hg.alternating(make({}), SPACE)

    def run(train: Any, valid: Any, updates: int = 3) -> None:
        state = tuner.init({"rate": 0.01}, jax.random.key(0))
        hg.fit(tuner, state, train, valid, updates, checkpoint=tmp_path / "run")

    train, valid = (X[:32].reshape(4, 8, 4), Y[:32].reshape(4, 8)), (X[32:], Y[32:])
    run(train, valid)
    with pytest.raises(ValueError, match=r"its train has 1 of float32\[4, 8\], checksum"):
        run((train[0], 2 * train[1]), valid, 4)
    with pytest.raises(ValueError, match=r"its valid has 0 of float32\[64, 4\], checksum"):
        run(train, (X[:64], Y[:64]), 4)
    run(train, valid, 4)


def test_a_key_that_a_loss_closes_over_is_part_of_the_program(tmp_path: Path) -> None:
    """NumPy holds no typed key: `fit` failed with checkpoints only."""

    def run(seed: int) -> None:
        own = jax.random.key(seed)
        loss = lambda w, h, b, key: jnp.mean((w - b + jax.random.normal(own)) ** 2)  # noqa: E731
        tuner = hg.alternating(make({}, loss), SPACE)
        state = tuner.init({"rate": 0.01}, jax.random.key(0))
        hg.fit(tuner, state, jnp.ones((3, 4)), jnp.ones(4), 2, checkpoint=tmp_path / "run")

    run(1)
    run(1)
    with pytest.raises(ValueError, match="other constants"):
        run(2)


def test_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """Log and table said that JAX has removed its internal frames, for every trial."""

    def wrong(choices: Any) -> hg.Problem:
        loss = lambda w, h, b, key: jnp.mean(b[0] @ w)  # noqa: E731
        return hg.bilevel(lambda key: jnp.zeros(5), loss, loss, lambda h: optax.sgd(h["rate"]))

    with pytest.raises(ValueError, match=r"3 trials have failed alike .*TypeError: dot_gen"):
        sweep(None, 9, wrong)
    assert "#0 failed: TypeError: dot_general requires" in caplog.text
    assert "JAX has removed" not in caplog.text
    result = sweep(None, 2, wrong)
    assert "the last error: TypeError: dot_general requires" in result.table()
    (attrs, _) = (trial.user_attrs for trial in result.study.trials)
    assert attrs["reason"].startswith("TypeError: dot_general") and "Traceback" in attrs["error"]
    assert attrs["error"].splitlines()[-1] == attrs["reason"]


def test_different_failures_and_one_good_trial_end_nothing() -> None:
    count = iter(range(100))

    def other(choices: Any) -> hg.Problem:
        raise RuntimeError(f"failure number {next(count)}")

    assert "5 fail" in sweep(None, 5, other).table()
    space = hg.Space({**SPACE, "kind": hg.Categorical(["good", "bad"])})

    def some(choices: Any) -> hg.Problem:
        assert choices["kind"] == "good", "always the same"
        return make(choices)

    assert "complete" in sweep(None, 12, some, space=space).table()


def test_several_lines_are_one_reason() -> None:
    def lines(choices: Any) -> hg.Problem:
        error = ValueError("one\n  two")
        error.add_note("a note")
        raise error

    assert sweep(None, 1, lines).table().endswith("the last error: ValueError: one two")


@pytest.mark.filterwarnings("ignore:.*a program of its own")
def test_ctrl_c_leaves_a_result(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    def interrupted(choices: Any) -> hg.Problem:
        seen.append(choices)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return make(choices)

    space = hg.Space({**SPACE, "kind": hg.Int(0, 1000)})
    # A shell starts what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = sweep(None, 4, interrupted, space=space)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.interrupted and "interrupted" in caplog.text
    assert len(result.top()) == 1 and "1 waiting" in result.table()
    assert not sweep().interrupted


def test_results_pickle(tmp_path: Path) -> None:
    for storage in (None, str(tmp_path / "a.journal"), f"sqlite:///{tmp_path}/a.db"):
        result = sweep(storage, 3)
        copy = pickle.loads(pickle.dumps(result))
        assert copy.best == result.best and copy.table() == result.table()
        assert len(copy.study.trials) == 3 and copy.steps_spent == result.steps_spent
        with pytest.raises(ValueError, match=r"call hypergrad\.sweep again with the same storage"):
            copy.audit()
    problem = make({})
    for tuner in (hg.alternating(problem, SPACE), hg.restarting(problem, SPACE)):
        state = tuner.init({"rate": 0.01}, jax.random.key(0))
        train = hg.Minibatches((X[:32], Y[:32]), 8, num_steps=4)
        result = hg.fit(tuner, state, train, (X[32:], Y[32:]), 2)
        copy = pickle.loads(pickle.dumps(result))
        one, two = (jax.tree.leaves((r.state, r.hyper, r.schedule)) for r in (copy, result))
        for a, b in zip(map(jnp.asarray, one), map(jnp.asarray, two), strict=True):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b)
        assert copy.history[1].loss == result.history[1].loss


SECRET = "pa55w0rd"
URLS = (
    f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/db",
    f"postgresql+psycopg://me:{SECRET}@127.0.0.1:none/db",
    f"nothing://me:{SECRET}@host/db",
    f"postgresql+psycopg://me:a@{SECRET}@127.0.0.1:1/db",
    f"postgresql+psycopg://127.0.0.1:1/db?user=me&password={SECRET}",
    f"mysql://me:{SECRET}@127.0.0.1:1/db",
    f"postgresql:/me:{SECRET}@127.0.0.1/db",
    f"me:{SECRET}@127.0.0.1/db",
    f"grpc://me:{SECRET}@host:port",
    f"sqlite:///nowhere/me:{SECRET}@a.db",
)


@pytest.mark.parametrize("url", URLS)
def test_no_password_is_told(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("def sweep(**options):\n    raise ValueError(options)\n")
    with pytest.raises(Exception) as error:
        sweep(url)
    import traceback

    told = "".join(traceback.format_exception(error.value)).replace(f"sweep({url!r})", "")
    assert SECRET not in told, told
    for command in (
        ["show", url],
        ["report", url],
        ["sweep", "a.py", "--storage", url],
        ["sweep", "a.py", "--seed", "1", "--name", url],
        [url],
        ["show", url, "--out", url],
        ["show", "a.journal", url],
        ["show", "a.journal", f"--nothing={url}"],
    ):
        try:
            assert main(command) != 0
        except SystemExit as end:
            assert end.code != 0
        captured = capfd.readouterr()
        assert SECRET not in captured.out + captured.err + caplog.text, command


def test_no_password_is_kept_in_a_trial() -> None:
    assert without_passwords("x[:, None]@w", urls_only=True) == "x[:, None]@w"
    with open_study(SPACE, None, "random", num_trials=1) as opened:
        proposal = opened.ask()
        assert proposal is not None
        opened.fail(proposal, f"Traceback\n  y = x[:,0]@w\nValueError: {URLS[0]} is away")
        attrs = opened.study.trials[0].user_attrs
    assert SECRET not in str(attrs) and "y = x[:,0]@w" in attrs["error"]


def test_a_database_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    """It was a page of statements, of which the last line spoke of the transaction."""
    url = f"sqlite:///{tmp_path}/a.db"
    sweep(url, 1)
    storage = open_storage(url)
    study = optuna.load_study(study_name="hypergrad", storage=storage)
    (tmp_path / "a.db").unlink()
    (tmp_path / "a.db").mkdir()
    match = r"a\.db' cannot be used \(.*\): what was told"
    with pytest.raises(OSError, match=match) as error, told_in_one_sentence(storage):
        study.set_user_attr("a", 1)
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__ and error.value.__cause__ is None


class Loader:
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches()


def _fit(source: Any, updates: int = 2, **options: Any) -> Any:
    loss = lambda w, h, b, key: -w * jnp.mean(b)  # noqa: E731
    valid = lambda w, h, b, key: (w - 1) ** 2 * h["rate"]  # noqa: E731
    problem = hg.bilevel(lambda k: jnp.zeros(()), loss, valid, lambda h: optax.sgd(h["rate"]))
    tuner = hg.alternating(problem, hg.Space({"rate": hg.Float(0.5, 1.0)}))
    state = tuner.init({"rate": 1.0}, jax.random.key(0))
    return hg.fit(tuner, state, source, np.ones(2, np.float32), updates, **options)


def test_batches_are_copied_before_they_are_stacked() -> None:
    """K steps trained on the last of K batches: 6 instead of 0 + 1 + 2."""

    def reused() -> Iterator[Any]:
        buffer = np.empty(2, np.float32)
        for i in range(3):
            buffer[:] = i
            yield buffer

    result = _fit(Loader(reused), 1, steps_per_update=3)
    assert float(result.state.inner.params) == 3


class NeedsTwo(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyError("label"), NeedsTwo(1, 2)])
def test_a_loader_that_raises_is_named_with_its_batch(error: Exception) -> None:
    def broken() -> Iterator[Any]:
        for _ in range(4):
            yield np.ones(2, np.float32)
        raise error

    kind = RuntimeError if isinstance(error, NeedsTwo) else type(error)
    with pytest.raises(kind, match=rf"Batch 5 of train .*Loader raised {type(error).__name__}"):
        _fit(Loader(broken), 5, steps_per_update=2)


def test_a_loader_that_hangs_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "_TELL_AFTER", 0.1)
    go_on = threading.Event()

    def slow() -> Iterator[Any]:
        yield np.ones(2, np.float32)
        go_on.wait(1.0)
        yield np.ones(2, np.float32)

    _fit(Loader(slow), 1, steps_per_update=2)
    assert "batch 2 of train has been waited for" in caplog.text


def test_a_stopped_worker_is_waited_for_and_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """SIGSTOP: its process is there, and its trials were waited for without a word or an end."""
    path = str(tmp_path / "a.journal")
    program = (
        "import sys, time; sys.path.insert(0, 'tests'); import test_nobody_fooled as t\n"
        "from hypergrad.study.study import open_study\n"
        "opened = open_study(t.SPACE, sys.argv[1], 'random', num_trials=1)\n"
        "opened.ask(record=False); print('asked', flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", program, path], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "asked\n"
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(workers, "_STOPPED_PATIENCE", 0.0)
        begin = time.time()
        monkeypatch.setattr(workers.time, "time", lambda: begin + 58 + 2 * (time.monotonic() % 1))
        with monkeypatch.context() as patch:
            # 58 to 60 s without a beat: within the grace of 60 s.
            patch.setattr(workers, "_STOPPED_PATIENCE", 1e9)
            with open_study(SPACE, path, "random", num_trials=1) as opened:
                assert opened.others() == [f"process {process.pid} here, which is stopped"]
        monkeypatch.setattr(workers.time, "time", lambda: begin + 100)
        result = sweep(path, 1, data=splits())
        assert len(result.top()) == 1
    finally:
        process.kill()
        process.communicate()


def test_bad_data_are_told_from_divergence(caplog: pytest.LogCaptureFixture) -> None:
    """One NaN among 128 numbers: 34 of 60 updates were refused, and nobody said why."""
    x = X.copy()
    x[3, 1] = np.nan
    tuner = hg.alternating(make({}), SPACE)
    state = tuner.init({"rate": 0.02}, jax.random.key(0))
    valid = X[64:], Y[64:]
    train = hg.Minibatches((x[:32], Y[:32]), batch_size=8, num_steps=4)
    for data, valid_data, match in (
        (train, valid, r"training step \d+\) is not finite.* train, in examples \[3\] of 32"),
        (
            (x[None, :32], Y[None, :32]),
            valid,
            r"train, in steps and examples \[\[0, 3\]\] of 1 x 32",
        ),
        ((X[None, :32], Y[None, :32]), (x, Y), r"infinity in valid, in examples \[3\] of 96"),
        ([(x[:8], Y[:8]), (X[:8], Y[:8])], valid, "It read batches 1 to 2 of train"),
    ):
        caplog.clear()
        given = {"steps_per_update": 2} if isinstance(data, list) else {}
        with contextlib.suppress(FloatingPointError):
            hg.fit(tuner, state, data, valid_data, 12, **given)
        assert re.search(match, caplog.text), caplog.text
        assert caplog.text.count("Update 0") == 1
    with pytest.raises(FloatingPointError, match=r"train, in .*; valid, in examples \[3\]"):
        hg.fit(tuner, state, train, (x, Y), 25)
    table = sweep(data=splits(x)).table()
    assert "NaN or infinity in data.train, in examples [3] of 32 (leaf 0)" in table
    # Divergence is not blamed on the data.
    caplog.clear()
    wide = hg.Space({"rate": hg.Float(1e-3, 1e6, scale="log")})
    result = sweep(None, 1, space=wide, enqueue=[{"rate": 1e5}], num_steps=200)
    assert "#0 failed: ValueError: the score is" in caplog.text
    assert "infinity in" not in caplog.text + result.table()


def test_a_training_loss_of_nan_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Gradients may be finite where the loss is not: what `where` hides is no derivative."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return _loss(w, hyper, batch, key) + jax.lax.stop_gradient(jnp.nan)

    problem = hg.bilevel(lambda k: jnp.zeros(4), loss, _loss, lambda h: optax.sgd(h["rate"]))
    tuner = hg.alternating(problem, SPACE)
    train = hg.Minibatches((X[:32], Y[:32]), batch_size=8, num_steps=4)
    hg.fit(tuner, tuner.init({"rate": 0.02}, jax.random.key(0)), train, (X[32:], Y[32:]), 5)
    assert "The training loss was not finite in 5 of 5 updates" in caplog.text


def test_the_dashboards_command_leaves_the_password_to_the_shell() -> None:
    storage = object.__new__(optuna.storages.RDBStorage)
    storage.url = URLS[0]
    command = dashboard_command(storage)
    assert SECRET not in command
    shell = ["sh", "-c", f"PASSWORD={SECRET}; echo {command.split()[1]}"]
    assert subprocess.run(shell, capture_output=True, text=True).stdout.strip() == URLS[0]
