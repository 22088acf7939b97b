"""Data on the device before it is needed: a thread reads, stacks and moves it."""

import contextlib
import logging
import queue
import threading
from collections.abc import Generator
from typing import NamedTuple

import jax

from hypergrad.data.streams import Constant, Stream, StreamPosition
from hypergrad.trees import Batch, Train

# Groups of batches that wait on the device, besides the one in use.
_READY = 2
# After how many seconds without data it is said who is waited for.
_TELL_AFTER = 30.0

_log = logging.getLogger("hypergrad")


class Fed(NamedTuple):
    """What one update gets, and where the streams stand behind it.

    Attributes:
      train: K stacked batches, or the data that `Constant` holds.
      valid: one batch, or the data that `Constant` holds.
      positions: by name, of the streams among the two; {} where there is none.
    """

    train: Train
    valid: Batch
    positions: dict[str, StreamPosition]


def feed(
    train: Constant | Stream, valid: Constant | Stream, first: int, stop: int, every: int
) -> Generator[Fed, None, None]:
    """What the updates `first`, ..., `stop - 1` get; no batch beyond is read.

    Streams save their state behind every update whose number after it is a multiple of `every`.
    They are read ahead in a thread, which ends when the iterator is closed or collected. What goes
    wrong there is raised here; `RanOut` where a stream has no more.
    """
    if isinstance(train, Constant) and isinstance(valid, Constant):
        for _ in range(first, stop):
            yield Fed(train.take(), valid.take(), {})
        return
    ready: queue.Queue[Fed | BaseException] = queue.Queue(_READY)
    stopped = threading.Event()
    # Both settings belong to a thread.
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    device = jax.config.jax_default_device  # type: ignore[attr-defined]

    def offer(item: Fed | BaseException) -> None:
        # In short waits: nobody makes room once the iterator is closed.
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            with jax.enable_x64(wide), jax.default_device(device):
                for update in range(first, stop):
                    if stopped.is_set():
                        return
                    offer(_read(train, valid, (update + 1) % every == 0))
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=read, name="hypergrad-feed", daemon=True)
    thread.start()
    try:
        for _ in range(first, stop):
            item = _awaited(ready, train, valid)
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        # A source that blocks for good must not block the end of the run.
        thread.join(timeout=1)


def _awaited(
    ready: queue.Queue[Fed | BaseException], train: Constant | Stream, valid: Constant | Stream
) -> Fed | BaseException:
    """What comes next; says who keeps it waiting."""
    waited = 0.0
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=_TELL_AFTER)
        waited += _TELL_AFTER
        names = " or ".join(s.awaited for s in (train, valid) if isinstance(s, Stream))
        _log.warning(f"{names} has been waited for {waited:.0f} s: does its loader hang?")


def _read(train: Constant | Stream, valid: Constant | Stream, save: bool) -> Fed:
    streams = {n: s for n, s in (("train", train), ("valid", valid)) if isinstance(s, Stream)}
    # Validation first: a group for training that nobody validates would be read for nothing.
    valid_batch = valid.take()
    train_batches = train.take()
    for stream in streams.values():
        if save:
            stream.save()
    return Fed(train_batches, valid_batch, {name: s.position() for name, s in streams.items()})
