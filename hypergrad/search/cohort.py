"""A cohort: the trials of one bracket, trained in groups of one program and halved at its rungs."""

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optuna.trial import TrialState

from hypergrad.search.live import Moment, Show
from hypergrad.search.program import ProblemError, Program, Programs
from hypergrad.search.schedulers import PopulationBasedTraining, Rung
from hypergrad.study.ranking import sign_of
from hypergrad.study.study import OpenStudy, Proposal
from hypergrad.tuners.population.member import PopulationReport, PopulationState
from hypergrad.tuners.population.population import width_for

Told = Literal["start", "last", "best", "mean"]
# Where a report holds what is told.
TOLD_FIELDS = {"start": "start", "last": "hyper", "best": "best", "mean": "mean"}
# How often a rung says how far it is.
_PARTS = 10


class Group(NamedTuple):
    """Trials of one program that train together; proposals stand in the order of their slots.

    `copied` says, by a trial's number, after how many steps it went on from which other trial.
    """

    program: Program
    state: PopulationState
    proposals: tuple[Proposal, ...]
    copied: dict[int, list[tuple[int, int]]]


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
      exploit: population based training between the members of a group, or None.
      num_steps: of a full run.
      seed: of the members' training.
      show: is told where the sweep stands, if anybody looks.
      log: gets one line per rung, and a warning where trials fail.
    """

    def __init__(
        self,
        opened: OpenStudy,
        programs: Programs,
        score: Callable[[PopulationReport], jax.Array],
        told: Told,
        exploit: PopulationBasedTraining | None,
        num_steps: int,
        seed: int,
        show: Show | None,
        log: logging.Logger,
    ) -> None:
        self._opened, self._programs, self._score = opened, programs, score
        self._told, self._exploit, self._seed = told, exploit, seed
        self._num_steps, self._show = num_steps, show
        self._log, self._warn = log.info, log.warning
        self._maximize = sign_of(opened.study) < 0
        self._spent = 0
        self._running = 0
        # In full runs: what those that train here have behind them.
        self._partial = 0.0
        self._finished = 0
        self._best: float | None = None
        self._look_back()

    @property
    def spent(self) -> int:
        """Training steps so far."""
        return self._spent

    def run(self, teams: Sequence[Sequence[Proposal]], rungs: Sequence[Rung], most: int) -> None:
        """Trains teams of equal choices through the rungs."""
        groups = [
            g for team in teams for g in self._start(team, width_for(len(team), _widths(most)))
        ]
        done = 0
        for i, rung in enumerate(rungs):
            self._running = sum(len(g.proposals) for g in groups)
            groups, standings = self._train(groups, done, rung.steps)
            done = rung.steps
            alive = sorted((s for s in standings if np.isfinite(s.score)), key=self._rank)
            last = i == len(rungs) - 1
            going = () if last else alive[: rungs[i + 1].members]
            for standing in standings:
                self._tell(standing, last, done, standing in going)
            self._running, self._partial = len(going), len(going) * done / self._num_steps
            self._look_back()
            best = f"best {alive[0].score:.4g}" if alive else "none finite"
            self._log(f"{len(standings)} trials at {done} steps: {best}, {len(going)} go on")
            kept = {s.proposal.number for s in going}
            groups = [self._shrunk(g, kept, most) for g in groups]
            groups = [g for g in groups if g.proposals]

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
        return [Group(program, state, tuple(team), {})]

    def _train(
        self, groups: list[Group], done: int, until: int
    ) -> tuple[list[Group], list[Standing]]:
        trained, standings = [], []
        for group in groups:
            try:
                ended = self._advanced(group, done, until)
                standings += self._standings(ended)
                trained.append(ended)
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
                more, found = self._train(alone, done, until)
                trained += more
                standings += found
            except Exception:
                self._fail(group.proposals)
        return trained, standings

    def _advanced(self, group: Group, done: int, until: int) -> Group:
        """The group after training from `done` to `until` steps."""
        members, here = group.program.members, len(group.proposals)
        stride = self._stride(until - done) // members.steps_per_update * members.steps_per_update
        while done < until:
            steps = min(max(stride, members.steps_per_update), until - done)
            state = members.advance(group.state, steps // members.steps_per_update)
            group = group._replace(state=jax.block_until_ready(state))
            done += steps
            self._spent += steps * here
            self._partial += steps * here / self._num_steps
            self._look()
            if self._exploit is not None and here > 1 and done < until:
                group = self._exploited(group, done)
        return group

    def _stride(self, steps: int) -> int:
        """Steps to train before somebody looks or copies."""
        if self._exploit is not None:
            return self._exploit.every
        return steps if self._show is None else -(-steps // _PARTS)

    def _exploited(self, group: Group, done: int) -> Group:
        """The group after one round of population based training."""
        recipe, members = self._exploit, group.program.members
        assert recipe is not None
        scores = self._score(members.report(group.state))
        key = jax.random.fold_in(jax.random.key(self._seed), group.proposals[0].number)
        state, parents = members.exploit(
            group.state,
            jax.random.fold_in(key, done),
            recipe.fraction,
            recipe.perturb,
            recipe.resample,
            -scores if self._maximize else scores,
        )
        copied = {number: list(history) for number, history in group.copied.items()}
        # The slots beyond the proposals only fill up the width.
        for i, (proposal, slot) in enumerate(
            zip(group.proposals, np.asarray(parents), strict=False)
        ):
            if slot != i:
                parent = group.proposals[slot].number
                copied.setdefault(proposal.number, []).append((done, parent))
        return group._replace(state=state, copied=copied)

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
                    **{n: _rounded(v[i][used]) for n, v in report.trail.items()},
                },
            }
            if report.test_score is not None:
                attrs["held_out"] = float(report.test_score[i])
            attrs["metrics"] = {name: float(v[i]) for name, v in dict(report.metrics or {}).items()}
            if self._exploit is not None:
                attrs["copied"] = group.copied.get(proposal.number, [])
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
        return group._replace(state=state, proposals=tuple(group.proposals[i] for i in slots))

    def _fail(self, proposals: Sequence[Proposal]) -> None:
        error = traceback.format_exc()
        for proposal in proposals:
            self._opened.fail(proposal, error)
        numbers = ", ".join(f"#{proposal.number}" for proposal in proposals)
        self._warn(f"{numbers} failed: {error.strip().splitlines()[-1]}")

    def _rank(self, standing: Standing) -> float:
        return -standing.score if self._maximize else standing.score

    def _look_back(self) -> None:
        """Shows where the study stands, others' trials included."""
        if self._show is None:
            return
        self._finished = self._opened.progress().finished
        full = (t for t in self._opened.trials() if t.state == TrialState.COMPLETE)
        scores = [t.value for t in full if t.value is not None]
        self._best = (max if self._maximize else min)(scores, default=None)
        self._look()

    def _look(self) -> None:
        if self._show is not None:
            done = self._finished + self._partial
            self._show(Moment(done, self._running, self._spent, self._best))


def _rounded(values: np.ndarray) -> list[float]:
    """To the digits of a float32: as JSON they are half as long, and MySQL's texts are limited."""
    return [float(f"{value:.7g}") for value in values]


def _widths(most: int) -> list[int]:
    """The few widths that programs are compiled for: powers of four, and the largest."""
    widths = [1]
    while widths[-1] < most:
        widths.append(min(4 * widths[-1], most))
    return widths
