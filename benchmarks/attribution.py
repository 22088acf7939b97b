"""One hypergradient against what leaving examples out does, beside three rivals.

The derivative of each test loss in one weight per training example, through the whole run, sums to
a prediction of what leaving a subset out does to it; the subsets are then left out and the network
is retrained, all else (start, data order) equal. LDS is Spearman's rank correlation of prediction
and truth over the subsets, for each test example; mean / worst over test examples. Rivals see the
same run:

- influence: the inverse Hessian at the trained weights by conjugate gradients, damped;
- TracIn: gradient products, summed over ten checkpoints;
- TRAK-like: gradients of the margin, projected to 256 random directions, one model.

Influence and TRAK get the best of three dampings, chosen on the truth itself, which favours them.
"smooth" is `hypergrad.metasmoothness` before anything is differentiated; "cost" is what a test loss
costs in plain runs, timed.

  python -m benchmarks.attribution [--quick] [--data FOLDER] [--out FILE] [--tasks NAME ...]

Each network is trained twice: smooth (tanh, average pooling), and "relu" (with maximum pooling
where there is any). Adam, 150 steps of 50; its eps_root is 0, but 1e-6 in the smooth "digits" and
"transformer". Without --data only scikit-learn's digits; FOLDER holds MNIST's t10k idx files and
tinyshakespeare.txt. 500 (conv) or 1,000 training examples, 16 test examples, one seed.
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
from jax.flatten_util import ravel_pytree
from scipy.stats import spearmanr

import hypergrad as hg
from benchmarks.attribution_tasks import Recipe, Task, convolutional, digits, transformer

KEY = jax.random.key(0)
CHECKPOINTS, PROJECTED, CHUNK = 10, 256, 8
DAMPINGS = (1e-3, 1e-2, 1e-1)
# Smooth, and as networks are usually trained; see docs/attribution.md.
SMOOTH = Recipe(activation="tanh", pool="average", eps_root=1e-6)
USUAL = Recipe(activation="relu", pool="max")
MAKERS: dict[str, Callable[..., Task]] = {
    "digits": lambda folder, *rest: digits(*rest),
    "conv": convolutional,
    "transformer": transformer,
}
# By name: which network, how many examples, how it is trained.
TASKS = {
    "digits": ("digits", 1000, SMOOTH),
    "conv": ("conv", 500, SMOOTH._replace(eps_root=0.0)),
    "transformer": ("transformer", 1000, SMOOTH),
    "digits, relu": ("digits", 1000, USUAL),
    "conv, relu": ("conv", 500, USUAL),
    "transformer, relu": ("transformer", 1000, USUAL),
}
Row = dict[str, Any]


class Truth(NamedTuple):
    """What retraining does.

    `kept` [subsets, examples] of 0 and 1; `change` [subsets, tests] of the losses; `seconds` of one
    run.
    """

    kept: np.ndarray
    change: np.ndarray
    loss: float
    seconds: float


def ones(task: Task) -> Any:
    """The weights at which all is differentiated."""
    return {"weight": jnp.ones(task.size)}


def retrain(task: Task, fractions: tuple[float, ...], subsets: int, seed: int = 1) -> dict:
    """By fraction: subsets are left out at random, and the tests' losses change."""

    def run(kept: jax.Array) -> jax.Array:
        hyper = {"weight": kept}
        inner = task.problem.init(hyper, KEY)
        params = hg.rollout(task.problem, hyper, inner, task.train, KEY).params
        return jax.vmap(task.loss, (None, 0))(params, task.tests)

    rng = np.random.default_rng(seed)
    masks = np.ones((1 + subsets * len(fractions), task.size), np.float32)
    for i, mask in enumerate(masks[1:]):
        count = max(round(fractions[i // subsets] * task.size), 1)
        mask[rng.choice(task.size, count, replace=False)] = 0
    runs = jax.jit(lambda masks: jax.lax.map(run, masks, batch_size=8)).lower(masks).compile()
    begin = time.perf_counter()
    losses = np.asarray(runs(masks))
    seconds = (time.perf_counter() - begin) / len(masks)
    truth = {}
    for i, fraction in enumerate(fractions):
        part = slice(1 + i * subsets, 1 + (i + 1) * subsets)
        change = losses[part] - losses[0]
        truth[fraction] = Truth(masks[part], change, float(losses[0].mean()), seconds)
    return truth


def listed(tests: Any) -> list[Any]:
    """One batch for each test example."""
    count = len(jax.tree.leaves(tests)[0])
    return [jax.tree.map(lambda x, i=i: x[i], tests) for i in range(count)]


def by_hypergradient(task: Task) -> tuple[np.ndarray, float]:
    """(scores [tests, examples], seconds for each test, without compiling)."""
    tests = listed(task.tests)
    call = lambda tests: hg.attribution(  # noqa: E731
        task.problem, ones(task), task.train, tests, KEY, chunk=CHUNK, check=False
    )
    call(tests[:CHUNK])
    begin = time.perf_counter()
    return call(tests)["weight"], (time.perf_counter() - begin) / len(tests)


def checkpoints(task: Task) -> list[Any]:
    """Parameters along the run; the last are the trained ones."""
    hyper, steps = ones(task), task.train.num_steps // CHECKPOINTS
    part = hg.Minibatches(task.train.arrays, task.train.batch_size, steps)
    inner, found = task.problem.init(hyper, KEY), []
    for _ in range(CHECKPOINTS):
        inner = hg.rollout(task.problem, hyper, inner, part, KEY)
        found.append(inner.params)
    return found


def gradients_of(function: Callable[..., jax.Array]) -> Callable[..., np.ndarray]:
    """`(params, examples) -> [examples, parameters]`, compiled once for each number of examples."""
    one = lambda params, example: ravel_pytree(jax.grad(function)(params, example))[0]  # noqa: E731

    @jax.jit
    def every(params: Any, examples: Any) -> jax.Array:
        return jax.lax.map(lambda example: one(params, example), examples, batch_size=50)

    return lambda params, examples: np.asarray(every(params, examples))


def by_tracin(task: Task, along: list[Any]) -> np.ndarray:
    """Minus the learning rate times gradient products, over checkpoints."""
    gradients = gradients_of(task.loss)
    products = (gradients(p, task.tests) @ gradients(p, task.examples).T for p in along)
    return -task.rate * sum(products)


def by_influence(task: Task, params: Any) -> list[np.ndarray]:
    """Minus g_test (H + damping)^-1 g_train of the mean training loss, for each damping."""
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def solved(right: jax.Array, every: Any, damping: jax.Array) -> jax.Array:
        def total(flat: jax.Array) -> jax.Array:
            return task.problem.train_loss(unravel(flat), ones(task), every, KEY)

        def product(v: jax.Array) -> jax.Array:
            return jax.jvp(jax.grad(total), (flat,), (v,))[1] + damping * v

        return jax.lax.map(lambda g: jax.scipy.sparse.linalg.cg(product, g, maxiter=30)[0], right)

    gradients = gradients_of(task.loss)
    test, train = (gradients(params, x) for x in (task.tests, task.examples))
    inverse = (np.asarray(solved(test, task.train.arrays, jnp.float32(d))) for d in DAMPINGS)
    return [-x @ train.T / task.size for x in inverse]


def by_trak(task: Task, params: Any) -> list[np.ndarray]:
    """Minus phi_test (Phi^T Phi + damping)^-1 phi_train (1 - p_train), phi projected gradients."""

    def margin(params: Any, example: Any) -> jax.Array:
        loss = task.loss(params, example)
        return -loss - jnp.log(-jnp.expm1(-loss) + 1e-6)

    gradients, rng = gradients_of(margin), np.random.default_rng(0)
    test, train = (gradients(params, x) for x in (task.tests, task.examples))
    random = rng.normal(size=(train.shape[1], PROJECTED)).astype(np.float32)
    test, train = test @ random, train @ random
    losses = jax.jit(jax.vmap(task.loss, (None, 0)))(params, task.examples)
    kernel = train.T @ train
    scale = np.trace(kernel) / len(kernel) * np.eye(len(kernel), dtype=np.float32)
    solved = (np.linalg.solve(kernel + d * scale, train.T) for d in DAMPINGS)
    return [-test @ x * (1 - np.exp(-np.asarray(losses))) for x in solved]


def lds(scores: np.ndarray, truth: Truth) -> np.ndarray:
    """[tests], NaN taken as no correlation."""
    predicted = (truth.kept - 1) @ scores.T
    pairs = zip(predicted.T, truth.change.T, strict=True)
    return np.nan_to_num([spearmanr(p, t).statistic for p, t in pairs])


def measure(task: Task, fractions: tuple[float, ...], subsets: int, rivals: bool = True) -> Row:
    """One task: metasmoothness, cost, and the LDS of every method by fraction."""
    smooth = hg.metasmoothness(task.problem, ones(task), task.train, KEY)
    scores, seconds = by_hypergradient(task)
    methods = {"hypergradient": [scores]}
    if rivals:
        along = checkpoints(task)
        methods["influence"] = by_influence(task, along[-1])
        methods["TracIn"] = [by_tracin(task, along)]
        methods["TRAK-like"] = by_trak(task, along[-1])
    truth = retrain(task, fractions, subsets)
    first = truth[fractions[0]]
    row = {
        "task": task.name,
        "metasmoothness": smooth.value,
        "verdict": smooth.verdict,
        "test_loss": first.loss,
        "run_seconds": first.seconds,
        "cost_in_runs": seconds / first.seconds,
        "lds": {},
    }
    for fraction, true in truth.items():
        for name, options in methods.items():
            found = max((lds(s, true) for s in options), key=np.mean)
            cell = {"mean": float(found.mean()), "worst": float(found.min())}
            row["lds"].setdefault(name, {})[str(fraction)] = cell
    return row


def show(rows: list[Row], fractions: tuple[float, ...], subsets: int) -> None:
    """The table."""
    print(f"\nLDS over {subsets} subsets, mean / worst of the test examples")
    head = "".join(f"{f'{f:.0%} left out':>18}" for f in fractions)
    print(f"{'task':20}{'smooth':>7}{'cost':>6}  {'method':15}{head}")
    for row in rows:
        start = f"{row['task']:20}{row['metasmoothness']:7.3f}{row['cost_in_runs']:6.1f}"
        for name, cells in row["lds"].items():
            texts = (f"{c['mean']:.3f} / {c['worst']:6.3f}" for c in cells.values())
            print(f"{start:33}  {name:15}" + "".join(f"{t:>18}" for t in texts), flush=True)
            start = ""


def main(quick: bool = False, argv: list[str] | None = None) -> list[Row]:
    """Measures, prints the table and writes `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, help="MNIST's idx files and tinyshakespeare.txt")
    parser.add_argument("--out", help="JSON with every row")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    args = parser.parse_args([] if argv is None else argv)
    args.quick |= quick
    fractions = (0.05,) if args.quick else (0.01, 0.05, 0.1)
    subsets = 16 if args.quick else 64
    names = args.tasks or [name for name in TASKS if args.data or TASKS[name][0] == "digits"]
    names = names[:1] if args.quick and not args.tasks else names
    if not args.data and any(TASKS[name][0] != "digits" for name in names):
        raise SystemExit(
            f"--tasks {' '.join(names)}: give --data FOLDER with MNIST's t10k idx files and "
            "tinyshakespeare.txt."
        )
    rows = []
    for name in names:
        kind, size, recipe = TASKS[name]
        sizes = (100, 4) if args.quick else (size, 16)
        recipe = recipe._replace(steps=60) if args.quick else recipe
        task = MAKERS[kind](args.data, recipe, *sizes)
        row = {**measure(task, fractions, subsets), "task": name, "examples": task.size}
        show([row], fractions, subsets)
        rows.append(row)
        if args.out:
            Path(args.out).write_text(json.dumps({"rows": rows, "subsets": subsets}, indent=1))
        jax.clear_caches()
    return rows


if __name__ == "__main__":
    main(argv=sys.argv[1:])
