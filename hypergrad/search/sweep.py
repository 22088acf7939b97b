"""The sweep: an Optuna study outside, populations trained in one program, gradients inside."""

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optuna

from hypergrad.checks import (
    checked_seed,
    choice,
    flag,
    integer,
    printable,
    text,
)
from hypergrad.data.batches import num_examples
from hypergrad.data.contents import refuse_text
from hypergrad.data.splits import Splits
from hypergrad.knowledge.lengths import Lengths, Setting
from hypergrad.knowledge.local import neighbour
from hypergrad.knowledge.programs import tell_of_programs
from hypergrad.knowledge.samplers import first_points, sampler_of
from hypergrad.knowledge.warm import warm_studies
from hypergrad.population.refine import Refine
from hypergrad.results.goals import goals_of
from hypergrad.results.kept import Keeper
from hypergrad.results.programs import MakeProblem, Programs
from hypergrad.results.result import SweepResult
from hypergrad.search.arguments import check_types, checked_points
from hypergrad.search.cohort import Cohort, Told
from hypergrad.search.endings import AllAlike, UntilInterrupted
from hypergrad.search.limits import Limits, SweepCallback
from hypergrad.search.recipe import check_losses, describe_data, describe_refine
from hypergrad.search.schedulers import (
    PopulationBasedTraining,
    Rung,
    Scheduler,
    brackets,
    in_whole_updates,
    is_synchronous,
)
from hypergrad.search.stopping import judge_of
from hypergrad.search.telling import tell
from hypergrad.space.space import Space
from hypergrad.study.ranking import ranked, sign_of
from hypergrad.study.signature import check_recipe
from hypergrad.study.storage import open_storage, told_in_one_sentence
from hypergrad.study.study import OpenStudy, Proposal, open_study
from hypergrad.training.progress import SweepProgress

_log = logging.getLogger("hypergrad")

# What the members of a team have in common, of their choices.
Shared = Callable[[dict[str, Any]], dict[str, Any]]

# How often it is said who is waited for, in seconds.
_TELL_EVERY = 60.0


