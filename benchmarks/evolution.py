"""Measure where evolution strategies get to on short windows and under chaos, and their noise.

Run: `python -m benchmarks.evolution` (three minutes on one core; `main(quick=True)` one).

The task `rotations` is a linear recurrence s' = A s + B theta, s in R^23, theta in R^10, A eleven
slow damped rotations (periods of 30 to 80 steps, modulus .98) in a random basis. An episode is 100
steps from s = 0 in windows of K = 10; the loss is |s - 1|^2 / 2 at the end of each window, L its
mean over the windows, whose optimum L* is known in closed form. Most of what theta does shows only
after the window. `forgetful` has A = I / 2 and a random target for every step in the place of 1, so
that the windows' gradients have nothing in common.

`tuning`: theta from 0 by SGD (rate 1e-3, cosine decay) with one update per window, 150 episodes
(quick: 40), every estimator alike. L is of the last theta, held fixed, the worst of 3 seeds (quick:
1). `excess` is (L - L*) / (L0 - L*), L0 at theta = 0; `gradients` counts gradient evaluations per
step. `fixed point of truncation`: where exact truncated descent must end, by its linear equations.
`unbiasedness`: the sum of an episode's estimates at theta = 0.1, its mean over seeds against the
gradient of the summed losses: distance over that gradient's norm; in standard errors of the mean
the largest deviation of an entry, and how far zero is away.
`noise of an episode`: standard deviation of the summed estimate over the exact gradient's norm, 64
pairs; `law` is sqrt((hyperparameters + 1) / pairs).
`chaos`: 100 steps of gradient descent on 64 copies of w^2 / 2 with ripples, whose learning rate
starts where the map is chaotic; validation is mean((w - 1)^2) and the hyperparameters are the
logarithm of the rate and the centre of the square. The norm of the first hypergradient and the
largest, over 60 steps of Adam(.05) on fresh starts; losses are means over 100 other starts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.estimators.evolution import Evolution

STATES, PARAMETERS, STEPS, WINDOW = 23, 10, 100, 10
PAIRS, STD = 64, 0.1


class Task(NamedTuple):
    """A recurrence: A `[23, 23]`, B `[23, parameters]`, targets `[100, 23]`."""

    a: np.ndarray
    b: np.ndarray
    targets: np.ndarray


class Recurrent(NamedTuple):
    """The recurrence's state, in the place of parameters."""

    params: jax.Array
    step: jax.Array


