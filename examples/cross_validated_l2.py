"""The L2 of ridge and logistic regression by hypergradients and L-BFGS-B, beside scikit-learn's.

Ridge regression on scikit-learn's diabetes, logistic regression on its breast cancer, both with
scikit-learn's own five folds. The cross-validated loss is a smooth function of log L2: its
derivative is the mean over the folds of `hg.Implicit`'s hypergradients (one `vmap`), and
`scipy.optimize.minimize(method="L-BFGS-B")` descends it, as HOAG does (Pedregosa 2016). The inner
solver is optax's L-BFGS in a hand-filled `hg.Problem`; parameters, curvature pairs and the linear
solve are warm from one outer step to the next.

scikit-learn searches a grid: its default of 10 values in 8 decades, whose neighbours are a factor
of 7.7 apart, and the same zoomed in three times, until they are 2.3% apart. The reference is
scikit-learn's (for ridge the closed form by Cholesky, for logistic regression converged tightly),
on values 0.8% apart; "off by" is the distance of an L2 from it. Gradient evaluations are, for
scikit-learn, its n_iter_: of LSQR for ridge, of L-BFGS for logistic regression, warm along the grid
as it does. For hypergradients they are the inner solver's (its slowest fold's, for every fold), and
10 and 2 per product with the Hessian for each hypergradient.

  python examples/cross_validated_l2.py [--quick] [--out cross_validated_l2.png]

prints the tables and writes the picture in 14 s of processor time, of which 7 compile; --quick has
one start only.

ridge, diabetes: scikit-learn's optimum, to 0.8%, is 0.2144
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ method                           ┃     L2 ┃ off by ┃  CV loss ┃ tried ┃ gradient evals ┃ seconds ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━━━━━━━┩
│ scikit-learn, 10 values          │ 0.3594 │  67.6% │ 0.504735 │    10 │            408 │     0.2 │
│ scikit-learn, 10 values, 3 zooms │ 0.2138 │   0.3% │ 0.504730 │    40 │          1,908 │     0.7 │
│ hypergradients, from 1           │ 0.2144 │   0.0% │ 0.504730 │     8 │          1,665 │     0.2 │
│ hypergradients, from 100         │ 0.2143 │   0.1% │ 0.504730 │    10 │          2,060 │     0.1 │
│ hypergradients, from 0.01        │ 0.2144 │   0.0% │ 0.504730 │     9 │          2,165 │     0.1 │
└──────────────────────────────────┴────────┴────────┴──────────┴───────┴────────────────┴─────────┘
compiling took 14.8 s more
logistic, breast cancer: scikit-learn's optimum, to 0.8%, is 1.5781
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ method                           ┃     L2 ┃ off by ┃  CV loss ┃ tried ┃ gradient evals ┃ seconds ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━━━━━━━┩
│ scikit-learn, 10 values          │ 2.7826 │  76.3% │ 0.080217 │    10 │            891 │     0.8 │
│ scikit-learn, 10 values, 3 zooms │ 1.5826 │   0.3% │ 0.078138 │    40 │          1,865 │     2.3 │
│ hypergradients, from 1           │ 1.5799 │   0.1% │ 0.078138 │     5 │          1,165 │     0.1 │
│ hypergradients, from 100         │ 1.5811 │   0.2% │ 0.078138 │     6 │          1,290 │     0.1 │
│ hypergradients, from 0.01        │ 1.5820 │   0.2% │ 0.078138 │     6 │          1,945 │     0.1 │
└──────────────────────────────────┴────────┴────────┴──────────┴───────┴────────────────┴─────────┘
compiling took 11.6 s more

From scikit-learn's default L2 of 1 hypergradients take fewer gradient evaluations than the zoomed
grid on both tasks; from a hundred times more or less it depends: on ridge 8% and 13% more, on
logistic regression 31% fewer and 4% more. Ridge's loss is so flat that 5% of the L2 are 6e-8 of it.
HOAG's decreasing tolerance did not pay here: the line search compares losses, and one that is not
converged misled it; `info["converged_loss"]`, which corrects it to first order, let the tolerance
be 1e-5 where 1e-7 was needed.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegressionCV, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import hypergrad as hg

# The optimum of a flat loss takes more digits than float32 has.
jax.config.update("jax_enable_x64", True)

FOLDS, GRID, TOLERANCE = 5, np.logspace(-4, 4, 10), 1e-5
# How often a grid is laid anew between the neighbours of its best value. From neighbours that are a
# factor of 7.7 apart it comes to 2.3%; the reference, from half to twice that answer, to 0.8%.
ZOOMS, REFERENCE_ZOOMS = 3, 2
# what the picture shows of the grid's 8 decades, and of losses close to the minimum
LOW, HIGH, FLOOR = 1e-2, 1e3, 1e-8


class Task(NamedTuple):
    """A regression and its folds.

    `x` [n, features] and `y` [n]; `used` [folds, n] is 1 where a fold trains, else 0. The training
    loss of a fold is the mean of `per_example(prediction, y)` over its rows, plus
    `penalty` * l2 * |w|^2 / rows: scikit-learn's objective, l2 being its alpha or 1 / C.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    used: np.ndarray
    per_example: Callable[[jax.Array, jax.Array], jax.Array]
    penalty: float
    products: int  # with the Hessian, for a hypergradient
    gtol: float  # a slope of the loss over log10 L2: where to stop
    scores: Callable[..., tuple[np.ndarray, int]]  # (l2s, tight) -> (losses, iterations)


