"""Time and memory of hypergradients at the size that an accelerator is for, rows by value.

Run: `python -m benchmarks.accelerator --out rows.json`, on a machine with JAX on a GPU; it needs no
network and no data set. `--seconds` (480) is a limit on the clock, after which the rows that are
left are skipped, and said to be; `--quick` takes tiny models, `--rows TEXT ...` the rows whose
names hold one of the texts. `--out` (JSON) is written after every row; Markdown is printed.

Rows are measured in a child process, one for all as long as none dies: a row that fails, or takes
its process with it, or is not done after 150 seconds, is reported as that and loses no other.

Models of about 100 million float32 weights, data at random: an MLP and a transformer under AdamW,
a CNN under momentum; hyperparameters: learning rate and one L2 coefficient. "plain" and "naive
reverse" (`jax.grad` over a scan of `jax.value_and_grad` and optax) are written by hand.
Columns: milliseconds of a call (median, compiled before, K = 5 steps unless the row says more); the
same over the row's base (plain training or what the row names); peak memory by XLA's analysis
(arguments, results and temporaries, less what is donated) in GiB and in copies of the parameters;
seconds to trace and to compile; the largest relative difference of the hypergradient from the naive
one. Memory is never taken in advance; a program that would not fit is not run.
"""

import argparse
import functools
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from benchmarks import populations
from hypergrad.estimators.unrolled import Checkpoint
from hypergrad.population.population import Population
from hypergrad.population.refine import Refine

STEPS, ROW_SECONDS = 5, 150.0
MODES = tuple(mode for mode in typing.get_args(Checkpoint) if mode != "auto")
SPACE = hg.Space(
    {
        "learning_rate": hg.Float(1e-6, 1e-2, scale="log"),
        "l2": hg.Float(1e-7, 1e-2, scale="log"),
    }
)


class Model(NamedTuple):
    """What is trained: `loss(params, batch)`, `batches(k)` with leaves [k, batch, ...]."""

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[int], Any]
    optimizer: Callable[[Any], optax.GradientTransformation]


class Row(NamedTuple):
    """A line of the table: `measure()` gives its figures, `base` names the row to compare with."""

    name: str
    measure: Callable[[], dict[str, Any]]
    base: str = ""


# ---- models


def _layers(step: Callable[[Any, Any], Any], x: jax.Array, weights: Any) -> jax.Array:
    return jax.lax.scan(lambda x, w: (step(x, w), None), x, weights)[0]


def _dense(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / math.sqrt(math.prod(shape[1:-1]))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _adamw(hyper: Any) -> optax.GradientTransformation:
    return optax.adamw(hyper.get("learning_rate", 1e-4), weight_decay=0.01)


def _momentum(hyper: Any) -> optax.GradientTransformation:
    return optax.sgd(hyper.get("learning_rate", 1e-3), momentum=0.9)


def _draws(k: int, shape: Sequence[int], classes: int, labels: Sequence[int]) -> Any:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(k, *shape)).astype(np.float32)
    return x, draw.integers(0, classes, (k, *labels)).astype(np.int32)


def mlp(width: int, depth: int, batch: int) -> Model:
    """`depth` square layers with residual connections; the first 10 units are the logits."""

    def loss(params: Any, batch: Any) -> jax.Array:
        out = _layers(lambda x, w: x + jax.nn.relu(_normal(x) @ w), batch[0], params)
        return _cross_entropy(out[:, :10], batch[1])

    batches = lambda k: _draws(k, (batch, width), 10, (batch,))  # noqa: E731
    return Model(lambda key: _dense(key, depth, width, width), loss, batches, _adamw)


