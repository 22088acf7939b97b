"""Measure the hypergradient through every optimiser of optax against central differences.

Run: `python -m benchmarks.optimizers` (a few minutes; `main(quick=True)`: the first rows only).

A two-layer network of 6, 4 and 3 units with tanh, without biases, on 24 examples, two of whose
columns are constant (as the digits' are: a gradient that is exactly zero is what breaks Adam's
square root), batches of 8, 8 steps. Every optimiser has its default arguments apart from the
numbers in the second column.
`float64`: largest relative error over these numbers of `Unrolled()`, against the nearest of the
central differences over 1e-5, 1e-6 and 1e-7 of each (a sign or a clip that flips within a step
spoils that one); target 1e-4. `float32`: how far the same hypergradient in float32 is from float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg

STEPS = (1e-5, 1e-6, 1e-7)
NUM_STEPS = 8
TARGET = 1e-4
contrib = optax.contrib


class Row(NamedTuple):
    """One optimiser.

    Attributes:
      make: `hyper -> optax transformation`.
      hyper: the numbers that are differentiated.
      remark: what a user must know, for the table.
      done: steps taken before the differentiated ones, which then start from a given state.
    """

    make: Callable[[Any], optax.GradientTransformation]
    hyper: dict[str, float]
    remark: str = ""
    done: int = 0


def _row(
    optimizer: Callable[..., Any], hyper: dict[str, float], remark: str = "", **rest: Any
) -> Row:
    return Row(lambda h: optimizer(**h, **rest), hyper, remark)


LR, ADAM = {"learning_rate": 0.01}, {"learning_rate": 0.01, "b1": 0.9, "b2": 0.999}
NO_B2 = {"learning_rate": 0.01, "b1": 0.9}
ROWS: dict[str, Row] = {
    "sgd": _row(optax.sgd, {"learning_rate": 0.1}),
    "sgd, momentum": _row(optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}),
    "sgd, nesterov": _row(optax.sgd, {"learning_rate": 0.1, "momentum": 0.9}, nesterov=True),
    "adam": _row(optax.adam, ADAM),
    "adamw": _row(optax.adamw, ADAM | {"weight_decay": 0.1}),
    "nadam": _row(optax.nadam, ADAM),
    "nadamw": _row(optax.nadamw, ADAM | {"weight_decay": 0.1}),
    "amsgrad": _row(optax.amsgrad, ADAM),
    "adamax": _row(optax.adamax, ADAM),
    "adamaxw": _row(optax.adamaxw, ADAM | {"weight_decay": 0.1}),
    "adabelief": _row(optax.adabelief, ADAM),
    "adan": _row(optax.adan, {"learning_rate": 0.01, "b1": 0.98, "b2": 0.92, "b3": 0.99}),
    "yogi": _row(
        optax.yogi,
        ADAM,
        "b2's difference needs a step far below 1 - b2: 1e-5 is off by 1e-4, 1e-3 by 300 times",
    ),
    "lamb": _row(optax.lamb, ADAM | {"weight_decay": 0.1}),
    "lars": _row(optax.lars, {"learning_rate": 1.0, "weight_decay": 0.1, "momentum": 0.9}),
    "lion": _row(
        optax.lion,
        {"learning_rate": 0.01, "weight_decay": 0.1},
        "b1 and b2 act through signs alone: refused",
    ),
    "sign_sgd": _row(optax.sign_sgd, LR),
    "signum": _row(optax.signum, LR, "beta acts through signs alone: refused"),
    "rprop": _row(optax.rprop, LR, "from a fresh start only: later the rate lives in the state"),
    "adagrad": _row(optax.adagrad, {"learning_rate": 0.1}),
    "adadelta": _row(optax.adadelta, {"learning_rate": 1.0, "rho": 0.9, "weight_decay": 0.1}),
    "adafactor": _row(optax.adafactor, LR, "NaN in float32: give eps=1e-24 (below)"),
    "rmsprop": _row(optax.rmsprop, {"learning_rate": 0.01, "decay": 0.9}),
    "rmsprop, centered": _row(
        optax.rmsprop, {"learning_rate": 0.01, "decay": 0.9, "momentum": 0.9}, centered=True
    ),
    "novograd": _row(optax.novograd, {"learning_rate": 0.01, "b1": 0.9, "b2": 0.25}),
    "sm3": _row(optax.sm3, {"learning_rate": 0.1, "momentum": 0.9}),
    "fromage": _row(optax.fromage, LR),
    "noisy_sgd": _row(
        optax.noisy_sgd, {"learning_rate": 0.1, "eta": 0.01}, "draws other noise in float32", key=0
    ),
    "optimistic_gradient_descent": _row(
        optax.optimistic_gradient_descent, {"learning_rate": 0.1, "alpha": 1.0, "beta": 1.0}
    ),
    "optimistic_adam_v2": _row(optax.optimistic_adam_v2, NO_B2 | {"alpha": 1.0}),
    "polyak_sgd": _row(optax.polyak_sgd, {"max_learning_rate": 1.0, "scaling": 0.3}),
    "radam": _row(
        optax.radam, ADAM, "NaN unless 4 steps are done before the window (below)"
    )._replace(done=5),
    "acprop": _row(contrib.acprop, ADAM),
    "ademamix": _row(contrib.ademamix, ADAM | {"b3": 0.9999, "alpha": 5.0}),
    "simplified_ademamix": _row(contrib.simplified_ademamix, ADAM | {"alpha": 0.5}),
    "adopt": _row(contrib.adopt, {"learning_rate": 0.01, "b1": 0.9, "b2": 0.9999}),
    "cocob": _row(
        contrib.cocob, {"alpha": 100.0}, "invariant to its learning rate, whose gradient is truly 0"
    ),
    "dadapt_adamw": _row(contrib.dadapt_adamw, {"learning_rate": 1.0, "weight_decay": 0.1}),
    "dog": _row(
        contrib.dog,
        {"learning_rate": 0.9},
        "at the default 1.0 a maximum has a kink: the gradient is that of one side",
    ),
    "dowg": _row(contrib.dowg, {"learning_rate": 1.0}),
    "madgrad": _row(contrib.madgrad, {"learning_rate": 0.01, "momentum": 0.9}),
    "momo": _row(contrib.momo, {"learning_rate": 0.1, "beta": 0.9}),
    "momo_adam": _row(contrib.momo_adam, ADAM),
    "muon": _row(contrib.muon, {"learning_rate": 0.01, "beta": 0.95, "weight_decay": 0.1}),
    "prodigy": _row(
        contrib.prodigy,
        {"learning_rate": 1.0, "weight_decay": 0.1},
        "NaN in float32 where a gradient is exactly zero (below)",
    ),
    "schedule_free_sgd": _row(contrib.schedule_free_sgd, {"learning_rate": 0.1}),
    "schedule_free_adamw": _row(
        contrib.schedule_free_adamw, {"learning_rate": 0.01, "b2": 0.999, "weight_decay": 0.1}
    ),
    "mechanize(adam)": Row(
        lambda h: contrib.mechanize(optax.adam(h["learning_rate"])),
        {"learning_rate": 0.01},
    ),
    "lbfgs": _row(optax.lbfgs, {"learning_rate": 0.1}, "without line search", linesearch=None),
    "galore": _row(contrib.galore, {"learning_rate": 0.01}, rank=2),
}


def small_problem(optimizer: Any) -> tuple[hg.Problem, hg.Minibatches, Any]:
    """(problem, training data, validation batch), the same numbers in float32 and float64."""
    draw, floats = np.random.default_rng(0), jnp.result_type(float)
    inputs = draw.normal(size=(2, 24, 6))
    inputs[..., [0, 3]] = 0
    labels = jnp.asarray(draw.integers(0, 3, (2, 24)), jnp.int32)
    start = {"w": draw.normal(size=(6, 4)) / 2, "v": draw.normal(size=(4, 3)) / 2}
    inputs, start = jax.tree.map(lambda x: jnp.asarray(x, floats), (inputs, start))

    def cross_entropy(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        logits = jnp.tanh(batch[0] @ params["w"]) @ params["v"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = hg.bilevel(lambda key: start, cross_entropy, cross_entropy, optimizer)
    return problem, hg.Minibatches((inputs[0], labels[0]), 8, NUM_STEPS), (inputs[1], labels[1])


def hypergradient(row: Row, differences: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(`Unrolled()`'s gradient `[numbers]`, the differences `[steps, numbers]`) of a row."""
    problem, train, valid = small_problem(row.make)
    key = jax.random.key(2)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, row.hyper))
    moves = jnp.asarray([sign * step for step in STEPS for sign in (1, -1)])
    points = flat + moves[:, None, None] * jnp.diag(flat)  # [steps * signs, moved number, number]

    @jax.jit
    def run(flat: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        inner = None
        if row.done:
            hyper = unravel(flat)
            before = hg.Minibatches(train.arrays, train.batch_size, row.done)
            inner = hg.rollout(problem, hyper, problem.init(hyper, key), before, key)
        arguments = (inner, train, valid, key)
        grad = hg.hypergradient(problem, unravel(flat), *arguments).grad
        if not differences:
            return ravel_pytree(grad)[0], points[:, :, 0]
        window = hg.Window(problem, *arguments)
        loss = lambda flat: window.objective(unravel(flat))[0]  # noqa: E731
        return ravel_pytree(grad)[0], jax.vmap(jax.vmap(loss))(points)

    grad, losses = run(flat, points)
    up, down = np.asarray(losses)[::2], np.asarray(losses)[1::2]
    widths = np.einsum("sii->si", np.asarray(points[::2] - points[1::2]))
    return np.asarray(grad), (up - down) / widths


def error(row: Row) -> float:
    """The largest relative error over the row's numbers, each against its nearest difference."""
    with jax.enable_x64(True):
        grad, differences = hypergradient(row)
    return float(np.min(np.abs(grad / differences - 1), axis=0).max())


def float32_error(row: Row) -> float:
    """The same of float32 against float64; NaN where float32 is not finite."""
    grads = []
    for x64 in (True, False):
        with jax.enable_x64(x64):
            grads.append(hypergradient(row, differences=False)[0])
    return float(np.abs(grads[1] / grads[0] - 1).max())


def main(quick: bool = False) -> list[tuple[str, str, float, float]]:
    """Print and return the table's rows; `quick`: the first eight."""
    print("| optimiser | differentiated | float64 | float32 | remark |\n|---|---|---|---|---|")
    table = []
    for name, row in list(ROWS.items())[: 8 if quick else None]:
        table.append((name, ", ".join(row.hyper), error(row), float32_error(row)))
        print("| {} | {} | {:.0e} | {:.0e} | {} |".format(*table[-1], row.remark), flush=True)
    return table


if __name__ == "__main__":
    main()
