"""`hypergrad.fit`: the plain loop's bits, data from anywhere, what ends a run and how."""

import logging
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.training.history import LARGE, History, Record, observe, scalars
from hypergrad.training.progress import FitProgress, SweepProgress
from hypergrad.tuners.alternating import horizon
from hypergrad.tuners.learned import remarks

SPACE = hg.Space({"rate": hg.Float(1e-4, 2.0, scale="log"), "l2": hg.Float(1e-6, 1.0, scale="log")})
START = {"rate": 1e-3, "l2": np.full(2, 1e-3, np.float32)}


def _loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    penalty = jnp.vdot(hyper["l2"], params**2)
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2) + penalty


PROBLEM = hg.bilevel(lambda key: jnp.ones(2), _loss, _loss, lambda hyper: optax.sgd(hyper["rate"]))
# One for all tests: it is compiled once for each shape of the data.
TUNER = hg.alternating(PROBLEM, SPACE)


def _batch(i: int, size: int = 4) -> dict[str, np.ndarray]:
    x = np.random.default_rng(i).normal(size=(size, 2)).astype(np.float32)
    return {"x": x, "y": x @ np.array([1.0, -2.0], np.float32)}


BATCHES, VALID = [_batch(i) for i in range(60)], _batch(99)
ARRAYS = jax.tree.map(lambda *x: np.stack(x), *BATCHES[:3])


def _start() -> Any:
    return TUNER.init(START, jax.random.key(0))


def _plain_loop(groups: list[Any], valids: list[Any]) -> tuple[Any, list[Any]]:
    update, state, infos = jax.jit(TUNER.update), _start(), []
    for train, valid in zip(groups, valids, strict=True):
        state, info = update(state, train, valid)
        infos.append(info)
    return state, infos


def _stacked(batches: list[Any], size: int = 3) -> list[Any]:
    groups = [batches[i : i + size] for i in range(0, len(batches), size)]
    return [jax.tree.map(lambda *x: np.stack(x), *group) for group in groups]


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_fit_is_the_plain_loop() -> None:
    result = hg.fit(TUNER, _start(), ARRAYS, VALID, 12)
    state, infos = _plain_loop([ARRAYS] * 12, [VALID] * 12)
    assert_same_bits(result.state, state)
    assert [record.update for record in result.history] == list(range(12))
    for record, info in zip(result.history, infos, strict=True):
        assert record.loss == float(info.loss) and record.norm == float(info.norm)
        np.testing.assert_array_equal(record.hyper["l2"], info.hyper["l2"])
        np.testing.assert_array_equal(record.grad["rate"], info.grad["rate"])
        assert record.estimate == {k: v.item() for k, v in info.estimate.items()}
    assert result.history[-1].train_loss == float(state.inner.loss)
    assert result.history[-1].loss < 0.2 * result.history[0].loss
    np.testing.assert_array_equal(result.hyper["rate"], TUNER.best(state)["rate"])
    schedule = hg.settled_schedule(SPACE, [record.hyper for record in result.history], 3)
    assert float(schedule(30)["rate"]) > 1e-3
    learned = hg.learned_schedule([info.hyper for info in infos], 3)
    assert result.schedule.steps_per_update == 3
    assert_same_bits(result.schedule.values, learned.values)
    np.testing.assert_array_equal(result.schedule.of("rate")(35), infos[-1].hyper["rate"])


def test_the_length_of_a_run_gives_the_horizon() -> None:
    steps = hg.fit(TUNER, _start(), BATCHES, BATCHES, num_steps=100)
    assert steps.schedule.steps_per_update == horizon(100) == 10
    assert len(steps.history) == 10 and int(steps.state.inner.step) == 100
    # data with an axis K of their own keep it
    arrays = hg.fit(TUNER, _start(), ARRAYS, VALID, num_steps=100)
    assert arrays.schedule.steps_per_update == 3 and len(arrays.history) == 33
    with pytest.raises(ValueError, match=r"num_updates=None and num_steps=None: give one of them"):
        hg.fit(TUNER, _start(), ARRAYS, VALID)
    with pytest.raises(ValueError, match=r"num_updates=3 and num_steps=9"):
        hg.fit(TUNER, _start(), ARRAYS, VALID, 3, num_steps=9)
    with pytest.raises(ValueError, match=r"num_steps=2 is less than one update of K=3"):
        hg.fit(TUNER, _start(), ARRAYS, VALID, num_steps=2)
    with pytest.raises(ValueError, match=r"num_steps=7 is too short"):
        hg.fit(TUNER, _start(), BATCHES, VALID, num_steps=7)


