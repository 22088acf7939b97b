"""Measure how exact the exact estimators are.

Run: `python -m benchmarks.closed_forms` (about a minute on one core; `main(quick=True)` half).

`closed forms`: relative error of the hypergradient (the largest over hyperparameters, each relative
to its own reference) on ridge regression (400 steps of gradient descent) and on a quadratic under
momentum (15 steps), whose hypergradients NumPy gives in closed form: targets 1e-10 in float64, 1e-5
in float32.
`differences`: the same against central differences in float64 on the digits network of
`examples/digits200.py` (flax, batches of 64), target 1e-6, without dropout: a rate's derivative is
right in expectation only, not key by key. SGD has learning rate, momentum and L2 per layer; AdamW
learning rate, both betas, weight decay and L2 per layer. The difference moves each hyperparameter
by 1e-5 of its value and the activation is tanh. With relu (the example's) training is not smooth: a
difference that moves a unit across its kink is off by 1e-2 or more, under AdamW above all. There
the nearest of the differences over 1e-5, 1e-6 and 1e-7 is taken for every hyperparameter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from examples import digits200
from hypergrad.testing.contract import Oracle, momentum_quadratic, relative_error, ridge

EXACT: dict[str, hg.Estimator] = {
    "Unrolled()": hg.Unrolled(),
    'Unrolled(checkpoint="step")': hg.Unrolled(checkpoint="step"),
    'Unrolled(checkpoint="sqrt")': hg.Unrolled(checkpoint="sqrt"),
    "Forward()": hg.Forward(),
}
TARGETS = {"float64": 1e-10, "float32": 1e-5}
DIFFERENCE_TARGET = 1e-6
STEPS = (1e-5, 1e-6, 1e-7)
L2 = [1e-4, 1e-3, 1e-2]
OPTIMIZERS: dict[str, tuple[Callable[[Any], optax.GradientTransformation], dict[str, Any]]] = {
    "SGD, momentum": (
        lambda hyper: optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
        {"learning_rate": 1e-2, "momentum": 0.9, "l2": L2},
    ),
    "AdamW": (
        lambda hyper: optax.adamw(
            hyper["learning_rate"], hyper["b1"], hyper["b2"], weight_decay=hyper["decay"]
        ),
        {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "decay": 1e-2, "l2": L2},
    ),
}


def estimate(oracle: Oracle, estimator: hg.Estimator) -> Any:
    """The hypergradient of a problem whose answer is known, compiled as a whole."""
    arguments = (oracle.hyper, None, oracle.train, oracle.valid, oracle.key, estimator)
    return jax.jit(lambda: hg.hypergradient(oracle.problem, *arguments).grad)()


def closed_forms() -> list[tuple[Any, ...]]:
    """Rows (problem, dtype, estimator, error, target)."""
    rows = []
    for dtype, target in TARGETS.items():
        with jax.enable_x64(dtype == "float64"):
            for make in (ridge, momentum_quadratic):
                oracle = make()
                for name, estimator in EXACT.items():
                    error = relative_error(estimate(oracle, estimator), oracle.grad)
                    rows.append((make.__name__, dtype, name, error, target))
    return rows


class Network(nn.Module):
    """The example's network without dropout, with any activation, in float64."""

    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in (128, 128):
            x = self.activation(nn.Dense(size, param_dtype=jnp.float64)(x))
        return nn.Dense(10, param_dtype=jnp.float64)(x)


def digits_problem(network: Network, optimizer: Any) -> hg.Problem:
    """digits-200's losses for `network`; a batch holds images and labels."""

    def valid_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        images, labels = batch
        return digits200.cross_entropy(network.apply(params, images), labels)

    def train_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        squares = [jnp.sum(layer["kernel"] ** 2) for layer in params["params"].values()]
        loss = valid_loss(params, hyper, batch, key)
        return loss + 0.5 * jnp.vdot(hyper["l2"], jnp.stack(squares))

    init_params = lambda key: network.init(key, jnp.zeros((1, 64)))  # noqa: E731
    return hg.bilevel(init_params, train_loss, valid_loss, optimizer)


def nearest_error(grad: Any, references: list[Any]) -> float:
    """The largest relative error over scalars, each against its nearest reference."""
    flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grad)])
    others = [np.concatenate([np.ravel(g) for g in jax.tree.leaves(r)]) for r in references]
    return float(np.min([np.abs(flat / r - 1) for r in others], axis=0).max())


def differences(num_steps: int, quick: bool) -> list[tuple[Any, ...]]:
    """Rows (optimiser, activation, estimator, error, target); quick: `Unrolled()` on tanh."""
    rows = []
    with jax.enable_x64(True):
        data = digits200.load()
        arrays, valid = ((x.astype(jnp.float64), y) for x, y in (data.train, data.valid))
        train = hg.Minibatches(arrays, digits200.BATCH, num_steps)
        activations = (("tanh", STEPS[:1]),) if quick else (("tanh", STEPS[:1]), ("relu", STEPS))
        for activation, steps in activations:
            network = Network(getattr(jax.nn, activation))
            for name, (optimizer, hyper) in OPTIMIZERS.items():
                problem = digits_problem(network, optimizer)
                hyper = {k: jnp.asarray(v, jnp.float64) for k, v in hyper.items()}
                arguments = (problem, hyper, None, train, valid, jax.random.key(0))
                references = central_differences(*arguments, steps=steps)
                for estimator_name, estimator in list(EXACT.items())[: 1 if quick else None]:
                    run = lambda *a, e=estimator: hg.hypergradient(*a, e).grad  # noqa: E731
                    grad = jax.jit(partial(run, problem))(*arguments[1:])
                    error = nearest_error(grad, references)
                    rows.append((name, activation, estimator_name, error, DIFFERENCE_TARGET))
    return rows


def central_differences(
    problem: hg.Problem, hyper: Any, *args: Any, steps: tuple[float, ...]
) -> list[Any]:
    """The gradient by differences of plain training runs, for each relative step."""
    flat, unravel = ravel_pytree(hyper)
    loss = jax.jit(lambda flat: hg.Window(problem, *args).objective(unravel(flat))[0])

    def difference(i: int, step: float) -> float:
        up, down = (flat.at[i].multiply(1 + s) for s in (step, -step))
        return float((loss(up) - loss(down)) / (up[i] - down[i]))

    return [unravel(jnp.array([difference(i, s) for i in range(flat.size)])) for s in steps]


def main(quick: bool = False) -> dict[str, list[tuple[Any, ...]]]:
    """Print and return the tables; `quick`: 20 steps of the digits network, one estimator."""
    tables = {}
    for title, rows in (
        ("closed forms", closed_forms),
        ("differences", partial(differences, 20 if quick else 100, quick)),
    ):
        print(f"{title:20}{'with':9}{'estimator':29}{'error':>9}{'target':>9}")
        tables[title] = rows()
        for row in tables[title]:
            verdict = "" if row[-2] <= row[-1] else "   MISSED"
            print("{:20}{:9}{:29}{:9.1e}{:9.0e}".format(*row) + verdict, flush=True)
    return tables


if __name__ == "__main__":
    main()
