"""The loop around a tuner, for runs that last: data, progress, callbacks, exact resume."""

import contextlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from hypergrad.checks import folder_name, instance
from hypergrad.data.prefetch import Fed, feed
from hypergrad.data.streams import (
    RanOut,
    fixed,
    open_source,
    refuse_missing_axis,
    refuse_split_batch,
)
from hypergrad.optim.schedules import Schedule
from hypergrad.training.arguments import check_types_of_run
from hypergrad.training.callbacks import Stop, check
from hypergrad.training.checkpoints import Checkpoint, Resumed, Saver, is_together, refusal, restore
from hypergrad.training.doubts import Doubts, remarks_of
from hypergrad.training.history import History, Record, observe
from hypergrad.training.identity import describe, program_difference, program_of
from hypergrad.training.length import lengths
from hypergrad.training.progress import FitProgress
from hypergrad.training.signals import Stopped, signals_of
from hypergrad.training.updates import compiled_update, owned, strongly_typed
from hypergrad.trees import Batch, State, Train, all_finite
from hypergrad.tuners.base import Tuner
from hypergrad.tuners.trust import REASONS

_log = logging.getLogger("hypergrad")

# Updates that the device has before it while the host looks at an older one.
_AHEAD = 4
# Updates without a finite loss, in a row, after which there is no hope: a start that diverges is
# tried over a quarter of its steps, a sixteenth, ..., which 16 refusals bring down to a single one.
_HOPELESS = 20
_EITHER = (
    "Either training diverges there: start from a lower learning rate; or the data or a loss give "
    "NaN: hypergrad.check_hypergradient names the step, the leaf and the likely cause."
)


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: the tuner's state after the last update: to evaluate (`state.inner.params`), to go on.
      hyper: `tuner.best(state)`, the values to keep.
      history: one `history.Record` per update of the run, on the host; under resume, of
        the updates before it too.
      schedule: the values of each update for its K training steps, to replay or as optax schedules;
        for the run of an `alternating` tuner. `settled_schedule` leaves its way from the start out.
      remarks: what is odd about the run, a sentence each: refusals, hyperparameters that ended on a
        bound or moved one way throughout.
    """

    state: Any
    hyper: Any
    history: History
    schedule: Schedule
    remarks: tuple[str, ...] = ()


def fit(
    tuner: Tuner,
    state: State,
    train: Train,
    valid: Batch,
    num_updates: int | None = None,
    *,
    num_steps: int | None = None,
    steps_per_update: int | None = None,
    callbacks: Sequence[Callable[[Record], Any]] = (),
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    progress: bool = True,
    sharding: Sharding | None = None,
) -> FitResult:
    """Runs `num_updates` of a tuner, or `num_steps`, and can be killed and started again.

    The result is that of the plain loop over `jax.jit(tuner.update)`. The device is kept busy: data
    are stacked and moved by a thread, and the host looks at an update when four more are under way.
    The state is donated from update to update, in buffers of the run's own: `state` stays whole.

    Args:
      tuner: `hypergrad.alternating` or `restarting`; compiled once per tuner, also over several
        calls. A `tuner.update` that is jitted already (with compiler options) is used as it is.
      state: where to start: `tuner.init(hyper, key)`, or the state of an earlier result.
      train: a `Minibatches` or arrays with a leading axis K, used by every update; or an iterable
        of single batches, pytrees of what NumPy can read (a generator, a PyTorch `DataLoader`,
        grain, tf.data), of which `steps_per_update` are stacked. It is started anew when it ends;
        a one-shot iterator that ends also ends the run, with a warning. The last batch of an epoch,
        if shorter, is left out.
      valid: a `Minibatches` or one batch, used by every update; or an iterable, one batch each,
        started anew when it ends. A list is always one of batches: give a tuple or a dict instead
        where you mean one batch.
      num_updates: updates from `state` on, those done before a resume included.
      num_steps: instead, the training steps of the run; a last update that is cut off is left out.
      steps_per_update: K, for an iterable `train`; None for what the length of the run says, where
        `num_steps` gives it (`hypergrad.tuners.alternating.horizon`).
      callbacks: functions of one `Record`, or objects, see `hypergrad.callbacks`; one may end the
        run (`hypergrad.callbacks.EarlyStopping`).
      checkpoint: a folder, or a `hypergrad.Checkpoint`: every 100 updates, at the end, and on
        SIGTERM the whole state, the history and the position in the data are saved, and the same
        command goes on from there, to the same bits. At the end `hyper.toml` there holds the values
        to keep, for people and for `tomllib`.
      progress: on a terminal and in a notebook (with ipywidgets) a bar, elsewhere a line a minute
        (`hypergrad.training.progress`).
      sharding: where batches of an iterable go, a `jax.sharding.Sharding` of their leaves
        `[batch, ...]` (the axis K is not split); arrays and `Minibatches` stay where they are.

    Resume: make `state` as before (same key and starting values). `Minibatches` and arrays need
    nothing else. An iterable must give the same batches again when it is started anew in a new
    process (seed its shuffling); its batches are then read and dropped up to the position. One with
    `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`), or whose iterator has
    `get_state` and `set_state` (grain), is set to its own state instead: unpickled, so do not
    resume from a folder that others can write to. (A `StatefulDataLoader` forgets its `generator`
    at the end of an epoch: use `torch.manual_seed`.)

    A checkpoint of another problem, space or start is refused; one that is torn is dropped for the
    one before. SIGTERM saves, then ends the process as its earlier handler does, else with exit
    status 143; within five seconds where data or a callback hang, and at once when it comes again.
    Ctrl-C saves and is then raised, saying where. Both only where `fit` runs in the main thread.
    One process at a time writes to a folder; guard it as you would a program, as the state of a
    loader is unpickled from it. Processes that train one state (`jax.distributed`) all make this
    call and share one folder, which all must see: each writes what it holds, and a SIGTERM to one
    ends all after the same update.

    A run that ends with more than a third of its last updates refused, with a hyperparameter on a
    bound or one that moved one way throughout says so: the logger "hypergrad" gets a warning, the
    result has it in `remarks`.

    Cost over the loop: see docs/benchmarks.md (`python -m benchmarks.fit`).

    Raises:
      ValueError: an argument that cannot be, a refused checkpoint, batches of unequal shape, data
        that end before the first update.
      FloatingPointError: parameters or hyperparameters that are not finite at the end, or a loss
        that was not in any of the last 20 updates. Refused updates alone are no error.

    >>> import jax, jax.numpy as jnp, numpy as np, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> tuner = hg.alternating(problem, hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")}))
    >>> state = tuner.init({"lr": 1e-3}, jax.random.key(0))
    >>> batches = [np.full(4, 1.0 + i) for i in range(3)]
    >>> result = hg.fit(tuner, state, batches, batches, 8, steps_per_update=5)
    >>> len(result.history), bool(result.history[-1].hyper["lr"] > 1e-3)
    (8, True)
    """
    check_types_of_run(tuner, state, train)
    if sharding is not None:
        instance("sharding", sharding, Sharding, "a jax.sharding.NamedSharding, or None")
    refuse_missing_axis(train, valid)
    refuse_split_batch(train=train, valid=valid)
    steps, num_updates = lengths(train, num_updates, num_steps, steps_per_update)
    check(callbacks)
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(folder_name("checkpoint", checkpoint))
    state = jax.tree.map(strongly_typed, state)
    first = int(getattr(state, "updates", 0))
    asked = range(first, first + num_updates)
    about: dict[str, Any] = {}
    resumed = Resumed(state, first, History(tuner.best(state)), {}, None)
    if checkpoint is not None:
        about = describe(tuner, state, steps) | {"data": fixed(train=train, valid=valid)}
        resumed = restore(checkpoint, resumed, about, asked.stop)
    # A run that is complete gets the data of one update too: to see that it is of this program.
    complete = resumed.done == asked.stop
    positions = {} if complete else resumed.positions
    batches = feed(
        open_source("train", train, steps, positions.get("train"), sharding),
        open_source("valid", valid, None, positions.get("valid"), sharding),
        resumed.done - complete,
        asked.stop,
        1 if checkpoint is None else checkpoint.every,
    )
    run = _Run(tuner, resumed, asked, steps, about, Doubts(train, valid, steps))
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(batches))
        # Without a checkpoint there is nothing to save: signals then do what they always do.
        if checkpoint is not None:
            run.saver = stack.enter_context(Saver(checkpoint, is_together(state)))
            run.every = checkpoint.every
            stack.enter_context(run.signals)
        ahead = run.prepare(batches)
        for callback in callbacks:
            # Before `open`, so that one which fails half-way is closed, too.
            stack.callback(getattr(callback, "close", lambda: None))
            with run.until_stopped():
                getattr(callback, "open", lambda history, update: None)(run.history, resumed.done)
        run.callbacks = callbacks
        run.progress = stack.enter_context(
            FitProgress(resumed.done, asked.stop, steps, enabled=progress)
        )
        run.through(ahead)
    # Only here: at the end of the stack the last save was waited for.
    run.end_if_wanted()
    return run.result()


class _Pending(NamedTuple):
    """An update that the device may still be working on; `state` where it is to be saved."""

    update: int
    info: Any
    train_loss: Any
    state: Any
    positions: dict[str, Any]


class _Run:
    """One call of `fit`: where it stands, and what happens to each update in turn."""

    saver: Saver | None = None
    every = 1
    callbacks: Sequence[Callable[[Record], Any]] = ()
    stopped = False
    progress: FitProgress

    def __init__(
        self,
        tuner: Tuner,
        resumed: Resumed,
        asked: range,
        steps: int,
        about: dict[str, Any],
        doubts: Doubts,
    ) -> None:
        self.tuner, self.asked = tuner, asked
        self.steps, self.about = steps, about
        self.state, self.done, self.history = owned(resumed.state), resumed.done, resumed.history
        self.positions, self.saved_program = resumed.positions, resumed.program
        self.saved = resumed.done
        self.bad_in_a_row = 0
        self.update = compiled_update(tuner.update)
        self.signals, self.doubts = signals_of(is_together(resumed.state)), doubts

    def prepare(self, batches: Iterator[Fed]) -> Iterator[Fed]:
        """What is left of `batches`, once the program is seen to be the checkpoint's."""
        try:
            with self.signals.within():
                fed = next(batches)
        except RanOut as reason:
            self._ran_out(reason)
            return iter(())
        except Stopped:
            self._broken_off()
            return iter(())
        if self.saver is not None:
            program = program_of(self.update.trace(self.state, fed.train, fed.valid))
            differs = self.saved_program and program_difference(self.saved_program, program)
            if differs:
                raise refusal(self.saver.folder, self.done, differs)
            if self.saved_program and self.saved_program["jax"] != program["jax"]:
                _log.warning(
                    f"checkpoint: written under JAX {self.saved_program['jax']}, going on under "
                    f"{program['jax']}: bits may differ."
                )
            self.about["program"] = program
        return iter(()) if self.done == self.asked.stop else itertools.chain([fed], batches)

    def through(self, batches: Iterator[Fed]) -> None:
        """All updates, as long as there are data and nobody wants an end."""
        pending: deque[_Pending] = deque()
        try:
            for fed in () if self.stopped else self._waited_for(batches):
                self.state, info = self.update(self.state, fed.train, fed.valid)
                # Before the next update takes the state's buffers.
                loss = owned(getattr(getattr(self.state, "inner", None), "loss", None))
                self.done, self.positions = self.done + 1, fed.positions
                due = self.saver is not None and self.done % self.every == 0
                kept = owned(self.state) if due else None
                pending.append(_Pending(self.done - 1, info, loss, kept, fed.positions))
                if len(pending) > _AHEAD:
                    self._settle(pending.popleft())
                if self.stopped or (self.saver and self.signals.wanted_after(self.done)):
                    break
        except RanOut as reason:
            self._ran_out(reason)
        except Stopped:
            self._broken_off()
        while pending:
            try:
                self._settle(pending.popleft())
            except Stopped:
                self._broken_off()
        if self.saver is not None and self.saved != self.done:
            self._save(self.done, self.state, self.positions)

    @contextlib.contextmanager
    def until_stopped(self) -> Iterator[None]:
        """A callback within may end the run; the others see it to its end."""
        try:
            yield
        except Stop as reason:
            if not self.stopped:
                _log.info(f"the run ends after {self.done} updates: {reason}")
            self.stopped = True

    def _broken_off(self) -> None:
        self.signals.freed()
        self.callbacks = ()  # one of them may be what hung

    def _waited_for(self, batches: Iterator[Fed]) -> Iterator[Fed]:
        while True:
            with self.signals.within():
                fed = next(batches, None)
            if fed is None:
                return
            yield fed

    def end_if_wanted(self) -> None:
        """End as a signal asked for."""
        if self.signals.wanted is not None and self.saver is not None:
            message = (
                f"checkpoint: stopped by {self.signals.wanted.name}; {self.saved} updates are "
                f"saved in {self.saver.folder}, and the same command goes on from there."
            )
            _log.warning(message)
            self.signals.end(message)

    def result(self) -> FitResult:
        """What `fit` returns. Raises FloatingPointError."""
        # Compiled it is silent about refusals, of which more is known here.
        hyper = jax.jit(self.tuner.best)(self.state)
        params = getattr(getattr(self.state, "inner", None), "params", None)
        # One program for all leaves, not a few for each.
        if not jax.jit(all_finite)((params, hyper)):
            raise self._not_finite("the final parameters or hyperparameters are not finite")
        # A run that was too short to be hopeless.
        if 0 < len(self.history) == self.bad_in_a_row:
            raise self._not_finite("no update had a finite loss and hypergradient")
        self.doubts.say()
        if self.saver is not None:
            self.saver.write_values(self.done, self.history, hyper)
        schedule = Schedule(jax.tree.map(jnp.asarray, self.history.hypers), self.steps)
        remarks = remarks_of(self.tuner, self.state, self.history)
        return FitResult(self.state, hyper, self.history, schedule, remarks)

    def _settle(self, pending: _Pending) -> None:
        record = observe(pending.update, pending.info, pending.train_loss)
        self.history.append(record)
        self.doubts.see(record, pending.train_loss is not None, pending.positions)
        finite = np.isfinite(record.loss) if record.finite is None else record.finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        for callback in self.callbacks:
            with self.until_stopped(), self.signals.within():
                callback(record)
        self.progress.show(record)
        # After the callbacks, which are to show this update, and before a save of what is lost.
        if self.bad_in_a_row == _HOPELESS:
            raise self._not_finite(f"{_HOPELESS} updates in a row had no finite loss")
        if pending.state is not None:
            self._save(pending.update + 1, pending.state, pending.positions)

    def _save(self, done: int, state: State, positions: dict[str, Any]) -> None:
        assert self.saver is not None
        about = self.about | {"positions": positions}
        self.saver.submit(done, state, self.history.columns, about)
        self.saved = done

    def _ran_out(self, reason: RanOut) -> None:
        if self.done == self.asked.start:
            raise ValueError(
                f"{reason}: an update takes steps_per_update={self.steps} batches of train and one "
                "of valid."
            ) from reason
        made = self.done - self.asked.start
        _log.warning(f"{reason}. The run ends after {made} of {len(self.asked)} updates.")

    def _not_finite(self, what: str) -> FloatingPointError:
        last = self.history[-1]
        show = partial(np.array2string, precision=4, threshold=8, edgeitems=2)
        hyper = jax.tree.map(show, last.hyper)
        step = last.first_bad_step
        where = "" if step in (None, -1) else f" (its training step {step} was the first bad one)"
        why = f": {REASONS[last.refused]}" if last.refused else ""
        return FloatingPointError(
            f"After update {last.update}{where} {what}{why}. It trained under {hyper}. "
            + (self.doubts.cause() or _EITHER)
        )
