"""A network that scores training data, learned by hypergradients and handed to a larger model.

Half of the sequences of tiny Shakespeare are corrupted: their characters shuffled, or two fifths of
them replaced, or their order reversed. A scorer of some 1,200 weights reads a sequence and gives
its weight in the training loss of a small character model; the scorer's weights are the
hyperparameters, tuned on clean text by hypergradients through windows of two steps, over three
models under `vmap` that have trained for 100, 200 and 300 steps. Every seed's hypergradient is
brought to length one before they are averaged. Then the scorer is frozen, the better half of the
data by its score is kept, and a model four times as large is trained on it from scratch.

  python examples/data_scorer.py --data FOLDER [--quick] [--seeds 2] [--steps 2000] [--out FILE]

FOLDER holds tinyshakespeare.txt. The table counts compute in gradient evaluations of the large
model on a batch: those until its test loss is that of training on everything, and what choosing the
data took (a small model's evaluation is a fourth; a step that is differentiated counts 3.3, a
forward pass a third). Rivals: a small model trained on the same clean text keeps the sequences of
its lowest loss; gradient products (of a sequence's loss with that of clean text) at a small model
trained on everything; a random half; and the oracle, which knows what is corrupted.

With --seeds 1 --steps 600 the scorer keeps 68% of the clean sequences and 3% of the replaced ones;
the large model reaches the loss after 225 steps instead of 475 on a random half, and the scorer
costs more than that saves. The reference model is the better choice here: docs/data_scorer.md.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tiny_transformer import read

import hypergrad as hg
from hypergrad.plotting.panels import PALETTE, new_panels, png
from hypergrad.trees import norm

LENGTH, CONTEXT, EMBED, SMALL, LARGE, BATCH = 24, 8, 16, 64, 256, 32
SEEDS, WINDOW, OUTER = 3, 2, optax.adam(2e-2)
KINDS = ("clean", "shuffled", "replaced", "reversed")
compiled = partial(jax.jit, compiler_options=compiling.OPTIONS)


class Sizes(NamedTuple):
    """How long everything takes: steps of the large model, of references, updates of the scorer."""

    steps: int = 2000
    reference: int = 300
    updates: int = 60
    every: int = 25


class Data(NamedTuple):
    """Sequences of characters, int32 [n, LENGTH + 1]; `kind` [n] indexes KINDS, for the oracle."""

    train: jax.Array
    kind: np.ndarray
    valid: jax.Array
    test: jax.Array
    vocabulary: int


def load(folder: str, seed: int) -> Data:
    """The text's first 90%, half of its sequences corrupted; 5% clean to tune on, 5% to report."""
    text, vocabulary = read(folder)

    def sequences(begin: float, end: float) -> np.ndarray:
        part = text[round(begin * len(text)) : round(end * len(text))]
        whole = len(part) // (LENGTH + 1) * (LENGTH + 1)
        return part[:whole].reshape(-1, LENGTH + 1).astype(np.int32)

    rng, clean = np.random.default_rng(seed), sequences(0, 0.9)
    kind = np.where(rng.random(len(clean)) < 0.5, 0, rng.integers(1, 4, len(clean)))
    replaced = np.where(
        rng.random(clean.shape) < 0.4, rng.integers(0, vocabulary, clean.shape), clean
    )
    versions = np.stack([clean, rng.permuted(clean, axis=1), replaced, clean[:, ::-1]])
    train = versions[kind, np.arange(len(clean))]
    valid, test = jnp.asarray(sequences(0.9, 0.95)), jnp.asarray(sequences(0.95, 1))
    return Data(jnp.asarray(train), kind, valid, test, vocabulary)


# ---- the models


def init_model(vocabulary: int, width: int, key: jax.Array) -> Any:
    """The next character from the last eight, by one hidden layer (Bengio et al. 2003)."""
    a, b, c = jax.random.split(key, 3)
    inputs = CONTEXT * EMBED
    return {
        "embed": jax.random.normal(a, (vocabulary, EMBED)) / 4,
        "hidden": jax.random.normal(b, (inputs, width)) / np.sqrt(inputs),
        "bias": jnp.zeros(width),
        "out": jax.random.normal(c, (width, vocabulary)) / np.sqrt(width),
        "shift": jnp.zeros(vocabulary),
    }