def cnn(width: int, depth: int, batch: int, side: int) -> Model:
    """A stem of patches 4 x 4, then `depth` residual 3 x 3 convolutions."""

    def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
        dimensions = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=dimensions
        )

    def init(key: jax.Array) -> Any:
        stem, body, head = jax.random.split(key, 3)
        return {
            "stem": _dense(stem, 1, 4, 4, 3, width)[0],
            "body": _dense(body, depth, 3, 3, width, width),
            "head": _dense(head, 1, width, 10)[0],
        }

    def loss(params: Any, batch: Any) -> jax.Array:
        x = convolve(batch[0], params["stem"], 4)
        x = _layers(lambda x, w: x + jax.nn.relu(convolve(_normal(x), w)), x, params["body"])
        return _cross_entropy(x.mean((1, 2)) @ params["head"], batch[1])

    batches = lambda k: _draws(k, (batch, side, side, 3), 10, (batch,))  # noqa: E731
    return Model(init, loss, batches, _momentum)


def _normal(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def transformer(
    width: int, depth: int, batch: int, length: int, words: int, remat: bool = False
) -> Model:
    """A causal decoder with tied embeddings and heads of 64 (or `width`, where that is less)."""
    heads = max(width // 64, 1)

    def init(key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, 6))
        return {
            "words": 0.02 * jax.random.normal(next(keys), (words, width)),
            "places": 0.02 * jax.random.normal(next(keys), (length, width)),
            "blocks": {
                "qkv": _dense(next(keys), depth, width, 3 * width),
                "out": _dense(next(keys), depth, width, width) / math.sqrt(depth),
                "up": _dense(next(keys), depth, width, 4 * width),
                "down": _dense(next(keys), depth, 4 * width, width) / math.sqrt(depth),
            },
        }

    def attention(x: jax.Array, w: Any) -> jax.Array:
        n, t, _ = x.shape
        q, k, v = jnp.split((x @ w["qkv"]).reshape(n, t, heads, -1), 3, axis=-1)
        scores = jnp.einsum("nthd,nshd->nhts", q, k) / math.sqrt(q.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v)
        return mixed.reshape(n, t, width) @ w["out"]

    def block(x: jax.Array, w: Any) -> jax.Array:
        x = x + attention(_normal(x), w)
        return x + jax.nn.gelu(_normal(x) @ w["up"]) @ w["down"]

    step = jax.checkpoint(block) if remat else block

    def loss(params: Any, batch: Any) -> jax.Array:
        x = params["words"][batch[:, :-1]] + params["places"]
        return _cross_entropy(
            _normal(_layers(step, x, params["blocks"])) @ params["words"].T, batch[:, 1:]
        )

    def batches(k: int) -> Any:
        return np.random.default_rng(0).integers(0, words, (k, batch, length + 1), dtype=np.int32)

    return Model(init, loss, batches, _adamw)


def models(quick: bool) -> dict[str, Model]:
    """The three, and the transformer with rematerialised blocks."""
    sizes = (32, 2, 2, 8, 64) if quick else (768, 12, 8, 256, 16384)
    return {
        "transformer": transformer(*sizes),
        "transformer, blocks rematerialised": transformer(*sizes, remat=True),
        "MLP": mlp(*((16, 2, 4) if quick else (4096, 6, 512))),
        "CNN": cnn(*((8, 2, 2, 8) if quick else (1024, 10, 32, 32))),
    }


# ---- what is measured


def problem(model: Model) -> hg.Problem:
    """With an L2 penalty, one coefficient or one for each weight."""

    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return penalised(model, params, hyper, batch)

    def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return model.loss(params, batch)

    return hg.bilevel(model.init, train_loss, valid_loss, model.optimizer)


def penalised(model: Model, params: Any, hyper: Any, batch: Any) -> jax.Array:
    l2 = hyper["l2"]
    each = jax.tree.map(lambda _: l2, params) if jnp.ndim(l2) == 0 else l2
    squares = jax.tree.map(lambda c, p: jnp.sum(c * p**2), each, params)
    return model.loss(params, batch) + 0.5 * sum(jax.tree.leaves(squares))


def by_hand(model: Model, hyper: Any, inner: Any, train: Any) -> Any:
    """(params, opt_state) after plain training."""

    def step(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        loss = functools.partial(penalised, model)
        _, grads = jax.value_and_grad(loss)(params, hyper, batch)
        updates, opt_state = model.optimizer(hyper).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, inner, train)[0]


def hyper_of(model: Model, estimator: hg.Estimator | None = None) -> Any:
    """Starting values; an implicit estimator of a stationary point sees no learning rate."""
    hyper = {"l2": jnp.float32(1e-4)}
    if isinstance(estimator, hg.Implicit) and estimator.of == "stationary":
        return hyper
    return hyper | {"learning_rate": jnp.float32(1e-3 if model.optimizer is _momentum else 1e-4)}


def arguments(model: Model, steps: int) -> tuple[Any, Any, Any]:
    """(key, train [steps, ...], valid), on the device."""
    data = jax.tree.map(jnp.asarray, model.batches(steps + 1))
    return jax.random.key(0), *(jax.tree.map(f, data) for f in (lambda x: x[1:], lambda x: x[0]))


def timed(
    function: Callable[..., Any], *args: Any, params: Any = None, carried: bool = False
) -> dict[str, Any]:
    """Figures of `function(*args)`.

    `carried`: its first result is its next first argument, donated. `params` are what memory is
    counted in copies of.
    """
    begin = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=(0,) if carried else ()).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    figures = {"trace": traced - begin, "compile": time.perf_counter() - traced}
    memory = program.memory_analysis()
    if memory is not None:
        sizes = {n: getattr(memory, f"{n}_size_in_bytes") for n in ("argument", "output", "temp")}
        figures["temp_bytes"] = sizes["temp"]
        figures["bytes"] = sum(sizes.values()) - memory.alias_size_in_bytes
        if params is not None:
            figures["copies"] = figures["bytes"] / sum(x.nbytes for x in jax.tree.leaves(params))
        stats = jax.devices()[0].memory_stats() or {}
        if figures["bytes"] > stats.get("bytes_limit", math.inf):
            return figures | {"note": "does not fit, not run"}
    del lowered
    out, seconds = None, []
    while len(seconds) < 3 or (sum(seconds) < 1.0 and len(seconds) < 30):
        begin = time.perf_counter()
        out = jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - begin)
        if carried:
            args = (out[0], *args[1:])
        if sum(seconds) > 15:
            break
    # The first call also loads the program.
    return figures | {"ms": 1e3 * float(np.median(seconds[1:] or seconds)), "out": out}


