"""What is known already: priors that are right and wrong, and warm starts from another data set.

A perceptron of 32 units on 400 examples of digits and of mnist1d, 100 steps; rate, momentum, one L2
coefficient, dropout of the input, and the optimizer. A run's cost is the trials that it takes to
the score that half of the plain TPE runs of `TRIALS` reach; one that never does counts all of them.

* prior: at the best point of all plain runs (the truth), and at the farthest corner from it (wrong,
  the other optimizer too).
* warm_from: a sweep of digits for one of mnist1d, and back.

Before that the priors on a bowl in four logarithmic coordinates and a choice, with noise, which
trains nothing: trials to what half of the plain runs reach in 20, 30, 40 and 50 trials, over 100
seeds (20 are too few: a wrong prior cost a third there, and a seventh here).

  python -m benchmarks.knowledge [--quick] [--seeds 10] [--out FILE]

Full: a quarter of an hour on one core; quick: three seeds, two minutes.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import sklearn.datasets

import hypergrad as hg
from benchmarks.gauntlet_tasks import mnist1d
from hypergrad.knowledge.priors import with_priors
from hypergrad.knowledge.samplers import first_points
from hypergrad.study.sampler import make_sampler
from hypergrad.study.study import open_study

STEPS, BATCH, UNITS = 100, 50, 32
RANGES = {
    "rate": (1e-4, 1.0, "log"),
    "momentum": (0.5, 0.999, "reverse_log"),
    "l2": (1e-7, 1e-1, "log"),
    "noise": (1e-2, 2.0, "log"),
}
OPTIMIZERS = ["sgd", "adam"]


def space(believed: dict[str, Any] | None = None) -> hg.Space:
    """The space, with a prior on each of its hyperparameters or on none."""
    prior = (believed or {}).get
    floats = {n: hg.Float(*r, prior=prior(n)) for n, r in RANGES.items()}
    return hg.Space({"optimizer": hg.Categorical(OPTIMIZERS, prior=prior("optimizer")), **floats})


def digits() -> hg.Splits:
    """400, 400 and the rest of the digits."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return hg.Splits((x[:400], y[:400]), (x[400:800], y[400:800]), (x[800:], y[800:]))


TASKS = {"digits": digits, "mnist1d": lambda: mnist1d(400, 400, 1000)}


def make_problem(choices: dict[str, Any], inputs: int) -> hg.Problem:
    """A perceptron on inputs with Gaussian noise."""

    def init(key: jax.Array) -> Any:
        first, last = jax.random.split(key)
        return {
            "w1": jax.random.normal(first, (inputs, UNITS)) * (2 / inputs) ** 0.5,
            "b1": jnp.zeros(UNITS),
            "w2": jax.random.normal(last, (UNITS, 10)) * (1 / UNITS) ** 0.5,
            "b2": jnp.zeros(10),
        }

    def valid_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        x, y = batch
        logits = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def train_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        x, y = batch
        noisy = x + hyper["noise"] * jax.random.normal(key, x.shape)
        penalty = jnp.sum(params["w1"] ** 2) + jnp.sum(params["w2"] ** 2)
        return valid_loss(params, hyper, (noisy, y), key) + hyper["l2"] * penalty

    def optimizer(hyper: Any) -> Any:
        if choices["optimizer"] == "sgd":
            return optax.sgd(hyper["rate"], momentum=hyper["momentum"])
        return optax.adam(hyper["rate"], b1=hyper["momentum"])

    return hg.bilevel(init, train_loss, valid_loss, optimizer)


@dataclasses.dataclass
class Bench:
    """Sweeps of one task; `trials` each."""

    task: str
    trials: int

    def __post_init__(self) -> None:
        self.data = TASKS[self.task]()
        inputs = self.data.train[0].shape[1]
        # One problem per choice, so that all sweeps of a task would share it.
        self._problems = {o: make_problem({"optimizer": o}, inputs) for o in OPTIMIZERS}

    def sweep(self, seed: int, believed: dict[str, Any] | None = None, **options: Any) -> Any:
        """One sweep."""
        return hg.sweep(
            lambda choices: self._problems[choices["optimizer"]],
            space(believed),
            self.data,
            num_trials=self.trials,
            num_steps=STEPS,
            batch_size=BATCH,
            seed=seed,
            progress=False,
            **options,
        )


def best_so_far(result: Any) -> np.ndarray:
    """The lowest score after each trial."""
    scores = [np.inf if t.value is None else t.value for t in result.study.trials]
    return np.minimum.accumulate(scores)


def trials_to(curves: list[np.ndarray], target: float) -> list[int]:
    """The trials of each run until it is at the target; all of them where it never is."""
    return [int(np.argmax(c <= target)) + 1 if c[-1] <= target else len(c) for c in curves]


