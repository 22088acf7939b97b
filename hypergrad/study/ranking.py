"""The trials of a study from the best on, in the user's units, as values and as a table.

Everything is read from the study, so that it works in a process that never ran the sweep.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from hypergrad.checks import integer, printable
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates
from hypergrad.study.remarks import AT_BOUND, BOUND_NOTE, at_bounds, audit_line, audits
from hypergrad.study.signature import recipe_of, stored_space
from hypergrad.study.slots import ERROR, REASON, counted

# The study's user attribute that keeps what was confirmed, and of how many trials in full; a
# trial's that says that its values moved.
_CONFIRMED, MOVED = "confirmed", "moved"
# Beside scores of trials that break constraints; of values that moved, and what that says.
BROKEN, MARK = "!", "*"
# A trial's user attribute: its score on the test split, where there is one.
HELD_OUT = "held_out"
FOOTNOTE = (
    f"{MARK} of values that moved while they trained; frozen they may score otherwise: "
    "result.confirm(), or hypergrad confirm"
)


class Best(NamedTuple):
    """One trial that trained in full.

    Attributes:
      hyper: all active hyperparameters, discrete ones too, in the user's units.
      score: the validation score it was selected by: flattering, as selected scores are.
      held_out: its own run's score on the test split, by the same metric; NaN without one.
      number: the trial's number in the study.
      moved: whether the score is of values that moved while they trained, of which `hyper` is
        where they ended.
      values: all objectives, of which the score is the first.
      excess: by how much it breaks constraints, in all; 0 where it keeps to them.
    """

    hyper: dict[str, Any]
    score: float
    held_out: float
    number: int
    moved: bool = False
    values: tuple[float, ...] = ()
    excess: float = 0.0


def ranked(study: optuna.Study) -> list[Best]:
    """The trials that trained in full, the best first.

    Those that keep to the constraints come first; of several objectives the front, by the first of
    them, then the others.
    """
    values = Coordinates(stored_space(study)).from_study
    complete = [
        Best(
            values(t.params),
            t.values[0],
            float(t.user_attrs.get(HELD_OUT, "nan")),
            t.number,
            bool(t.user_attrs.get(MOVED, False)),
            tuple(t.values),
            sum(max(x, 0.0) for x in t.constraints.values()),
        )
        for t in counted(study)
        if t.state == TrialState.COMPLETE and t.values
    ]
    several = len(study.directions) > 1
    front = {trial.number for trial in study.best_trials} if several else set()
    sign = sign_of(study)
    return sorted(complete, key=lambda b: (b.excess, b.number not in front, sign * b.score))


def front(study: optuna.Study) -> list[Best]:
    """The trials that no other one beats in every objective, by the first; constraints kept."""
    numbers = {trial.number for trial in study.best_trials}
    return [best for best in ranked(study) if best.number in numbers]


def objective_names(study: optuna.Study) -> list[str]:
    """What the objectives are called."""
    return [name for name, _ in recipe_of(study).get("objectives") or [("score", "")]]


def best_of(study: optuna.Study) -> Best:
    """The best of `ranked`.

    Raises:
      ValueError: no trial trained in full.
    """
    found = ranked(study)
    if not found:
        raise ValueError(
            "No trial has trained in full: give more room where timeout= or max_evaluations= ended "
            "the sweep; of trials that failed, the user attribute 'error' has the reason "
            "(result.study.trials)."
        )
    return found[0]


def keep_confirmed(study: optuna.Study, best: Best) -> None:
    """Write into the study what is best of the trials that have trained in full so far."""
    study.set_user_attr(_CONFIRMED, {"of": len(ranked(study)), "best": list(best)})


def confirmed(study: optuna.Study) -> tuple[Best, int] | None:
    """What was confirmed, and how many trials have trained in full since; None for nothing."""
    kept = study.user_attrs.get(_CONFIRMED)
    if not kept:
        return None
    best = Best(*kept["best"])
    # JSON knows no tuples.
    return best._replace(values=tuple(best.values)), len(ranked(study)) - kept["of"]


def states(study: optuna.Study) -> str:
    """How many trials there are of each state."""
    names = [t.state.name.lower() for t in counted(study)]
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return f"{len(names)} trials: {counts}" if names else "no trials"


def table(study: optuna.Study, count: int = 10) -> str:
    """The best trials as text, one line each, and how many there are of each state."""
    space = stored_space(study)
    best, count = ranked(study), integer("count", count, 0)
    lines = [f"{printable(study.study_name)}: {states(study)}"]
    if len(study.directions) > 1:
        ways = zip(objective_names(study), study.directions, strict=True)
        named = ", ".join(f"{printable(n)} ({d.name.lower()})" for n, d in ways)
        lines.append(f"scores are {named}; the first {len(study.best_trials)} are their front")
    tested = is_tested(study)
    lines += [_row(one, space, tested) for one in best[:count]]
    if any(one.excess for one in best[:count]):
        lines.append(f"{BROKEN} breaks the constraints, and ranks by how far")
    if any(one.moved for one in best[:count]):
        lines.append(FOOTNOTE)
    if any(at_bounds(space, one.hyper) for one in best[:count]):
        lines.append(BOUND_NOTE)
    reasons = [reason_of(trial) for trial in failed_trials(study)]
    if reasons and not best:
        lines.append(f"the last error: {reasons[-1]}")
    if kept := confirmed(study):
        found, since = kept
        stale = f", before {since} more had trained" if since else ""
        lines.append(f"confirmed, its values frozen{stale}:\n{_row(found, space, tested)}")
    lines += [f"audit: {audit_line(one)}  {in_line(one['hyper'], space)}" for one in audits(study)]
    return "\n".join(lines)


def is_tested(study: optuna.Study) -> bool:
    """Whether its data have a test split; a score of NaN on one is shown."""
    return any(HELD_OUT in trial.user_attrs for trial in counted(study))


def _row(best: Best, space: Space, tested: bool) -> str:
    scores = ", ".join(f"{value:.4g}" for value in (best.score, *best.values[1:]))
    score = f"{scores}{MARK if best.moved else ''}{BROKEN if best.excess else ''}"
    test = f"test {best.held_out:<9.4g}  " if tested else ""
    return f"#{best.number:<5} score {score:<9}  {test}{in_line(best.hyper, space)}"


def in_line(hyper: Mapping[str, Any], space: Space) -> str:
    """Values in a line, those at a bound marked."""
    edge = at_bounds(space, hyper)
    return "  ".join(
        f"{printable(name)}={short(value)}{AT_BOUND if name in edge else ''}"
        for name, value in hyper.items()
    )


def reason_of(trial: FrozenTrial) -> str:
    """Why a trial failed, in a line."""
    error = str(trial.user_attrs.get(ERROR, "")).strip().splitlines()
    # A study of an earlier version has no reasons.
    reason = trial.user_attrs.get(REASON) or (error[-1] if error else "no traceback was recorded")
    return printable(str(reason))


def failed_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those that failed for good; a lost one counts by its successor."""
    return [t for t in counted(study) if t.state == TrialState.FAIL]


