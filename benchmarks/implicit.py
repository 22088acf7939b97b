"""Measure implicit differentiation: its solvers, SOBA's alternation, and a million hyperparameters.

Run: `python -m benchmarks.implicit` (four minutes on two cores; `main(quick=True)` one).

`solvers`: a symmetric positive definite system of dimension 50, eigenvalues .5 to 4, in float64:
relative error of the solution. CG and GMRES get 50 products (target 1e-8); Neumann's error over
150 and 250 terms falls by a factor per term whose logarithm over that of 1 - a mu stands below
(target within 5%); Nystrom at full rank is compared with the damped solution.
`soba`: 1024 samples of a least-squares problem in 100 parameters and 100 hyperparameters; each
round takes one SGD step on 64 of them, one product for the linear system and one outer step, all
with rates that fall as t^-1/2 or faster. The squared norm of the exact hypergradient, from a closed
form, at powers of ten of rounds; target 1e-4 or below.
`million`: one L2 coefficient for each of the 1,005,240 weights of an MLP 64-1000-930-10 on 64
digits, after 100 steps. A term is one product of the solver: seconds of 20 terms less those of 10,
over 10 and over those of a training step (interleaved; target 3), and the program's memory with its
arguments and results over that of a training step (target 4). Cosine of the hypergradient with that
of a converged CG (its residual is shown); target .99 for CG(20).
`singular`: the same after 400 steps with coefficients of 3e-2, where the penalty has emptied most
of the network and the Hessian is nearly singular: solvers disagree, and their residuals say so.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import hypergrad as hg


def solvers() -> list[tuple[str, float]]:
    """Rows (solver, relative error)."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        basis = np.linalg.qr(rng.normal(size=(50, 50)))[0]
        matrix = basis @ np.diag(np.linspace(0.5, 4, 50)) @ basis.T
        b, a = rng.normal(size=50), jnp.asarray(matrix)

        def error(solver: Any, damping: float = 0.0) -> float:
            x, _ = solver.solve(lambda x: a @ x, jnp.asarray(b), jax.random.key(0), ())
            exact = np.linalg.solve(matrix + damping * np.eye(50), b)
            return float(np.linalg.norm(np.asarray(x) - exact) / np.linalg.norm(exact))

        rows = [
            ("ConjugateGradient(50)", error(hg.ConjugateGradient(50))),
            ("GMRES(50)", error(hg.GMRES(50))),
            ("Nystrom(50, 0.1)", error(hg.Nystrom(50, 0.1), 0.1)),
            ("Neumann(150, 0.2)", error(hg.Neumann(150, 0.2))),
            ("Neumann(250, 0.2)", error(hg.Neumann(250, 0.2))),
        ]
    for row in rows:
        print("{:24}{:10.1e}".format(*row))
    slope = np.log(rows[-1][1] / rows[-2][1]) / 100 / np.log(1 - 0.2 * 0.5)
    missed = "" if abs(slope - 1) <= 0.05 and max(rows[0][1], rows[1][1]) <= 1e-8 else "   MISSED"
    print(f"Neumann's slope over the law's: {slope:.4f}{missed}")
    return rows