def farthest(values: dict[str, Any]) -> dict[str, Any]:
    """The corner of the space that is farthest from these values."""
    floats = {n: v for n, v in values.items() if n in RANGES}
    unit = jax.device_get(space().to_unit(floats))
    corner = {n: np.float32(0.02 if u > 0.5 else 0.98) for n, u in unit.items()}
    found = {n: float(v) for n, v in jax.device_get(space().from_unit(corner)).items()}
    return {"optimizer": next(o for o in OPTIMIZERS if o != values["optimizer"]), **found}


BEST = np.array([0.7, 0.35, 0.6, 0.2])
SLOPES = np.array([1.0, 0.6, 0.3, 0.15])


def bowl(believed: np.ndarray | None, choice: str, seed: int) -> np.ndarray:
    """The lowest score after each of 80 trials on the bowl, under a prior at these places."""
    names = [f"x{i}" for i in range(len(BEST))]
    at = [None] * len(names) if believed is None else [10 ** (4 * u - 4) for u in believed]
    floats = {n: hg.Float(1e-4, 1.0, "log", prior=p) for n, p in zip(names, at, strict=True)}
    prior = None if believed is None else choice
    space, rng = (
        hg.Space({"kind": hg.Categorical(["a", "b"], prior=prior), **floats}),
        np.random.default_rng(seed),
    )
    sampler, scores = with_priors(make_sampler("tpe", seed), space, seed), []
    with open_study(space, sampler=sampler, num_trials=80) as opened:
        for point in first_points(space, sampler, [], [], opened.study, 80):
            opened.enqueue(point)
        while proposal := opened.ask():
            places = np.array([np.log10(proposal.start[n]) / 4 + 1 for n in names])
            score = float(SLOPES @ (places - BEST) ** 2) + 0.15 * (proposal.choices["kind"] == "b")
            scores.append(score + 0.004 * rng.normal())
            opened.finish(proposal, scores[-1])
    return np.minimum.accumulate(scores)


def bowls(seeds: int) -> list[dict[str, Any]]:
    """Rows of the bowl's table, which is printed."""
    arms = {
        "plain TPE": (None, "a"),
        "prior at the truth": (BEST, "a"),
        "prior, off by .1": (BEST + 0.1, "a"),
        "prior, wrong": (np.where(BEST > 0.5, 0.02, 0.98), "b"),
    }
    runs = {arm: [bowl(*given, 200 + s) for s in range(seeds)] for arm, given in arms.items()}
    rows = []
    for arm, curves in runs.items():
        means = {}
        for trials in (20, 30, 40, 50):
            target = float(np.median([curve[trials - 1] for curve in runs["plain TPE"]]))
            means[trials] = float(np.mean(trials_to(curves, target)))
        rows.append({"task": "bowl", "arm": arm, "mean": means})
        print(f"{'bowl':<9}{arm:<22}" + "".join(f"{m:8.1f}" for m in means.values()), flush=True)
    return rows


def main(quick: bool = False, seeds: int = 10, out: str | None = None) -> None:
    """Prints the table."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    begin, rows = time.perf_counter(), []
    seeds, trials = (3, 24) if quick else (seeds, 40)
    # Each sweep makes its programs anew: what differs is the trials, not what is compiled.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rows += bowls(5 if quick else 100)
    benches = {name: Bench(name, trials) for name in TASKS}
    plain = {n: [bench.sweep(s) for s in range(seeds)] for n, bench in benches.items()}
    for name, bench in benches.items():
        other = next(n for n in benches if n != name)
        best = min((result.best for result in plain[name]), key=lambda b: b.score)
        arms: dict[str, dict[str, Any]] = {
            "prior at the truth": {"believed": best.hyper},
            "prior, wrong": {"believed": farthest(best.hyper)},
        }
        curves = [best_so_far(result) for result in plain[name]]
        target = float(np.median([curve[-1] for curve in curves]))
        for arm in ("plain TPE", f"warm_from {other}", *arms):
            runs = curves
            if arm in arms:
                runs = [best_so_far(bench.sweep(100 + s, **arms[arm])) for s in range(seeds)]
            elif arm != "plain TPE":
                sources = [[plain[other][s]] for s in range(seeds)]
                swept = [bench.sweep(100 + s, warm_from=x) for s, x in enumerate(sources)]
                runs = [best_so_far(result) for result in swept]
            spent = trials_to(runs, target)
            row = {"task": name, "arm": arm, "target": target, "trials": spent}
            row |= {"mean": float(np.mean(spent)), "final": float(np.mean([r[-1] for r in runs]))}
            rows.append(row)
            reached = sum(bool(r[-1] <= target) for r in runs)
            print(
                f"{name:<9}{arm:<22}trials to {target:.3f}: {row['mean']:5.1f} "
                f"({reached}/{seeds} reach it)   at the end {row['final']:.3f}",
                flush=True,
            )
    print(f"{seeds} seeds of {trials} trials, {time.perf_counter() - begin:.0f} s")
    if out:
        Path(out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out")
    options = parser.parse_args()
    main(options.quick, options.seeds, options.out)
