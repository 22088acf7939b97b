"""A cohort: the trials of one bracket, trained in groups of one program and halved at its rungs."""

import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.search.program import ProblemError, Program, Programs
from hypergrad.search.rungs import Rung
from hypergrad.search.study import OpenStudy, Proposal
from hypergrad.tuners.member import PopulationState, Report
from hypergrad.tuners.population import width_for

Told = Literal["start", "last", "best", "mean"]
# Where a report holds what is told.
TOLD_FIELDS = {"start": "start", "last": "hyper", "best": "best", "mean": "mean"}


class Group(NamedTuple):
    """Trials of one program that train together; proposals stand in the order of their slots."""

    program: Program
    state: PopulationState
    proposals: tuple[Proposal, ...]


class Standing(NamedTuple):
    """Where one trial stands at a rung.

    Attributes:
      proposal: the trial.
      score: in the study's units; NaN where training diverged.
      refined: the values that the study is told.
      attrs: what is kept beside them.
    """

    proposal: Proposal
    score: float
    refined: dict[str, float]
    attrs: dict[str, Any]


class Cohort:
    """Runs brackets: trains, ranks, stops the losers, tells the study.

    Args:
      opened: the study.
      programs: what is trained.
      score: `(report) -> [slots]`, in the study's units.
      told: which of a trial's values the study learns.
      seed: of the members' training.
      log: called with one line per rung.
    """

    def __init__(
        self,
        opened: OpenStudy,
        programs: Programs,
        score: Callable[[Report], jax.Array],
        told: Told,
        seed: int,
        log: Callable[[str], None],
    ) -> None:
        self._opened, self._programs, self._score = opened, programs, score
        self._told, self._seed, self._log = told, seed, log
        self._maximize = opened.study.direction.name == "MAXIMIZE"

    def run(self, teams: Sequence[Sequence[Proposal]], rungs: Sequence[Rung], most: int) -> int:
        """Trains teams of equal choices through the rungs; returns the training steps spent."""
        groups = [
            g for team in teams for g in self._start(team, width_for(len(team), _widths(most)))
        ]
        spent, done = 0, 0
        for i, rung in enumerate(rungs):
            groups, standings = self._train(groups, rung.steps - done)
            spent += (rung.steps - done) * sum(len(g.proposals) for g in groups)
            done = rung.steps
            alive = sorted(
                (s for s in standings if np.isfinite(s.score)),
                key=lambda s: -s.score if self._maximize else s.score,
            )
            last = i == len(rungs) - 1
            going = () if last else alive[: rungs[i + 1].members]
            for standing in standings:
                self._tell(standing, last, done, standing in going)
            best = f"best {alive[0].score:.4g}" if alive else "none finite"
            self._log(f"{len(standings)} trials at {done} steps: {best}, {len(going)} go on")
            kept = {s.proposal.number for s in going}
            groups = [self._shrunk(g, kept, most) for g in groups]
            groups = [g for g in groups if g.proposals]
        return spent

    def _start(self, team: Sequence[Proposal], width: int) -> list[Group]:
        try:
            program = self._programs.of(team[0].choices)
            hypers = {
                name: jnp.asarray([p.start[name] for p in team], jnp.float32)
                for name in program.space.continuous
            }
            keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(self._seed), n))(
                jnp.asarray([p.number for p in team])
            )
            state = program.members.init(hypers, keys, width)
        except ProblemError:
            raise
        except Exception:
            self._fail(team)
            return []
        return [Group(program, state, tuple(team))]

    def _train(self, groups: list[Group], steps: int) -> tuple[list[Group], list[Standing]]:
        trained, standings = [], []
        for group in groups:
            try:
                updates = steps // group.program.members.steps_per_update
                state = group.program.members.advance(group.state, updates)
                standings += self._standings(group._replace(state=state))
                trained.append(group._replace(state=state))
            except ProblemError:
                raise
            except jax.errors.JaxRuntimeError:
                # Memory may suffice for one where it does not for all: each alone, from here.
                if len(group.proposals) == 1:
                    self._fail(group.proposals)
                    continue
                alone = [
                    group._replace(
                        state=group.program.members.select(group.state, [i]),
                        proposals=(proposal,),
                    )
                    for i, proposal in enumerate(group.proposals)
                ]
                more, found = self._train(alone, steps)
                trained += more
                standings += found
            except Exception:
                self._fail(group.proposals)
        return trained, standings

    def _standings(self, group: Group) -> list[Standing]:
        report = jax.device_get(group.program.members.report(group.state))
        scores = np.where(report.finite, self._score(report), np.nan)
        values = getattr(report, TOLD_FIELDS[self._told])
        result = []
        for i, proposal in enumerate(group.proposals):
            refined = {name: float(value[i]) for name, value in values.items()}
            used = report.trail_steps[i] > 0
            attrs: dict[str, Any] = {
                "steps": int(report.steps[i]),
                "refused": int(report.refused[i]),
                "trajectory": {
                    "steps": report.trail_steps[i][used].tolist(),
                    **{n: v[i][used].tolist() for n, v in report.trail.items()},
                },
            }
            if report.test_score is not None:
                attrs["held_out"] = float(report.test_score[i])
            attrs["metrics"] = {name: float(v[i]) for name, v in dict(report.metrics or {}).items()}
            result.append(Standing(proposal, float(scores[i]), refined, attrs))
        return result

    def _tell(self, standing: Standing, last: bool, steps: int, goes_on: bool) -> None:
        proposal, score = standing.proposal, standing.score
        if not np.isfinite(score):
            self._opened.fail(proposal, f"ValueError: the score is {score} after {steps} steps.")
            return
        self._opened.report(proposal, score, steps)
        refined = None if proposal.recorded else standing.refined
        if last:
            self._opened.finish(proposal, score, refined, standing.attrs)
        elif not goes_on:
            self._opened.prune(proposal, score, steps, refined, standing.attrs)

    def _shrunk(self, group: Group, kept: set[int], most: int) -> Group:
        slots = [i for i, p in enumerate(group.proposals) if p.number in kept]
        if not slots or len(slots) == len(group.proposals):
            return group._replace(proposals=tuple(group.proposals[i] for i in slots))
        width = width_for(len(slots), _widths(most))
        state = group.program.members.select(group.state, slots, width)
        return Group(group.program, state, tuple(group.proposals[i] for i in slots))

    def _fail(self, proposals: Sequence[Proposal]) -> None:
        for proposal in proposals:
            self._opened.fail(proposal, traceback.format_exc())


def _widths(most: int) -> list[int]:
    """The few widths that programs are compiled for: powers of four, and the largest."""
    widths = [1]
    while widths[-1] < most:
        widths.append(min(4 * widths[-1], most))
    return widths