def training(model: Model, steps: int = STEPS) -> dict[str, Any]:
    """Plain training by hand, donated."""
    hyper, (key, train, _) = hyper_of(model), arguments(model, steps)
    params = jax.jit(model.init)(key)

    def run(inner: Any, hyper: Any, train: Any) -> Any:
        return by_hand(model, hyper, inner, train), ()

    inner = params, model.optimizer(hyper).init(params)
    return _plain(timed(run, inner, hyper, train, params=params, carried=True))


def naive(model: Model, steps: int = STEPS) -> dict[str, Any]:
    """Reverse over reverse."""
    hyper, (key, train, valid) = hyper_of(model), arguments(model, steps)
    params = jax.jit(model.init)(key)

    def run(hyper: Any, inner: Any, train: Any, valid: Any) -> Any:
        def after(hyper: Any) -> Any:
            inner_after = by_hand(model, hyper, inner, train)
            return model.loss(inner_after[0], valid), inner_after

        return jax.grad(after, has_aux=True)(hyper)

    inner = params, model.optimizer(hyper).init(params)
    return _plain(timed(run, hyper, inner, train, valid, params=params))


def estimated(
    model: Model, estimator: hg.Estimator, steps: int = STEPS, per_weight: bool = False
) -> dict[str, Any]:
    """One hypergradient, the training state after it included."""
    hyper, (key, train, valid) = hyper_of(model, estimator), arguments(model, steps)
    bilevel = problem(model)
    if per_weight:
        params = jax.eval_shape(model.init, key)
        hyper["l2"] = jax.tree.map(lambda p: jnp.full(p.shape, 1e-4, p.dtype), params)
    inner = jax.jit(bilevel.init)(hyper, key)

    def run(hyper: Any, inner: Any, train: Any, valid: Any) -> Any:
        estimate = hg.hypergradient(bilevel, hyper, inner, train, valid, key, estimator)
        return estimate.grad, estimate.inner, estimate.loss, estimate.info

    figures = _plain(timed(run, hyper, inner, train, valid, params=inner.params))
    if per_weight:
        figures["hyperparameters"] = sum(x.size for x in jax.tree.leaves(hyper))
    return figures