def sweep(
    make_problem: MakeProblem,
    space: Space,
    data: Splits,
    *,
    num_trials: int,
    num_steps: Setting,
    batch_size: Setting,
    refine: Refine | None = None,
    sampler: str | optuna.samplers.BaseSampler = "tpe",
    scheduler: Scheduler | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    population: int = 1,
    metric: str | None = None,
    direction: Literal["minimize", "maximize"] = "minimize",
    objectives: Mapping[str, str] | None = None,
    constraints: Mapping[str, float] | None = None,
    told: Told = "last",
    polish: int = 0,
    enqueue: Iterable[Mapping[str, Any]] = (),
    timeout: float | None = None,
    max_evaluations: float | None = None,
    callbacks: Sequence[SweepCallback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    warm_from: Iterable[Any] = (),
    seed: int = 0,
    name: str = "hypergrad",
    progress: bool = True,
) -> SweepResult:
    """Searches a mixed space: discrete choices by Optuna, continuous values by gradients too.

    Trials with equal discrete choices are one program and train as a population; hyperparameters
    and seeds are traced, so that each program is compiled once per width, never per trial. With
    `refine` each trial follows hypergradients while it trains, and the study is told what they
    led to. With `refine=None` it is a black-box sweep.

    Args:
      make_problem: `choices -> Problem`, from a dict of the active discrete values, or `choices ->
        (Problem, Splits)` where they choose the data, too. The problem's `hyper` holds exactly the
        active Floats and the traced Ints, which are not among the choices.
      space: what is searched.
      data: the splits. Scores are taken on all of `valid`; `test` is only reported.
      num_trials: in all, over all processes and restarts that share the storage.
      num_steps: training steps of a full run, a multiple of the recipe's steps per update. Rungs
        are rounded down to such multiples, but not below the scheduler's `min_steps`. A number, the
        name of a hyperparameter, or `choices -> number`.
      batch_size: examples per training step; in the same three ways. Where it differs, schedulers
        ration examples: trials stand at a rung when they have seen equally many, which are those of
        the rung's steps at the largest batch; one whose own run ends before has its final score.
      refine: a recipe, or None.
      sampler: "tpe", "random", "grid", "gp", "cmaes", "qmc", "nsga2", "auto" (docs/sweeps.md says
        which for what), or any Optuna sampler. Where hyperparameters have a `prior`, that point is
        tried first, and a share of the trials, falling as results come in, is drawn around it
        (`hypergrad.knowledge.priors`).
      scheduler: None, `SuccessiveHalving` or `Hyperband`, synchronous: a bracket's trials train
        together, and the best of each rung go on. TPE with Hyperband is BOHB. `ASHA` and
        `LearningCurves` judge each trial by itself, and no process waits for another. With
        `PopulationBasedTraining` the members of a population copy each other.
      storage: None for memory, "path.journal", a database's URL, or an Optuna storage. The same
        call goes on where an earlier one stopped or was killed, and several processes share it.
      population: the most trials that train in one program at once. They share their discrete
        choices and are proposed before any of them is told; 1 makes the same proposals as Optuna
        alone. On a CPU more gain nothing; on an accelerator raise it, beside `num_trials`.
      metric: the name of one of `problem.metrics`; None for the validation loss.
      direction: of the score; "maximize" needs a metric.
      objectives: several metrics with their directions, `{"loss": "minimize", "latency":
        "minimize"}`, where "loss" is the validation loss unless a metric has this name. The study
        keeps their front. With `refine` each trial follows a weighted sum of its own.
      constraints: metrics with the bounds that they must stay below, `{"latency": 5.0}`: a trial
        that breaks one ranks behind all that keep to them.
      told: which of a refined trial's values the study learns: "start", "last" (better than "best"
        on digits: a short run is still on its way), "best" (the mean of the trusted iterates, later
        ones counting more) or "mean" (of the second half).
      polish: so many of the last trials are not proposed: full runs that start, under new seeds,
        where the best trials so far ended (their choices, the values told). Worth a fifth of the
        trials, after a scheduler has picked among many short runs. Without `refine` they are a
        local search: the best point with one coordinate moved, in turn.
      enqueue: known good points, tried first; what a point leaves out is proposed.
      timeout: seconds of this call, after which nothing more begins. The rung that trains is
        finished; trials that would go on are handed back and queued again.
      max_evaluations: gradient evaluations in all, over all processes and restarts that share the
        storage (trials that died excepted): no group of trials begins a rung that would exceed it.
        A training step counts 1 (of the largest batch), its way back 2, a validation gradient
        n_valid / batch_size (`hypergrad.knowledge.spending`); the trials' attribute `evaluations`
        says what each has cost.
      callbacks: functions of the study and of a trial that has ended, as Optuna's own are. One ends
        the sweep by `study.stop()`, or by raising `hypergrad.callbacks.Stop`.
      warm_from: storages or studies of earlier sweeps, on other data or of another space: points
        that ranked high there, and where the others' trials say so, are tried first, up to a fifth
        of the trials (`hypergrad.knowledge.warm`).
      checkpoint: a folder, which all processes of the sweep may share: a trial that its process
        lost or handed back goes on from its last rung, or from 30 seconds before.
      seed: of the sampler and of training.
      name: the study's.
      progress: a live view (trials, best score, running population, speed, training steps, time
        left) where standard error is a terminal, and in a notebook (with ipywidgets); elsewhere a
        line a minute. The logger "hypergrad" gets a line per rung.

    Warns (`UserWarning`) of an Int of more than 16 values: each is a program of its own.

    A trial whose program raises, or whose score is not finite, fails alone: it is recorded with its
    traceback (user attributes `error` and `reason`), the logger gets a warning, and the sweep goes
    on; but not after three that have failed alike before any training, where none has trained.
    Ctrl-C ends the sweep with what it has: running trials are queued again.

    Raises:
      ValueError: what `open_study` refuses (another space, another direction); a scheduler whose
        `min_steps` exceeds `num_steps`; `refine` without a Float; a batch larger than the data; a
        mistake that every trial would meet, such as a `make_problem` that ignores or lacks a
        hyperparameter, or an unknown metric.
    """
    limits = Limits(timeout, max_evaluations, callbacks)
    check_types(make_problem, space, data, refine, scheduler)
    seed, name = checked_seed(seed), text("name", name)
    flag("progress", progress)
    lengths = Lengths(space, batch_size, num_steps, refine)
    goals = goals_of(metric, direction, objectives, constraints)
    enqueue, earlier = checked_points(enqueue, space), warm_studies(warm_from)
    if refine is not None and not space.continuous:
        raise ValueError(
            f"refine={refine!r} has nothing to refine: the space holds no Float, only "
            f"{list(space)}. Give refine=None."
        )
    num_trials = integer("num_trials", num_trials)
    population, polish = integer("population", population), integer("polish", polish, 0)
    choice("told", told, get_args(Told))
    if goals.several and scheduler is not None:
        raise ValueError(
            f"objectives={goals.names} with scheduler={scheduler!r}: no rung could rank several. "
            "Give scheduler=None, or bounds for all but one by constraints=."
        )
    tell_of_programs(space, num_trials)
    exploit = scheduler if isinstance(scheduler, PopulationBasedTraining) else None
    if exploit is not None and population < 2:
        raise ValueError(
            f"population={population} leaves {scheduler!r} nobody to copy from: give at least 4."
        )
    if polish and not 0 < polish < num_trials:
        raise ValueError(
            f"polish={polish} with num_trials={num_trials}: give fewer than all trials, as there "
            "must be something to polish."
        )
    keeper = None if checkpoint is None else Keeper(checkpoint, name)
    if checkpoint is not None and exploit is not None:
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} with {scheduler!r}: members that copy each "
            "other cannot go on alone. Give checkpoint=None, or another scheduler."
        )
    num_steps = lengths.num_steps
    ladders = [
        in_whole_updates(ladder, scheduler, lengths.steps_per_update)
        for ladder in brackets(scheduler, num_steps, num_trials - polish)
    ]
    refuse_text("data", {"train": data.train, "valid": data.valid, "test": data.test})
    # Once: every program has a population of its own, and all share these arrays.
    data = Splits(*(jax.tree.map(jnp.asarray, split) for split in data))
    programs = Programs(make_problem, space, data, lengths, refine, goals)
    lengths.refuse_larger_than(num_examples(data.train))
    # A sampler that is made already has its own seed.
    engine, sampler_seed = sampler_of(sampler, space, num_trials, seed)
    # What moves while it trains is recorded when it has ended, as a record cannot be changed.
    moves = refine is not None or exploit is not None
    full = (Rung(population, num_steps),)
    together = is_synchronous(scheduler) and len(ladders[0]) > 1
    if not together:  # as many at a time as fit
        ladders = [tuple(rung._replace(members=population) for rung in ladders[0])]
    backend = open_storage(storage)
    with (
        told_in_one_sentence(backend),
        open_study(
            space, backend, engine, goals.directions, sampler_seed, name, num_trials=num_trials
        ) as opened,
    ):
        recipe = lengths.describe()
        recipe |= {"metric": metric, "constraints": dict(goals.constraints) or None}
        # In their order, which is that of the values.
        recipe |= {"objectives": [list(pair) for pair in (objectives or {}).items()] or None}
        recipe |= {"refine": describe_refine(refine)}
        recipe |= {"told": told if moves else None}
        if storage is not None:  # in memory nobody else's trials can be
            recipe |= {"data": describe_data(data)}
            programs.made = partial(check_losses, opened.study)
        check_recipe(opened.study, **recipe)
        # All processes queue them, and a study takes each point once.
        for hyper in first_points(space, engine, enqueue, earlier, opened.study, num_trials):
            opened.enqueue(hyper)
        with (
            SweepProgress(num_trials, progress) as view,
            UntilInterrupted() as interrupted,
            limits.opened(opened.study),
        ):
            cohort = Cohort(
                programs,
                sign_of(opened.study),
                # What copies made of a trial is its end.
                told if refine is not None else "last",
                exploit,
                seed,
                view.show if progress else None,
            )
            cohort.judge = judge_of(scheduler, opened.study, cohort.sign, num_steps)
            cohort.keeper = keeper
            cohort.may = lambda more: limits.allow(opened.study, cohort.evaluations, more)
            alike = AllAlike(space)
            _look_back(view, opened, cohort)
            for ladder in _from_where_it_stopped(ladders, together, full, polish, opened):
                members = ladder[0].members
                _queue_best(opened, members, polish, num_trials, refine is not None)
                shared = dict if exploit is not None else programs.shared
                teams = _ask_or_wait(opened, shared, members, population, not moves, cohort.may)
                if not teams:
                    break
                for news in cohort.run(teams, ladder, population):
                    tell(opened, news)
                    alike.see(news)
                    limits.see(opened.study, news)
                    _look_back(view, opened, cohort)
    spent = cohort.spent
    return SweepResult(opened.study, spent, opened, programs, num_steps, seed, interrupted.once)