class Fold(NamedTuple):
    """What one fold's losses see."""

    x: jax.Array
    y: jax.Array
    used: jax.Array


class Solution(NamedTuple):
    """The training state: what a warm start needs, and the gradients taken so far."""

    params: Any
    opt_state: Any
    evaluations: jax.Array


class Found(NamedTuple):
    """What a search came to; `path` is every L2 it tried and the cross-validated loss there."""

    method: str
    l2: float
    path: list[tuple[float, float]]
    evaluations: int
    seconds: float


def ridge() -> Task:
    """Diabetes, features and target scaled to unit variance, so that the loss is 1 - R^2."""
    x, y = load_diabetes(return_X_y=True)
    x, y = StandardScaler().fit_transform(x), (y - y.mean()) / y.std()
    folds = list(KFold(FOLDS).split(x))

    def scores(l2s: np.ndarray, tight: bool = False) -> tuple[np.ndarray, int]:
        solver = {"solver": "cholesky"} if tight else {"solver": "lsqr"}
        losses, iterations = np.zeros((FOLDS, len(l2s))), 0
        for i, (train, valid) in enumerate(folds):
            for j, l2 in enumerate(l2s):
                model = Ridge(alpha=l2, **solver).fit(x[train], y[train])
                losses[i, j] = np.mean((model.predict(x[valid]) - y[valid]) ** 2)
                iterations += 0 if tight else int(np.sum(model.n_iter_))
        return losses.mean(0), iterations

    squared = lambda prediction, y: (prediction - y) ** 2  # noqa: E731
    # Flat: 5% of the L2 are a slope of 3e-6.
    return Task("ridge, diabetes", x, y, masks(folds, len(y)), squared, 1.0, 11, 1e-7, scores)


def logistic() -> Task:
    """Breast cancer, features scaled to unit variance; the loss is the log loss in nats."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    folds = list(StratifiedKFold(FOLDS).split(x, y))

    def scores(l2s: np.ndarray, tight: bool = False) -> tuple[np.ndarray, int]:
        limits = {"tol": 1e-8, "max_iter": 10_000} if tight else {}
        search = LogisticRegressionCV(
            Cs=1 / l2s[::-1], cv=folds, scoring="neg_log_loss", refit=False, **limits
        )
        # Two threads on these small matrices take 15 times as long as one.
        with warnings.catch_warnings(), threadpool_limits(1):
            # about the shape of scores_, which is right below before and after the change
            warnings.simplefilter("ignore", FutureWarning)
            search.fit(x, y)
        found = search.scores_
        found = found[1] if isinstance(found, dict) else found
        return -np.mean(found, axis=0).ravel()[::-1], int(np.sum(search.n_iter_))

    log_loss = lambda logit, y: jax.nn.softplus(logit) - y * logit  # noqa: E731
    name = "logistic, breast cancer"
    return Task(name, x, y, masks(folds, len(y)), log_loss, 0.5, 10, 1e-4, scores)


def masks(folds: Any, size: int) -> np.ndarray:
    """[folds, n]: 1 where a fold trains, else 0."""
    used = np.zeros((len(folds), size))
    for row, (train, _) in zip(used, folds, strict=True):
        row[train] = 1
    return used


def make_problem(task: Task) -> hg.Problem:
    """A fold's training as a `Problem` whose one step is a whole solve by L-BFGS."""
    solver = optax.lbfgs(memory_size=30)

    def valid_loss(params: Any, hyper: Any, fold: Fold, key: jax.Array) -> jax.Array:
        prediction = fold.x @ params["w"] + params["b"]
        return jnp.vdot(fold.used, task.per_example(prediction, fold.y)) / fold.used.sum()

    def train_loss(params: Any, hyper: Any, fold: Fold, key: jax.Array) -> jax.Array:
        penalty = task.penalty * 10 ** hyper["log_l2"] * jnp.sum(params["w"] ** 2)
        return valid_loss(params, hyper, fold, key) + penalty / fold.used.sum()

    def init(hyper: Any, key: jax.Array) -> Solution:
        params = {"w": jnp.zeros(task.x.shape[1]), "b": jnp.zeros(())}
        # Some of optax's first state is weakly typed, which would compile everything twice.
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), solver.init(params))
        return Solution(params, state, jnp.zeros((), int))

    def step(inner: Solution, hyper: Any, fold: Fold, key: jax.Array) -> Solution:
        loss = lambda params: train_loss(params, hyper, fold, key)  # noqa: E731
        value, grad = jax.value_and_grad(loss)(inner.params)
        read = lambda name: optax.tree.get(inner.opt_state, name)  # noqa: E731
        # The newest curvature pair is a difference of gradients: both must be of one L2.
        moved = jax.tree.map(lambda u, new, old: u + new - old, read("updates"), grad, read("grad"))
        state = optax.tree.set(inner.opt_state, value=value, grad=grad, updates=moved)

        def far(inner: Solution) -> jax.Array:
            return optax.tree.norm(optax.tree.get(inner.opt_state, "grad")) > TOLERANCE

        def iterate(inner: Solution) -> Solution:
            params, state, evaluations = inner
            at = {name: optax.tree.get(state, name) for name in ("value", "grad")}
            updates, state = solver.update(at["grad"], state, params, value_fn=loss, **at)
            tried = optax.tree.get(state, "info").num_linesearch_steps
            return Solution(optax.apply_updates(params, updates), state, evaluations + tried)

        start = Solution(inner.params, state, inner.evaluations + 1)
        return jax.lax.while_loop(far, iterate, start)

    return hg.Problem(init, step, train_loss, valid_loss)


