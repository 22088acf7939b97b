"""Trials that train together: groups of one program, and cohorts that are halved at rungs.

Nothing here knows of a study: proposals come in, standings go out, and `sweep` asks and tells.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from hypergrad.data.batches import num_examples
from hypergrad.knowledge.lengths import Length
from hypergrad.knowledge.spending import evaluations_per_step
from hypergrad.population.held import WEIGHTS
from hypergrad.population.member import PopulationReport, PopulationState, on_test
from hypergrad.population.population import width_for
from hypergrad.results.kept import Keeper
from hypergrad.results.programs import ProblemError, Program, Programs
from hypergrad.results.standings import EVALUATIONS, Failure, Fate, Standing, Standings, failure
from hypergrad.search.schedulers import PopulationBasedTraining, Rung
from hypergrad.search.stopping import Judge
from hypergrad.study.ranking import HELD_OUT, MOVED
from hypergrad.study.study import Proposal
from hypergrad.tuners.trust import NOT_FINITE, REASONS

Told = Literal["start", "last", "best", "mean"]
# Where a report holds what is told.
_TOLD_FIELDS = {"start": "start", "last": "hyper", "best": "best", "mean": "mean"}
# How often a rung says how far it is.
_PARTS = 10


class Group(NamedTuple):
    """Trials of one program that train together; proposals stand in the order of their slots.

    `copies` says which trial went on after how many steps from which other one.
    """

    program: Program
    state: PopulationState
    proposals: tuple[Proposal, ...]
    copies: tuple[tuple[int, int, int], ...] = ()
    length: Length = Length(1, 1, 1)


@dataclasses.dataclass(eq=False)
class Cohort:
    """Runs brackets: trains, ranks, stops the losers.

    Args:
      programs: what is trained.
      sign: 1 where a small score is good, -1 where a large one is.
      told: which of a trial's values the study learns.
      exploit: population based training between the members of a group, or None.
      seed: of the members' training.
      watch: gets `training` several times a rung, where anybody looks.
      may: says whether so many gradient evaluations more may begin; what may not is left as it is.
      judge: says which of the trials at a rung go on, where a bracket's are not ranked together.
      keeper: keeps states of trials that go on, for those who run them when this process has died.
    """

    programs: Programs
    sign: int
    told: Told
    exploit: PopulationBasedTraining | None
    seed: int
    watch: Callable[[int, float, int], None] | None = None
    may: Callable[[float], bool] = lambda more: True
    judge: Judge | None = None
    keeper: Keeper | None = None
    spent: int = 0
    examples: int = 0
    evaluations: float = 0.0
    _cut: bool = False
    _told: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    _running: int = 0
    # In full runs: what those that train here have behind them.
    _partial: float = 0.0

    @property
    def training(self) -> tuple[int, float, int]:
        """Trials that train here, what they have behind them in full runs, and all steps spent."""
        return self._running, self._partial, self.spent

    def run(
        self, teams: Sequence[Sequence[Proposal]], rungs: Sequence[Rung], most: int
    ) -> Iterator[Standings | Failure]:
        """Trains teams of equal choices through the rungs, at most `most` members at once.

        Gives what the study must be told as soon as it is known, as a process may be killed at any
        time: all standings at a rung before the next one begins, and what has raised at once.
        """
        groups = yield from self._start(teams, most)
        self._cut, done = False, 0
        for rung, after in zip(rungs, [*rungs[1:], None], strict=True):
            self._running = sum(len(g.proposals) for g in groups)
            groups, standings = yield from self._train(groups, done, rung.steps)
            done = rung.steps
            reached = self._placed(standings, done, after)
            going = {s.proposal.number for s in reached.trials if s.fate == "goes on"}
            # Before the yield, as whoever is told looks at `training`.
            self._running = len(going)
            self._partial = len(going) * done / self.programs.lengths.num_steps
            if reached.trials or not self._cut:
                yield reached
            groups = [g for group in groups if (g := _shrunk(group, going, most)).proposals]
            if self.keeper is not None:
                self.keeper.forget(s.proposal for s in reached.trials if s.fate != "goes on")
                for group in groups:
                    self.keeper.keep(group.state, group.proposals)
            if self._cut:
                return

    def _start(
        self, teams: Sequence[Sequence[Proposal]], most: int
    ) -> Generator[Failure, None, list[Group]]:
        groups = []
        for team in teams:
            # A program takes its time to be made, too.
            if not self.may(1.0):
                self._cut = True
                break
            try:
                groups.append(self._group(team, _width(len(team), most)))
            except ProblemError:
                raise
            except Exception as error:
                yield failure(team, error)
        return groups

    def _group(self, team: Sequence[Proposal], width: int) -> Group:
        program = self.programs.of(team[0].choices)
        hypers = program.starts([{**p.choices, **p.start, **self._weights(p)} for p in team])
        length = self.programs.lengths.of(team[0].choices)
        # By their numbers, so that a trial trains alike in whatever team it is.
        numbers = np.asarray([p.number for p in team])
        keys = _keys(jax.random.key(self.seed), numbers)
        state = program.members.init(hypers, keys, width)
        if self.keeper is not None:
            state = self.keeper.restored(state, team)
            self.evaluations += (
                int(state.trail.seen.sum())
                * self._rate(program)
                * (program.members.steps_per_update)
            )
        return Group(program, state, tuple(team), length=length)

    def _weights(self, proposal: Proposal) -> dict[str, np.ndarray]:
        """What a trial's objectives are weighted by, where there are several."""
        goals = self.programs.goals
        if not goals.several:
            return {}
        return {WEIGHTS: goals.weights(self.seed, proposal.number, self._told)}

    def _train(
        self, groups: list[Group], done: int, until: int
    ) -> Generator[Failure, None, tuple[list[Group], list[Standing]]]:
        trained: list[Group] = []
        standings: list[Standing] = []
        while groups:
            group, *groups = groups
            steps = self._own_steps(group, until) - self._own_steps(group, done)
            if not self.may(steps * self._rate(group.program) * len(group.proposals)):
                self._cut = True
                break
            try:
                ended = self._advanced(group, done, until)
                standings += self._standings(ended)
                trained.append(ended)
            except ProblemError:
                raise
            except Exception as error:
                if isinstance(error, jax.errors.JaxRuntimeError) and len(group.proposals) > 1:
                    # Memory may suffice for one where it does not for all: each alone, from here.
                    groups = [_part(group, [i]) for i in range(len(group.proposals))] + groups
                else:
                    yield failure(group.proposals, error)
        return trained, standings

    def _own_steps(self, group: Group, steps: int) -> int:
        """Steps of a group's own that a rung at so many steps is."""
        return self.programs.lengths.steps_at(group.length, steps) if steps else 0

    def _rate(self, program: Program) -> float:
        """Gradient evaluations of a trial's training step, in those of the largest batch."""
        floats = len(program.space.continuous)
        refine = self.programs.refine if floats else None
        guidance = num_examples(program.data.valid) / program.batch_size
        steps = program.members.steps_per_update
        share = program.batch_size / self.programs.lengths.batch_size
        return share * evaluations_per_step(refine, floats, guidance, steps)

    def _advanced(self, group: Group, done: int, until: int) -> Group:
        """The group after training from rung to rung."""
        length = group.length
        done, until = self._own_steps(group, done), self._own_steps(group, until)
        members, here = group.program.members, len(group.proposals)
        # Members know whole updates only, and at least one.
        stride = self._stride(until - done) // members.steps_per_update * members.steps_per_update
        while done < until:
            steps = min(max(stride, members.steps_per_update), until - done)
            updates = self._updates(group, done + steps, steps)
            state = members.advance(group.state, updates)
            # An error of the device comes up here, where it is known whose it is.
            group = group._replace(state=jax.block_until_ready(state))
            done += steps
            trained = int(updates[:here].sum()) * members.steps_per_update
            self.spent += trained
            self.examples += trained * length.batch_size
            self.evaluations += trained * self._rate(group.program)
            self._partial += steps * here / length.num_steps
            if self.keeper is not None and self.keeper.is_due and done < until:
                self.keeper.keep(group.state, group.proposals)
            if self.watch is not None:
                self.watch(*self.training)
            if self.exploit is not None and here > 1 and done < until:
                group = self._exploited(group, done)
        return group

    def _updates(self, group: Group, until: int, most: int) -> np.ndarray:
        """Updates of each slot up to `until` steps; one that is kept may have come further."""
        k = group.program.members.steps_per_update
        seen = 0 if self.keeper is None else np.asarray(group.state.trail.seen)
        counts = most // k if self.keeper is None else np.clip(until // k - seen, 0, most // k)
        return np.broadcast_to(counts, group.state.active.shape).astype(np.int32)

    def _stride(self, steps: int) -> int:
        """Steps to train before somebody looks or copies."""
        if self.exploit is not None:
            return self.exploit.every
        nobody = self.watch is None and self.keeper is None
        return steps if nobody else -(-steps // _PARTS)

    def _exploited(self, group: Group, done: int) -> Group:
        """The group after one round of population based training."""
        recipe, members = self.exploit, group.program.members
        assert recipe is not None
        scores = self.programs.goals.score(members.report(group.state))
        # Of the group and of the time, so that no two rounds draw alike.
        key = jax.random.fold_in(jax.random.key(self.seed), group.proposals[0].number)
        state, parents = members.exploit(
            group.state,
            jax.random.fold_in(key, done),
            recipe.fraction,
            recipe.perturb,
            recipe.resample,
            self.sign * scores,
        )
        numbers = [proposal.number for proposal in group.proposals]
        # The slots beyond the proposals only fill up the width.
        slots = np.asarray(parents)[: len(numbers)]
        copies = [(numbers[i], done, numbers[slot]) for i, slot in enumerate(slots) if slot != i]
        return group._replace(state=state, copies=(*group.copies, *copies))

    def _standings(self, group: Group) -> list[Standing]:
        report = jax.device_get(group.program.members.report(group.state))
        # A metric may come out finite where the parameters are not, as an accuracy does.
        objectives = self.programs.goals.values(report)
        finite = report.finite & np.isfinite(objectives).all(1)
        values, tested = getattr(report, _TOLD_FIELDS[self.told]), on_test(report)
        result = []
        for i, proposal in enumerate(group.proposals):
            refined = {n: float(values[n][i]) for n in group.program.space.continuous}
            used = report.trail_steps[i] > 0  # 0 marks a block still to come
            attrs: dict[str, Any] = {
                "steps": int(report.steps[i]),
                "refused": int(report.refused[i]),
                EVALUATIONS: int(report.steps[i]) * self._rate(group.program),
                "trajectory": {
                    "steps": report.trail_steps[i][used].tolist(),
                    **{n: _rounded(v[i][used]) for n, v in report.trail.items()},
                },
            }
            if self.programs.refine is not None or self.exploit is not None:
                attrs |= _moved(report, i)
            if self.programs.lengths.reads:
                attrs["examples"] = attrs["steps"] * group.length.batch_size
            doubt = _doubt(report.reasons[i])
            if doubt is not None:
                attrs["doubt"] = doubt
                # Most of its training was NaN and undone: no success, whatever the end scores.
                not_finite = report.reasons[i][NOT_FINITE]
                attrs["undone"] = bool(2 * not_finite > report.reasons[i].sum())
            if tested is not None:
                attrs[HELD_OUT] = float(self.programs.goals.score(tested)[i])
                attrs |= _named("test_metrics", tested, i)
            attrs |= _named("metrics", report, i)
            if self.exploit is not None:
                mine = (copy for copy in group.copies if copy[0] == proposal.number)
                attrs["copied"] = [(step, parent) for _, step, parent in mine]
            ended = int(report.steps[i]) >= group.length.num_steps
            fate: Fate = "finished" if ended else "goes on"
            scores = tuple(objectives[i].tolist()) if finite[i] else (np.nan,) * objectives.shape[1]
            excess = self.programs.goals.excess(report, i)
            if ended and finite[i]:
                self._told.append(scores)
            result.append(Standing(proposal, scores, refined, attrs, fate, excess))
        return result

    def _placed(self, standings: list[Standing], steps: int, after: Rung | None) -> Standings:
        """The same, in their order, with each one's fate: the best go on to the rung `after`."""
        finite = [s for s in standings if np.isfinite(s.score)]
        broken = lambda s: sum(max(x, 0.0) for x in s.excess.values())  # noqa: E731
        best = sorted(finite, key=lambda s: (broken(s), self.sign * s.score))
        # Where some have not come as far as this, nobody has lost.
        places = len(best) if self._cut else after.members if after else 0
        going = {s.proposal.number for s in best[:places]} if after else set()
        if self.judge is not None and after and not self._cut:
            going = self.judge(steps, best)
        trials = []
        for standing in standings:
            if not np.isfinite(standing.score):
                standing = standing._replace(fate="diverged")
            elif standing.fate == "goes on" and standing.proposal.number not in going:
                standing = standing._replace(fate="stopped")
            trials.append(standing)
        undone = any(s.attrs.get("undone") for s in standings)
        bad = undone or len(finite) < len(standings)
        why = self.programs.bad_data if bad else ""
        return Standings(steps, trials, best[0].score if best else None, why)


# Compiled, as each operation of its own would be dispatched, and compiled, alone.
_keys = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def _shrunk(group: Group, kept: set[int], most: int) -> Group:
    """The group with those members only whose numbers are `kept`, in as few slots as hold them."""
    slots = [i for i, p in enumerate(group.proposals) if p.number in kept]
    if not slots or len(slots) == len(group.proposals):
        return group._replace(proposals=tuple(group.proposals[i] for i in slots))
    return _part(group, slots, _width(len(slots), most))


def _width(members: int, most: int) -> int:
    """One of the few widths that programs are compiled for: powers of four, and the largest."""
    return min(width_for(members), most)


def _part(group: Group, slots: list[int], width: int | None = None) -> Group:
    state = group.program.members.select(group.state, slots, width)
    return group._replace(state=state, proposals=tuple(group.proposals[i] for i in slots))


def _rounded(values: np.ndarray) -> list[float]:
    """To the digits of a float32: as JSON they are half as long, and MySQL's texts are limited."""
    return [float(f"{value:.7g}") for value in values]


def _named(name: str, report: PopulationReport, slot: int) -> dict[str, dict[str, float]]:
    """The metrics of one member as an attribute; none without, as each costs a write."""
    found = {metric: float(v[slot]) for metric, v in dict(report.metrics or {}).items()}
    return {name: found} if found else {}


def _moved(report: PopulationReport, slot: int) -> dict[str, bool]:
    """Marks a trial whose hyperparameters did not stand still, so that its score is no value's."""
    pairs = zip(report.start.values(), report.trail.values(), strict=True)
    used = report.trail_steps[slot] > 0
    # Means of what stands still differ from it by rounding.
    moved = any(not np.allclose(t[slot][used], s[slot], 1e-6, 0) for s, t in pairs)
    return {MOVED: True} if moved else {}


def _doubt(reasons: np.ndarray) -> str | None:
    """What is to be said of a trial that had more than a third of its updates refused."""
    updates, refused = int(reasons.sum()), int(reasons[1:].sum())
    if updates < 4 or 3 * refused <= updates:
        return None
    most = REASONS[1 + int(np.argmax(reasons[1:]))]
    return f"{refused} of its {updates} updates were refused, mostly because {most}"
