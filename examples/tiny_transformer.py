"""A character transformer whose schedule, decay and dropout are tuned in the run that trains it.

Two layers of width 48 on windows of 48 characters of tiny Shakespeare, 300 steps of AdamW on
batches of 16. Warm-up, peak, decay length and final share of the learning rate, weight decay and
dropout start at values that scripts start from; one alternating run tunes all six while it trains.
The first 90% of the text are trained on, the next 5% tuned on, the last 5% only reported.

  python examples/tiny_transformer.py --data FOLDER [--quick] [--out tiny_transformer.png]

FOLDER holds tinyshakespeare.txt (Karpathy's char-rnn; any plain text under that name will do). It
prints, in 95 seconds of processor time, on a busy machine,

cross-entropy per character after 300 steps
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━┳━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━━━━━━━┓
┃                           ┃ runs ┃ validation ┃  test ┃ gradient evals ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━╇━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━━━━━━━┩
│ the default, untuned      │    3 │      2.626 │ 2.631 │              0 │
│ one alternating run       │    1 │      2.364 │ 2.380 │            920 │
│   settled, replayed       │    3 │      2.383 │ 2.386 │            920 │
│   its best values, frozen │    3 │      2.361 │ 2.365 │            920 │
└───────────────────────────┴──────┴────────────┴───────┴────────────────┘
best values: {'decay': 440.0, 'dropout': 0.0015, 'final': 0.34,
  'peak': 0.0089, 'warmup': 11.0, 'weight_decay': 0.0026}
compiling 110 s, tuning 26 s

A run costs 300 gradient evaluations, so the tuned one costs three. Against random search, and with
a second run that starts from what the first one found: `python -m benchmarks.tiny_transformer`.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import compiling
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import hypergrad as hg
from hypergrad.nn import LinenDropout
from hypergrad.plotting import plot_losses, plot_trajectories
from hypergrad.plotting.panels import PALETTE, legend_above, new_panels, png, set_step_axis

CONTEXT, WIDTH, HEADS, LAYERS = 48, 48, 4, 2
STEPS, BATCH, WINDOW, VALID_BATCH = 300, 16, 30, 32
# Ten updates have to cross the box, so their steps are long; the learning rate that is best for the
# next 30 steps is nearer to the whole run's than that for the next 10. The last third of a window
# is judged: all of it forgives noise, with which the run then ends; its last step alone fears it.
ESTIMATOR, STEP = hg.Unrolled(validate_at=10), 0.15
compiled = partial(jax.jit, compiler_options=compiling.OPTIONS)

SPACE = hg.Space(
    {
        "peak": hg.Float(1e-4, 5e-2, scale="log"),
        "warmup": hg.Float(1.0, 100.0, scale="log"),
        "decay": hg.Float(0.5 * STEPS, 2.0 * STEPS, scale="log"),
        "final": hg.Float(0.0, 1.0),
        "weight_decay": hg.Float(1e-3, 1.0, scale="log"),
        "dropout": hg.Float(0.0, 0.5),
    }
)
# What scripts start from: Adam's own rate, a tenth of the run to warm up, a full cosine.
DEFAULT = {
    "peak": 1e-3,
    "warmup": 0.1 * STEPS,
    "decay": float(STEPS),
    "final": 0.1,
    "weight_decay": 0.1,
    "dropout": 0.2,
}


class Data(NamedTuple):
    """Windows of characters, uint8 [n, CONTEXT + 1], and how many characters there are."""

    train: jax.Array
    valid: jax.Array
    test: jax.Array
    vocabulary: int


def read(folder: str) -> tuple[np.ndarray, int]:
    """The text as numbers of its characters, and how many characters there are."""
    path = Path(folder) / "tinyshakespeare.txt"
    if not path.is_file():
        raise SystemExit(
            f"--data {folder}: there is no tinyshakespeare.txt in it. It is the text of Karpathy's "
            "char-rnn, 1.1 MB; any plain text under that name will do."
        )
    characters, text = np.unique(np.frombuffer(path.read_bytes(), np.uint8), return_inverse=True)
    return text.astype(np.uint8), len(characters)


def load(folder: str) -> Data:
    """The text's first 90% to train on, the next 5% to tune on, the last 5% for the report."""
    text, vocabulary = read(folder)

    def windows(begin: float, end: float, stride: int) -> jax.Array:
        part = text[round(begin * len(text)) : round(end * len(text))]
        return jnp.asarray(np.lib.stride_tricks.sliding_window_view(part, CONTEXT + 1)[::stride])

    splits = windows(0, 0.9, 16), windows(0.9, 0.95, CONTEXT), windows(0.95, 1, CONTEXT)
    return Data(*splits, vocabulary)


