"""Measure what the linear solvers keep of their digits, at every scale and condition.

Run: `python -m benchmarks.solvers [--quick] [--out FILE]` (a minute on one core).

One row per solver, dtype, condition and scale: A is symmetric of dimension 50 with eigenvalues
spaced evenly in their logarithm, from scale / condition to scale. `residual` is |A x - b| / |b| and
`error` the relative error against the dense solution, both in float64, of the system that the
solver solves (with its damping). Dampings and step sizes go with the scale, as they must.
Targets: no residual depends on the scale; full-rank Nystrom in float32 within 1e-5 at condition 10;
a second cycle of GMRES no worse than the first.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from benchmarks import command

DIM = 50
KEY = jax.random.key(0)
SOLVERS: dict[str, Callable[[float], hg.linear.LinearSolver]] = {
    "Identity()": lambda scale: hg.Identity(),
    "Neumann(50, 1 / scale)": lambda scale: hg.Neumann(50, 1 / scale),
    "Richardson(50, 1 / scale)": lambda scale: hg.Richardson(50, 1 / scale, warm_start=False),
    "ConjugateGradient(50)": lambda scale: hg.ConjugateGradient(50),
    "GMRES(50)": lambda scale: hg.GMRES(50),
    "GMRES(50, cycles=2)": lambda scale: hg.GMRES(50, cycles=2),
    "GMRES(10, cycles=3)": lambda scale: hg.GMRES(10, cycles=3),
    "BiCGSTAB(50)": lambda scale: hg.BiCGSTAB(50),
    "Cholesky()": lambda scale: hg.Cholesky(),
    "Preconditioned(CG(50))": lambda scale: hg.Preconditioned(hg.ConjugateGradient(50)),
    "Nystrom(50, 1e-2 scale)": lambda scale: hg.Nystrom(50, 1e-2 * scale),
    "Nystrom(50, 1e-8 scale)": lambda scale: hg.Nystrom(50, 1e-8 * scale),
    "Nystrom(10, 1e-2 scale)": lambda scale: hg.Nystrom(10, 1e-2 * scale),
}


@functools.partial(jax.jit, static_argnums=0)
def solved(solver: hg.linear.LinearSolver, matrix: jax.Array, b: jax.Array) -> jax.Array:
    """`A^-1 b`, compiled once per solver and dtype."""
    return solver.solve(lambda v: matrix @ v, b, KEY, ())[0]


def measure(make: Any, dtype: str, condition: float, scale: float) -> tuple[float, float]:
    """Residual and error of one solve; in float64, with 64-bit types enabled."""
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))
    a = scale * (q * np.geomspace(1 / condition, 1, DIM)) @ q.T
    b = np.random.default_rng(1).normal(size=DIM)
    matrix, solver = jnp.asarray(a, dtype), make(scale)
    x = solved(solver, matrix, jnp.asarray(b, dtype))
    damped = a + getattr(solver, "damping", 0.0) * np.eye(DIM)
    exact = np.linalg.solve(damped, b)
    residual = np.linalg.norm(damped @ np.asarray(x, np.float64) - b) / np.linalg.norm(b)
    return float(residual), float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def main(quick: bool = False, out: str | None = None) -> list[dict[str, Any]]:
    """Print the table; return its rows."""
    scales = (1e-8, 1.0, 1e8) if quick else (1e-8, 1e-4, 1.0, 1e4, 1e8)
    conditions = (10.0,) if quick else (1.1, 10.0, 1e3, 1e6)
    rows = []
    print("| solver | dtype | condition | scale | residual | error |\n|---|---|---|---|---|---|")
    with jax.enable_x64(True):
        for name, make in SOLVERS.items():
            for dtype in ("float32", "float64"):
                for condition in conditions:
                    for scale in scales:
                        residual, error = measure(make, dtype, condition, scale)
                        row = {"solver": name, "dtype": dtype, "condition": condition}
                        rows.append({**row, "scale": scale, "residual": residual, "error": error})
                        cells = (name, dtype, f"{condition:g}", f"{scale:g}")
                        print("|", " | ".join(cells), f"| {residual:.1e} | {error:.1e} |")
    if out:
        Path(out).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    command.run(main, __doc__)
