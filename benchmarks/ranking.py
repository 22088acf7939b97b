"""Rank all estimators on the same four problems: error, time, memory, and what they cannot see.

Run: `python -m benchmarks.ranking [--quick] [--out FILE]` (three minutes of one core).

`ridge`: the closed form of `hypergrad.testing`, converged (400 full steps). `digits`: softmax
regression with one L2 coefficient per class, 100 steps of gradient descent on 200 images, short of
convergence. `wu`: the learning rate of Wu et al.'s noisy quadratic (`benchmarks/horizon.py`), 300
steps, at a tenth of the best rate. `transformer`: one block of width 16 on a Markov chain of 12
letters, 50 steps of AdamW, an L2 coefficient and a label smoothing in the loss.
One hypergradient from a fresh start; float32. `error`: |grad - exact| / |exact|, exact the closed
form or reverse mode through the whole run; 0 is all digits. `time`: over that of training and one
validation, the median of interleaved rounds. `memory`: XLA's temporary memory in KiB. Refused: the
estimator says that it cannot see these hyperparameters. Estimators with a memory between calls
(SABA, F2SA, SelfTuning) get no other call than this one. SABA gets plain SGD and whole batches.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from benchmarks import command
from benchmarks.horizon import noisy_quadratic
from examples import digits200
from hypergrad.estimators.memory import compiled_for, temporary_bytes
from hypergrad.problem.structure import StructureError
from hypergrad.testing import ridge


class Case(NamedTuple):
    """One problem; `exact` None: reverse mode through the whole run. `rate`: of z's descent."""

    problem: hg.Problem
    hyper: Any
    train: Any
    valid: Any
    rate: float
    exact: Any = None


def estimators(rate: float) -> dict[str, hg.Estimator]:
    """All of them; step sizes are those that training has."""
    return {
        "Unrolled()": hg.Unrolled(),
        'Unrolled(checkpoint="sqrt")': hg.Unrolled(checkpoint="sqrt"),
        "Unrolled(window=10)": hg.Unrolled(window=10),
        "Unrolled(window=1)": hg.Unrolled(window=1),
        "Forward()": hg.Forward(),
        "Implicit(ConjugateGradient(20))": hg.Implicit(hg.ConjugateGradient(20), batches="last"),
        "Implicit(Nystrom(20))": hg.Implicit(hg.Nystrom(20, 1e-2), batches="last"),
        "Implicit(Neumann(20))": hg.Implicit(hg.Neumann(20, rate), batches="last"),
        "Implicit(Identity())": hg.Implicit(hg.Identity(), batches="last"),
        "Implicit(GMRES(20), fixed point)": hg.Implicit(
            hg.GMRES(20), of="fixed_point", batches="last"
        ),
        "SABA": hg.SABA(rate, blocks=1, steps=20),
        "F2SA": hg.F2SA(rate, 300.0),
        "SelfTuning": hg.SelfTuning(optax.sgd(rate), std=0.01),
        "Evolution(8)": hg.Evolution(8, 0.01, "es"),
        "FiniteDifference()": hg.FiniteDifference(),
    }


def whole(batch: Any, steps: int) -> hg.Minibatches:
    """The same batch in each step, as data that come again."""
    return hg.Minibatches(batch, jax.tree.leaves(batch)[0].shape[0], steps)


def closed_form() -> Case:
    """Ridge regression."""
    oracle = ridge()
    train = whole(jax.tree.map(lambda x: x[0], oracle.train), 400)
    return Case(oracle.problem, oracle.hyper, train, oracle.valid, 0.2, oracle.grad)


def digits() -> Case:
    """Ten L2 coefficients of softmax regression."""
    data = digits200.load()

    def fit(w: Any, batch: Any) -> jax.Array:
        return digits200.cross_entropy(batch[0] @ w, batch[1])

    problem = hg.bilevel(
        lambda key: jnp.zeros((64, 10)),
        lambda w, hyper, batch, key: fit(w, batch) + 0.5 * jnp.sum(hyper["l2"] * w**2),
        lambda w, hyper, batch, key: fit(w, batch),
        lambda hyper: optax.sgd(0.5),
    )
    return Case(problem, {"l2": jnp.full(10, 1e-2)}, whole(data.train, 100), data.valid, 0.5)


def wu() -> Case:
    """A learning rate."""
    train = hg.Minibatches(jnp.zeros((1, 1)), 1, 300)
    return Case(noisy_quadratic(), {"lr": jnp.float32(0.05)}, train, jnp.zeros(1), 0.05)


