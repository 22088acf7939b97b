"""Traced numbers of a run that nothing moves: one program serves all their values."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax

from hypergrad.population.refine import PlainRuns, RefinedRuns
from hypergrad.problem.problem import Problem
from hypergrad.space.space import Space
from hypergrad.trees import Batch, Hyper, InnerState, Key, State, Train, Unit
from hypergrad.tuners.base import Tuner

# What several objectives are weighted by, `[objectives]`: seen by what is followed alone.
WEIGHTS = "hypergrad:weights"


class Held(NamedTuple):
    """A run, as `TunerState` or `Plain`, and the `values` that it holds by name."""

    run: State
    values: Hyper

    @property
    def inner(self) -> InnerState:
        """The training state."""
        return self.run.inner

    @property
    def key(self) -> Key:
        """The run's key."""
        return self.run.key

    def keyed(self, key: Key) -> Self:
        """The run under another key."""
        return self._replace(run=self.run._replace(key=key))


def user_values(values: Hyper) -> Hyper:
    """What of the held values the problem finds in `hyper`."""
    return {name: value for name, value in values.items() if name != WEIGHTS}


def given(problem: Problem, values: Hyper) -> Problem:
    """The problem whose functions find `values` in `hyper`, beside what is tuned."""

    def after(first: str) -> Callable[..., State]:
        function = getattr(problem, first)
        return lambda x, hyper, *rest: function(x, {**hyper, **values}, *rest)

    names = ["step", "train_loss", "valid_loss"]
    names += [] if problem.metrics is None else ["metrics"]
    return problem._replace(
        init=lambda hyper, key: problem.init({**hyper, **values}, key),
        **{name: after(name) for name in names},
    )


@dataclasses.dataclass(frozen=True)
class HeldRuns:
    """Runs of `make(values)`, which a start holds by `names` beside what `space` tunes.

    See `RefinedRuns` for the methods.
    """

    make: Callable[[Hyper], RefinedRuns | PlainRuns]
    names: tuple[str, ...]
    space: Space

    @property
    def tuner(self) -> Tuner:
        """A tuner whose `init` takes what is tuned and what is held in one dict."""
        return Tuner(self._init, self._update, self._best, self.space)

    def unit(self, run: Held) -> Unit:
        """Where a run's hyperparameters stand, in unit coordinates."""
        return self._of(run.values).unit(run.run)

    def hyper(self, run: Held) -> Hyper:
        """The same in the user's units, with what the problem finds beside them."""
        return {**self._of(run.values).hyper(run.run), **user_values(run.values)}

    def moved(self, run: Held, unit: Unit) -> Held:
        """The run with its hyperparameters at `unit`."""
        return run._replace(run=self._of(run.values).moved(run.run, unit))

    def _of(self, values: Hyper) -> RefinedRuns | PlainRuns:
        return self.make(values)

    def _init(self, hyper: Hyper, key: Key) -> Held:
        values = {name: hyper[name] for name in self.names}
        tuned = {name: value for name, value in hyper.items() if name not in values}
        return Held(self._of(values).tuner.init(tuned, key), values)

    def _update(self, run: Held, train: Train, valid: Batch) -> tuple[Held, NamedTuple]:
        moved, info = self._of(run.values).tuner.update(run.run, train, valid)
        return run._replace(run=moved), info

    def _best(self, run: Held) -> jax.Array:
        return self._of(run.values).tuner.best(run.run)


Runs = RefinedRuns | PlainRuns | HeldRuns