def _from_where_it_stopped(
    ladders: Sequence[tuple[Rung, ...]],
    together: bool,
    full: tuple[Rung, ...],
    polish: int,
    opened: OpenStudy,
) -> Iterator[tuple[Rung, ...]]:
    """The brackets still to run; where trials are not ranked together, one over and over."""
    if not together:
        return itertools.repeat(ladders[0])
    # A bracket that was cut short begins again, with what it left in the queue.
    finished, sizes = opened.progress().finished, (ladder[0].members for ladder in ladders)
    skipped = sum(begun <= finished for begun in itertools.accumulate(sizes))
    # Beyond the plan, when other processes have died: once more from its beginning.
    beyond = itertools.repeat(full) if polish else itertools.cycle(ladders)
    return itertools.chain(ladders[skipped:], beyond)


def _queue_best(opened: OpenStudy, count: int, polish: int, num_trials: int, refined: bool) -> None:
    """Queues where the best trials ended, up to `count` of them, once the rest is proposed.

    Without refinement the best point so far with one coordinate moved, one at a time.
    """
    if not polish:
        return
    progress = opened.progress()
    left = num_trials - progress.finished - progress.running - progress.waiting
    wanted = min(left, count - progress.waiting)
    if left > polish or wanted <= 0:
        return
    if not refined:
        point = neighbour(opened.study, opened.space, polish - left)
        if point is not None:
            opened.enqueue(point, again=True)
        return
    for best in ranked(opened.study)[:wanted]:
        opened.enqueue(best.hyper, again=True)


