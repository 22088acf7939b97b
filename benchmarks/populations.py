"""Trials per second of populations, beside the usual Optuna loop that compiles for every trial.

Run: `python -m benchmarks.populations`, made for a machine with a GPU; needs no network and no data
set. No row is begun after six minutes, so that it ends within eight there; a CPU gets as far as the
first refined rows. `main(quick=True)`: widths 1 and 8, 40 steps, plain only.

Task: a network like that of digits-200 (MLP 64-128-128-10, learning rate, momentum, three L2
coefficients and two dropout rates; 200 images each, batches of 64, 500 steps), on images drawn at
random: speed does not depend on what they show. Every trial is asked from an Optuna study (TPE),
trained and told.

Rows: populations of 1, 8, 64 and 512 members, plain and with hypergradients (`Refine()`, 3 gradient
evaluations a step). Columns: trials per second when compiled, compile seconds (all programs of that
width, the probe of "auto" included), how members ran, Optuna's share of the wall time: ask and tell
of as many trials, measured alone. Last row: the usual loop, hyperparameters as Python numbers and
`jax.jit` inside the objective, the whole run in one program; then the ratio to it.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.population.population import Population
from hypergrad.population.refine import Refine

LAYERS, BATCH, EXAMPLES = (64, 128, 128, 10), 64, 200
SPACE = hg.Space(
    {
        "learning_rate": hg.Float(1e-4, 0.1, scale="log"),
        "momentum": hg.Float(0.0, 0.99, scale="reverse_log"),
        "l2": hg.Float(1e-6, 1e-1, scale="log"),
        "dropout": hg.Float(0.0, 0.8),
    }
)


class Row(NamedTuple):
    """One line of the table."""

    width: int
    refined: bool
    trials_per_second: float
    compile_seconds: float
    mode: str
    share: float
    ratio: float


def _forward(params: Any, images: jax.Array, dropout: Any, key: jax.Array | None) -> jax.Array:
    for i, (weight, bias) in enumerate(params):
        images = images @ weight + bias
        if i + 1 < len(params):
            images = jax.nn.relu(images)
            if key is not None:
                images = hg.dropout(images, dropout[i], jax.random.fold_in(key, i))
    return images


def _init(key: jax.Array) -> Any:
    return [
        (jax.random.normal(jax.random.fold_in(key, i), (m, n)) * (2 / m) ** 0.5, jnp.zeros(n))
        for i, (m, n) in enumerate(pairwise(LAYERS))
    ]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _train_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
    squares = jnp.stack([jnp.sum(weight**2) for weight, _ in params])
    fit = _cross_entropy(_forward(params, batch[0], hyper["dropout"], key), batch[1])
    return fit + 0.5 * jnp.vdot(jnp.asarray(hyper["l2"]), squares)


def _valid_loss(params: Any, hyper: Any, batch: Any, key: jax.Array) -> jax.Array:
    return _cross_entropy(_forward(params, batch[0], None, None), batch[1])


PROBLEM = hg.bilevel(
    _init,
    _train_loss,
    _valid_loss,
    lambda hyper: optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
)


def data() -> tuple[Any, Any]:
    """(training, validation) images `[200, 64]` and labels `[200]`."""
    draw = np.random.default_rng(0)
    split = lambda: (  # noqa: E731
        draw.normal(size=(EXAMPLES, LAYERS[0])).astype(np.float32),
        draw.integers(0, LAYERS[-1], EXAMPLES).astype(np.int32),
    )
    return split(), split()


def suggest(trial: Any) -> dict[str, Any]:
    """Seven numbers for one trial."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 0.1, log=True),
        "momentum": 1 - trial.suggest_float("1 - momentum", 0.01, 1.0, log=True),
        "l2": [trial.suggest_float(f"l2/{i}", 1e-6, 1e-1, log=True) for i in range(3)],
        "dropout": [trial.suggest_float(f"dropout/{i}", 0.0, 0.8) for i in range(2)],
    }