def cross_validated(task: Task) -> tuple[Callable[..., Any], Any, Any]:
    """(log10 L2, inner, state) -> (loss, slope, inner, state), compiled; and the first two states.

    `inner` and `state`, the training's and the linear solve's, have a leading axis [folds].
    """
    problem, key = make_problem(task), jax.random.key(0)
    estimator = hg.Implicit(hg.ConjugateGradient(task.products, warm_start=True))

    @partial(jax.jit, compiler_options=compiling.OPTIONS)
    def objective(log_l2: jax.Array, inner: Any, state: Any) -> Any:
        def of_fold(used: jax.Array, inner: Any, state: Any) -> Any:
            train, valid = Fold(task.x, task.y, used), Fold(task.x, task.y, 1 - used)
            one_step = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], train)
            hyper = {"log_l2": log_l2}
            # hg.hypergradient in one call would forget the linear solve; this keeps its state.
            window = hg.Window(problem, inner, one_step, valid, key)
            return estimator.estimate(window, hyper, state)

        estimate, state = jax.vmap(of_fold)(task.used, inner, state)
        # The line search compares losses: those at the solution, to which the inner solver came
        # only so close, are more exact by one order.
        loss = estimate.info["converged_loss"].mean()
        return loss, estimate.grad["log_l2"].mean(), estimate.inner, state

    inner = jax.vmap(lambda _: problem.init(None, key))(task.used)
    state = jax.vmap(
        lambda inner: estimator.init(hg.Window(problem, inner, None, None, key), None)
    )(inner)
    objective(np.float64(0), inner, state)  # compiles
    return objective, inner, state


