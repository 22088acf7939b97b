"""Every public callable under a table of wrong values: each is refused by its argument's name."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.population.population import Population
from hypergrad.search.schedulers import brackets
from hypergrad.study.study import open_study

NAN, INF = float("nan"), float("inf")
KEY = jax.random.key(0)
X = jnp.arange(8.0)
TRAIN, VALID = X.reshape(2, 4), X
SPACE = hg.Space({"rate": hg.Float(1e-3, 1.0, scale="log")})
HYPER = {"rate": jnp.float32(0.1)}
INFOS = [SimpleNamespace(hyper=HYPER, loss=1.0, norm=1.0)] * 4


def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.mean((w - batch) ** 2)


def start(key: Any) -> jax.Array:
    return jnp.zeros(())


def sgd(hyper: Any) -> Any:
    return optax.sgd(hyper["rate"])


PROBLEM = hg.bilevel(start, loss, loss, sgd)
TUNER = hg.alternating(PROBLEM, SPACE)
STATE = TUNER.init(HYPER, KEY)
SPLITS = hg.Splits(X, X, X)
GIVEN = (PROBLEM, HYPER, None, TRAIN, VALID, KEY)


def given(function: Callable[..., Any], **good: Any) -> Callable[..., Any]:
    """`function` with these arguments, of which a call replaces some."""
    return lambda **wrong: function(**(good | wrong))


def problem_of(**arguments: Any) -> Any:
    """A problem, used once: some mistakes show when it is."""
    problem = given(hg.bilevel, init_params=start, train_loss=loss, valid_loss=loss, optimizer=sgd)
    return hg.hypergradient(problem(**arguments), HYPER, None, TRAIN, VALID, KEY)


def started(tune: Callable[..., Any]) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        tuner = given(tune, problem=PROBLEM, space=SPACE)(**arguments)
        return jax.jit(tuner.update)(tuner.init(HYPER, KEY), TRAIN, VALID)

    return run


def opened(**arguments: Any) -> None:
    given(open_study, space=SPACE, num_trials=2, seed=None)(**arguments).close()


@functools.cache
def result() -> Any:
    return sweep()


def sweep(**arguments: Any) -> Any:
    return given(
        hg.sweep,
        make_problem=lambda choices: PROBLEM,
        space=SPACE,
        data=SPLITS,
        num_trials=1,
        num_steps=4,
        batch_size=4,
        sampler="random",
        progress=False,
    )(**arguments)


def hypergradient_of(estimator: Any) -> Any:
    return hg.hypergradient(*GIVEN, estimator=estimator)


class NoState(hg.Estimator):
    def estimate(self, window: Any, hyper: Any, state: Any) -> Any:
        return hg.Unrolled().estimate(window, hyper, state)[0]


NOT_INTEGERS = (0, -1, 1.5, "3", None, True, [2])
NOT_POSITIVE = (0, -1, NAN, "a", None, True, [1.0])
NOT_A_PROBLEM = (None, 3, SPACE, lambda choices: PROBLEM)
NOT_A_SPACE = (None, 3, {"rate": 0.1}, PROBLEM)
NOT_FUNCTIONS = (None, 3, "loss")
NOT_ESTIMATORS = (None, 3, "best", hg.Unrolled)
NOT_OPTIMISERS = (0.01, "adam", optax.adam)
NOT_TRUST = (3, None, "always", hg.Trust)
NOT_KEYS = (None, "key", 1.5)
NOT_TEXTS = ("best", 3, None)
NOT_FLAGS = ("yes", 2, None)
NOT_PATHS = (3, None, "", True, ["run"])

# By callable: what gives it all that it needs, and wrong values by argument.
TABLE: dict[str, tuple[Callable[..., Any], dict[str, tuple[Any, ...]]]] = {
    "Float": (
        given(hg.Float, low=0.1, high=1.0),
        {
            "low": (NAN, INF, "a", 2.0, [0.1], True),
            "high": (NAN, "a", 0.05, True),
            "scale": ("logarithmic", 3, None),
            "when": (3, "sgd", ["sgd"]),
            "prior": (NAN, INF, "a", 2.0, 0.05, [0.5], True),
        },
    ),
    "Int": (
        given(hg.Int, low=1, high=9),
        {
            "low": (1.5, "a", None, 10),
            "high": (2.5, "a", None, 0),
            "scale": ("square", 3),
            "prior": (0, 10, 2.5, "a", [3], True),
            "traced": (3, "yes", None),
        },
    ),
    "Categorical": (
        given(hg.Categorical, choices=["a", "b"]),
        {"choices": ([], 3, "ab", None, ["a", "a"]), "when": (3, "sgd"), "prior": (3, "c", ["a"])},
    ),
    "Space": (
        given(hg.Space, dimensions={"rate": hg.Float(0.0, 1.0)}),
        {"dimensions": (None, 3, ["rate"], {"rate": 0.1}, {3: hg.Float(0.0, 1.0)})},
    ),
    "Minibatches": (
        given(hg.Minibatches, arrays=X, batch_size=4, num_steps=2),
        {
            "arrays": (3.0, (), (X, X[:3]), None),
            "batch_size": (*NOT_INTEGERS, 9),
            "num_steps": NOT_INTEGERS,
        },
    ),
    "bilevel": (
        problem_of,
        {
            "init_params": (None, 3, {"w": 1.0}),
            "train_loss": NOT_FUNCTIONS,
            "valid_loss": NOT_FUNCTIONS,
            "optimizer": (None, 3, optax.sgd(0.1), optax.sgd, lambda hyper: 0.1),
            "absorb": (3, "state"),
            "metrics": (3, "accuracy"),
            "trainable": (3, "params"),
        },
    ),
    "alternating": (
        started(hg.alternating),
        {
            "problem": NOT_A_PROBLEM,
            "space": NOT_A_SPACE,
            "estimator": (*NOT_ESTIMATORS, NoState()),
            "outer_optimizer": NOT_OPTIMISERS,
            "max_move": NOT_POSITIVE,
            "trust": NOT_TRUST,
        },
    ),
    "restarting": (
        started(hg.restarting),
        {
            "problem": NOT_A_PROBLEM,
            "space": NOT_A_SPACE,
            "estimator": (*NOT_ESTIMATORS, NoState()),
            "outer_optimizer": NOT_OPTIMISERS,
            "num_seeds": NOT_INTEGERS,
            "fresh_seeds": NOT_FLAGS,
            "max_move": NOT_POSITIVE,
            "trust": NOT_TRUST,
        },
    ),
    "init": (
        given(TUNER.init, hyper=HYPER, key=KEY),
        {"hyper": (None, 3, {}, {"other": 0.1}, {"rate": "a"}, {"rate": 7.0}), "key": NOT_KEYS},
    ),
    "hypergradient": (
        given(
            hg.hypergradient,
            problem=PROBLEM,
            hyper=HYPER,
            inner=None,
            train=TRAIN,
            valid=VALID,
            key=KEY,
        ),
        {
            "problem": NOT_A_PROBLEM,
            "hyper": ({"rate": 1}, {"rate": "a"}, {"other": 0.1, "rate": 0.1}),
            "inner": (3, "state"),
            "train": (None, 3.0, (), [3.0]),
            "key": NOT_KEYS,
            "estimator": (*NOT_ESTIMATORS, NoState()),
        },
    ),
    "check_hypergradient": (
        given(
            hg.check_hypergradient,
            problem=PROBLEM,
            hyper=HYPER,
            inner=None,
            train=TRAIN,
            valid=VALID,
            key=KEY,
        ),
        {
            "problem": NOT_A_PROBLEM,
            "estimator": (3, hg.Unrolled),
            "space": (3, {"rate": 0.1}),
            "rtol": (-1, NAN, "a"),
            "max_entries": NOT_INTEGERS,
            "key": NOT_KEYS,
        },
    ),
    "choose_estimator": (
        given(
            hg.choose_estimator,
            problem=PROBLEM,
            space=SPACE,
            hyper=HYPER,
            inner=None,
            train=TRAIN,
            valid=VALID,
            key=KEY,
        ),
        {
            "problem": NOT_A_PROBLEM,
            "space": NOT_A_SPACE,
            "memory_limit": (0, -1, "a"),
            "validate_at": ("first", 3, 0.0, 1.5),
        },
    ),
    "metasmoothness": (
        given(hg.metasmoothness, problem=PROBLEM, hyper=HYPER, train=TRAIN, key=KEY),
        {
            "problem": NOT_A_PROBLEM,
            "hyper": (None, {}, {"rate": 1}, {"rate": "a"}),
            "train": (None, 3.0, (), [3.0], iter([X])),
            "key": NOT_KEYS,
            "direction": (3.0, {"rate": "a"}, {"rate": 0.0}, {"rate": NAN}, {"speed": 0.1}),
        },
    ),
    "attribution": (
        given(
            hg.attribution,
            problem=PROBLEM,
            hyper=HYPER,
            train=TRAIN,
            tests=[VALID],
            key=KEY,
            check=False,
        ),
        {
            "problem": NOT_A_PROBLEM,
            "hyper": (None, {}, {"rate": 1}, {"rate": "a"}),
            "train": (None, 3.0, (), [3.0], iter([X])),
            "tests": (None, 3, "all", {"x": X}, [], ["a"]),
            "key": NOT_KEYS,
            "estimator": (*NOT_ESTIMATORS, NoState()),
            "chunk": NOT_INTEGERS,
            "check": NOT_FLAGS,
        },
    ),
    "Unrolled": (
        hg.Unrolled,
        {
            "window": (0, -1, 1.5, "3", True),
            "checkpoint": NOT_TEXTS,
            "validate_at": ("first", -0.5, 0.0, 1.5, NAN, None, True),
            "memory_limit": (0, -1, "a", NAN),
        },
    ),
    "Forward": (
        hg.Forward,
        {
            "chunk": (0, -1, 1.5, "3"),
            "validate_at": ("first", -0.5, 0.0, NAN, None),
            "carry": NOT_FLAGS,
        },
    ),
    "Implicit": (
        hg.Implicit,
        {
            "solver": (3, "cg", hg.ConjugateGradient),
            "of": NOT_TEXTS,
            "batches": NOT_TEXTS,
        },
    ),
    "Evolution": (
        given(hg.Evolution, pairs=2, std=0.1),
        {
            "pairs": NOT_INTEGERS,
            "std": NOT_POSITIVE,
            "method": NOT_TEXTS,
            "validate_at": ("first", -0.5, 0.0, 1.5),
        },
    ),
    "FiniteDifference": (
        hg.FiniteDifference,
        {"step": NOT_POSITIVE, "validate_at": ("first", -0.5, 0.0, 1.5)},
    ),
    "custom_root": (
        given(hg.custom_root, optimality=lambda x, a: x - a),
        {
            "optimality": NOT_FUNCTIONS,
            "solver": (None, 3, "cg", hg.GMRES),
            "max_residual": (0, -1, NAN, "a", True),
        },
    ),
    "custom_fixed_point": (
        given(hg.custom_fixed_point, map=lambda x, a: a),
        {
            "map": NOT_FUNCTIONS,
            "solver": (None, 3, "cg", hg.GMRES),
            "max_residual": (0, -1, NAN, "a", True),
        },
    ),
    "BiCGSTAB": (
        hg.BiCGSTAB,
        {
            "max_steps": NOT_INTEGERS,
            "damping": (-1, NAN, "a", None),
            "tolerance": (-1, NAN, "a", None),
        },
    ),
    "Cholesky": (hg.Cholesky, {"damping": (-1, NAN, "a", None)}),
    "Preconditioned": (
        given(hg.Preconditioned, solver=hg.GMRES()),
        {
            "solver": (None, 3, "cg", hg.GMRES),
            "diagonal": ("jacobi", 3, None),
            "probes": NOT_INTEGERS,
            "rounds": NOT_INTEGERS,
            "floor": NOT_POSITIVE,
        },
    ),
    "Mixed": (
        given(hg.Mixed, options={"a": jnp.tanh, "b": jnp.sin}),
        {
            "options": (None, 3, "relu", [], {}, {"a": jnp.tanh}, {"a": 1, "b": 2}),
            "temperature": NOT_POSITIVE,
        },
    ),
    "SABA": (
        given(hg.SABA, step_size=0.1, blocks=2),
        {
            "step_size": NOT_POSITIVE,
            "blocks": NOT_INTEGERS,
            "valid_blocks": NOT_INTEGERS,
            "steps": NOT_INTEGERS,
        },
    ),
    "F2SA": (
        given(hg.F2SA, step_size=0.1),
        {"step_size": NOT_POSITIVE, "multiplier": NOT_POSITIVE},
    ),
    "SelfTuning": (
        given(hg.SelfTuning, optimizer=optax.sgd(0.1)),
        {
            "optimizer": (None, 3, "adam", optax.adam),
            "std": NOT_POSITIVE,
            "samples": NOT_INTEGERS,
            "form": ("rows", 3, None),
        },
    ),
    "Neumann": (hg.Neumann, {"terms": NOT_INTEGERS, "step_size": NOT_POSITIVE}),
    "ConjugateGradient": (
        hg.ConjugateGradient,
        {
            "max_steps": NOT_INTEGERS,
            "damping": (-1, NAN, "a", None),
            "tolerance": (-1, NAN, "a", None),
            "warm_start": NOT_FLAGS,
        },
    ),
    "GMRES": (
        hg.GMRES,
        {
            "max_steps": NOT_INTEGERS,
            "cycles": NOT_INTEGERS,
            "damping": (-1, NAN, "a"),
            "tolerance": (-1, NAN, "a", None),
        },
    ),
    "Nystrom": (hg.Nystrom, {"rank": NOT_INTEGERS, "damping": NOT_POSITIVE}),
    "Richardson": (
        hg.Richardson,
        {"steps": NOT_INTEGERS, "step_size": NOT_POSITIVE, "warm_start": NOT_FLAGS},
    ),
    "Trust": (
        hg.Trust,
        {
            "max_spike": NOT_POSITIVE,
            "max_growth": NOT_POSITIVE,
            "max_loss": NOT_POSITIVE,
            "max_residual": NOT_POSITIVE,
            "warm_up": (-1, 1.5, "3", None),
        },
    ),
    "Refine": (
        hg.Refine,
        {
            "estimator": NOT_ESTIMATORS,
            "outer_optimizer": NOT_OPTIMISERS,
            "steps_per_update": [value for value in NOT_INTEGERS if value is not None],
            "max_move": NOT_POSITIVE,
            "trust": NOT_TRUST,
        },
    ),
    "norm_adam": (
        given(hg.norm_adam, learning_rate=0.1),
        {
            "learning_rate": (0, -1, NAN, "a", None, True),
            "b1": (2, -0.1, 1.0, NAN, "a", None),
            "b2": (2, -0.1, 1.0, NAN, "a", None),
        },
    ),
    "hypergradient_descent": (
        given(
            hg.hypergradient_descent,
            optimizer_factory=optax.sgd,
            learning_rate=0.1,
            hyper_learning_rate=0.1,
        ),
        {
            "optimizer_factory": (None, 3, optax.sgd(0.1)),
            "learning_rate": (0, -1, NAN, "a", None),
            "hyper_learning_rate": (0, -1, NAN, "a", None),
            "rule": NOT_TEXTS,
            "min_learning_rate": (-1, NAN, "a", None),
        },
    ),
    "piecewise_linear": (
        given(hg.piecewise_linear, values=[0.0, 1.0], num_steps=4),
        {"values": ("a", 3.0, [1.0], None), "num_steps": (0, -1, NAN, "a")},
    ),
    "piecewise_constant": (
        given(hg.piecewise_constant, values=[0.1, 0.2], steps_each=2),
        {"values": ("a", 3.0, None), "steps_each": NOT_INTEGERS},
    ),
    "piecewise_cosine": (
        given(hg.piecewise_cosine, values=[0.0, 1.0], num_steps=4),
        {"values": ("a", 3.0, [1.0], None), "num_steps": (0, -1, NAN, "a")},
    ),
    "polynomial_decay": (
        given(hg.polynomial_decay, initial=0.1, final=0.0, power=2.0, num_steps=4),
        {"initial": ("a", None), "final": ("a", None), "num_steps": (0, -1, NAN, "a")},
    ),
    "prox": (
        given(hg.prox, optimizer=optax.sgd(0.1), penalty=hg.prox.l1(0.1)),
        {"optimizer": (None, 3, optax.sgd), "penalty": (None, 3, 0.1)},
    ),
    "warmup_cosine": (
        given(hg.warmup_cosine, peak=0.1, warmup_steps=2, decay_steps=8),
        {"peak": ("a", None), "warmup_steps": (-1, NAN, "a", 9), "decay_steps": (0, -1, NAN, "a")},
    ),
    "exponential_decay": (
        given(hg.exponential_decay, initial=0.1, rate=0.5, transition_steps=2),
        {
            "initial": ("a", None),
            "rate": ("a", None, -0.5, NAN),
            "transition_steps": (0, -1, NAN, "a"),
        },
    ),
    "scale_by_tree": (
        lambda **wrong: hg.scale_by_tree(**wrong).update({"a": X}, ()),
        {"rates": ({"b": 1.0}, "a", None)},
    ),
    "decay_by_tree": (
        lambda **wrong: hg.decay_by_tree(**wrong).update({"a": X}, (), {"a": X}),
        {"weight_decay": ({"b": 1.0}, "a", None)},
    ),
    "dropout": (
        given(hg.dropout, x=X, rate=0.5, key=KEY),
        {
            "x": ("a", jnp.arange(3), None),
            "rate": (-0.1, 1.0, NAN, "a", None),
            "key": NOT_KEYS,
            "form": ("normal", 3, None),
        },
    ),
    "fit": (
        given(hg.fit, tuner=TUNER, state=STATE, train=TRAIN, valid=VALID, num_updates=1),
        {
            "tuner": (None, 3, PROBLEM, TUNER.update),
            "state": (None, 3, {}, HYPER),
            "train": (None, 3, X, hg.Minibatches, {"x": "cat"}),
            "valid": (None, 3, "cat", TRAIN[None]),
            "num_updates": NOT_INTEGERS,
            "steps_per_update": (0, -1, 1.5, "3", 5),
            "callbacks": (print, 3, "log", [3], [hg.Checkpoint]),
            "checkpoint": (3, "", True, ["run"], 1.5),
        },
    ),
    "Checkpoint": (
        given(hg.Checkpoint, folder="run"),
        {
            "folder": (*NOT_PATHS, "missing/run", b"run", "a\0b"),
            "every": NOT_INTEGERS,
            "keep": NOT_INTEGERS,
        },
    ),
    "tune": (
        given(
            hg.tune,
            problem=PROBLEM,
            space=SPACE,
            data=SPLITS,
            start={"rate": 0.1},
            num_steps=16,
            batch_size=4,
            budget=1.0,
            progress=False,
        ),
        {
            "problem": (None, 3, SPACE),
            "space": (None, 3, {"rate": 0.1}, PROBLEM, hg.Space({})),
            "data": (None, 3, (X, X, X), hg.Splits(X, None), hg.Splits(X, X[:0])),
            "start": (3, "rate", [], {"speed": 1.0}, [{"rate": 5.0}]),
            "num_steps": (*NOT_INTEGERS, 4),
            "batch_size": (*NOT_INTEGERS, 9),
            "budget": (0, -1, 0.5, NAN, "6", None),
            "seed": (None, 1.5, -1, "0"),
            "progress": (3, "yes", None),
            "checkpoint": (3, True, "missing/a/b"),
        },
    ),
    "sweep": (
        sweep,
        {
            "make_problem": (None, 3, PROBLEM, lambda choices: 3, lambda: PROBLEM),
            "space": (None, 3, {"rate": 0.1}, PROBLEM),
            "data": (
                None,
                3,
                (X, X, X),
                hg.Splits(X, None),
                hg.Splits(None, X),
                hg.Splits(3.0, X),
                hg.Splits(X, X[:0]),
                hg.Splits(X, X, X[:0]),
            ),
            "num_trials": NOT_INTEGERS,
            "num_steps": (*NOT_INTEGERS, "rate", lambda c: 0, lambda c: c["no"], lambda: 4),
            "batch_size": (*NOT_INTEGERS, 9, "rate", lambda c: 9, lambda c: "4"),
            "refine": (3, True, hg.Unrolled(), hg.Refine),
            "sampler": ("best", 3, None),
            "scheduler": (3, "hyperband", hg.Hyperband),
            "storage": (3, "sweep.txt", b"a.journal", "missing/a.journal", True),
            "population": NOT_INTEGERS,
            "metric": ("accuracy", 3),
            "direction": ("up", 3, None, "maximize"),
            "objectives": (
                3,
                ["loss"],
                {},
                {"loss": "down"},
                {"other": "minimize"},
                {3: "minimize"},
            ),
            "constraints": (3, ["loss"], {"loss": "a"}, {"loss": NAN}, {"other": 1.0}, {3: 1.0}),
            "warm_from": (3, "a.journal", None, [3], [None], ["missing/a.journal"], {"a": 1}),
            "told": ("first", 3, None),
            "timeout": (0, -1, NAN, "60", True),
            "max_evaluations": (0, -1, NAN, "60", True),
            "callbacks": (print, 3, "stop", [3], [hg.Checkpoint], [lambda study: None]),
            "checkpoint": (3, True, "", "missing/a/b"),
            "polish": (-1, 1.5, "3", None, 1),
            "enqueue": (3, [3], [{"other": 1}], [{"rate": 7.0}], None, {"rate": 0.1}),
            "seed": (None, 1.5, "a", -1),
            "name": (3, None, ""),
            "progress": NOT_FLAGS,
        },
    ),
    "open_study": (
        opened,
        {
            "space": (None, 3, {"rate": 0.1}, PROBLEM),
            "storage": (3, "sweep.txt", b"a.journal"),
            "sampler": ("best", 3, None),
            "direction": ("up", 3, None),
            "seed": (1.5, "a", -1),
            "name": (3, None, ""),
            "num_trials": (0, -1, 1.5, "3", True),
            "grid_points": (1, 1.5, "3", None),
            "beat_every": (0, -1, NAN, "a", None),
            "grace": (0, -1, NAN, "a", None),
            "max_retries": (-1, 1.5, "3"),
        },
    ),
    "Hyperband": (
        given(hg.Hyperband, min_steps=1),
        {"min_steps": NOT_INTEGERS, "eta": (1, *NOT_INTEGERS)},
    ),
    "SuccessiveHalving": (
        given(hg.SuccessiveHalving, min_steps=1),
        {"min_steps": NOT_INTEGERS, "eta": (1, *NOT_INTEGERS)},
    ),
    "ASHA": (
        given(hg.ASHA, min_steps=1),
        {"min_steps": NOT_INTEGERS, "eta": (1, *NOT_INTEGERS)},
    ),
    "LearningCurves": (
        given(hg.LearningCurves, min_steps=1),
        {
            "min_steps": NOT_INTEGERS,
            "points": (1, *NOT_INTEGERS),
            "probability": (0, -0.1, 0.6, NAN, "a", None),
        },
    ),
    "PopulationBasedTraining": (
        given(hg.PopulationBasedTraining, every=1),
        {
            "every": NOT_INTEGERS,
            "fraction": (0, -0.1, 0.6, NAN, "a", None),
            "perturb": (-0.1, 2, NAN, "a", None),
            "resample": (-0.1, 2, NAN, "a", None),
        },
    ),
    "brackets": (
        given(brackets, scheduler=None, num_steps=4, num_trials=2),
        {"num_steps": NOT_INTEGERS, "num_trials": NOT_INTEGERS, "scheduler": (3, "hyperband")},
    ),
    "Population": (
        given(
            Population,
            problem=PROBLEM,
            space=SPACE,
            refine=None,
            train=X,
            valid=X,
            batch_size=4,
        ),
        {"batch_size": (*NOT_INTEGERS, 9), "steps_per_update": (0, -1, 1.5, "3")},
    ),
    "learned_schedule": (
        given(hg.learned_schedule, history=[HYPER] * 4, steps_per_update=2),
        {"history": ([], 3, None), "steps_per_update": NOT_INTEGERS},
    ),
    "settled_schedule": (
        given(hg.settled_schedule, space=SPACE, history=[HYPER] * 4, steps_per_update=2),
        {
            "space": NOT_A_SPACE,
            "history": ([], [HYPER] * 3, 3, None),
            "steps_per_update": NOT_INTEGERS,
        },
    ),
    "audit": (
        lambda **wrong: result().audit(**wrong),
        {"seeds": NOT_INTEGERS, "hyper": ({}, {"other": 1}, {"rate": 7.0}, 3)},
    ),
    "confirm": (
        lambda **wrong: result().confirm(**wrong),
        {"seeds": NOT_INTEGERS, "count": NOT_INTEGERS},
    ),
    "retrain": (
        lambda **wrong: result().retrain(**wrong),
        {"hyper": ({}, {"other": 1}, {"rate": 7.0}, 3), "seed": (None, 1.5, -1, "0", 2**32)},
    ),
    "save": (
        lambda **wrong: result().save(**({"folder": "network"} | wrong)),
        {"folder": (*NOT_PATHS, "missing/a/b"), "hyper": ({}, {"rate": 7.0}), "seed": (None, -1)},
    ),
    "load": (
        lambda **wrong: hg.load(**({"folder": result().save("network")} | wrong)),
        {"folder": (*NOT_PATHS, "missing"), "like": (3, HYPER, STATE)},
    ),
    "top": (lambda **wrong: result().top(**wrong), {"count": (-1, 1.5, "3", None)}),
    "table": (lambda **wrong: result().table(**wrong), {"count": (-1, 1.5, "3", None)}),
    "JSONLines": (hg.callbacks.JSONLines, {"path": (3, None, "missing/a.jsonl", "", True)}),
    "TensorBoard": (hg.callbacks.TensorBoard, {"folder": NOT_PATHS}),
    "MLflow": (
        given(hg.callbacks.MLflow, experiment="e", run="r"),
        {
            "experiment": (3, None, ""),
            "run": (3, None, ""),
            "params": (3, "seed"),
            "tracking_uri": (3, True),
        },
    ),
}
CASES = {
    # Without addresses, which differ between the workers of one test run.
    f"{name}({argument}={re.sub(r' at 0x.*', '', str(value))[:30]!r}, {i})": (make, argument, value)
    for name, (make, wrong) in TABLE.items()
    for argument, values in wrong.items()
    for i, value in enumerate(values)
}


def test_the_table_is_of_all_that_is_public() -> None:
    assert len(CASES) > 400
    functions = {n for n in [*hg.__all__, *hg._LATER] if callable(getattr(hg, n))}
    # Containers of results, what users subclass, and what is called within a trace only.
    without = {"Estimate", "Estimator", "Identity", "Inner", "Problem", "Schedule", "Splits"}
    without |= {"Tuner", "Window", "inner_gradient", "nonzero_gradient", "replay", "rollout"}
    assert functions - without <= TABLE.keys(), functions - without - TABLE.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_value_is_refused_by_name(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, argument, value = CASES[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError)) as error:
        make(**{argument: value})
    text = str(error.value)
    assert {"dimensions": "Space"}.get(argument, argument) in text, text
    assert len(text) < 1500


@pytest.mark.parametrize("name", TABLE)
def test_right_values_are_taken(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """What is refused above is refused for the wrong value and for nothing else."""
    monkeypatch.chdir(tmp_path)
    good = {"scale_by_tree": {"rates": 1.0}, "decay_by_tree": {"weight_decay": 0.1}}
    good |= {"JSONLines": {"path": "a.jsonl"}, "TensorBoard": {"folder": "a"}}
    TABLE[name][0](**good.get(name, {}))
    assert np.isfinite(float(HYPER["rate"]))
