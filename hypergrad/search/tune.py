"""One call for who has a model and a default: tuned hyperparameters and a trained network."""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypergrad.checks import WrongTypeError, flag, integer, positive
from hypergrad.data.batches import Minibatches, num_examples
from hypergrad.data.contents import bad_examples
from hypergrad.data.splits import Splits, check_splits
from hypergrad.problem.mistakes import refuse_no_problem
from hypergrad.problem.problem import Problem
from hypergrad.search.candidates import UPDATES, Workshop
from hypergrad.search.tuned import TuneResult
from hypergrad.space.space import Space
from hypergrad.trees import Hyper
from hypergrad.tuners.alternating import horizon

_log = logging.getLogger("hypergrad")

# Runs that only look for values take a quarter of the steps.
_STRIDE = 4
_DIVERGED = "lower its learning rate; hypergrad.check_hypergradient names the step and the cause."
# Whole-run steps at a time.
_STEPS = 2
# Alternating runs in turn: how many updates, and whether they look ahead.
_RUNS = ((UPDATES[0], False), (UPDATES[1], False), (UPDATES[0], True))


def tune(
    problem: Problem,
    space: Space,
    data: Splits,
    start: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    num_steps: int,
    batch_size: int,
    budget: float = 6.0,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> TuneResult:
    """A trained network and tuned hyperparameters, at the cost of `budget` plain training runs.

    No kind of run is best everywhere, so several compete: the start as it is; alternating runs,
    one from what a short one found; the values that they leave, retrained; steps over whole short
    runs; of each the last weights and their running mean. Validation tells which network is kept,
    and the untuned start is always among them.

    Args:
      problem: what is trained and judged.
      space: the ranges; all continuous. What has no gradient is for `hypergrad.sweep`.
      data: the splits; `test` is used by `result.audit` alone.
      start: values to begin with, or a list of such; None for the priors, where there are none the
        middle of the range.
      num_steps: training steps of a full run.
      batch_size: examples per training step.
      budget: in plain runs of `num_steps`, choosing included: a training step counts 1, its way
        back 2, a validation gradient n_valid / batch_size. About 5 for the first tuned network
        beside the untuned one; more buys more runs from better places.
      seed: of all training.
      progress: shows each run as it goes, see `fit`; the logger "hypergrad" gets a line per run.
      checkpoint: a folder: killed, the same call goes on from it.

    Validation gradients take all of `valid` where that is cheap, else minibatches of it. A run
    that diverges is a candidate that lost.

    Cost: at most `budget * num_steps` gradient evaluations, and the compilation of up to five
    programs, which on tiny models takes longer than the runs: there plain black-box search
    (`hypergrad.sweep`) is quicker on the clock. Memory: two training states for each alternating
    run, a mean of its parameters, and the best network.

    Raises:
      ValueError: a budget below one run, too few steps for any horizon, a start outside of the
        space, a space without a Float or with choices, a batch larger than the data, no
        validation split.
      FloatingPointError: every candidate diverged.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> space = hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")})
    >>> data = hg.Splits(jnp.ones(8), jnp.ones(4), jnp.ones(4))
    >>> result = hg.tune(problem, space, data, {"lr": 1e-3}, num_steps=40, batch_size=4)
    >>> bool(result.score < result.candidates[0].score), result.best.kind != "untuned"
    (True, True)
    """
    refuse_no_problem(problem)
    flag("progress", progress)
    starts = _checked_starts(space, start)
    num_steps, batch_size = integer("num_steps", num_steps), integer("batch_size", batch_size)
    horizon(num_steps)  # refuses a run that is too short
    positive("budget", budget, "plain runs, at least 1")
    if budget < 1:
        raise ValueError(
            f"budget={budget} is less than one plain run, which the untuned start takes: give 6, "
            "or at least 1."
        )
    _check_data(data, batch_size)
    folder = None if checkpoint is None else _made(checkpoint)
    data = Splits(*(jax.tree.map(jax.numpy.asarray, split) for split in data))
    shop = Workshop(problem, space, data, num_steps, batch_size, integer("seed", seed, 0))
    shop.progress, shop.folder = progress, folder
    _spend(shop, starts, budget * num_steps)
    if shop.best is None:
        found = ((name, bad_examples(split)) for name, split in data._asdict().items())
        bad = [f"data.{name}, in examples {where}" for name, where in found if where]
        data_are = f"the data are the reason, NaN or infinity in {'; '.join(bad)}."
        raise FloatingPointError(
            f"Every candidate diverged, from start={start!r} on: {data_are if bad else _DIVERGED}"
        )
    return TuneResult.of(shop)


def _spend(shop: Workshop, starts: list[Hyper], budget: float) -> None:
    """Trains candidates as long as the budget affords one.

    First a short alternating run, which finds its way from far at a quarter of the cost, then
    a whole one from there: its network. What it leaves is retrained; steps over whole short
    runs go on from it, as they see the decay that alternating ones do not. Then once more,
    by smaller steps, and by a run that looks ahead.
    """

    def affords(*costs: float) -> bool:
        return shop.spent + sum(costs) <= budget

    plain = shop.plain_cost()
    steps = shop.whole_runs_cost(_STRIDE, _STEPS)
    for start in starts:
        if affords(plain):
            shop.train("untuned", start, start)
    place = shop.lowest_constant().hyper
    if affords(shop.alternating_cost(stride=_STRIDE), plain):
        found = shop.alternate(place, stride=_STRIDE)
        if found is not None:
            place = found.hyper
            if not affords(shop.alternating_cost()):
                shop.train("frozen", place, shop.lowest_constant().hyper, found.horizon)
    for number, (updates, ahead) in enumerate(itertools.cycle(_RUNS)):
        if not affords(shop.alternating_cost(updates)):
            break
        if not affords(shop.alternating_cost(updates, ahead=ahead)):
            continue
        found = shop.alternate(place, updates, ahead=ahead)
        # By last weights, as the values that it leaves are judged.
        won = shop.candidates[-1].last == min(c.last for c in shop.candidates)
        # A later one is followed where its network won: else the budget is better spent on another.
        if found is not None and (won or number == 0):
            if affords(plain):
                shop.train("frozen", found.hyper, place, found.horizon)
            if affords(steps, plain):
                values = shop.whole_runs(found.hyper, _STRIDE, _STEPS)
                if values is not None:
                    shop.train("whole runs", values, found.hyper, shop.num_steps // _STRIDE)
            if found.settled is not None and affords(plain):
                shop.replay(found.settled, found.hyper, place)
        place = shop.lowest_constant().hyper
    if all(candidate.kind == "untuned" for candidate in shop.candidates):
        shop.remarks += (
            f"Nothing was tuned: budget={budget / shop.num_steps:g} affords the start alone. Give "
            "3 or more, 6 for a tuned network and its values.",
        )
        _log.warning(shop.remarks[-1])
        return
    while affords(plain):
        shop.train("frozen", shop.lowest_constant().hyper, place)


def _checked_starts(space: Any, start: Any) -> list[Hyper]:
    if not isinstance(space, Space):
        raise WrongTypeError(f"space is a {type(space).__name__}: give a hypergrad.Space.")
    if space.discrete:
        raise ValueError(
            f"space holds the choices {list(space.discrete)}, which have no gradient: fix them, or "
            "search them with hypergrad.sweep."
        )
    if not space.continuous:
        raise ValueError("space holds no Float, so there is nothing to tune: add one.")
    if start is None:
        middle = {name: np.float32(0.5) for name in space.continuous}
        believed = {n: np.float32(p) for n in space.continuous if (p := space[n].prior) is not None}
        return [jax.device_get(space.from_unit(middle)) | believed]
    starts = [start] if isinstance(start, Mapping) else start
    if not isinstance(starts, list | tuple) or not all(isinstance(s, Mapping) for s in starts):
        raise WrongTypeError(f"start={start!r}: give a dict of values, a list of such, or None.")
    if not starts:
        raise ValueError(f"start={start!r} is empty: give values, or None for the middle.")
    try:
        return [space.validate(dict(values)) for values in starts]
    except (TypeError, ValueError) as error:
        raise type(error)(f"start={start!r}: {error}") from None


def _check_data(data: Any, batch_size: int) -> None:
    if not isinstance(data, Splits):
        raise WrongTypeError(
            f"data is a {type(data).__name__}: give hypergrad.Splits(train, valid, test)."
        )
    for name, split in data._asdict().items():
        if split is not None:
            try:
                num_examples(split)
            except ValueError as error:
                raise ValueError(f"data.{name}: {error}") from None
    Minibatches(data.train, batch_size)  # refuses a batch larger than the data
    if data.valid is None:
        raise ValueError("data.valid=None: tuning needs a split that is not trained on.")
    check_splits(data, "data")
    if num_examples(data.valid) == 1:
        _log.warning(
            "data.valid holds one example: what is tuned on it says little about others. Give more."
        )


def _made(checkpoint: str | os.PathLike[str]) -> Path:
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise WrongTypeError(f"checkpoint={checkpoint!r} is no path: give a folder's name.")
    folder = Path(checkpoint).expanduser().absolute()
    if not folder.parent.is_dir():
        raise ValueError(
            f"checkpoint={str(folder)!r} lies in {str(folder.parent)!r}, which is no folder: make "
            "it."
        )
    folder.mkdir(exist_ok=True)
    return folder