def neighbours(embedded: jax.Array, count: int) -> jax.Array:
    """Each place with the `count` - 1 before it (zeros at first), [n, time, count features]."""
    padded = jnp.pad(embedded, ((0, 0), (count - 1, 0), (0, 0)))
    length = embedded.shape[1]
    return jnp.concatenate([padded[:, i : i + length] for i in range(count)], -1)


def losses(params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy per character of each sequence, [n]."""
    x = neighbours(params["embed"][tokens[:, :-1]], CONTEXT)
    x = jnp.tanh(x @ params["hidden"] + params["bias"])
    logits = x @ params["out"] + params["shift"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def init_scorer(vocabulary: int, key: jax.Array) -> Any:
    """Two layers, of which the last is zero: all sequences weigh the same at first."""
    a, b = jax.random.split(key)
    return {
        "embed": jax.random.normal(a, (vocabulary, 8)) / 2,
        "hidden": jax.random.normal(b, (3 * 8, 24)) / 5,
        "out": jnp.zeros(24),
    }


def scores(scorer: Any, tokens: jax.Array) -> jax.Array:
    """[n]: the mean over places of what three characters in a row say."""
    x = jnp.tanh(neighbours(scorer["embed"][tokens], 3) @ scorer["hidden"])
    return x.mean(1) @ scorer["out"] * 10


def problem(vocabulary: int) -> hg.Problem:
    """The small model's training, each batch weighted by a softmax of its scores."""

    def train_loss(params: Any, scorer: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores(scorer, tokens)) @ losses(params, tokens)

    def valid_loss(params: Any, scorer: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        return losses(params, tokens).mean()

    init = partial(init_model, vocabulary, SMALL)
    return hg.bilevel(init, train_loss, valid_loss, lambda scorer: optax.adam(3e-3))


# ---- the scorer


def learn_scorer(data: Data, sizes: Sizes, key: jax.Array) -> Any:
    """The scorer after `sizes.updates` outer steps."""
    small = problem(data.vocabulary)
    scorer = init_scorer(data.vocabulary, key)

    def grown(key: jax.Array, age: int) -> Any:
        """A model that trained on everything: one that has learned nothing yet tells nothing."""
        batches = hg.Minibatches(data.train, BATCH, age)
        return hg.rollout(small, scorer, small.init(scorer, key), batches, key)

    def one(scorer: Any, inner: Any, key: jax.Array) -> tuple[Any, Any]:
        b, c, d = jax.random.split(key, 3)
        batches = data.train[jax.random.randint(b, (WINDOW, BATCH), 0, len(data.train))]
        valid = data.valid[jax.random.randint(c, (2 * BATCH,), 0, len(data.valid))]
        found = hg.hypergradient(small, scorer, inner, batches, valid, d, hg.Unrolled())
        size = norm(found.grad)
        return jax.tree.map(lambda g: g / jnp.where(size > 0, size, 1), found.grad), found.inner

    @compiled
    def update(scorer: Any, memory: Any, inners: Any, count: jax.Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, count), SEEDS)
        grads, inners = jax.vmap(one, (None, 0, 0))(scorer, inners, keys)
        moves, memory = OUTER.update(jax.tree.map(lambda g: g.mean(0), grads), memory)
        return optax.apply_updates(scorer, moves), memory, inners

    ages = [round(sizes.reference * (i + 1) / SEEDS) for i in range(SEEDS)]
    models = [grown(k, age) for k, age in zip(jax.random.split(key, SEEDS), ages, strict=True)]
    inners = jax.tree.map(lambda *x: jnp.stack(x), *models)
    memory = OUTER.init(scorer)
    for count in range(sizes.updates):
        scorer, memory, inners = update(scorer, memory, inners, jnp.int32(count))
    return scorer


# ---- training without scores


@partial(compiled, static_argnums=(3,))
def train_on(inner: Any, tokens: jax.Array, key: jax.Array, steps: int) -> Any:
    """(params, memory) after `steps` steps of Adam on random batches of `tokens`."""

    def step(inner: Any, key: jax.Array) -> tuple[Any, None]:
        params, memory = inner
        batch = tokens[jax.random.randint(key, (BATCH,), 0, len(tokens))]
        grads = jax.grad(lambda p: losses(p, batch).mean())(params)
        moves, memory = optax.adam(3e-3).update(grads, memory)
        return (optax.apply_updates(params, moves), memory), None

    return jax.lax.scan(step, inner, jax.random.split(key, steps))[0]


def begun(data: Data, width: int, key: jax.Array) -> Any:
    """An untrained model and Adam's memory."""
    params = init_model(data.vocabulary, width, key)
    return params, optax.adam(3e-3).init(params)


def curve(data: Data, kept: np.ndarray, sizes: Sizes, key: jax.Array, until: float) -> np.ndarray:
    """The large model's test loss every `sizes.every` steps, until it is below `until`."""
    inner, found = begun(data, LARGE, key), []
    tokens, test_loss = (
        data.train[jnp.asarray(kept)],
        compiled(lambda p: losses(p, data.test).mean()),
    )
    for count in range(sizes.steps // sizes.every):
        inner = train_on(inner, tokens, jax.random.fold_in(key, count), sizes.every)
        found.append(float(test_loss(inner[0])))
        if found[-1] <= until:
            break
    return np.array(found)


# ---- who says what is good: (data, sizes, key) -> (a value per sequence, its cost)

Values = tuple[np.ndarray, float]


def in_batches(function: Callable[[jax.Array], jax.Array], tokens: jax.Array) -> np.ndarray:
    """`function` of all sequences, 1024 at a time."""
    run = compiled(function)
    return np.concatenate([run(tokens[i : i + 1024]) for i in range(0, len(tokens), 1024)])


def passes(data: Data, factor: float) -> float:
    """The cost of `factor` gradient evaluations of a small model on every sequence."""
    return factor * len(data.train) / BATCH * SMALL / LARGE


def by_scorer(data: Data, sizes: Sizes, key: jax.Array) -> Values:
    """What this example is about."""
    scorer = learn_scorer(data, sizes, key)
    share = 1 + 24 * 24 / (SMALL * (CONTEXT * EMBED + data.vocabulary))  # the scorer's own products
    each = SEEDS * (3.3 * WINDOW * share + 2) * SMALL / LARGE
    values = in_batches(partial(scores, scorer), data.train)
    grown = sizes.reference * (SEEDS + 1) / 2 * SMALL / LARGE
    return values, grown + sizes.updates * each + passes(data, (share - 1) / 3)


def by_loss(data: Data, sizes: Sizes, key: jax.Array) -> Values:
    """Minus the loss of a small model that was trained on the clean text."""
    params, _ = train_on(begun(data, SMALL, key), data.valid, key, sizes.reference)
    values = -in_batches(partial(losses, params), data.train)
    return values, sizes.reference * SMALL / LARGE + passes(data, 1 / 3)


def by_products(data: Data, sizes: Sizes, key: jax.Array) -> Values:
    """The derivative of each sequence's loss along the gradient of the clean text's."""
    params, _ = train_on(begun(data, SMALL, key), data.train, key, sizes.reference)
    way = compiled(jax.grad(lambda p: losses(p, data.valid).mean()))(params)
    along = lambda tokens: jax.jvp(lambda p: losses(p, tokens), (params,), (way,))[1]  # noqa: E731
    clean = len(data.valid) / BATCH
    cost = (sizes.reference + clean) * SMALL / LARGE + passes(data, 2 / 3)
    return in_batches(along, data.train), cost


def by_chance(data: Data, sizes: Sizes, key: jax.Array) -> Values:
    """Nothing."""
    return np.asarray(jax.random.uniform(key, (len(data.train),))), 0.0


def by_oracle(data: Data, sizes: Sizes, key: jax.Array) -> Values:
    """Whether it is clean."""
    return (data.kind == 0) + 1e-6 * by_chance(data, sizes, key)[0], 0.0


METHODS = {
    "learned scorer": by_scorer,
    "oracle": by_oracle,
    "loss of a reference model": by_loss,
    "gradient products": by_products,
    "a random half": by_chance,
}


class Row(NamedTuple):
    """One method under one seed; `steps` is None where the loss was not reached."""

    method: str
    kept: list[float]  # the share that is kept of each of KINDS
    cost: float
    steps: int | None
    loss: float
    seconds: float
    curve: np.ndarray


def measure(data: Data, sizes: Sizes, seed: int, console: Console) -> list[Row]:
    """All methods, one line each as they come; the first row trains on everything."""
    key = jax.random.key(seed)
    everything = curve(data, np.arange(len(data.train)), sizes, key, -np.inf)
    target = float(everything[-4:].mean())
    rows = [Row("everything", [1.0] * 4, 0.0, sizes.steps, target, 0.0, everything)]
    for name, method in METHODS.items():
        begin = time.perf_counter()
        values, cost = method(data, sizes, jax.random.fold_in(key, 1))
        seconds = time.perf_counter() - begin
        best = np.argsort(-values)[: len(values) // 2]
        kept = np.zeros(len(values))
        kept[best] = 1
        shares = [float(kept[data.kind == i].mean()) for i in range(4)]
        found = curve(data, best, sizes, key, target)
        steps = len(found) * sizes.every if found[-1] <= target else None
        rows.append(Row(name, shares, cost, steps, float(found[-1]), seconds, found))
        reached = "not reached" if steps is None else f"reached after {steps} steps"
        keeps = ", ".join(f"{s:.0%} {kind}" for s, kind in zip(shares, KINDS, strict=True))
        console.print(f"{name}: {reached}, chosen for {cost:.0f} evaluations; {keeps}")
    return rows


def show(console: Console, runs: list[list[Row]], sizes: Sizes) -> None:
    """Means over seeds."""
    title = f"half of the sequences corrupted, {len(runs)} seeds; training on everything is 1"
    table = Table(title=title, title_justify="left")
    table.add_column("kept by")
    for name in (*KINDS, "choosing", "training", "together", "seconds to choose"):
        table.add_column(name, justify="right")
    for rows in zip(*runs, strict=True):
        shares = [f"{np.mean([r.kept[i] for r in rows]):.0%}" for i in range(4)]
        cost = np.mean([r.cost for r in rows]) / sizes.steps
        reached = [r.steps for r in rows if r.steps is not None]
        steps = np.mean(reached) / sizes.steps if len(reached) == len(rows) else np.inf
        texts = [f"{cost:.2f}", f"{steps:.2f}", f"{cost + steps:.2f}"]
        texts = [text.replace("inf", "never") for text in texts]
        seconds = np.mean([r.seconds for r in rows])
        table.add_row(rows[0].method, *shares, *texts, f"{seconds:.1f}")
    console.print(table)
    console.print(f"test loss to reach: {', '.join(f'{rows[0].loss:.3f}' for rows in runs)}")


def picture(rows: list[Row], sizes: Sizes) -> bytes:
    """The large model's test loss over all compute, choosing included; one seed."""
    axes = new_panels(1)
    for color, row in zip(PALETTE, rows, strict=False):
        place = row.cost + sizes.every * (1 + np.arange(len(row.curve)))
        axes[0].plot(place, row.curve, color=color, label=row.method)
    axes[0].axhline(rows[0].loss, color="0.6", linewidth=0.8)
    axes[0].set_xlabel("gradient evaluations of the large model, choosing included")
    axes[0].set_ylabel("test loss")
    axes[0].legend(frameon=False, fontsize=8)
    return png(axes[0].figure)


def main() -> None:
    """Measure, print the table, write the picture."""
    parser = argparse.ArgumentParser(description="a scorer of training data, learned and handed on")
    parser.add_argument("--data", required=True, help="folder with tinyshakespeare.txt")
    parser.add_argument("--quick", action="store_true", help="80 steps, 15 updates, one seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="of the large model")
    parser.add_argument("--out", default="data_scorer.png", help="where the picture goes")
    options = parser.parse_args()
    sizes = Sizes(80, 30, 15, 20) if options.quick else Sizes(options.steps)
    console = Console(width=max(Console().width, 120))
    begin, runs = time.perf_counter(), []
    for seed in range(1 if options.quick else options.seeds):
        runs.append(measure(load(options.data, seed), sizes, seed, console))
    show(console, runs, sizes)
    Path(options.out).write_bytes(picture(runs[0], sizes))
    console.print(f"picture: {options.out}; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