def test_a_run_that_was_mostly_refused_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tuner = hg.alternating(PROBLEM, SPACE, trust=hg.Trust(max_growth=1e-9))
    with caplog.at_level(logging.WARNING, "hypergrad"):
        result = hg.fit(tuner, tuner.init(START, jax.random.key(0)), ARRAYS, VALID, 12)
    [remark] = [text for text in result.remarks if "not to be trusted" in text]
    assert "12 of the last 12 updates were refused" in remark and "the adjoint grew" in remark
    assert result.history[-1].refusals == 12
    assert caplog.text.count("updates were refused") == 1
    caplog.clear()
    tuner.best(result.state)
    assert "12 of the last 12 updates were refused" in caplog.text
    caplog.clear()
    hg.settled_schedule(SPACE, result.history, 3)
    assert "12 of the last 12 updates were refused" in caplog.text
    caplog.clear()
    jax.jit(tuner.best)(result.state)
    assert not caplog.text


def test_a_hyperparameter_on_its_bound_or_on_its_way_is_named() -> None:
    space = hg.Space({"a": hg.Float(0.0, 1.0), "b": hg.Float(0.0, 1.0), "c": hg.Float(0.0, 1.0)})
    way = np.linspace(0.1, 0.9, 20)
    values = {"a": np.minimum(2 * way, 1.0), "b": way, "c": 0.5 + 0.1 * np.sin(np.arange(20))}
    bound, drift = remarks(space, jax.tree.map(jnp.asarray, values))
    assert bound.startswith("a ended on the upper bound") and "horizon" in bound
    assert drift.startswith("b moved one way through the whole run")
    settled = {"b": np.minimum(0.1 + 0.1 * np.arange(20), 0.7)}
    assert remarks(hg.Space({"b": space["b"]}), settled) == ()
    many = {"a": np.stack([values["a"], values["c"]], 1)}
    assert "(1 of its 2 numbers)" in remarks(hg.Space({"a": space["a"]}), many)[0]


def test_fit_goes_on_from_an_earlier_result() -> None:
    half = hg.fit(TUNER, _start(), ARRAYS, VALID, 6)
    rest = hg.fit(TUNER, half.state, ARRAYS, VALID, 6)
    assert_same_bits(rest.state, hg.fit(TUNER, _start(), ARRAYS, VALID, 12).state)
    assert [record.update for record in rest.history] == list(range(6, 12))


def test_an_update_that_is_jitted_already_is_used_as_it_is() -> None:
    options = {"xla_cpu_enable_fast_math": False}
    tuner = TUNER._replace(update=jax.jit(TUNER.update, compiler_options=options))
    hg.fit(tuner, _start(), ARRAYS, VALID, 2)
    assert tuner.update._cache_size() == 1


def test_restarting_and_minibatches() -> None:
    tuner = hg.restarting(PROBLEM, SPACE)
    examples = jax.tree.map(lambda *x: np.concatenate(x), *BATCHES[:10])
    train = hg.Minibatches(examples, batch_size=8, num_steps=20)
    result = hg.fit(tuner, tuner.init(START, jax.random.key(1)), train, VALID, 5)
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert np.isnan(result.history[-1].train_loss)