def _ask_or_wait(
    opened: OpenStudy,
    shared: Shared,
    count: int,
    population: int,
    record: bool,
    may: Callable[[float], bool],
) -> list[list[Proposal]]:
    """Proposals as of `_ask`; where none are left, others', if they die, until all have ended."""
    ended, told = False, time.monotonic()
    while may(1.0):
        teams = _ask(opened, shared, count, population, record)
        # Others may have given trials back between our asking and our looking: ask once more.
        if teams or ended:
            return teams
        if not opened.recover():
            running = opened.progress().running
            ended = not running
            if running and time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                who = printable("; ".join(opened.others())) or "processes that use Optuna alone"
                _log.warning(f"waiting for {running} trials that are run by {who}")
            # Each look reads the whole study, and a second is little beside a trial.
            time.sleep(0.0 if ended else 1.0)
    return []


def _ask(
    opened: OpenStudy, shared: Shared, count: int, population: int, record: bool
) -> list[list[Proposal]]:
    """Up to `count` proposals, in teams of one program and at most `population` members."""
    teams: list[list[Proposal]] = []
    for _ in range(count):
        team = teams[-1] if teams and len(teams[-1]) < population else None
        proposal = opened.ask(shared(team[0].choices) if team else None, record=record)
        if proposal is None and team:
            # No slot is left for more of these choices, but the queue may hold others.
            proposal = opened.ask(record=record)
        if proposal is None:
            break
        # A grid proposes in its own order, whatever choices it is asked for.
        if team and shared(proposal.choices) == shared(team[0].choices):
            team.append(proposal)
        else:
            teams.append([proposal])
    return teams


def _look_back(view: SweepProgress, opened: OpenStudy, cohort: Cohort) -> None:
    """Shows where the study stands, others' trials included."""
    if view.is_watched:
        view.finished = opened.progress().finished
        ranks = ranked(opened.study)
        view.best = ranks[0].score if ranks else None
        view.last = max(ranks, key=lambda one: one.number).score if ranks else None
        view.show(*cohort.training, now=True)