@functools.cache
def task(name: str, parameters: int = PARAMETERS) -> Task:
    rng = np.random.default_rng(0)
    a = np.zeros((STATES, STATES))
    for i in range(STATES // 2):
        w = 2 * np.pi / rng.uniform(30, 80)
        turn = np.array([[np.cos(w), -np.sin(w)], [np.sin(w), np.cos(w)]])
        a[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = 0.98 * turn
    a[-1, -1] = 0.98
    basis = np.linalg.qr(rng.normal(size=a.shape))[0]
    b = rng.normal(size=(STATES, parameters)) / np.sqrt(STATES)
    if name == "rotations":
        return Task(basis @ a @ basis.T, b, np.ones((STEPS, STATES)))
    return Task(np.eye(STATES) / 2, b, 10 * rng.normal(size=(STEPS, STATES)))


def problem_of(task: Task) -> hg.Problem:
    a, b = jnp.asarray(task.a), jnp.asarray(task.b)

    def init(theta: Any, key: Any) -> Recurrent:
        return Recurrent(jnp.zeros(STATES), jnp.zeros((), jnp.int32))

    def step(inner: Recurrent, theta: Any, batch: Any, key: Any) -> Recurrent:
        return Recurrent(a @ inner.params + b @ theta, inner.step + 1)

    def loss(params: Any, theta: Any, target: Any, key: Any) -> jax.Array:
        return 0.5 * jnp.sum((params - target) ** 2)

    return hg.Problem(init, step, loss, loss)


class Exact:
    """What NumPy knows of a task: each window's end is `responses[i] @ theta`."""

    def __init__(self, task: Task, window: int) -> None:
        total, responses = np.zeros_like(task.b), []
        for _ in range(STEPS):
            total = task.a @ total + task.b
            responses.append(total)
        self.responses = responses[window - 1 :: window]
        self.targets = task.targets[window - 1 :: window]

    def loss(self, theta: np.ndarray) -> float:
        return float(np.mean([0.5 * np.sum(r**2) for r in self._residuals(theta)]))

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """Of the sum over windows."""
        pairs = zip(self.responses, self._residuals(theta), strict=True)
        return sum(j.T @ r for j, r in pairs)

    def root(self, truncated: bool = False) -> np.ndarray:
        """Where the gradient vanishes; `truncated`: where what each window sees of it does."""
        seen = self.responses[:1] * len(self.responses) if truncated else self.responses
        left = sum(x.T @ j for x, j in zip(seen, self.responses, strict=True))
        return np.linalg.solve(left, sum(x.T @ y for x, y in zip(seen, self.targets, strict=True)))

    def _residuals(self, theta: np.ndarray) -> list[np.ndarray]:
        return [j @ theta - y for j, y in zip(self.responses, self.targets, strict=True)]


def episode(
    task: Task, estimator: hg.Estimator, window: int, update: Any, carry: Any, key: Any
) -> Any:
    """`update((theta, ...), grad)` after each window of an episode; returns the last carry."""
    problem = problem_of(task)
    inner = problem.init(carry[0], key)
    state = estimator.init(hg.Window(problem, inner, None, None, key), carry[0])
    train, targets = jnp.zeros((window, 1)), jnp.asarray(task.targets[window - 1 :: window])

    def one(progress: Any, target: jax.Array) -> Any:
        carry, inner, state = progress
        window = hg.Window(problem, inner, train, target, key)
        estimate, state = estimator.estimate(window, carry[0], state)
        return (update(carry, estimate.grad), estimate.inner, state), None

    return jax.lax.scan(one, (carry, inner, state), targets)[0][0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def tuned(estimator: hg.Estimator, episodes: int, key: jax.Array) -> jax.Array:
    """Theta after `episodes` with one update per window."""
    optimizer = optax.sgd(optax.cosine_decay_schedule(1e-3, episodes * STEPS // WINDOW))

    def update(carry: Any, grad: jax.Array) -> Any:
        move, outer = optimizer.update(grad, carry[1])
        return carry[0] + move, outer

    theta = jnp.zeros(PARAMETERS)
    run = functools.partial(episode, task("rotations"), estimator, WINDOW, update)
    start, keys = (theta, optimizer.init(theta)), jax.random.split(key, episodes)
    return jax.lax.scan(lambda carry, key: (run(carry, key), None), start, keys)[0][0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def summed(
    name: str, parameters: int, estimator: hg.Estimator, window: int, keys: jax.Array
) -> jax.Array:
    """The sum of each episode's estimates at theta = 0.1, `[keys, parameters]`."""
    theta = jnp.full(parameters, 0.1)
    update = lambda carry, grad: (carry[0], carry[1] + grad)  # noqa: E731
    run = functools.partial(episode, task(name, parameters), estimator, window, update)
    return jax.lax.map(lambda key: run((theta, 0 * theta), key)[1], keys, batch_size=50)


def tuning(episodes: int, seeds: int) -> list[tuple[Any, ...]]:
    """Rows (estimator, gradients per step, L, L / L*, excess)."""
    exact = Exact(task("rotations"), WINDOW)
    best, start = exact.loss(exact.root()), exact.loss(np.zeros(PARAMETERS))

    def row(name: str, cost: int, value: float) -> tuple[Any, ...]:
        return name, cost, value, value / best, (value - best) / (start - best)

    rows = [
        row("theta = 0", 0, start),
        row("optimum", 0, best),
        row("fixed point of truncation", 0, exact.loss(exact.root(truncated=True))),
    ]
    for name, cost, estimator in (
        ("Unrolled() on each window", 3, hg.Unrolled()),
        *(
            (f'Evolution({PAIRS}, {STD}, "{m}")', 2 * PAIRS + 1, Evolution(PAIRS, STD, m))
            for m in METHODS
        ),
    ):
        thetas = [tuned(estimator, episodes, jax.random.key(seed)) for seed in range(seeds)]
        rows.append(row(name, cost, max(exact.loss(np.asarray(theta)) for theta in thetas)))
    return rows


METHODS: tuple[Any, ...] = ("es", "pes", "es_single")


def unbiasedness(seeds: int) -> list[tuple[Any, ...]]:
    """Rows (method, distance over norm, largest deviation and zero's in standard errors)."""
    exact = Exact(task("rotations"), WINDOW).gradient(np.full(PARAMETERS, 0.1))
    keys = jax.random.split(jax.random.key(1), seeds)
    rows = []
    for method in METHODS:
        estimator = Evolution(PAIRS, STD, method)
        samples = np.asarray(summed("rotations", PARAMETERS, estimator, WINDOW, keys))
        error = samples.std(0, ddof=1) / np.sqrt(seeds)
        away = samples.mean(0) - exact
        distance = np.linalg.norm(away) / np.linalg.norm(exact)
        zero = np.linalg.norm(exact) / np.linalg.norm(error)
        rows.append((method, distance, np.max(np.abs(away) / error), zero))
    return rows


def noise(seeds: int, quick: bool) -> list[tuple[Any, ...]]:
    """Rows (task, method, windows, hyperparameters, deviation over norm, its law)."""
    keys = jax.random.split(jax.random.key(1), seeds)
    cases = [
        (name, method, window, PARAMETERS)
        for name in (("forgetful",) if quick else ("rotations", "forgetful"))
        for window in ((10, 2) if quick else (100, 10, 2, 1))
        for method in ("pes", "es_single")
    ]
    cases += [("rotations", "es", STEPS, p) for p in ((100,) if quick else (1, 10, 100))]
    rows = []
    for name, method, window, parameters in cases:
        estimator = Evolution(PAIRS, STD, method)
        samples = np.asarray(summed(name, parameters, estimator, window, keys))
        exact = Exact(task(name, parameters), window).gradient(np.full(parameters, 0.1))
        spread = np.linalg.norm(samples.std(0, ddof=1)) / np.linalg.norm(exact)
        law = ((parameters + 1) / PAIRS) ** 0.5
        rows.append((name, method, STEPS // window, parameters, spread, law))
    return rows


def rippled() -> hg.Problem:
    """Gradient descent on w^2 / 2 with ripples: chaotic above a learning rate of about .2."""

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum(0.5 * (w - hyper["centre"]) ** 2 - 0.3 * jnp.cos(5 * w))

    def valid_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((w - 1) ** 2)

    return hg.bilevel(
        lambda key: 3 * jax.random.normal(key, (64,)),
        train_loss,
        valid_loss,
        lambda hyper: optax.sgd(jnp.exp(hyper["log_rate"])),
    )


def chaos(updates: int = 60) -> list[tuple[Any, ...]]:
    """Rows (estimator, norm of the first gradient, loss before, after, rate, centre after)."""
    problem, optimizer = rippled(), optax.adam(0.05)
    start = {"log_rate": jnp.log(1.2), "centre": jnp.asarray(0.0)}
    train, valid = jnp.zeros((100, 1)), jnp.zeros(1)
    rows = []
    for name, estimator in (
        ("Unrolled()", hg.Unrolled()),
        (f"Evolution({PAIRS}, {STD})", Evolution(PAIRS, STD)),
    ):

        def gradient(hyper: Any, key: jax.Array, e: hg.Estimator = estimator) -> Any:
            return hg.hypergradient(problem, hyper, None, train, valid, key, e).grad

        def update(carry: Any, key: jax.Array, gradient: Any = gradient) -> Any:
            hyper, outer = carry
            grad = gradient(hyper, key)
            move, outer = optimizer.update(grad, outer)
            return (optax.apply_updates(hyper, move), outer), optax.global_norm(grad)

        keys = jax.random.split(jax.random.key(3), updates)
        run = jax.jit(lambda c, keys=keys, update=update: jax.lax.scan(update, c, keys))
        (end, _), norms = run((start, optimizer.init(start)))
        losses = [expected(problem, hyper, train) for hyper in (start, end)]
        rate, centre = float(jnp.exp(end["log_rate"])), float(end["centre"])
        rows.append((name, float(norms[0]), float(jnp.max(norms)), *losses, rate, centre))
    return rows


def expected(problem: hg.Problem, hyper: Any, train: Any) -> float:
    """The validation loss, mean over 100 starts."""

    def loss(key: jax.Array) -> jax.Array:
        end = hg.rollout(problem, hyper, problem.init(hyper, key), train, key)
        return problem.valid_loss(end.params, hyper, None, key)

    return float(jnp.mean(jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(4), 100))))


TABLES = {
    "tuning": (
        f"{'tuning':34}{'gradients':>10}{'L':>9}{'L / L*':>9}{'excess':>9}",
        "{:34}{:10}{:9.3f}{:9.3f}{:9.1%}",
    ),
    "unbiasedness": (
        f"{'unbiasedness':34}{'distance':>10}{'largest':>9}{'zero':>9}",
        "{:34}{:10.1%}{:9.2f}{:9.1f}",
    ),
    "noise": (
        f"{'noise of an episode':24}{'method':10}{'windows':>10}{'hyper':>9}{'noise':>9}{'law':>9}",
        "{:24}{:10}{:10}{:9}{:9.3f}{:9.3f}",
    ),
    "chaos": (
        f"{'chaos':34}{'norm':>10}{'largest':>9}{'before':>9}{'after':>9}{'rate':>9}{'centre':>9}",
        "{:34}{:10.2g}{:9.2g}{:9.3f}{:9.3f}{:9.3f}{:9.3f}",
    ),
}


def main(quick: bool = False) -> dict[str, list[tuple[Any, ...]]]:
    """Print and return the tables; `quick`: shorter tuning, 50 seeds of 200, fewer windows."""
    tables = {}
    with jax.enable_x64(True):
        seeds = 50 if quick else 200
        for name, rows in (
            ("tuning", functools.partial(tuning, *((40, 1) if quick else (150, 3)))),
            ("unbiasedness", functools.partial(unbiasedness, seeds)),
            ("noise", functools.partial(noise, seeds, quick)),
            ("chaos", chaos),
        ):
            title, form = TABLES[name]
            print(title)
            tables[name] = rows()
            for row in tables[name]:
                print(form.format(*row), flush=True)
    return tables


if __name__ == "__main__":
    main()