class Loader:
    """As a DataLoader without drop_last: an epoch of 7 batches and a short one, in a new order."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[Any]:
        for i in self._random.permutation(7):
            yield BATCHES[i]
        yield _batch(5, size=1)


def test_an_iterable_is_stacked_and_started_anew(caplog: pytest.LogCaptureFixture) -> None:
    result = hg.fit(TUNER, _start(), Loader(), BATCHES[50:52], 7, steps_per_update=3)
    loader = Loader()
    seen = [batch for _ in range(3) for batch in loader if len(batch["x"]) == 4]
    state, _ = _plain_loop(_stacked(seen), [BATCHES[50 + i % 2] for i in range(7)])
    assert_same_bits(result.state, state)
    left_out = [r for r in caplog.records if "1 examples instead of 4 is left out" in r.message]
    assert len(left_out) == 1


def test_a_generator_is_read_no_further_than_it_is_used() -> None:
    batches = iter(BATCHES)
    first = hg.fit(TUNER, _start(), batches, VALID, 4, steps_per_update=3)
    second = hg.fit(TUNER, first.state, batches, VALID, 2, steps_per_update=3)
    state, _ = _plain_loop(_stacked(BATCHES[:18]), [VALID] * 6)
    assert_same_bits(second.state, state)
    np.testing.assert_array_equal(next(batches)["x"], BATCHES[18]["x"])


def test_the_device_has_work_while_the_host_looks() -> None:
    """Host values come with a delay: several updates are under way before the first is seen."""
    read: list[int] = []
    source = (read.append(i) or batch for i, batch in enumerate(BATCHES))  # type: ignore[func-returns-value]
    at_first_record: list[int] = []
    hg.fit(
        TUNER,
        _start(),
        source,
        VALID,
        20,
        steps_per_update=3,
        callbacks=[lambda record: at_first_record or at_first_record.append(len(read))],
    )
    assert at_first_record[0] >= 3 * 5
    # but not everything: what is read ahead is held on the device
    assert at_first_record[0] <= 3 * 9


def test_callbacks_see_every_update_in_order() -> None:
    seen: list[Any] = []

    class Recorder:
        def open(self, history: Any, update: int) -> None:
            seen.append(("open", len(history), update))

        def __call__(self, record: Record) -> None:
            seen.append(record.update)
            if record.update == 5:
                raise RuntimeError("enough")

        def close(self) -> None:
            seen.append("close")

    with pytest.raises(RuntimeError, match="enough"):
        hg.fit(TUNER, _start(), ARRAYS, VALID, 9, callbacks=[Recorder()])
    assert seen == [("open", 0, 0), 0, 1, 2, 3, 4, 5, "close"]


def test_data_that_end_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    result = hg.fit(TUNER, _start(), iter(BATCHES[:11]), VALID, 9, steps_per_update=3)
    assert_same_bits(result.state, _plain_loop(_stacked(BATCHES[:9]), [VALID] * 3)[0])
    assert len(result.history) == 3
    assert "train ran out after 11 batches" in caplog.text
    assert "after 3 of 9 updates" in caplog.text
    hg.fit(TUNER, _start(), ARRAYS, iter(BATCHES[:2]), 9)
    assert "valid ran out after 2 batches" in caplog.text
    with pytest.raises(ValueError, match=r"ran out after 2 batches.*steps_per_update=3"):
        hg.fit(TUNER, _start(), iter(BATCHES[:2]), VALID, 9, steps_per_update=3)


@pytest.mark.parametrize("name", ["train", "valid"])
def test_wrong_batches_are_named(name: str) -> None:
    def run(batches: Any) -> None:
        train, valid = (batches, VALID) if name == "train" else (BATCHES, batches)
        hg.fit(TUNER, _start(), train, valid, 20, steps_per_update=3)

    with pytest.raises(ValueError, match=rf"{name}=.* yields no batch"):
        run([])
    wider = {"x": np.ones((4, 3), np.float32), "y": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match=rf"Batch 3 of {name} has x of float32\[4, 3\], the first"):
        run([*BATCHES[:2], wider])
    with pytest.raises(ValueError, match=rf"Batch 2 of {name} has the structure"):
        run([BATCHES[0], {"x": wider["x"]}])
    with pytest.raises(ValueError, match="examples in a row"):
        run([BATCHES[0], _batch(1, 3), _batch(2, 2)])
    with pytest.raises(TypeError, match=rf"{name} yields str at y"):
        run([{"x": BATCHES[0]["x"], "y": "cat"}])

    def broken() -> Iterator[Any]:
        yield BATCHES[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        run(broken())


def test_a_reused_buffer_is_copied() -> None:
    """A generator that yields one buffer again and again gave every update its last content."""

    def reusing() -> Iterator[Any]:
        buffer = _batch(0)
        for batch in BATCHES:
            for name in buffer:
                buffer[name][...] = batch[name]
            yield buffer

    result = hg.fit(TUNER, _start(), ARRAYS, reusing(), 6)
    assert_same_bits(result.state, _plain_loop([ARRAYS] * 6, BATCHES[:6])[0])


def test_batches_keep_64_bits_in_the_thread_that_reads_them(x64: None) -> None:
    seen: list[Any] = []

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        seen.append(batch.dtype)
        return jnp.mean((w - batch) ** 2)

    problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    tuner = hg.alternating(problem, hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")}))
    state = tuner.init({"lr": 0.1}, jax.random.key(0))
    hg.fit(tuner, state, [np.ones(3)], [np.ones(3)], 2, steps_per_update=2)
    assert set(seen) == {jnp.dtype("float64")}


def test_one_bad_batch_is_no_error_but_only_bad_ones_are() -> None:
    bad = {"x": np.full((4, 2), np.nan, np.float32), "y": np.ones(4, np.float32)}
    batches = [*BATCHES[:7], bad, *BATCHES[8:30]]
    result = hg.fit(TUNER, _start(), batches, VALID, 10, steps_per_update=3)
    assert [record.finite for record in result.history].count(False) == 1
    assert result.history[2].first_bad_step == 1
    with pytest.raises(
        FloatingPointError, match=r"After update 4 .*training step 0.*no update had"
    ):
        hg.fit(TUNER, _start(), [bad], VALID, 5, steps_per_update=3)
    seen: list[int] = []
    with pytest.raises(FloatingPointError, match="20 updates in a row had no finite loss"):
        callbacks = [lambda record: seen.append(record.update)]
        hg.fit(TUNER, _start(), [bad], VALID, 99, steps_per_update=3, callbacks=callbacks)
    assert len(seen) == 20
    lost = _start()._replace(average=_start().average._replace(unit={"rate": jnp.nan, "l2": 0.0}))
    with pytest.raises(FloatingPointError, match="final parameters or hyperparameters"):
        hg.fit(TUNER._replace(update=lambda *x: (lost, _Untold())), lost, ARRAYS, VALID, 2)


class _Untold:
    """The info of a tuner that says little."""

    loss, hyper = jnp.float32(1.0), {"rate": jnp.float32(0.5), "l2": jnp.zeros(2)}


jax.tree_util.register_pytree_node(_Untold, lambda x: ((), None), lambda *_: _Untold())


def test_wrong_arguments_are_named(tmp_path: Any) -> None:
    def run(num_updates: Any = 2, train: Any = ARRAYS, valid: Any = VALID, **more: Any) -> None:
        hg.fit(TUNER, _start(), train, valid, num_updates, **more)

    for value in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=rf"num_updates={value}"):
            run(value)
    with pytest.raises(ValueError, match=r"train is a list of single batches.*steps_per_update"):
        run(train=BATCHES)
    with pytest.raises(ValueError, match="steps_per_update=0 must be at least 1"):
        run(train=BATCHES, steps_per_update=0)
    with pytest.raises(ValueError, match="steps_per_update=5, but train has its own axis K of 3"):
        run(steps_per_update=5)
    with pytest.raises(TypeError, match="train=7 is neither"):
        run(train=7, steps_per_update=2)
    with pytest.raises(TypeError, match=r"valid=\{'x': 'cat'\} is neither"):
        run(valid={"x": "cat"})
    with pytest.raises(TypeError, match=r"callbacks\[1\]='log' cannot be called"):
        run(callbacks=[print, "log"])
    with pytest.raises(TypeError, match=r"callbacks\[0\]=.*JSONLines.* cannot be called"):
        run(callbacks=[hg.callbacks.JSONLines])
    with pytest.raises(TypeError, match=r"callbacks=.* is no list"):
        run(callbacks=print)
    with pytest.raises(ValueError, match=r"lies in .*missing.*, which is no folder: make it"):
        run(checkpoint=tmp_path / "missing" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="every=0 must be"):
        hg.Checkpoint(tmp_path, every=0)
    with pytest.raises(ValueError, match=r"path=.*no folder"):
        hg.callbacks.JSONLines(tmp_path / "missing" / "history.jsonl")


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _record(update: int) -> Record:
    return Record(update, 0.5, 0.25, {"rate": np.array(0.125), "l2": np.array([1.0, 2.0])}, None)


def test_a_line_a_minute_where_nobody_watches(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "hypergrad")
    clock = _Clock()
    with FitProgress(0, 1000, 10, clock=clock) as progress:
        for update in range(200):
            progress.show(_record(update))
            clock.now += 1.0
    lines = [record.message for record in caplog.records]
    assert lines == [
        "61/1000 loss 0.5, 10 steps/s, rate 0.125, l2 1..2, 0:15:39 left",
        "121/1000 loss 0.5, 10 steps/s, rate 0.125, l2 1..2, 0:14:39 left",
        "181/1000 loss 0.5, 10 steps/s, rate 0.125, l2 1..2, 0:13:39 left",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, screen = _Clock(), Terminal()
    with FitProgress(40, 100, 10, file=screen, clock=clock) as progress:
        for update in range(40, 100):
            progress.show(_record(update))
            clock.now += 0.1
    text = screen.getvalue()
    assert "40/100" in text and "100/100" in text
    assert "loss 0.5, 100 steps/s" in text
    # twice a second, not at every update
    assert text.count("steps/s") <= 2 * 6 + 4
    assert capsys.readouterr() == ("", "")


def test_a_sweep_says_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypergrad")
    clock = _Clock()
    with SweepProgress(10, clock=clock) as progress:
        for second in range(150):
            if progress.is_watched:
                progress.finished, progress.best, progress.last = 1 + second // 60, 0.25, 0.5
            progress.show(2, second / 100, 10 * second)
            clock.now += 1.0
    with SweepProgress(10, enabled=False, clock=clock) as progress:
        clock.now += 100.0
        assert not progress.is_watched
        progress.show(1, 0.5, 10)
    lines = [record.message for record in caplog.records]
    assert lines == [
        "2/10 trials, score 0.5, best 0.25, 0:02:51 left",
        "3/10 trials, score 0.5, best 0.25, 0:02:46 left",
    ]


def test_history_grows_and_is_a_sequence() -> None:
    history = History({"rate": jnp.float32(0.5), "weights": jnp.zeros(LARGE + 1)})
    for update in range(50):
        hyper = {"rate": jnp.float32(update), "weights": jnp.zeros(LARGE + 1)}

        class Info:
            loss, grad, norm = jnp.float32(2.0 * update), None, jnp.float32(1.0)

        Info.hyper = hyper  # type: ignore[attr-defined]
        history.append(observe(update, Info, jnp.float32(0.25)))
        if update == 20:
            early = history.columns["loss"]
    assert len(history) == 50 and early.tolist() == [2.0 * i for i in range(21)]
    assert history[-1] == history[49] and history[-1].loss == 98.0
    assert [record.update for record in history[10:13]] == [10, 11, 12]
    assert set(history[3].hyper) == {"rate"} and history[3].hyper["rate"].dtype == np.float32
    assert history[3].estimate is None and history[3].refused is None
    with pytest.raises(IndexError, match=r"history\[50\]"):
        history[50]
    again = History(history.hyper, history.columns)
    again.append(history[0])
    assert len(again) == 51 and again[50] == history[0]
    assert scalars(history[7]) == {
        "loss": 14.0,
        "train_loss": 0.25,
        "hyper/rate": 7.0,
        "norm": 1.0,
    }
    many = Record(0, 1.0, 1.0, {"w": np.arange(20.0)}, None)
    assert scalars(many) == {
        "loss": 1.0,
        "train_loss": 1.0,
        "hyper/w/mean": 9.5,
        "hyper/w/min": 0.0,
        "hyper/w/max": 19.0,
    }


def test_without_a_checkpoint_sigterm_is_left_alone() -> None:
    seen: list[Any] = []
    hg.fit(
        TUNER,
        _start(),
        ARRAYS,
        VALID,
        2,
        callbacks=[lambda record: seen.append(signal.getsignal(signal.SIGTERM))],
    )
    assert seen == [signal.getsignal(signal.SIGTERM)] * 2


def test_what_is_mixed_up_is_named() -> None:
    with pytest.raises(TypeError, match=r"state is a dict that .* give tuner\.init"):
        hg.fit(TUNER, START, ARRAYS, VALID, 2)
    with pytest.raises(TypeError, match="tuner is a TunerState"):
        hg.fit(_start(), TUNER, ARRAYS, VALID, 2)
    with pytest.raises(TypeError, match="call it"):
        hg.fit(TUNER, _start(), lambda: BATCHES, VALID, 2)
    with pytest.raises(ValueError, match="lack the leading axis K"):
        hg.fit(TUNER, _start(), VALID, VALID, 2)


class _Info(NamedTuple):
    loss: jax.Array
    hyper: Any


def test_a_tuner_of_ones_own_keeps_any_state() -> None:
    def update(state: Any, train: Any, valid: Any) -> Any:
        return {"rate": state["rate"] / 2}, _Info(jnp.mean(valid["y"] ** 2), state)

    tuner = hg.Tuner(lambda hyper, key: hyper, update, lambda state: state)
    result = hg.fit(tuner, {"rate": jnp.float32(1.0)}, ARRAYS, VALID, 3)
    assert float(result.hyper["rate"]) == 0.125
    assert [float(record.hyper["rate"]) for record in result.history] == [1.0, 0.5, 0.25]