def updated(model: Model, estimator: hg.Estimator, **options: Any) -> dict[str, Any]:
    """One update of `alternating`, its state donated."""
    key, train, valid = arguments(model, STEPS)
    tuner = hg.alternating(problem(model), SPACE, estimator, **options)
    state = jax.jit(tuner.init)(hyper_of(model), key)
    # In a buffer of its own each: what is donated must not be there twice.
    state = jax.tree.map(jnp.copy, state)
    return _plain(timed(tuner.update, state, train, valid, params=state.inner.params, carried=True))


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without arrays: a small hypergradient as numbers, of a large one the norm."""
    out = figures.pop("out", None)
    grad = None if out is None else out[0]
    if isinstance(grad, dict) and all(jnp.ndim(x) == 0 for x in grad.values()):
        figures["grad"] = {name: float(x) for name, x in grad.items()}
    elif isinstance(grad, dict):
        norm = math.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(grad)))
        figures["note"] = f"norm {norm:.3g}"
    return figures


def fitted(updates: int, wrapped: bool) -> dict[str, Any]:
    """`fit`, or the loop that it replaces, over batches from the host; a small MLP."""
    model = mlp(256, 4, 128)
    data = model.batches(STEPS + 1)
    batches = [tuple(x[i] for x in data) for i in range(STEPS + 1)]
    train, valid = batches[1:], batches[:1]
    tuner = hg.alternating(problem(model), SPACE)
    update = jax.jit(tuner.update)
    tuner = tuner._replace(update=update)

    def run(count: int) -> float:
        state = tuner.init(hyper_of(model), jax.random.key(0))
        begin = time.perf_counter()
        if wrapped:
            hg.fit(tuner, state, train, valid, count, steps_per_update=STEPS, progress=False)
        else:
            for _ in range(count):
                stacked = jax.tree.map(lambda *x: np.stack(x), *train)
                state, _ = update(state, stacked, valid[0])
            jax.block_until_ready(state)
        return time.perf_counter() - begin

    first = run(2)
    seconds = run(updates)
    rate = updates / seconds
    return {"ms": 1e3 / rate, "compile": first, "note": f"{rate:.0f} updates/s"}


def population(width: int, refined: bool, steps: int) -> dict[str, Any]:
    """Trials of benchmarks/populations.py's task, side by side, asked from a study and told."""
    train, valid = populations.data()
    members = Population(
        populations.PROBLEM,
        populations.SPACE,
        Refine(steps_per_update=10) if refined else None,
        train,
        valid,
        populations.BATCH,
        mode="vmap",
    )

    def generation(seed: int) -> float:
        hypers = _hypers(np.random.default_rng(seed), width)
        begin = time.perf_counter()
        state = members.init(hypers, jax.random.split(jax.random.key(seed), width))
        state = members.advance(state, steps // members.steps_per_update)
        jax.block_until_ready(members.report(state).score)
        return time.perf_counter() - begin

    first = generation(0)
    seconds = min(generation(1), generation(2)) if first < 20 else generation(1)
    asking = _seconds_of_optuna(width)
    note = f"{width / seconds:.3g} trials/s"
    if asking is None:
        note += "; optuna is not installed"
    else:
        note += f"; with ask and tell {width / (seconds + asking):.3g}, Optuna's share "
        note += f"{asking / (seconds + asking):.0%}"
    return {
        "ms": 1e3 * seconds / width,
        "compile": first - seconds,
        "trials_per_second": width / seconds,
        "optuna_seconds": asking,
        "note": note,
    }


def _hypers(draw: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    hypers = {
        "learning_rate": 10 ** draw.uniform(-4, -1, n),
        "momentum": 1 - 10 ** draw.uniform(-2, 0, n),
        "l2": 10 ** draw.uniform(-6, -1, (n, 3)),
        "dropout": draw.uniform(0, 0.8, (n, 2)),
    }
    return {name: x.astype(np.float32) for name, x in hypers.items()}


def _seconds_of_optuna(width: int, most: int = 64) -> float | None:
    """To ask for and tell as many trials, by a history of 64; more than 64 by proportion."""
    try:
        study, alone = populations.new_study(), min(width, most)
    except ImportError:
        return None
    for n in (most, alone):  # the first fills the history
        begin = time.perf_counter()
        trials, _ = populations.asked(study, n)
        populations.told(study, trials, np.linspace(0, 1, n))
    return (time.perf_counter() - begin) * width / alone


# ---- rows


def rows(quick: bool) -> list[Row]:
    """All rows, by value."""
    of = models(quick)
    solver = 2 if quick else 5
    others: dict[str, hg.Estimator] = {
        "Forward()": hg.Forward(),
        f"Implicit(ConjugateGradient({solver}))": hg.Implicit(hg.ConjugateGradient(solver)),
        f"Implicit(Neumann({solver}))": hg.Implicit(hg.Neumann(solver, 0.1)),
        f"Implicit(Nystrom({solver}))": hg.Implicit(hg.Nystrom(solver)),
        f"Implicit(GMRES({solver}))": hg.Implicit(hg.GMRES(solver)),
        "Implicit(Richardson())": hg.Implicit(hg.Richardson(1, 0.1)),
        'Implicit(Identity(), of="fixed_point")': hg.Implicit(hg.Identity(), of="fixed_point"),
        "Evolution(pairs=2)": hg.Evolution(pairs=2, std=0.01),
        "FiniteDifference()": hg.FiniteDifference(1e-2),
    }

    def reverse(name: str, modes: Sequence[str] = MODES) -> list[Row]:
        model, base = of[name], f"{name}: plain training"
        found = [Row(base, lambda: training(model))]
        for mode in modes:
            estimator = hg.Unrolled(checkpoint=mode)  # type: ignore[arg-type]
            label = f'{name}: Unrolled(checkpoint="{mode}")'
            found.append(Row(label, functools.partial(estimated, model, estimator), base))
        found.insert(2, Row(f"{name}: naive reverse", lambda: naive(model), base))
        return found

    def online(name: str, default: bool = True) -> list[Row]:
        model, base = of[name], f"{name}: plain training"
        one = functools.partial(updated, model, hg.Unrolled(window=1))
        found = [Row(f"{name}: alternating, Unrolled(window=1)", one, base)]
        usual = functools.partial(updated, model, hg.Unrolled(validate_at=0.8, checkpoint="step"))
        return [*found, *[Row(f'{name}: alternating, checkpoint="step"', usual, base)] * default]

    def rest(name: str) -> list[Row]:
        base = f"{name}: plain training"
        run = functools.partial(estimated, of[name])
        return [Row(f"{name}: {n}", functools.partial(run, e), base) for n, e in others.items()]

    long = mlp(*((16, 2, 4) if quick else (128, 3, 128)))

    def whole_run(steps: int, modes: Sequence[str]) -> list[Row]:
        base = f"T = {steps}: plain training"
        found = [Row(base, lambda: training(long, steps))]
        for mode in modes:
            estimator = hg.Unrolled(checkpoint=mode)  # type: ignore[arg-type]
            run = functools.partial(estimated, long, estimator, steps)
            found.append(Row(f'T = {steps}: Unrolled(checkpoint="{mode}")', run, base))
        return found

    def each_weight() -> list[Row]:
        name, base = "one L2 per weight of the MLP", "MLP: plain training"
        ways: dict[str, hg.Estimator] = {
            "Unrolled(window=1)": hg.Unrolled(window=1),
            'Unrolled(checkpoint="step")': hg.Unrolled(checkpoint="step"),
            f"Implicit(ConjugateGradient({solver}))": hg.Implicit(hg.ConjugateGradient(solver)),
        }
        run = functools.partial(estimated, of["MLP"], per_weight=True)
        return [
            Row(f"{name}: {n}", functools.partial(run, estimator=e), base) for n, e in ways.items()
        ]

    def trials(widths: Sequence[int], refined: bool) -> list[Row]:
        steps, kind = (20 if quick else 500), "refined" if refined else "plain"
        return [
            Row(
                f"population: {n} members, {kind}",
                functools.partial(population, n, refined, steps),
                "population: 1 members, plain",
            )
            for n in widths
        ]

    name = "transformer"
    remat = f"{name}, blocks rematerialised"
    length, longer = (20, 40) if quick else (1000, 10_000)
    widths = (1, 8) if quick else (1, 8, 64, 512, 1024)
    updates = 4 if quick else 100
    return [
        *reverse(name),
        *online(name),
        *trials(widths, False),
        *trials(widths, True),
        Row("MLP: plain training", lambda: training(of["MLP"])),
        *each_weight(),
        *whole_run(length, ["none", *[m for m in MODES if m in ("sqrt", "log")]]),
        Row("fit: the loop", lambda: fitted(updates, False)),
        Row("fit: hypergrad.fit", lambda: fitted(updates, True), "fit: the loop"),
        *[row for row in reverse("MLP") if not row.name.endswith("plain training")],
        *online("MLP"),
        *reverse("CNN"),
        *online("CNN"),
        Row(f"{remat}: plain training", lambda: training(of[remat])),
        Row(
            f"{remat}: Unrolled()",
            lambda: estimated(of[remat], hg.Unrolled()),
            f"{remat}: plain training",
        ),
        *rest("transformer"),
        *rest("MLP"),
        *rest("CNN"),
        *whole_run(longer, [m for m in MODES if m in ("sqrt", "log")]),
    ]  # fmt: skip


# ---- the child, which measures, and the parent, which survives it


def work(names: Sequence[str], quick: bool, journal: Path) -> None:
    """Measures the rows of these names; a line in `journal` when each begins and ends."""
    found = {row.name: row for row in rows(quick)}
    with journal.open("a") as file:

        def note(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        note(device=device())
        for name in names:
            note(begins=name)
            try:
                result = found[name].measure()
            except Exception as error:  # reported, whatever it is
                result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            note(row={"name": name, "base": found[name].base, **result})
            gc.collect()
            jax.clear_caches()


def device() -> dict[str, Any]:
    """What the figures were measured on."""
    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "memory_gib": round(stats.get("bytes_limit", 0) / 2**30, 1),
        "jax": jax.__version__,
        "matmul_precision": str(jax.config.jax_default_matmul_precision or "default"),
    }


def supervise(
    names: Sequence[str],
    command: Callable[[Sequence[str], Path], list[str]],
    until: float,
    report: Callable[[list[dict[str, Any]], dict[str, Any]], None],
    row_seconds: float = ROW_SECONDS,
) -> dict[str, Any]:
    """Has `names` measured by child processes, `command(names, journal)`, up to a time.

    `until` is of `time.monotonic`. `report(rows, device)` is called after every row; returns what
    is known of the device.
    """
    left, about = list(names), {}
    done: list[dict[str, Any]] = []
    while left and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as folder:
            journal, errors = Path(folder, "journal"), Path(folder, "stderr")
            journal.touch()
            with errors.open("w") as stderr, journal.open() as lines:
                child = subprocess.Popen(
                    command(left, journal),
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    cwd=Path(__file__).resolve().parent.parent,
                )
                under_way, since = left[0], time.monotonic()
                while True:
                    ended = child.poll() is not None
                    for line in _whole_lines(lines):
                        about = line.get("device", about)
                        if "begins" in line:
                            under_way, since = line["begins"], time.monotonic()
                        if "row" in line:
                            done.append(line["row"])
                            left.remove(line["row"]["name"])
                            report(done, about)
                    now = time.monotonic()
                    late = now > until or now > since + row_seconds
                    if ended or late:
                        break
                    time.sleep(0.05)
                child.kill()
                child.wait()
            if not left:
                break
            if now > until:
                break
            tail = " ".join(errors.read_text().strip().splitlines()[-3:])[-300:]
            why = f"its process ended with {child.returncode}: {tail}"
            why = f"not done after {row_seconds:.0f} s" if late else why
            done.append({"name": under_way, "error": why})
            left.remove(under_way)
            report(done, about)
    done += [{"name": name, "skipped": "skipped: the time was over"} for name in left]
    report(done, about)
    return about


def _whole_lines(file: Any) -> list[dict[str, Any]]:
    found = []
    while True:
        place, line = file.tell(), file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return found
        found.append(json.loads(line))


# ---- the table


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown, a table per model."""
    by_name = {row["name"]: row for row in found}
    lines: list[str] = []
    for group, members in _grouped(found).items():
        lines += ["", f"### {group}", "", *_HEAD]
        lines += [_line(row, by_name, group) for row in members]
    return "\n".join(lines)


_HEAD = (
    "| row | ms | x base | GiB | copies | trace s | compile s | differs | |",
    "|---|---|---|---|---|---|---|---|---|",
)


def _grouped(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["name"].split(": ")[0], []).append(row)
    return groups


def _line(row: dict[str, Any], by_name: dict[str, dict[str, Any]], group: str) -> str:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    base = by_name.get(row.get("base", ""), {}).get("ms")
    ratio = row["ms"] / base if base and "ms" in row else None
    gib = row["bytes"] / 2**30 if "bytes" in row else None
    difference = _difference(row, by_name.get(f"{group}: naive reverse", {}))
    cells = [
        row["name"].split(": ", 1)[-1],
        shown(row.get("ms"), ".4g"),
        shown(ratio, ".2f"),
        shown(gib, ".2f"),
        shown(row.get("copies"), ".1f"),
        shown(row.get("trace"), ".1f"),
        shown(row.get("compile"), ".1f"),
        shown(difference, ".0e"),
        row.get("note") or row.get("error") or row.get("skipped") or "",
    ]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _difference(row: dict[str, Any], like: dict[str, Any]) -> float | None:
    """The largest relative difference of an entry of the hypergradient; None where none is."""
    ours, theirs = row.get("grad"), like.get("grad")
    if not ours or not theirs or ours.keys() != theirs.keys() or row is like:
        return None
    return max(abs(ours[n] - theirs[n]) / abs(theirs[n]) if theirs[n] else math.inf for n in ours)


def main(quick: bool = False, argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print Markdown and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", default=quick)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="TEXT")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # of a child: journal, names
    given = parser.parse_args([] if argv is None else list(argv))
    if given.work:
        work(json.loads(given.work[1]), given.quick, Path(given.work[0]))
        return []
    until = time.monotonic() + given.seconds
    names = [r.name for r in rows(given.quick) if any(text in r.name for text in given.rows)]
    found: list[dict[str, Any]] = []

    def command(left: Sequence[str], journal: Path) -> list[str]:
        child = [sys.executable, "-m", "benchmarks.accelerator", *["--quick"] * given.quick]
        return [*child, "--work", str(journal), json.dumps(list(left))]

    def report(done: list[dict[str, Any]], about: dict[str, Any]) -> None:
        if given.out is not None:
            partial = given.out.with_name(given.out.name + ".partial")
            partial.write_text(json.dumps({"device": about, "rows": done}, indent=1))
            partial.replace(given.out)
        by_name = {row["name"]: row for row in done}
        for row in done[len(found) :]:
            print(_line(row, by_name, row["name"].split(": ")[0]), flush=True)
        found[:] = done

    about = supervise(names, command, until, report)
    print(f"\n{json.dumps(about)}\n{table(found)}", flush=True)
    return found


if __name__ == "__main__":
    main(argv=sys.argv[1:])
