"""Measure whether `choose_estimator` chooses well: its choice against every fixed estimator.

Run: `python -m benchmarks.choice` (five minutes on two cores; `main(quick=True)` half).

Five tasks on digits. `scalars`: learning rate, momentum and decay of an MLP 64-128-128-10 over 100
steps. `long`: the same over 1000 steps in 32 MiB. `one`: the learning rate alone over 300 steps in
4 MiB. `weights`: one L2 coefficient for each of the 650 weights of softmax regression, 2000
full-batch steps, until stationary. `chaos`: `scalars` over 300 steps at learning rate 1.
An estimator is fit for a task if its program fits the memory and its hypergradient, in unit
coordinates, is within 10% of the exact one; for the chaotic task, if its norm is below 1e3.
Columns: whether it is fit, seconds per hypergradient without compiling (medians of interleaved
rounds). Target: the chosen one is fit and within 1.25 of the fastest fit one.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from benchmarks import momentum_task as task
from hypergrad.estimators.memory import compiled_for, temporary_bytes
from hypergrad.tuners.estimates import unit_estimate, unit_state

FIXED: tuple[hg.Estimator, ...] = (
    hg.Unrolled(),
    hg.Unrolled(checkpoint="step"),
    hg.Unrolled(checkpoint="sqrt"),
    hg.Forward(),
    hg.Implicit(hg.ConjugateGradient(20, tolerance=1e-3)),
    hg.Evolution(8, 0.03, "es"),
)
RATE = hg.Float(1e-4, 4.0, scale="log")


class Task(NamedTuple):
    """What `choose_estimator` is given."""

    problem: hg.Problem
    space: hg.Space
    hyper: Any
    train: Any
    valid: Any
    memory_limit: int | None = None
    chaotic: bool = False


def network(names: tuple[str, ...], values: dict[str, float]) -> Any:
    """The MLP with those of its three hyperparameters that are tuned."""

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return task.cross_entropy(params, *batch)

    def optimizer(hyper: Any) -> Any:
        full = values | hyper
        decay = optax.add_decayed_weights(full["weight_decay"])
        return optax.chain(decay, optax.sgd(full["learning_rate"], momentum=full["momentum"]))

    space = {
        "learning_rate": RATE,
        "momentum": hg.Float(0.5, 0.999, scale="reverse_log"),
        "weight_decay": hg.Float(1e-6, 1e-1, scale="log"),
    }
    problem = hg.bilevel(task.init, loss, loss, optimizer)
    return problem, hg.Space({n: space[n] for n in names}), {n: values[n] for n in names}


def softmax() -> Any:
    """Softmax regression with one penalty per weight."""

    def fit(w: Any, batch: Any) -> jax.Array:
        x, y = batch
        return task.cross_entropy([w[:64], w[64]], x, y)

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return fit(w, batch) + jnp.sum(hyper["l2"] * w**2)

    problem = hg.bilevel(
        lambda key: jnp.zeros((65, 10)),
        train_loss,
        lambda w, hyper, batch, key: fit(w, batch),
        lambda hyper: optax.sgd(0.3, momentum=0.9),
    )
    space = hg.Space({"l2": hg.Float(1e-5, 1.0, scale="log")})
    return problem, space, {"l2": jnp.full((65, 10), 3e-3)}


def tasks() -> dict[str, Task]:
    """All five."""
    train, valid = task.load()
    every = ("learning_rate", "momentum", "weight_decay")
    calm = {"learning_rate": 0.03, "momentum": 0.9, "weight_decay": 1e-3}
    wild = {"learning_rate": 1.0, "momentum": 0.9, "weight_decay": 1e-3}
    batches = lambda size, steps: hg.Minibatches(train, size, steps)  # noqa: E731
    few = network(("learning_rate",), calm)
    return {
        "scalars": Task(*network(every, calm), batches(128, 100), valid),
        "long": Task(*network(every, calm), batches(128, 1000), valid, 32 << 20),
        "one": Task(*few, batches(128, 300), valid, 4 << 20),
        "weights": Task(*softmax(), batches(1000, 2000), valid),
        "chaos": Task(*network(every, wild), batches(128, 300), valid, chaotic=True),
    }


def measure(this: Task, rounds: int) -> tuple[hg.Estimator, dict[hg.Estimator, Any]]:
    """The choice, and for each estimator (fit, seconds)."""
    key, unit = jax.random.key(0), this.space.to_unit(this.hyper)
    hyper = this.space.validate(this.hyper)
    chosen = hg.choose_estimator(
        this.problem,
        this.space,
        None,
        hyper,
        this.train,
        this.valid,
        key,
        memory_limit=this.memory_limit,
    )
    programs, grads = {}, {}
    for estimator in FIXED:
        if isinstance(estimator, hg.Forward) and ravel_pytree(hyper)[0].size > 10:
            continue  # minutes per hypergradient

        def gradient(unit: Any, train: Any, valid: Any, e: Any = estimator) -> Any:
            state = unit_state(e, this.problem, this.space, unit, None, key)
            window = hg.Window(this.problem, None, train, valid, key)
            estimate, _ = unit_estimate(e, window, this.space, unit, state)
            return ravel_pytree(estimate.grad)[0]

        try:
            arguments = (unit, this.train, this.valid)
            program = compiled_for(gradient, *arguments)
        except ValueError:
            continue  # refused: it cannot see these hyperparameters
        programs[estimator] = (program, arguments)
        grads[estimator] = (
            np.asarray(program(*arguments), np.float64),
            temporary_bytes(program),
        )
    exact = grads[hg.Unrolled()][0]
    seconds: dict[hg.Estimator, list[float]] = {e: [] for e in programs}
    for _ in range(rounds):
        for estimator, (program, arguments) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[estimator].append(time.perf_counter() - begin)
    rows = {}
    for estimator, (grad, needed) in grads.items():
        if this.chaotic:
            fit = bool(np.linalg.norm(grad) < 1e3)
        else:
            fit = bool(np.linalg.norm(grad - exact) <= 0.1 * np.linalg.norm(exact))
        fit &= this.memory_limit is None or needed <= this.memory_limit
        rows[estimator] = (fit, float(np.median(seconds[estimator])))
    return chosen, rows


def main(quick: bool = False) -> dict[str, float]:
    """Print the tables; returns the chosen estimator's cost over the best fit one's, by task."""
    ratios = {}
    for name, this in tasks().items():
        print(f"\n{name}")
        chosen, rows = measure(this, 3 if quick else 7)
        for estimator, (fit, seconds) in rows.items():
            mark = "chosen" if estimator == chosen else ""
            print(f"{'fit' if fit else '   '} {seconds:9.3f} s  {mark:7} {estimator}", flush=True)
        best = min(seconds for fit, seconds in rows.values() if fit)
        fit, seconds = rows.get(chosen, (False, float("inf")))
        ratios[name] = seconds / best if fit else float("inf")
        missed = "" if ratios[name] <= 1.25 else "   MISSED"
        print(f"cost over the best: {ratios[name]:.2f}{missed}")
    return ratios


if __name__ == "__main__":
    main()