def transformer(width: int = 16, length: int = 16, letters: int = 12) -> Case:
    """One block of attention and a perceptron, with a penalty and a label smoothing."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(letters, 0.3), letters)
    text = np.zeros((2, 32, length + 1), np.int32)
    for t in range(length):
        for place in np.ndindex(2, 32):
            text[(*place, t + 1)] = rng.choice(letters, p=chain[text[(*place, t)]])
    shapes = {"qkv": (width, 3 * width), "out": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width), "head": (width, letters)}
    shapes |= {"letters": (letters, width), "place": (length, width)}

    def start(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(shapes))
        draw = jax.nn.initializers.lecun_normal()
        return {name: draw(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}

    def normal(x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, epsilon=1e-3)

    def logits(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["letters"][tokens] + p["place"]
        q, k, v = jnp.split(normal(x) @ p["qkv"], 3, -1)
        scores = q @ jnp.swapaxes(k, -1, -2) / np.sqrt(width)
        past = jnp.tril(jnp.ones((length, length), bool))
        x = x + jax.nn.softmax(jnp.where(past, scores, -1e9)) @ v @ p["out"]
        x = x + jax.nn.gelu(normal(x) @ p["up"]) @ p["down"]
        return normal(x) @ p["head"]

    def fit(p: Any, tokens: jax.Array, smoothing: Any) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(tokens[:, 1:], letters), smoothing)
        return optax.softmax_cross_entropy(logits(p, tokens[:, :-1]), targets).mean()

    def train_loss(p: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        penalty = 0.5 * hyper["l2"] * optax.tree.norm(p, squared=True)
        return fit(p, batch, hyper["smoothing"]) + penalty

    problem = hg.bilevel(
        start,
        train_loss,
        lambda p, hyper, batch, key: fit(p, batch, 0.0),
        lambda _: optax.adamw(0.01),
    )
    hyper = {"l2": jnp.float32(1e-3), "smoothing": jnp.float32(0.1)}
    return Case(problem, hyper, whole(jnp.asarray(text[0]), 50), jnp.asarray(text[1]), 0.05)


CASES = {"ridge": closed_form, "digits": digits, "wu": wu, "transformer": transformer}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """By estimator (error, seconds over those of training, KiB), or why it refuses."""
    key = jax.random.key(0)

    def gradient(estimator: hg.Estimator) -> Any:
        def run(hyper: Any, train: Any, valid: Any) -> Any:
            return hg.hypergradient(case.problem, hyper, None, train, valid, key, estimator).grad

        return run

    def training(hyper: Any, train: Any, valid: Any) -> Any:
        return hg.Window(case.problem, None, train, valid, key).objective(hyper)[0]

    arguments = case.hyper, case.train, case.valid
    programs: dict[str, Any] = {"training": compiled_for(training, *arguments)}
    rows: dict[str, Any] = {}
    for name, estimator in estimators(case.rate).items():
        try:
            programs[name] = compiled_for(gradient(estimator), *arguments)
        except (StructureError, ValueError) as error:
            rows[name] = str(error)
    found = {
        name: np.asarray(ravel_pytree(program(*arguments))[0], np.float64)
        for name, program in programs.items()
    }
    exact = found["Unrolled()"] if case.exact is None else ravel_pytree(case.exact)[0]
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            begin = time.process_time()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.process_time() - begin)
    plain = np.median(seconds["training"])
    for name in programs.keys() - {"training"}:
        error = float(np.linalg.norm(found[name] - exact) / np.linalg.norm(exact))
        ratio = float(np.median(seconds[name]) / plain)
        rows[name] = error, ratio, temporary_bytes(programs[name]) / 1024
    return rows


def shown(cell: Any) -> str:
    """A cell of the table."""
    if isinstance(cell, str):
        return "refused"
    error, ratio, memory = cell
    return f"{error:.0e}, {ratio:.1f}, {memory:,.0f}"


def main(quick: bool = False, out: str | None = None) -> dict[str, Any]:
    """Print the table; returns its cells by problem and estimator."""
    names = ["ridge", "wu"] if quick else list(CASES)
    rows = {name: measure(CASES[name](), 3 if quick else 7) for name in names}
    print("| estimator |", " | ".join(names), "|\n|" + "---|" * (len(names) + 1))
    for estimator in estimators(0.1):
        print(f"| {estimator} |", " | ".join(shown(rows[name][estimator]) for name in names), "|")
    for name in names:
        reasons: dict[str, list[str]] = {}
        for estimator, cell in rows[name].items():
            if isinstance(cell, str):
                reasons.setdefault(cell, []).append(estimator)
        for reason, refusing in reasons.items():
            print(f"{name}: {', '.join(refusing)}: {reason}")
    if out:
        Path(out).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    command.run(main, __doc__)
