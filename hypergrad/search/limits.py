"""What a sweep may take: seconds, gradient evaluations, and as long as its callbacks go on."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hypergrad.checks import WrongTypeError, function, positive
from hypergrad.results.standings import EVALUATIONS, Failure, Standings
from hypergrad.study.optuna_private import stop_is_asked, stoppable
from hypergrad.training.callbacks import Stop

_log = logging.getLogger("hypergrad")

# What Optuna's own callbacks are called with.
SweepCallback = Callable[[optuna.Study, FrozenTrial], Any]


class Limits:
    """Ends a sweep by the clock, by what it has spent, or as a callback says.

    `why` says what has ended it; empty as long as nothing has. The clock starts here.

    Raises:
      ValueError: a timeout that is not positive, fewer than one evaluation.
      TypeError: callbacks that cannot be called with a study and a trial.
    """

    why = ""
    _level = logging.INFO

    def __init__(
        self,
        timeout: float | None,
        max_evaluations: float | None,
        callbacks: Sequence[SweepCallback],
    ) -> None:
        if timeout is not None:
            positive("timeout", timeout, "seconds, or None for no limit")
        if max_evaluations is not None:
            positive("max_evaluations", max_evaluations, "gradient evaluations, or None")
        self._timeout, self._most = timeout, max_evaluations
        self._begin = time.monotonic()
        self._callbacks = _checked(callbacks)
        # Of trials of ours that stand in the study with what they have cost.
        self._recorded = 0.0

    def allow(self, study: optuna.Study, own: float, more: float) -> bool:
        """Whether `more` evaluations may begin, after `own` ones of this process."""
        if not self.why and self._timeout is not None:
            over = time.monotonic() - self._begin >= self._timeout
            self.why = f"timeout={self._timeout} seconds are over" if over else ""
        if not self.why and self._most is not None:
            trials = study.get_trials(deepcopy=False)
            spent = sum(t.user_attrs.get(EVALUATIONS, 0.0) for t in trials) + own - self._recorded
            if spent + more > self._most:
                next_ones = f"and what is next takes {more:.0f}"
                self.why = f"{spent:.0f} of max_evaluations={self._most} are spent {next_ones}"
                # Whoever gave it expects a result, and there is none.
                self._level = logging.INFO if spent else logging.WARNING
        return not self.why

    @contextlib.contextmanager
    def opened(self, study: optuna.Study) -> Iterator[None]:
        """Callbacks may end the sweep within; what has ended it is logged."""
        with stoppable(study):
            for callback in self._callbacks:
                self._call(getattr(callback, "open", lambda study: None), study)
            yield
        if self.why:
            text = f"the sweep ends, as {self.why}; the same call goes on where it has room."
            _log.log(self._level, text)

    def see(self, study: optuna.Study, news: Standings | Failure) -> None:
        """Tell the callbacks of each trial that has ended."""
        if isinstance(news, Failure):
            ended = [proposal.number for proposal in news.proposals]
        else:
            done = [trial for trial in news.trials if trial.fate != "goes on"]
            self._recorded += sum(trial.attrs[EVALUATIONS] for trial in done)
            ended = [trial.proposal.number for trial in done]
        if self._callbacks and ended:
            trials = study.get_trials(deepcopy=False)
            for number in ended:
                for callback in self._callbacks:
                    self._call(callback, study, trials[number])

    def _call(self, callback: Callable[..., Any], study: optuna.Study, *trial: FrozenTrial) -> None:
        try:
            callback(study, *trial)
        except Stop as reason:
            self.why = self.why or str(reason) or "a callback has stopped it"
        if stop_is_asked(study):
            self.why = self.why or "a callback has stopped the study"


def _checked(callbacks: Any) -> list[SweepCallback]:
    if callable(callbacks) or isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise WrongTypeError(f"callbacks={callbacks!r} is no list: give [callback, ...].")
    for i, callback in enumerate(callbacks):
        if isinstance(callback, type):
            raise WrongTypeError(f"callbacks[{i}]={callback!r} is a class: give an object of it.")
        function(f"callbacks[{i}]", callback, "study", "trial")
    return list(callbacks)
