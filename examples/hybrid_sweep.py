"""A mixed space on digits-200: Optuna chooses what has no gradient, hypergradients refine the rest.

Run: `python examples/hybrid_sweep.py` (see `--help`; `--quick` takes under a minute). With
`--storage sweep.journal` it survives being killed: the same command goes on, and several processes
share the work. Optimizer, activation and width are chosen by TPE; learning rate, momentum, three
L2 coefficients and two dropout rates start where TPE says and then follow their hypergradients
while the network trains. The best trial is retrained on ten fresh seeds and scored on the test
split, which nothing else looks at.
"""

import argparse
import logging
import time
from typing import Any

import digits200
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import optuna

import hypergrad as hg
from hypergrad.nn import LinenDropout

L2 = hg.Float(1e-6, 1e-1, scale="log")
SPACE = hg.Space(
    {
        "optimizer": hg.Categorical(["sgd", "adamw"]),
        "activation": hg.Categorical(["relu", "tanh"]),
        "width": hg.Categorical([32, 64, 128, 256]),
        "momentum": hg.Float(0.5, 0.99, scale="reverse_log", when={"optimizer": "sgd"}),
        "learning_rate": hg.Float(1e-4, 0.3, scale="log"),
        **{f"l2_{layer}": L2 for layer in range(3)},
        **{f"dropout_{layer}": hg.Float(0.0, 0.8) for layer in range(2)},
    }
)


class MLP(nn.Module):
    """Two hidden layers of a chosen width and activation."""

    width: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array, dropout: Any, deterministic: bool) -> jax.Array:
        """x: [batch, inputs]; returns logits [batch, 10]."""
        for rate in dropout:
            x = getattr(nn, self.activation)(nn.Dense(self.width)(x))
            x = LinenDropout(rate)(x, deterministic=deterministic)
        return nn.Dense(10)(x)


def make_problem(choices: dict[str, Any], inputs: int = 64) -> hg.Problem:
    """The problem of one architecture and optimiser, on examples of so many numbers."""
    model = MLP(choices["width"], choices["activation"])

    def train_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        rates = (hyper["dropout_0"], hyper["dropout_1"])
        logits = model.apply(params, batch[0], rates, False, rngs={"dropout": key})
        layers = params["params"].values()
        penalty = sum(
            hyper[f"l2_{i}"] * jnp.sum(layer["kernel"] ** 2) for i, layer in enumerate(layers)
        )
        return digits200.cross_entropy(logits, batch[1]) + 0.5 * penalty

    def valid_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
        return digits200.cross_entropy(model.apply(params, batch[0], (0.0, 0.0), True), batch[1])

    def optimizer(hyper: Any) -> optax.GradientTransformation:
        if choices["optimizer"] == "sgd":
            return optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"])
        return optax.adamw(hyper["learning_rate"])

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, inputs)), (0.0, 0.0), True)

    return hg.bilevel(init, train_loss, valid_loss, optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--storage", help="a path such as sweep.journal, or a database's URL")
    parser.add_argument("--trials", type=int, default=33)
    parser.add_argument("--black-box", action="store_true", help="no hypergradients")
    parser.add_argument("--quick", action="store_true", help="4 short trials")
    parser.add_argument("--pictures", help="a folder for pictures of the sweep")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hypergrad").setLevel(logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    begin = time.perf_counter()
    recipe: dict[str, Any] = {"scheduler": hg.SuccessiveHalving(min_steps=50)}
    if not options.black_box:
        # short runs choose, the last fifth starts where the best ended
        recipe |= {"refine": hg.Refine(), "polish": options.trials // 5}
    if options.quick:
        recipe = {"refine": hg.Refine(), "polish": 1}
    result = hg.sweep(
        make_problem,
        SPACE,
        hg.Splits(*digits200.load()),
        num_trials=4 if options.quick else options.trials,
        num_steps=60 if options.quick else digits200.STEPS,
        batch_size=digits200.BATCH,
        population=3,
        storage=options.storage,
        **recipe,
    )
    print(result.table(5))
    print(f"{result.steps_spent} training steps, {time.perf_counter() - begin:.0f} s")
    found = result.confirm(count=1 if options.quick else 3)
    audit = result.audit(seeds=2 if options.quick else 10, hyper=found.hyper)
    print(f"fresh seeds: test loss {audit.mean:.3f} +- {audit.std_error:.3f}")
    if options.pictures:
        print("pictures:", *result.save_pictures(options.pictures))
    if options.storage:
        print("look at it with:", result.dashboard_command())


if __name__ == "__main__":
    main()
