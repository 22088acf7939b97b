"""A learning-rate schedule found from a flat line by 50 hypergradients, against 1,000 random ones.

An MLP on mnist1d (and a convolutional network on MNIST-10k with --data), momentum SGD. The
schedule has ten knots, straight lines between their logarithms; one more factor per layer, and one
weight decay per layer, are tuned in the same pass. The training is metasmooth (tanh, or
normalisation and average pooling), and its metasmoothness is printed. Hypergradients go through
the whole run from fresh parameters (`restarting`, 50 updates, each a run forward and back: 3 runs).
The rival draws 1,000 one-cycle schedules at random (peak, place of the peak, first and last share,
weight decay) and takes the best by validation loss: one population in one program. Both are then
retrained on seeds that neither has seen; "runs" is the cost in training runs.

  python -m benchmarks.schedules [--quick] [--data FOLDER] [--out FILE] [--seeds 3]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from benchmarks.gauntlet_tasks import mnist1d

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import mnist_schedule

KNOTS, UPDATES, RANDOM, FRESH = 10, 50, 1000, 5
SPACE = hg.Space(
    {
        "knots": hg.Float(1e-4, 3.0, scale="log"),
        "layers": hg.Float(0.03, 30.0, scale="log"),
        "decay": hg.Float(1e-6, 1e-1, scale="log"),
    }
)
FLAT = 0.02
Row = dict[str, Any]


class Task(NamedTuple):
    """A network `(params, x) -> logits` with named layers, its data, and the length of a run."""

    name: str
    init: Callable[[jax.Array], Any]
    logits: Callable[[Any, jax.Array], jax.Array]
    data: hg.Splits
    batch: int
    steps: int

    def problem(self) -> hg.Problem:
        """Momentum SGD under the schedule, a factor and a decay for each layer."""

        def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
            x, y = batch
            logits = self.logits(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
            decays = (
                hyper["decay"][name] * jnp.sum(layer["w"] ** 2) for name, layer in params.items()
            )
            return valid_loss(params, hyper, batch, key) + 0.5 * sum(decays)

        def optimizer(hyper: Any) -> optax.GradientTransformation:
            line = hg.piecewise_linear(jnp.log(hyper["knots"]), self.steps - 1)
            rates = {name: {"w": f, "b": f} for name, f in hyper["layers"].items()}
            return optax.chain(
                optax.trace(0.9),
                optax.scale_by_learning_rate(lambda step: jnp.exp(line(step))),
                hg.scale_by_tree(rates),
            )

        return hg.bilevel(self.init, train_loss, valid_loss, optimizer)

    def hyper(self, knots: Any, decay: Any = 1e-4) -> Any:
        """One schedule for all layers."""
        layers = jax.eval_shape(self.init, jax.random.key(0))
        return {
            "knots": jnp.asarray(knots, jnp.float32),
            "layers": {name: jnp.float32(1.0) for name in layers},
            "decay": {name: jnp.asarray(decay, jnp.float32) for name in layers},
        }


def _dense(key: jax.Array, *shape: int) -> Any:
    scale = np.sqrt(np.prod(shape[:-1]))
    return {"w": jax.random.normal(key, shape) / scale, "b": jnp.zeros(shape[-1])}


def signals() -> Task:
    """mnist1d, an MLP 40-64-64-10 with tanh."""

    def init(key: jax.Array) -> Any:
        a, b, c = jax.random.split(key, 3)
        return {"one": _dense(a, 40, 64), "two": _dense(b, 64, 64), "three": _dense(c, 64, 10)}

    def logits(params: Any, x: jax.Array) -> jax.Array:
        for name in ("one", "two"):
            x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
        return x @ params["three"]["w"] + params["three"]["b"]

    return Task("mnist1d", init, logits, mnist1d(2000, 1000, 2000), 100, 200)


def images(folder: str) -> Task:
    """MNIST-10k at 14 x 14: a convolution, average pooling and two dense layers, with tanh."""
    data = mnist_schedule.load(folder)
    halved = lambda x: x.reshape(-1, 14, 2, 14, 2).mean((2, 4))  # noqa: E731
    splits = hg.Splits(*((halved(x), y) for x, y in data))

    def init(key: jax.Array) -> Any:
        a, b, c = jax.random.split(key, 3)
        return {"conv": _dense(a, 16, 12), "one": _dense(b, 108, 32), "two": _dense(c, 32, 10)}

    def logits(params: Any, x: jax.Array) -> jax.Array:
        parts = [x[:, i : i + 11 : 2, j : j + 11 : 2] for i in range(4) for j in range(4)]
        x = jnp.stack(parts, -1) @ params["conv"]["w"] + params["conv"]["b"]  # [n, 6, 6, 12]
        x = jnp.tanh(x).reshape(len(x), 3, 2, 3, 2, -1).mean((2, 4)).reshape(len(x), -1)
        x = jnp.tanh(x @ params["one"]["w"] + params["one"]["b"])
        return x @ params["two"]["w"] + params["two"]["b"]

    return Task("mnist10k", init, logits, splits, 50, 200)


def one_cycles(task: Task, count: int, rng: np.random.Generator) -> Any:
    """`count` random schedules, stacked: up to a peak by a half cosine, and down by another."""
    place = np.linspace(0, 1, KNOTS)
    peak = 10 ** rng.uniform(-2.5, 0, (count, 1))
    top, first = rng.uniform(0.05, 0.6, (count, 1)), 10 ** rng.uniform(-2, 0, (count, 1))
    last = 10 ** rng.uniform(-3, -0.5, (count, 1))
    up, down = place / top, (place - top) / (1 - top)
    ease = lambda x: (1 - np.cos(np.pi * np.clip(x, 0, 1))) / 2  # noqa: E731
    share = np.where(place < top, first + (1 - first) * ease(up), 1 - (1 - last) * ease(down))
    knots = np.clip(peak * share, 1e-4, 3.0).astype(np.float32)
    decay = (10 ** rng.uniform(-6, -2, count)).astype(np.float32)
    return jax.vmap(task.hyper)(jnp.asarray(knots), jnp.asarray(decay))


class Programs(NamedTuple):
    """What is compiled once for a task.

    `losses(hypers, keys)` gives the validation and test losses of whole runs, side by side;
    `update` is one outer step.
    """

    problem: hg.Problem
    train: hg.Minibatches
    valid: Any
    losses: Callable[[Any, jax.Array], Any]
    tuner: hg.Tuner
    update: Callable[..., Any]


def programs(task: Task) -> Programs:
    """The task's problem, and the two programs that all methods use."""
    problem, data = task.problem(), task.data
    train = hg.Minibatches(jax.tree.map(jnp.asarray, data.train), task.batch, task.steps)
    valid, test = (jax.tree.map(jnp.asarray, split) for split in (data.valid, data.test))

    def run(hyper: Any, key: jax.Array) -> Any:
        params = hg.rollout(problem, hyper, problem.init(hyper, key), train, key).params
        return tuple(problem.valid_loss(params, hyper, x, key) for x in (valid, test))

    @jax.jit
    def losses(hypers: Any, keys: jax.Array) -> Any:
        return jax.lax.map(lambda x: run(*x), (hypers, keys), batch_size=10)

    tuner = hg.restarting(
        problem,
        SPACE,
        hg.Unrolled(validate_at=5),
        hg.norm_adam(0.2),
        fresh_seeds=True,
        trust=hg.Trust(max_growth=20.0),
    )
    return Programs(problem, train, valid, losses, tuner, jax.jit(tuner.update))


