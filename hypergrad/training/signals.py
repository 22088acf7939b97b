"""SIGTERM and Ctrl-C while a run goes on: it ends soon and saved, whatever hangs."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

_log = logging.getLogger("hypergrad")

# Seconds after SIGTERM: what the run waits for is broken off; the process ends in any case where
# even that did not help.
_BREAK_OFF, _LAST = 2.0, 4.5


class Stopped(BaseException):
    """Somebody wants the run's end while it waits for data or a callback.

    No Exception, as an `except Exception` of theirs is not to keep it.
    """


class Signals:
    """A context of a run with checkpoints. In another thread than the main one it does nothing.

    The first SIGTERM or Ctrl-C sets `wanted`, to which the loop looks between updates. What it
    waits for `within` is broken off by `Stopped`: at once after Ctrl-C, after two seconds after
    SIGTERM. A second SIGTERM ends the process at once, a second Ctrl-C is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.wanted: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._waits = self._broke_off = self._hung = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._take(signal.SIGTERM, self._terminate)
            # A handler of the user's own is left alone.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._take(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for number in list(self._before):
            self._give_back(number)

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """What belongs to others, and may be broken off: nothing of ours stands half-way in it."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def wanted_after(self, update: int) -> signal.Signals | None:
        """What asks the run to end now that `update` is under way."""
        return self.wanted

    def freed(self) -> None:
        """Say that what hung was broken off: what is left, a save, has the time that it takes."""
        self._ended.set()

    def end(self, message: str) -> None:
        """End as the signal asks for, now that all is saved."""
        if self.wanted == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if self.wanted == signal.SIGTERM:
            # A handler of the user's own has its turn; the usual one would end us without cleaning
            # up.
            if callable(signal.getsignal(signal.SIGTERM)):
                signal.raise_signal(signal.SIGTERM)
            raise SystemExit(128 + signal.SIGTERM)

    def _take(self, number: signal.Signals, handler: Callable[..., None]) -> None:
        self._before[number] = signal.signal(number, handler)

    def _give_back(self, number: signal.Signals) -> None:
        before = self._before.pop(number)
        # None is a handler that was not set from Python, which Python cannot set again.
        if before is not None:
            signal.signal(number, before)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._broke_off:
            self._break_off()
        elif self.wanted == signal.SIGTERM:
            # A handler of the user's own gets it once, when all is saved.
            if self._before[signal.SIGTERM] == signal.SIG_DFL:
                self._give_back(signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.wanted = signal.SIGTERM
            threading.Thread(target=self._watch, name="hypergrad-sigterm", daemon=True).start()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.wanted is not None:
            raise KeyboardInterrupt
        self.wanted = signal.SIGINT
        self._break_off()

    def _break_off(self) -> None:
        self._broke_off = False
        if self._waits:
            # Once: what cleans up behind it may wait, too.
            self._waits = False
            raise Stopped

    def _watch(self) -> None:
        last, pause = time.monotonic() + _LAST, _BREAK_OFF
        while not self._ended.wait(pause):
            if time.monotonic() > last:
                # It computes, and looks at us soon; or all else was of no help.
                return os._exit(128 + signal.SIGTERM) if self._hung else None
            if self._waits and not self._hung:
                self._hung = self._broke_off = True
                # Handlers run in the main thread, where they interrupt what it waits for.
                os.kill(os.getpid(), signal.SIGTERM)
            pause = 0.1


class _SignalsOfAll(Signals):
    """Of processes that train as one, which must end after the same update.

    JAX's own handler takes SIGTERM, of any of them, and its coordinator names the update.
    """

    _service = True

    def __enter__(self) -> Self:
        return self

    def wanted_after(self, update: int) -> signal.Signals | None:
        """The same in all processes."""
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        try:
            if self._service and reached_preemption_sync_point(update):
                self.wanted = signal.SIGTERM
        except RuntimeError as error:  # jax_enable_preemption_service is off
            self._service = False
            _log.warning(f"checkpoint: SIGTERM saves nothing here ({error}).")
        return self.wanted


def signals_of(together: bool) -> Signals:
    """Those of this process, or of all that train together."""
    return _SignalsOfAll() if together else Signals()
