"""The trials of a study from the best on, in the user's units, as values and as a table.

Everything is read from the study, so that it works in a process that never ran the sweep.
"""

from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState

from hypergrad.search.distributions import Coordinates
from hypergrad.search.fingerprint import stored_space
from hypergrad.search.ledger import ERROR, counted


class Best(NamedTuple):
    """One trial that trained in full.

    Attributes:
      hyper: all active hyperparameters, discrete ones too, in the user's units.
      score: the validation score it was selected by: flattering, as selected scores are.
      held_out: its own run's loss on the test split; NaN without one.
      number: the trial's number in the study.
    """

    hyper: dict[str, Any]
    score: float
    held_out: float
    number: int


def ranked(study: optuna.Study) -> list[Best]:
    """The trials that trained in full, the best first."""
    complete = [
        (t.value, t)
        for t in counted(study.get_trials(deepcopy=False))
        if t.state == TrialState.COMPLETE and t.value is not None
    ]
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    complete.sort(key=lambda pair: sign * pair[0])
    values = Coordinates(stored_space(study)).from_study
    return [
        Best(values(t.params), value, float(t.user_attrs.get("held_out", "nan")), t.number)
        for value, t in complete
    ]


def best_of(study: optuna.Study) -> Best:
    """The best of `ranked`.

    Raises:
      ValueError: no trial trained in full.
    """
    found = ranked(study)
    if not found:
        raise ValueError(
            "No trial has trained in full: see the trials' user attribute 'error' "
            "(result.study.trials)."
        )
    return found[0]


def states(study: optuna.Study) -> str:
    """How many trials there are of each state."""
    names = [t.state.name.lower() for t in counted(study.get_trials(deepcopy=False))]
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return f"{len(names)} trials: {counts}" if names else "no trials"


def table(study: optuna.Study, count: int = 10) -> str:
    """The best trials as text, one line each, and how many there are of each state."""
    lines = [states(study)]
    for best in ranked(study)[:count]:
        values = "  ".join(f"{name}={short(value)}" for name, value in best.hyper.items())
        lines.append(
            f"#{best.number:<5} score {best.score:<9.4g}  test {best.held_out:<9.4g}  {values}"
        )
    if len(lines) == 1 and (errors := _errors(study)):
        lines.append(f"the last error: {errors[-1]}")
    return "\n".join(lines)


def _errors(study: optuna.Study) -> list[str]:
    """The last line of each failed trial's traceback."""
    texts = [t.user_attrs.get(ERROR) for t in counted(study.get_trials(deepcopy=False))]
    return [text.strip().splitlines()[-1] for text in texts if text]


def short(value: Any) -> str:
    """A value in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