def short(value: Any) -> str:
    """A value in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))


class Scored(NamedTuple):
    """A trial with a finite score; `complete` where it trained in full."""

    trial: FrozenTrial
    score: float
    complete: bool


def scored_trials(study: optuna.Study) -> list[Scored]:
    """Trials with a finite score; a stopped one's is its last.

    Raises:
      ValueError: there is none.
    """
    # Optuna makes the last report of a pruned trial its value; a trial of any other end has none.
    scored = [
        Scored(trial, trial.values[0], trial.state == TrialState.COMPLETE)
        for trial in counted(study)
        if trial.values and math.isfinite(trial.values[0])
    ]
    if not scored:
        raise ValueError(
            f"The study {study.study_name!r} has no trial with a score: run the sweep first, or "
            "see the trials' user attribute 'error'."
        )
    return scored


def refined_trials(scored: Sequence[Scored]) -> list[Scored]:
    """Those that hypergradients moved: their attributes hold a start and a trajectory of Floats."""
    # A black-box trial's trajectory stands still, and its start is its recorded parameters.
    return [
        s
        for s in scored
        if "start" in s.trial.user_attrs and len(s.trial.user_attrs.get("trajectory", {})) > 1
    ]


def sign_of(study: optuna.Study) -> int:
    """1 where a small score, the first objective, is good, -1 where a large one is."""
    return -1 if study.directions[0].name == "MAXIMIZE" else 1