class Transformer(nn.Module):
    """Two pre-norm blocks; the dropout rate is an argument, so that it can be traced."""

    vocabulary: int
    layers: int = LAYERS

    @nn.compact
    def __call__(self, tokens: jax.Array, rate: Any, train: bool) -> jax.Array:
        """tokens: [batch, time]; returns logits [batch, time, vocabulary]."""
        drop = lambda x: LinenDropout()(x, rate=rate, deterministic=not train)  # noqa: E731
        batch, length = tokens.shape
        place = self.param("place", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        x = nn.Embed(self.vocabulary, WIDTH)(tokens) + place[:length]
        past = jnp.tril(jnp.ones((length, length), bool))
        for _ in range(self.layers):
            y = nn.Dense(3 * WIDTH)(nn.LayerNorm()(x))
            q, k, v = jnp.split(y.reshape(batch, length, HEADS, -1), 3, axis=-1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
            # finite instead of -inf, whose derivatives are NaN
            scores = jax.nn.softmax(jnp.where(past, scores, -1e9))
            y = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(batch, length, WIDTH)
            x = x + drop(nn.Dense(WIDTH)(y))
            y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
            x = x + drop(nn.Dense(WIDTH)(y))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def learning_rate(hyper: Any) -> Any:
    """Warm-up and half a cosine, as a function of the step."""
    floor = hyper["final"] * hyper["peak"]
    return hg.warmup_cosine(hyper["peak"], hyper["warmup"], hyper["decay"], floor)


def problem(vocabulary: int, layers: int = LAYERS) -> hg.Problem:
    """AdamW under warm-up and half a cosine, all of whose numbers are hyperparameters."""
    net = Transformer(vocabulary, layers)

    def loss(logits: jax.Array, windows: jax.Array) -> jax.Array:
        targets = windows[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def train_loss(params: Any, hyper: Any, windows: Any, key: jax.Array) -> jax.Array:
        tokens, streams = windows[:, :-1].astype(jnp.int32), {"dropout": key}
        return loss(net.apply(params, tokens, hyper["dropout"], True, rngs=streams), windows)

    def valid_loss(params: Any, hyper: Any, windows: Any, key: jax.Array) -> jax.Array:
        return loss(net.apply(params, windows[:, :-1].astype(jnp.int32), 0.0, False), windows)

    def adamw(hyper: Any) -> optax.GradientTransformation:
        rate = learning_rate(hyper)
        return optax.adamw(rate, b2=0.99, weight_decay=hyper["weight_decay"])

    tokens = jnp.zeros((1, CONTEXT), jnp.int32)
    init = lambda key: net.init(key, tokens, 0.0, False)  # noqa: E731
    return hg.bilevel(init, train_loss, valid_loss, adamw)


class Task(NamedTuple):
    """What is trained, on what, and the two compiled functions that every method needs.

    Attributes:
      data: the splits.
      problem: the network and its losses.
      train: `(schedule, data, key) -> params` after a run under a frozen schedule.
      score: `(params, windows) -> loss` on a whole split.
    """

    data: Data
    problem: hg.Problem
    train: Any
    score: Any


class Tuned(NamedTuple):
    """One alternating run: what it left, its infos, and its cost."""

    params: Any
    best: Any
    history: list[Any]
    evaluations: float
    seconds: float


def task(folder: str, layers: int = LAYERS, steps: int = STEPS) -> Task:
    """The task on the text in `folder`; fewer layers and steps for a quick look."""
    data = load(folder)
    inner = problem(data.vocabulary, layers)

    @compiled
    def train(schedule: hg.Schedule, windows: jax.Array, key: jax.Array) -> Any:
        state = inner.init(schedule(0), key)
        return hg.replay(inner, schedule, state, hg.Minibatches(windows, BATCH, steps), key).params

    @compiled
    def score(params: Any, windows: jax.Array) -> jax.Array:
        # at most 64 at once, so that the logits of a split fit anywhere
        size = min(64, len(windows))
        parts = windows[: len(windows) // size * size].reshape(-1, size, CONTEXT + 1)
        return jax.lax.map(lambda part: inner.valid_loss(params, None, part, None), parts).mean()

    return Task(data, inner, train, score)


def constant(hyper: Any, steps: int = STEPS) -> hg.Schedule:
    """The schedule that never changes, of the shape that a tuned one of so many steps has."""
    repeat = lambda x: jnp.full(steps // WINDOW, x, jnp.float32)  # noqa: E731
    return hg.Schedule(jax.tree.map(repeat, hyper), WINDOW)


class Update(NamedTuple):
    """`(state, train, valid, step) -> (state, info)`, compiled, and the seconds that took."""

    run: Any
    seconds: float


def tuner(problem: hg.Problem, step: Any) -> hg.Tuner:
    """An alternating tuner whose outer step, traced or not, is about `step` of every range.

    The adjoint grows where a warm-up begins: at the usual `max_growth` of 2 a run from a good start
    was refused from its first update on.
    """
    outer = optax.adam(step, b1=0.3, b2=0.99, eps=1e-20)
    return hg.alternating(
        problem, SPACE, ESTIMATOR, outer, max_move=4 / 3 * step, trust=hg.Trust(max_growth=20.0)
    )


def batches(data: Data) -> tuple[hg.Minibatches, hg.Minibatches]:
    """What one update trains on and is judged on."""
    size = min(VALID_BATCH, len(data.valid))
    return hg.Minibatches(data.train, BATCH, WINDOW), hg.Minibatches(data.valid, size)


def compile_update(task: Task) -> Update:
    """One program for every outer step."""
    begin, start = time.perf_counter(), tuner(task.problem, STEP).init(DEFAULT, jax.random.key(0))

    @compiled
    def update(state: Any, train: Any, valid: Any, step: jax.Array) -> Any:
        return tuner(task.problem, step).update(state, train, valid)

    program = update.lower(start, *batches(task.data), jnp.float32(STEP)).compile()
    return Update(program, time.perf_counter() - begin)


def tune(
    task: Task, update: Update, seed: int, start: Any, steps: int = STEPS, step: float = STEP
) -> Tuned:
    """One alternating run from `start`: it tunes while it trains."""
    train, valid = batches(task.data)
    state, history = tuner(task.problem, step).init(start, jax.random.key(seed)), []
    begin = time.perf_counter()
    for _ in range(steps // WINDOW):
        state, info = update.run(state, train, valid, jnp.float32(step))
        history.append(jax.tree.map(np.asarray, info))
    # a step counts 1 and its way back 2; a validation gradient is on two batches
    cost = len(history) * (3 * WINDOW + VALID_BATCH / BATCH)
    best = tuner(task.problem, step).best(state)
    return Tuned(state.inner.params, best, history, cost, time.perf_counter() - begin)


def schedules(run: Tuned) -> dict[str, hg.Schedule]:
    """What can be kept of a tuned run, to be frozen and replayed."""
    history = [info.hyper for info in run.history]
    return {
        "settled, replayed": hg.settled_schedule(SPACE, history, WINDOW),
        "its best values, frozen": constant(run.best, len(run.history) * WINDOW),
    }


def fresh(task: Task, schedule: hg.Schedule, seeds: int) -> np.ndarray:
    """Mean (validation, test) loss of runs under a frozen schedule, on seeds no method has seen."""
    keys = jax.random.split(jax.random.key(2**20), seeds)
    runs = [task.train(schedule, task.data.train, key) for key in keys]
    return np.mean([both(task, params) for params in runs], axis=0)


def both(task: Task, params: Any) -> tuple[float, float]:
    """(validation, test) loss."""
    return tuple(float(task.score(params, split)) for split in (task.data.valid, task.data.test))


def draw(run: Tuned, loss: float, path: str) -> None:
    """The trajectories, the validation loss, and the learning rate that the steps had."""
    axes = new_panels(len(SPACE.dimensions) + 2)
    plot_trajectories(run.history, SPACE, steps_per_update=WINDOW, axes=axes[:-2])
    plot_losses(run.history, steps_per_update=WINDOW, axes=axes[-2])
    axes[-2].axhline(loss, color=PALETTE[1], ls="--", label="default, at its end")
    legend_above(axes[-2], *axes[-2].get_legend_handles_labels())
    schedule = hg.learned_schedule([info.hyper for info in run.history], WINDOW)
    steps = np.arange(STEPS)
    tuned = jax.vmap(lambda step: learning_rate(schedule(step))(step))(steps)
    default = jax.vmap(learning_rate(DEFAULT))(steps)
    axes[-1].plot(steps, tuned, color=PALETTE[0], label="tuned")
    axes[-1].plot(steps, default, color=PALETTE[1], ls="--", label="default")
    axes[-1].set_ylabel("learning rate of a step")
    set_step_axis(axes[-1], "training step")
    legend_above(axes[-1], *axes[-1].get_legend_handles_labels())
    figure = axes[0].figure
    figure.suptitle("A character transformer, tuned while it trains")
    Path(path).write_bytes(png(figure))


def main() -> None:
    """Tune, retrain, print the table, write the picture."""
    parser = argparse.ArgumentParser(description="a transformer tuned while it trains")
    parser.add_argument("--data", required=True, help="folder with tinyshakespeare.txt")
    parser.add_argument("--quick", action="store_true", help="one layer, 120 steps")
    parser.add_argument("--seed", type=int, default=0, help="of the tuned run")
    parser.add_argument("--out", default="tiny_transformer.png", help="where the picture goes")
    options = parser.parse_args()
    layers, steps, seeds = (1, 120, 1) if options.quick else (LAYERS, STEPS, 3)
    what = task(options.data, layers, steps)
    update = compile_update(what)
    run = tune(what, update, options.seed, DEFAULT, steps)
    table = Table(title=f"cross-entropy per character after {steps} steps", title_justify="left")
    for name in ("", "runs", "validation", "test", "gradient evals"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, runs: int, losses: Any, cost: float) -> None:
        table.add_row(name, str(runs), *(f"{x:.3f}" for x in losses), f"{cost:,.0f}")

    default = fresh(what, constant(DEFAULT, steps), seeds)
    row("the default, untuned", seeds, default, 0)
    row("one alternating run", 1, both(what, run.params), run.evaluations)
    for name, schedule in list(schedules(run).items())[: 1 if options.quick else None]:
        row(f"  {name}", seeds, fresh(what, schedule, seeds), run.evaluations)
    console = Console(width=max(Console().width, 100))
    console.print(table)
    values = {name: float(f"{float(value):.2g}") for name, value in run.best.items()}
    console.print(f"best values: {values}", soft_wrap=True)
    console.print(f"compiling {update.seconds:.0f} s, tuning {run.seconds:.0f} s")
    draw(run, default[0], options.out)
    console.print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