def learned(p: Programs, flat: Any, key: jax.Array, updates: int) -> tuple[Any, int]:
    """The mean of the last five trusted positions, and how many steps were refused."""
    state, trusted, refused = p.tuner.init(flat, key), [], 0
    for _ in range(updates):
        state, info = p.update(state, p.train, p.valid)
        if int(info.refused) == 0:
            trusted.append(SPACE.to_unit(info.hyper))
        else:
            refused += 1
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *trusted[-5:])
    return SPACE.from_unit(mean), refused


def best_of(p: Programs, hypers: Any, key: jax.Array) -> Any:
    """The schedule with the least validation loss."""
    count = len(hypers["knots"])
    scores, _ = p.losses(hypers, jnp.stack([key] * count))
    return jax.tree.map(lambda x: x[int(np.nanargmin(scores))], hypers)


def measure(task: Task, seeds: int, updates: int, count: int) -> list[Row]:
    """The flat line, the learned schedule and the best random one, each on fresh seeds."""
    p, rows = programs(task), []
    flat = task.hyper(np.full(KNOTS, FLAT))
    smooth = hg.metasmoothness(p.problem, flat, p.train, jax.random.key(0)).value
    for seed in range(seeds):
        key, begin = jax.random.key(seed), time.perf_counter()
        found, refused = learned(p, flat, key, updates)
        middle = time.perf_counter()
        best = best_of(p, one_cycles(task, count, np.random.default_rng(seed)), key)
        seconds = (0.0, middle - begin, time.perf_counter() - middle)
        methods = {
            "the flat line": (flat, 0),
            f"{updates} hypergradients": (found, 3 * updates),
            f"best of {count} one-cycles": (best, count),
        }
        keys = jax.random.split(jax.random.key(2**20), FRESH)
        for (name, (hyper, runs)), spent in zip(methods.items(), seconds, strict=True):
            repeated = jax.tree.map(lambda x: jnp.stack([x] * FRESH), hyper)
            valid, test = (float(np.mean(x)) for x in p.losses(repeated, keys))
            about = {"task": task.name, "seed": seed, "method": name, "runs": runs}
            about |= {"valid": valid, "test": test, "seconds": spent, "refused": refused}
            knots = np.asarray(hyper["knots"]).tolist()
            rows.append({**about, "metasmoothness": smooth, "knots": knots})
    return rows


def show(rows: list[Row]) -> None:
    """One line per method: means over seeds."""
    print(f"\n{rows[0]['task']}, metasmoothness of the flat line {rows[0]['metasmoothness']:.3f}")
    print(f"{'':28}{'runs':>6}{'seconds':>9}{'valid':>8}{'test':>8}   test per seed")
    for name in dict.fromkeys(r["method"] for r in rows):
        group = [r for r in rows if r["method"] == name]
        means = [np.mean([r[k] for r in group]) for k in ("seconds", "valid", "test")]
        texts = f"{means[0]:9.1f}{means[1]:8.3f}{means[2]:8.3f}"
        each = " ".join(f"{r['test']:.3f}" for r in group)
        print(f"{name:28}{group[0]['runs']:6}{texts}   {each}", flush=True)


def main(quick: bool = False, argv: list[str] | None = None) -> list[Row]:
    """Measures, prints a table per task and writes `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", help="folder with MNIST's t10k idx files")
    parser.add_argument("--out", help="JSON with every row")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args([] if argv is None else argv)
    quick |= args.quick
    tasks = [signals(), *([images(args.data)] if args.data else [])]
    updates, count, seeds = (4, 20, 1) if quick else (UPDATES, RANDOM, args.seeds)
    rows = []
    for task in tasks:
        if quick:
            task = task._replace(steps=40)
        mine = measure(task, seeds, updates, count)
        show(mine)
        rows += mine
        if args.out:
            Path(args.out).write_text(json.dumps({"rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main(argv=sys.argv[1:])