def new_study() -> Any:
    """A study in memory, quiet."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))


def asked(study: Any, n: int) -> tuple[list[Any], dict[str, np.ndarray]]:
    """`n` trials and their hyperparameters, leaves `[n, ...]`."""
    trials = [study.ask() for _ in range(n)]
    values = [suggest(trial) for trial in trials]
    stacked = {name: np.array([v[name] for v in values], np.float32) for name in values[0]}
    return trials, stacked


def told(study: Any, trials: list[Any], scores: Any) -> None:
    """The scores go back; a trial that diverged has failed."""
    from optuna.trial import TrialState

    for trial, score in zip(trials, np.asarray(scores), strict=True):
        if np.isfinite(score):
            study.tell(trial, float(score))
        else:
            study.tell(trial, state=TrialState.FAIL)


def timed(function: Callable[[], Any]) -> float:
    """Seconds on the clock."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def of_population(width: int, refined: bool, steps: int, rounds: int) -> Row:
    """`rounds` populations of `width` members after a first one that compiles; no ratio yet."""
    train, valid = data()
    members = Population(PROBLEM, SPACE, Refine() if refined else None, train, valid, BATCH)
    study = new_study()

    def generation(seed: int) -> None:
        trials, hypers = asked(study, width)
        keys = jax.random.split(jax.random.key(seed), width)
        state = members.advance(members.init(hypers, keys), steps // members.steps_per_update)
        told(study, trials, members.report(state).score)

    first = timed(lambda: generation(0))
    seconds = sorted(timed(lambda i=i: generation(i)) for i in range(1, rounds + 1))
    usual = seconds[len(seconds) // 2]
    # Alone, at as many finished trials as the rounds had on average.
    alone = new_study()
    before = width * (rounds + 1) // 2
    if before:
        trials, _ = asked(alone, before)
        told(alone, trials, np.linspace(0, 1, before))

    def optuna_only() -> None:
        trials, _ = asked(alone, width)
        told(alone, trials, np.linspace(0, 1, width))

    share = timed(optuna_only) / usual
    mode = members.execution.mode or "alone"
    return Row(width, refined, width / usual, first - usual, mode, min(share, 1.0), float("nan"))


def of_usual_loop(steps: int, trials: int) -> float:
    """Trials per second of `study.optimize` on an objective that compiles what it trains."""
    train, valid = data()
    draws = hg.Minibatches(jax.tree.map(jnp.asarray, train), BATCH, steps)

    def objective(trial: Any) -> float:
        hyper = suggest(trial)

        @jax.jit
        def run(key: jax.Array) -> jax.Array:
            def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
                return _train_loss(params, hyper, batch, key)

            optimizer = optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"])

            def step(t: jax.Array, carry: Any) -> Any:
                params, opt_state = carry
                noise = jax.random.fold_in(key, t)
                grads = jax.grad(loss)(params, draws.batch(t, key), noise)
                updates, opt_state = optimizer.update(grads, opt_state, params)
                return optax.apply_updates(params, updates), opt_state

            params = _init(key)
            params, _ = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
            return _valid_loss(params, hyper, valid, key)

        return float(run(jax.random.key(trial.number)))

    study = new_study()
    study.optimize(objective, n_trials=1)  # what is compiled once in a process is not counted
    return trials / timed(lambda: study.optimize(objective, n_trials=trials))


def main(quick: bool = False) -> list[Row]:
    """Print the table and return its rows; `quick`: small."""
    begin = time.perf_counter()
    steps, rounds, trials = (40, 1, 1) if quick else (500, 3, 8)
    usual = of_usual_loop(steps, trials)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {steps} steps a trial")
    print("| members | refined | trials/s | compile s | run by | Optuna's share | x usual loop |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for refined in (False,) if quick else (False, True):
        for width in (1, 8) if quick else (1, 8, 64, 512):
            if time.perf_counter() - begin > 360:
                print(f"| {width} | {refined} | left out: six minutes are over | | | | |")
                continue
            row = of_population(width, refined, steps, 1 if width >= 64 else rounds)
            rows.append(row._replace(ratio=row.trials_per_second / usual))
            print(
                "| {} | {} | {:.3g} | {:.1f} | {} | {:.0%} | {:.1f} |".format(*rows[-1]), flush=True
            )
    print(f"| usual loop | False | {usual:.3g} | every trial | alone | | 1.0 |")
    return rows


if __name__ == "__main__":
    main()
