"""What a study is told of its trials: scores at rungs, ends, constraints, reasons."""

import contextlib
import logging
from collections.abc import Mapping

from optuna.exceptions import UpdateFinishedTrialError

from hypergrad.checks import printable
from hypergrad.results.standings import EVALUATIONS, Failure, Standings
from hypergrad.study.study import OpenStudy, Proposal

_log = logging.getLogger("hypergrad")


def tell(opened: OpenStudy, news: Standings | Failure) -> None:
    """Tells the study what became of its trials, and the log in a line."""
    if isinstance(news, Failure):
        for proposal in news.proposals:
            opened.fail(proposal, news.error)
        numbers = ", ".join(f"#{proposal.number}" for proposal in news.proposals)
        _log.warning(f"{numbers} failed: {printable(news.reason)}")
        return
    for standing in news.trials:
        proposal, score, attrs, fate = standing[0], standing.score, standing.attrs, standing.fate
        cost = {EVALUATIONS: attrs[EVALUATIONS]}
        if fate == "diverged":
            error = f"ValueError: the score is {score} after {news.steps} steps"
            opened.fail(proposal, f"{error}{news.why_not_finite}.", cost)
            _log.warning(f"#{proposal.number} failed: {error}{news.why_not_finite}.")
            continue
        if "doubt" in attrs:
            _log.warning(f"#{proposal.number}: {attrs['doubt']}{news.why_not_finite}.")
        if fate == "finished" and attrs.get("undone"):
            error = f"ValueError: training was undone: {attrs['doubt']}{news.why_not_finite}."
            opened.fail(proposal, error, cost)
            continue
        if len(standing.scores) == 1:  # Optuna takes no reports of several objectives
            opened.report(proposal, score, news.steps)
        values = None if proposal.recorded else standing.refined
        if fate in ("finished", "stopped"):
            _constrain(proposal, standing.excess)
        if fate == "finished":
            opened.finish(proposal, standing.scores, values, attrs)
        elif fate == "stopped":
            opened.prune(proposal, score, news.steps, values, attrs)
    best = "none finite" if news.best is None else f"best {news.best:.4g}"
    going = sum(standing.fate == "goes on" for standing in news.trials)
    _log.info(f"{len(news.trials)} trials at {news.steps} steps: {best}, {going} go on")


def _constrain(proposal: Proposal, excess: Mapping[str, float]) -> None:
    """Optuna's own constraints, which are written while a trial is still running."""
    with contextlib.suppress(UpdateFinishedTrialError):
        for name, value in excess.items():
            proposal.trial.set_constraint(name, value)