def soba(rounds: int) -> list[tuple[int, float]]:
    """Rows (rounds, squared norm of the exact hypergradient)."""
    rng = np.random.default_rng(0)
    n, d = 1024, 100
    a, c, e = rng.normal(size=(3, n, d))
    y, f = a @ rng.normal(size=d) / 10, e @ rng.normal(size=d) / 10
    mu = 0.1

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        a, c, y = batch
        fit = 0.5 * jnp.mean((a @ w + 0.1 * c @ hyper["h"] - y) ** 2)
        return fit + 0.5 * mu * jnp.sum(w**2)

    def valid_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        e, f = batch
        return 0.5 * jnp.mean((e @ w - f) ** 2) + 0.5 * mu * jnp.sum(hyper["h"] ** 2)

    def falling(rate: float) -> Callable[[Any], Any]:
        return lambda t: rate / jnp.sqrt(1 + t / 100)

    problem = hg.bilevel(
        lambda key: jnp.zeros(d), train_loss, valid_loss, lambda hyper: optax.sgd(falling(0.15))
    )
    hessian, cross = a.T @ a / n + mu * np.eye(d), 0.1 * a.T @ c / n

    def exact(h: np.ndarray) -> float:
        w = np.linalg.solve(hessian, a.T @ y / n - cross @ h)
        x = np.linalg.solve(hessian, e.T @ (e @ w - f) / n)
        return float(np.sum((mu * h - cross.T @ x) ** 2))

    train = hg.Minibatches(tuple(jnp.asarray(v, jnp.float32) for v in (a, c, y)), 64)
    valid = hg.Minibatches(tuple(jnp.asarray(v, jnp.float32) for v in (e, f)), 64)
    estimator = hg.Implicit(hg.Richardson(1, 0.05), batches="last")
    outer = optax.sgd(lambda t: 2.0 / (1 + t / 300))
    key = jax.random.key(0)
    hyper = {"h": jnp.ones(d)}
    inner = problem.init(hyper, key)
    memory = estimator.init(hg.Window(problem, inner, None, None, key), hyper)
    carry = (hyper, inner, memory, outer.init(hyper))

    def round_(carry: Any, _: None) -> Any:
        hyper, inner, memory, outer_state = carry
        window = hg.Window(problem, inner, train, valid, key)
        estimate, memory = estimator.estimate(window, hyper, memory)
        updates, outer_state = outer.update(estimate.grad, outer_state)
        return (optax.apply_updates(hyper, updates), estimate.inner, memory, outer_state), None

    run = jax.jit(lambda carry, n: jax.lax.scan(round_, carry, length=n)[0], static_argnums=1)
    rows, done = [(0, exact(np.ones(d)))], 0
    for target in (r for r in (100, 1_000, 10_000, 100_000) if r <= rounds):
        carry, done = run(carry, target - done), target
        rows.append((done, exact(np.asarray(carry[0]["h"], np.float64))))
    for row in rows:
        print("{:8d} rounds   squared norm of the hypergradient {:.2e}".format(*row), flush=True)
    print("target 1e-4" + ("" if rows[-1][1] <= 1e-4 else "   MISSED"))
    return rows


SIZES = (64, 1000, 930, 10)


def network(l2: float) -> tuple[hg.Problem, Any, Any, Any]:
    """Problem, hyper, training batch, validation batch."""
    data = load_digits()
    x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)

    def cross_entropy(params: Any, batch: Any) -> jax.Array:
        h, labels = batch
        for i, (w, b) in enumerate(params):
            h = h @ w + b
            h = jnp.tanh(h) if i < 2 else h
        return optax.softmax_cross_entropy_with_integer_labels(h, labels).mean()

    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        penalties = jax.tree.map(lambda c, p: jnp.sum(c * p**2), hyper["l2"], params)
        return cross_entropy(params, batch) + sum(jax.tree.leaves(penalties))

    def init(key: jax.Array) -> Any:
        return [
            (jax.random.normal(jax.random.fold_in(key, i), (m, n)) / jnp.sqrt(m), jnp.zeros(n))
            for i, (m, n) in enumerate(itertools.pairwise(SIZES))
        ]

    problem = hg.bilevel(
        init,
        train_loss,
        lambda params, hyper, batch, key: cross_entropy(params, batch),
        lambda hyper: optax.sgd(0.2, momentum=0.9),
    )
    params = init(jax.random.key(0))
    hyper = {"l2": jax.tree.map(lambda p: jnp.full(p.shape, l2), params)}
    return problem, hyper, (x[:64], y[:64]), (x[600:1200], y[600:1200])


def _bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    parts = (sizes.temp_size_in_bytes, sizes.argument_size_in_bytes, sizes.output_size_in_bytes)
    return sum(parts)


