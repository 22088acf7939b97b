"""Integers are checked by one rule, in every public constructor and function that takes one."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.plotting.runs import plot_losses, plot_norms, plot_trajectories
from hypergrad.population.population import Population
from hypergrad.search.schedulers import brackets
from hypergrad.study.study import open_study

KEY = jax.random.PRNGKey(0)
DATA = jnp.arange(8.0)
SPACE = hg.Space({"rate": hg.Float(1e-3, 1.0, scale="log")})
HYPER = {"rate": jnp.float32(0.1)}
INFOS = [SimpleNamespace(hyper=HYPER, loss=1.0, norm=1.0)] * 4


def loss(w: jax.Array, hyper: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.mean((w - batch) ** 2)


PROBLEM = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["rate"]))
TUNER = hg.alternating(PROBLEM, SPACE)


class Case(NamedTuple):
    """`make(value)` gives `argument` the value, and whatever else is needed."""

    make: Callable[[Any], Any]
    argument: str
    valid: int = 2
    least: int | None = 1


def fitted(**arguments: Any) -> Any:
    arguments = {"num_updates": 2, "steps_per_update": 2} | arguments
    result = hg.fit(TUNER, TUNER.init(HYPER, KEY), [DATA] * 2, DATA, **arguments)
    return result.history.columns


@functools.cache
def swept(**arguments: Any) -> Any:
    sizes = {"num_trials": 2, "num_steps": 4, "batch_size": 4, "population": 1}
    options = {"refine": hg.Refine(steps_per_update=2), "sampler": "random", "progress": False}
    splits = hg.Splits(DATA, DATA, DATA)
    return hg.sweep(lambda _: PROBLEM, SPACE, splits, **(sizes | options | arguments))


def searched(**arguments: Any) -> list[float]:
    return [trial.value for trial in swept.__wrapped__(**arguments).study.trials]


def populated(**arguments: Any) -> Any:
    arguments = {"batch_size": 4} | arguments
    members = Population(PROBLEM, SPACE, None, DATA, DATA, **arguments)
    return members.init({"rate": jnp.full(2, 0.1)}, jnp.stack([KEY, KEY]))


def opened(**arguments: Any) -> list[Any]:
    with open_study(SPACE, seed=0, **arguments) as study:
        return [proposal.start for proposal in iter(lambda: study.ask(record=False), None)]


def drawn(draw: Callable[..., Any], *about: Any, **arguments: Any) -> list[np.ndarray]:
    axes = np.atleast_1d(draw(*about, **arguments))
    return [line.get_xdata() for axis in axes for line in axis.lines]


def case(make: Callable[..., Any], argument: str, valid: int = 2, least: int | None = 1) -> Case:
    """The constructor or function `make`, whose other arguments have been given."""
    return Case(lambda value: make(**{argument: value}), argument, valid, least)


part = functools.partial
CASES = {
    "Minibatches": case(part(hg.Minibatches, DATA), "batch_size"),
    "Minibatches, steps": case(part(hg.Minibatches, DATA, 2), "num_steps"),
    "Int, low": case(part(hg.Int, high=9), "low", least=None),
    "Int, high": case(part(hg.Int, 1), "high", least=None),
    "piecewise_constant": case(part(hg.piecewise_constant, [0.1, 0.2]), "steps_each"),
    "fit, steps": case(fitted, "steps_per_update"),
    "Unrolled": case(hg.Unrolled, "window"),
    "Forward": case(hg.Forward, "chunk"),
    "Evolution": case(part(hg.Evolution, std=0.1), "pairs"),
    "restarting": Case(
        lambda value: hg.restarting(PROBLEM, SPACE, num_seeds=value).init(HYPER, KEY), "num_seeds"
    ),
    "Neumann": case(part(hg.Neumann, step_size=0.1), "terms"),
    "ConjugateGradient": case(hg.ConjugateGradient, "max_steps"),
    "GMRES": case(hg.GMRES, "max_steps"),
    "GMRES, cycles": case(hg.GMRES, "cycles"),
    "Nystrom": case(hg.Nystrom, "rank"),
    "Richardson": case(part(hg.Richardson, step_size=0.1), "steps"),
    "population, batch": case(populated, "batch_size", 4),
    "population, steps": case(populated, "steps_per_update"),
    "population, trail": case(populated, "trail", 4, least=2),
    "Refine": case(hg.Refine, "steps_per_update"),
    "Hyperband": case(hg.Hyperband, "min_steps"),
    "Hyperband, eta": case(part(hg.Hyperband, 1), "eta", least=2),
    "SuccessiveHalving": case(hg.SuccessiveHalving, "min_steps"),
    "SuccessiveHalving, eta": case(part(hg.SuccessiveHalving, 1), "eta", least=2),
    "brackets": case(part(brackets, None, num_trials=2), "num_steps"),
    "brackets, trials": case(part(brackets, None, 2), "num_trials"),
}
for draw in (plot_trajectories, plot_losses, plot_norms):
    about = (INFOS, SPACE) if draw is plot_trajectories else (INFOS,)
    CASES[draw.__name__] = case(part(drawn, draw, *about), "steps_per_update")
CASES |= {
    "check_hypergradient": case(
        part(hg.check_hypergradient, PROBLEM, HYPER, None, DATA[:, None], DATA, KEY), "max_entries"
    ),
    "Trust": case(hg.Trust, "warm_up", least=0),
    "learned_schedule": case(part(hg.learned_schedule, [HYPER] * 4), "steps_per_update"),
    "settled_schedule": case(part(hg.settled_schedule, SPACE, [HYPER] * 4), "steps_per_update"),
    "fit": case(fitted, "num_updates"),
    "Checkpoint": case(part(hg.Checkpoint, "run"), "every"),
    "Checkpoint, kept": case(part(hg.Checkpoint, "run"), "keep"),
    "PopulationBasedTraining": case(hg.PopulationBasedTraining, "every"),
    "open_study": case(opened, "num_trials"),
    "open_study, retries": case(part(opened, num_trials=1), "max_retries", least=0),
    "open_study, grid": case(part(opened, sampler="grid"), "grid_points", least=2),
    "audit": Case(lambda value: swept().audit(seeds=value), "seeds"),
    "confirm": Case(lambda value: swept().confirm(seeds=value), "seeds"),
    "confirm, trials": Case(lambda value: swept().confirm(count=value), "count"),
    "top": Case(lambda value: swept().top(count=value), "count", least=0),
    "table": Case(lambda value: swept().table(count=value), "count", least=0),
    "population, valid": case(populated, "valid_batch_size", 4),
    "sweep, trials": case(searched, "num_trials"),
    "sweep, steps": case(searched, "num_steps", 4),
    "sweep, batch": case(searched, "batch_size", 4),
    "sweep, population": case(searched, "population"),
    "sweep, polish": case(searched, "polish", 1, least=0),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("value", [True, 2.5, "3"])
def test_what_is_no_integer_is_refused_by_name(name: str, value: Any) -> None:
    make, argument, _, _ = CASES[name]
    with pytest.raises((TypeError, ValueError)) as refused:
        make(value)
    assert f"{argument}={value!r}" in str(refused.value)


@every_case
def test_numpys_integers_are_integers(name: str) -> None:
    """And do as Python's do: equal objects, of which compiled programs are found again."""
    make, argument, valid, _ = CASES[name]
    ours, theirs = make(np.int64(valid)), make(valid)
    assert not isinstance(getattr(ours, argument, None), np.integer)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


@every_case
def test_what_is_too_small_is_refused_by_name(name: str) -> None:
    make, argument, _, least = CASES[name]
    for value in () if least is None else (least - 1, -3):
        with pytest.raises(ValueError) as refused:
            make(value)
        assert f"{argument}={value!r}" in str(refused.value)