def by_hypergradients(task: Task, start: float, compiled: Any) -> Found:
    """L-BFGS-B over log10 L2, from `start`."""
    begin, path = time.perf_counter(), []
    objective, inner, state = compiled

    def value_and_slope(log_l2: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal inner, state
        loss, slope, inner, state = objective(log_l2[0], inner, state)
        path.append((10 ** log_l2[0], float(loss)))
        return float(loss), np.array([slope])

    end = minimize(
        value_and_slope,
        [np.log10(start)],
        jac=True,
        method="L-BFGS-B",
        options={"gtol": task.gtol, "ftol": 0.0},
    )
    # a product of the warm start more
    implicit = len(path) * (10 + 2 * (task.products + 1))
    evaluations = FOLDS * (int(inner.evaluations.max()) + implicit)
    seconds = time.perf_counter() - begin
    return Found(
        f"hypergradients, from {start:g}", float(10 ** end.x[0]), path, evaluations, seconds
    )


def by_grid(task: Task, zooms: int, tight: bool = False, grid: np.ndarray = GRID) -> Found:
    """scikit-learn's answer on `grid`, laid anew `zooms` times between the best's neighbours."""
    begin, path, evaluations = time.perf_counter(), [], 0
    for zoom in range(zooms + 1):
        losses, iterations = task.scores(grid, tight)
        evaluations += iterations
        path += zip(grid, losses, strict=True)
        best = int(np.argmin(losses))
        if not 0 < best < len(grid) - 1:
            raise ValueError(f"grid of zoom {zoom} has its best L2 {grid[best]} at its edge")
        l2, grid = grid[best], np.geomspace(grid[best - 1], grid[best + 1], len(grid))
    name = "scikit-learn, 10 values" + f", {zooms} zooms" * (zooms > 0)
    return Found(name, float(l2), path, evaluations, time.perf_counter() - begin)


def show(task: Task, results: list[Found], reference: Found, console: Console) -> None:
    """One task's table."""
    title = f"{task.name}: scikit-learn's optimum, to 0.8%, is {reference.l2:.4f}"
    table = Table(title=title, title_justify="left")
    for name in ("method", "L2", "off by", "CV loss", "tried", "gradient evals", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for found in results:
        off = np.exp(np.abs(np.log(found.l2 / reference.l2))) - 1
        # Judged tightly, whatever the search believed.
        loss = task.scores(np.array([found.l2]), True)[0][0]
        cost = (f"{found.evaluations:,}", f"{found.seconds:.1f}")
        numbers = (f"{found.l2:.4f}", f"{off:.1%}", f"{loss:.6f}", str(len(found.path)))
        table.add_row(found.method, *numbers, *cost)
    console.print(table)


def draw(rows: list[tuple[Task, Found, Found, Found]], curve: int, path: str) -> None:
    """How far above its minimum the loss is over L2, at the grid's values and on L-BFGS-B's way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    orange, blue = "#D55E00", "#0072B2"
    figure, axes = plt.subplots(1, len(rows), figsize=(11, 4.2), layout="constrained")
    for axis, (task, grid, found, reference) in zip(axes, rows, strict=True):
        best = min(loss for _, loss in reference.path)

        def above(pairs: list[tuple[float, float]], best: float = best) -> tuple[Any, Any]:
            l2s, losses = np.array(pairs).T
            return l2s, np.maximum(losses - best, FLOOR)

        l2s = np.unique([*np.geomspace(LOW, HIGH, curve), *(l2 for l2, _ in reference.path)])
        pairs = list(zip(l2s, task.scores(l2s, True)[0], strict=True))
        axis.plot(*above(pairs), color="0.6", zorder=1)
        label = f"scikit-learn's grid: best {grid.l2:.3f}, {grid.evaluations:,} gradients"
        axis.plot(*above(grid.path), "s", color=orange, markersize=7, label=label)
        label = f"L-BFGS-B: {found.l2:.3f}, {found.evaluations:,} gradients"
        axis.plot(*above(found.path), "o-", color=blue, markersize=5, lw=1, label=label)
        for i, spot in enumerate(zip(*above(found.path[:2]), strict=True)):
            axis.annotate(f"{i + 1}", spot, (6, 4), textcoords="offset points", color=blue)
        label = f"scikit-learn's optimum: {reference.l2:.3f}"
        axis.axvline(reference.l2, color="black", linestyle="--", lw=1, zorder=0, label=label)
        axis.set(xscale="log", yscale="log", xlim=(LOW, HIGH), title=task.name)
        axis.set_ylim(FLOOR / 2, 100 * above(pairs)[1].max())
        axis.set_xlabel("L2 coefficient (scikit-learn's alpha or 1 / C)")
        axis.grid(alpha=0.25)
        axis.legend(edgecolor="none", framealpha=1, fontsize=10, loc="upper left")
    axes[0].set_ylabel("cross-validated loss above its minimum")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Search both, print the tables, write the picture."""
    parser = argparse.ArgumentParser(description="cross-validated L2 by hypergradients (HOAG)")
    parser.add_argument("--quick", action="store_true", help="one start, a coarse curve")
    parser.add_argument("--out", default="cross_validated_l2.png", help="where the picture goes")
    options = parser.parse_args()
    # In a narrow terminal or a log the table would wrap inside its names.
    console = Console(width=max(Console().width, 112))
    # scikit-learn's default is an L2 of 1
    starts = [1.0] if options.quick else [1.0, 100.0, 0.01]
    rows = []
    for task in (ridge(), logistic()):
        grid, zoomed = by_grid(task, 0), by_grid(task, ZOOMS)
        around = np.geomspace(zoomed.l2 / 2, zoomed.l2 * 2, 10)
        reference = by_grid(task, REFERENCE_ZOOMS, tight=True, grid=around)
        begin = time.perf_counter()
        compiled = cross_validated(task)
        seconds = time.perf_counter() - begin
        found = [by_hypergradients(task, start, compiled) for start in starts]
        show(task, [grid, zoomed, *found], reference, console)
        console.print(f"compiling took {seconds:.1f} s more")
        rows.append((task, grid, found[0], reference))
    draw(rows, 8 if options.quick else 41, options.out)
    console.print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