def million(quick: bool) -> dict[str, float]:
    """Time and memory per term over those of a training step, and cosines with converged CG."""
    problem, hyper, batch, valid = network(1e-3)
    key, one = jax.random.key(0), jax.tree.map(lambda x: x[None], batch)
    many = hg.Minibatches(batch, 64, 100)
    inner = jax.jit(lambda inner: hg.rollout(problem, hyper, inner, many, key))(
        problem.init(hyper, key)
    )
    count = sum(x.size for x in jax.tree.leaves(hyper))
    print(f"{count:,} hyperparameters, training loss {float(inner.loss):.4f}")

    def program(solver: Any) -> Any:
        def gradient(hyper: Any, inner: Any) -> Any:
            return hg.hypergradient(problem, hyper, inner, one, valid, key, hg.Implicit(solver))

        return jax.jit(gradient).lower(hyper, inner).compile()

    def seconds(compiled: Any) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(hyper, inner))
        return time.perf_counter() - begin

    step = jax.jit(lambda h, inner: problem.step(inner, h, batch, key)).lower(hyper, inner)
    step = step.compile()
    neumann = {n: program(hg.Neumann(n, 0.5)) for n in (10, 20)}
    times: dict[str, list[float]] = {"step": [], "10": [], "20": []}
    for _ in range(5 if quick else 20):
        times["step"].append(min(seconds(step) for _ in range(3)))
        for n, compiled in neumann.items():
            times[str(n)].append(seconds(compiled))
    medians = {name: float(np.median(t)) for name, t in times.items()}
    ratio = (medians["20"] - medians["10"]) / 10 / medians["step"]
    memory = _bytes(neumann[20]) / _bytes(step)
    print(f"time per term / training step   {ratio:6.2f}" + "   MISSED" * (ratio > 3))
    print(f"memory / training step          {memory:6.2f}" + "   MISSED" * (memory > 4))

    found = cosines(lambda solver: program(solver)(hyper, inner))
    print("target .99 for CG(20)" + "   MISSED" * (found["ConjugateGradient(20)"] < 0.99))
    return {"time": ratio, "memory": memory, **found}


def cosines(estimate_by: Callable[[Any], Any]) -> dict[str, float]:
    """Cosines with the hypergradient of 200 products of CG."""
    solvers = {
        "ConjugateGradient(200)": hg.ConjugateGradient(200),
        "ConjugateGradient(50)": hg.ConjugateGradient(50),
        "ConjugateGradient(20)": hg.ConjugateGradient(20),
        "Neumann(20, 0.2)": hg.Neumann(20, 0.2),
        "Nystrom(20, 0.002)": hg.Nystrom(20, 0.002),
        "Identity()": hg.Identity(),
    }
    found: dict[str, float] = {}
    target = None
    for name, solver in solvers.items():
        estimate = estimate_by(solver)
        grad = np.concatenate([np.ravel(x) for x in jax.tree.leaves(estimate.grad)])
        target = grad if target is None else target
        cosine = float(grad @ target / np.linalg.norm(grad) / np.linalg.norm(target))
        length = float(np.linalg.norm(grad) / np.linalg.norm(target))
        residual = float(estimate.info.get("residual", np.nan))
        print(f"{name:24} cosine {cosine:6.3f}   length {length:6.3f}   residual {residual:.1e}")
        found[name] = cosine
    return found


def singular() -> dict[str, float]:
    """Cosines where the Hessian is nearly singular."""
    problem, hyper, batch, valid = network(3e-2)
    key, train = jax.random.key(0), hg.Minibatches(batch, 64, 400)
    inner = jax.jit(lambda inner: hg.rollout(problem, hyper, inner, train, key))(
        problem.init(hyper, key)
    )
    one = jax.tree.map(lambda x: x[None], batch)

    def estimate_by(solver: Any) -> Any:
        gradient = lambda h, inner: hg.hypergradient(  # noqa: E731
            problem, h, inner, one, valid, key, hg.Implicit(solver)
        )
        return jax.jit(gradient)(hyper, inner)

    return cosines(estimate_by)


def main(quick: bool = False) -> dict[str, Any]:
    """Print and return all tables."""
    return {
        "solvers": solvers(),
        "soba": soba(10_000 if quick else 100_000),
        "million": million(quick),
        "singular": {} if quick else singular(),
    }


if __name__ == "__main__":
    main()
