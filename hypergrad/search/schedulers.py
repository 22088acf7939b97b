"""Which configurations train for how long: the brackets and rungs of synchronous Hyperband.

Hyperband: Li et al. 2018 (JMLR 18:185), algorithm 1. A bracket is a tuple of rungs; all members of
a rung train up to its number of steps, then the best go on to the next rung.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from hypergrad.checks import instance, integer, integer_field, positive, within


class Rung(NamedTuple):
    """`members` configurations train until each has had `steps` inner steps in all.

    Promoted configurations resume, so that a rung costs only the steps since the rung before it.
    """

    members: int
    steps: int


@dataclass(frozen=True)
class _Halving:
    min_steps: int
    eta: int = 3

    def __post_init__(self) -> None:
        integer_field(self, "min_steps")
        integer_field(self, "eta", 2)


class Hyperband(_Halving):
    """Brackets from many short runs to few full ones, over and over (Li 2018, algorithm 1).

    No run stops before `min_steps` inner steps; at each rung the best 1/`eta` go on with `eta`
    times the steps. Every bracket costs about the same. Raises ValueError for `min_steps < 1`
    and `eta < 2`, TypeError where one is no integer.

    >>> [bracket[0].members for bracket in brackets(Hyperband(1), num_steps=81, num_trials=143)]
    [81, 34, 15, 8, 5]
    """


class SuccessiveHalving(_Halving):
    """Hyperband's most exploring bracket only, over and over: many short runs, one full one.

    With `s` the number of times that `min_steps` can be multiplied by `eta` within the full run, a
    bracket starts `eta**s` configurations and one of them trains in full. Brackets of this size
    follow one another until all trials are used, so that a sampler that learns (TPE) is told the
    results of one bracket before it proposes the next. Raises as `Hyperband` does.

    >>> for bracket in brackets(SuccessiveHalving(100), num_steps=900, num_trials=12):
    ...     print(*bracket)
    Rung(members=9, steps=100) Rung(members=3, steps=300) Rung(members=1, steps=900)
    Rung(members=3, steps=100) Rung(members=1, steps=300) Rung(members=1, steps=900)
    """


class ASHA(_Halving):
    """Successive halving that waits for nobody, for many processes (Li 2020, stopping at rungs).

    Rungs are those of `SuccessiveHalving`. A trial that comes to one goes on if it is among the
    best 1/`eta` of all that have been there so far, in whatever process, else it stops: nobody
    stands idle until a bracket is full, and the first ones at a rung go on for want of rivals.
    Raises as `Hyperband` does.

    >>> brackets(ASHA(100), num_steps=900, num_trials=50)
    [(Rung(members=50, steps=100), Rung(members=50, steps=300), Rung(members=50, steps=900))]
    """


@dataclass(frozen=True)
class LearningCurves:
    """Stops a trial whose extrapolated curve is unlikely to end below the best full run.

    At each of `points` rungs, evenly spaced from `min_steps` on, the trial's scores so far are
    extrapolated to its end by an ensemble of curves (`hypergrad.search.curves`); it goes on if
    that beats the best full run with at least this `probability`, so that the spread of the
    prediction decides (Domhan 2015). Before four scores, and before any full run, all go on. It
    waits for nobody, as `ASHA`. Raises ValueError for values out of range.

    >>> [rung.steps for rung in brackets(LearningCurves(200, points=5), 500, 8)[0]]
    [200, 300, 400, 500]
    """

    min_steps: int
    points: int = 10
    probability: float = 0.05

    def __post_init__(self) -> None:
        integer_field(self, "min_steps")
        integer_field(self, "points", 2)
        positive("probability", within("probability", self.probability, 0, 0.5))


@dataclass(frozen=True)
class PopulationBasedTraining:
    """All trials train in full; every so often the worst of a population go on from the best.

    After each `every` training steps the worst `fraction` of the members that train together (equal
    choices) take over parameters and hyperparameters of random ones among the best `fraction`, and
    each copied hyperparameter moves by `perturb` up or down in unit coordinates, or is drawn anew
    with probability `resample` (Jaderberg 2017). The study is told where the hyperparameters ended:
    what a trial did is a schedule, its `trajectory`. Raises ValueError for values out of range.

    >>> PopulationBasedTraining(every=100).fraction
    0.25
    """

    every: int
    fraction: float = 0.25
    perturb: float = 0.05
    resample: float = 0.0

    def __post_init__(self) -> None:
        integer_field(self, "every")
        positive("fraction", within("fraction", self.fraction, 0, 0.5))
        within("perturb", self.perturb, 0, 1)
        within("resample", self.resample, 0, 1)


Scheduler = Hyperband | SuccessiveHalving | ASHA | LearningCurves | PopulationBasedTraining


def brackets(
    scheduler: Scheduler | None, num_steps: int, num_trials: int
) -> list[tuple[Rung, ...]]:
    """Return the brackets that start `num_trials` configurations in all, in order.

    A full run has `num_steps` inner steps, and the last rung of every bracket is a full run. The
    last bracket is trimmed to the configurations that are left. Without a scheduler, and under
    population based training, there is one bracket with one rung: all `num_trials` train in full.
    Under schedulers that wait for nobody there is one whose rungs all `num_trials` may come to.

    With `s_max` the largest s such that `min_steps * eta**s <= num_steps`, bracket s starts
    `n = ceil((s_max + 1) * eta**s / (s + 1))` configurations; rung i has `floor(n / eta**i)`
    members (at least one in a trimmed bracket) and ends at `floor(num_steps / eta**(s - i))` steps,
    which is at least `min_steps`.

    Raises ValueError for `num_trials < 1`, `num_steps < 1` and `min_steps > num_steps`.

    >>> brackets(None, num_steps=300, num_trials=8)
    [(Rung(members=8, steps=300),)]
    """
    num_steps, num_trials = integer("num_steps", num_steps), integer("num_trials", num_trials)
    if scheduler is None or isinstance(scheduler, PopulationBasedTraining):
        return [(Rung(num_trials, num_steps),)]
    kinds = _Halving | LearningCurves
    instance("scheduler", scheduler, kinds, "Hyperband, SuccessiveHalving, ASHA, or None")
    if scheduler.min_steps > num_steps:
        raise ValueError(
            f"scheduler={scheduler!r} gives every run at least {scheduler.min_steps} steps, but "
            f"num_steps={num_steps}: lower min_steps, or raise num_steps."
        )
    if isinstance(scheduler, LearningCurves):
        parts = (num_steps * i // scheduler.points for i in range(1, scheduler.points + 1))
        stops = dict.fromkeys(max(part, scheduler.min_steps) for part in parts)
        return [tuple(Rung(num_trials, stop) for stop in stops)]
    eta, top = scheduler.eta, 0
    # In integers: floor(log(243) / log(3)) is 4 in floating point.
    while scheduler.min_steps * eta ** (top + 1) <= num_steps:
        top += 1
    if isinstance(scheduler, ASHA):
        return [tuple(Rung(num_trials, num_steps // eta ** (top - i)) for i in range(top + 1))]
    halvings = itertools.cycle(range(top, -1, -1) if isinstance(scheduler, Hyperband) else [top])
    result: list[tuple[Rung, ...]] = []
    left = num_trials
    while left:
        s = next(halvings)
        members = min(left, -(-(top + 1) * eta**s // (s + 1)))
        rungs = (Rung(max(1, members // eta**i), num_steps // eta ** (s - i)) for i in range(s + 1))
        result.append(tuple(rungs))
        left -= members
    return result


def in_whole_updates(
    bracket: tuple[Rung, ...], scheduler: Scheduler | None, steps: int
) -> tuple[Rung, ...]:
    """The bracket with its rungs at multiples of `steps`, rounded down, but not below `min_steps`.

    Rungs that fall together are one, at which losers are stopped once.

    >>> in_whole_updates((Rung(9, 100), Rung(3, 300), Rung(1, 900)), SuccessiveHalving(100), 300)
    (Rung(members=9, steps=300), Rung(members=3, steps=900))
    """
    least = getattr(scheduler, "min_steps", 1)
    eta = scheduler.eta if isinstance(scheduler, _Halving) and is_synchronous(scheduler) else 1
    stops = [max(rung.steps // steps, -(-least // steps)) * steps for rung in bracket]
    members = bracket[0].members
    return tuple(
        Rung(max(1, members // eta**i), stop) for i, stop in enumerate(dict.fromkeys(stops))
    )


def is_synchronous(scheduler: Scheduler | None) -> bool:
    """Whether the trials of a bracket are ranked together, and wait for each other."""
    return isinstance(scheduler, _Halving) and not isinstance(scheduler, ASHA)


def bracket_steps(bracket: tuple[Rung, ...]) -> int:
    """Return the inner steps that a bracket trains, summed over its members; promotions resume.

    >>> bracket_steps((Rung(9, 100), Rung(3, 300), Rung(1, 900)))
    2100
    """
    pairs = itertools.pairwise([Rung(0, 0), *bracket])
    return sum(rung.members * (rung.steps - before.steps) for before, rung in pairs)
