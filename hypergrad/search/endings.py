"""How a sweep ends before its last trial: by Ctrl-C, or as nothing works."""

import logging
from collections import Counter
from typing import Any, Self

from hypergrad.results.programs import ProblemError
from hypergrad.results.standings import Failure, Standings
from hypergrad.space.space import Space

_log = logging.getLogger("hypergrad")

# Trials that fail alike before any training, after which no other is tried.
_ALIKE = 3


class UntilInterrupted:
    """Ctrl-C ends what stands in it, and no more: what has finished is a result."""

    once = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.once = kind is not None and issubclass(kind, KeyboardInterrupt)
        if self.once:
            _log.warning(
                "interrupted: the result holds what has finished; running trials are queued again, "
                "and the same call goes on with them where it has a storage."
            )
        return self.once


class AllAlike:
    """Ends a sweep in which nothing has trained, as the same error meets one trial after another.

    Raises:
      ProblemError: three have failed alike before any training, under more than one choice where
        there are several, and none has trained.
    """

    def __init__(self, space: Space) -> None:
        self._reasons: Counter[str] | None = Counter()
        self._choices: set[frozenset[Any]] = set()
        self._fewest = 2 if space.discrete else 1

    def see(self, news: Standings | Failure) -> None:
        """Take what became of some trials."""
        if isinstance(news, Standings):
            # What meets all has not met these.
            self._reasons = None if news.trials else self._reasons
        elif self._reasons is not None and news.before_training:
            self._reasons[news.reason] += len(news.proposals)
            self._choices |= {frozenset(p.choices.items()) for p in news.proposals}
            alike = self._reasons[news.reason] >= _ALIKE
            if alike and len(self._choices) >= self._fewest:
                raise ProblemError(
                    f"make_problem: {self._reasons[news.reason]} trials have failed alike before "
                    f"any training, and none has trained: {news.reason}"
                )
