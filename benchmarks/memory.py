"""Measure temporary memory, from XLA's own analysis of the compiled programs; nothing is run.

Run: `python -m benchmarks.memory` (about three minutes on one core; `main(quick=True)` leaves out
the tables of whole runs).

Task: `benchmarks/momentum_task.py`; its training state (weights and velocity) takes .2 MiB.
`reverse`: MiB of a whole-run hypergradient at T = 1000 for each `checkpoint`, beside naive reverse
and the hand-derived adjoint; target for "sqrt": <= 16 MiB.
`copies`: what training and tuning hold in copies of the parameters, under Adam, states donated: the
peak of an update of K = 5 steps (arguments, results and temporaries), and what a whole run adds per
step; and `checkpoint="log"` at T = 1e5, target <= 20 states of 3 copies. One 1024 x 1024 matrix
and tiny batches, so that activations count for nothing.
`forward`: MiB of `Forward()` with `Minibatches` at T = 1e3 and 1e5, and their ratio; target: within
1% of each other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from benchmarks import momentum_task as task
from hypergrad.estimators.memory import compiled_for, temporary_bytes

NUM_STEPS, FORWARD_STEPS, LONG = 1000, (1_000, 100_000), 100_000
SQRT_TARGET, FORWARD_TARGET, LONG_TARGET = 16.0, 0.01, 20.0
SIDE, K = 1024, 5


def temporary(function: Callable[..., Any], *args: Any) -> float:
    """MiB that the compiled program needs beside its arguments and results."""
    return temporary_bytes(compiled_for(function, *args)) / 2**20


def reverse() -> list[tuple[str, float]]:
    """Rows (program, MiB) at T = 1000."""
    args = (task.HYPER, task.init(), task.indices(NUM_STEPS), *task.load())
    programs = {"naive reverse": task.naive_reverse, "hand-derived adjoint": task.adjoint}
    for checkpoint in ("none", "step", "sqrt", "log"):
        estimator = hg.Unrolled(checkpoint=checkpoint)  # type: ignore[arg-type]
        programs[f'Unrolled(checkpoint="{checkpoint}")'] = task.through_hypergrad(estimator)
    rows = []
    for name, function in programs.items():
        rows.append((name, temporary(function, *args)))
        target = f"   target {SQRT_TARGET:.0f}" if "sqrt" in name else ""
        missed = "   MISSED" if target and rows[-1][1] > SQRT_TARGET else ""
        print("{:30}{:8.1f} MiB".format(*rows[-1]) + target + missed, flush=True)
    return rows


def copies() -> list[tuple[str, float]]:
    """Rows (what, copies of the parameters)."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean(jnp.tanh(batch @ w) ** 2)

    init = lambda key: jax.random.normal(key, (SIDE, SIDE))  # noqa: E731
    problem = hg.bilevel(init, loss, loss, lambda h: optax.adam(h["lr"]))
    space = hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")})
    key, hyper = jax.random.key(0), {"lr": jnp.float32(1e-2)}
    inner, valid = problem.init(hyper, key), jnp.ones((4, SIDE))
    batches = lambda k: jax.ShapeDtypeStruct((k, 4, SIDE), jnp.float32)  # noqa: E731
    rows: list[tuple[str, float]] = []

    def row(name: str, count: float, target: float | None = None) -> None:
        rows.append((name, count))
        # the batches count, too, and are no copies
        missed = target is not None and count > target + 0.05
        note = "" if target is None else f"   target {target:.0f}" + "   MISSED" * missed
        print(f"{name:62}{count:6.1f}{note}", flush=True)

    def peak(function: Any, *args: Any) -> float:
        found = jax.jit(function, donate_argnums=0).lower(*args).compile().memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        return (held + found.temp_size_in_bytes - found.alias_size_in_bytes) / inner.params.nbytes

    def run(inner: Any, train: Any) -> Any:
        return hg.rollout(problem, hyper, inner, train, key)

    row("plain training", peak(run, inner, batches(K)))
    identity = hg.Implicit(hg.Identity(), of="fixed_point", batches="last")
    for label, estimator, target in (
        ("Unrolled(window=1)", hg.Unrolled(window=1), 5),
        ("the default", hg.Unrolled(validate_at=0.8), None),
        ('checkpoint="step"', hg.Unrolled(validate_at=0.8, checkpoint="step"), 16),
        ('checkpoint="log"', hg.Unrolled(validate_at=0.8, checkpoint="log"), None),
        ('Identity(), of="fixed_point", batches="last"', identity, 8),
    ):
        for rewinds in ("all", "hyper"):
            trust = hg.Trust(rewinds=rewinds)  # type: ignore[arg-type]
            tuner = hg.alternating(problem, space, estimator, trust=trust)
            state = tuner.init(hyper, key)
            count = peak(tuner.update, state, batches(K), valid)
            name = f'alternating, {label}, rewinds="{rewinds}"'
            row(name, count, target if rewinds == "hyper" else None)
    for checkpoint in ("none", "step", "sqrt", "log"):

        def whole(hyper: Any, inner: Any, train: Any, mode: Any = checkpoint) -> Any:
            estimator = hg.Unrolled(checkpoint=mode)
            estimate = hg.hypergradient(problem, hyper, inner, train, valid, key, estimator)
            return estimate.grad, estimate.inner

        few, many = (
            temporary_bytes(compiled_for(whole, hyper, inner, batches(k))) for k in (16, 64)
        )
        per_step = (many - few) / 48 / inner.params.nbytes
        row(f'Unrolled(checkpoint="{checkpoint}"), each step from 16 to 64', per_step)
    # The growth of the adjoint has two numbers a step.
    held = temporary_bytes(compiled_for(whole, hyper, inner, batches(LONG))) - 8 * LONG
    row(f'Unrolled(checkpoint="log"), T = {LONG}', held / inner.params.nbytes, 3 * LONG_TARGET)
    return rows


def forward() -> list[tuple[str, float]]:
    """Rows (T, MiB) of forward mode."""
    train, valid = task.load()
    inner = task.problem().init(task.HYPER, jax.random.key(0))
    rows = []
    for num_steps in FORWARD_STEPS:

        def gradient(hyper: Any, data: Any, valid: Any, num_steps: int = num_steps) -> Any:
            batches = hg.Minibatches(data, task.BATCH, num_steps)
            arguments = (hyper, inner, batches, valid, jax.random.key(0), hg.Forward())
            return hg.hypergradient(task.problem(), *arguments)

        rows.append((f"Forward(), T = {num_steps}", temporary(gradient, task.HYPER, train, valid)))
        print("{:30}{:8.3f} MiB".format(*rows[-1]), flush=True)
    ratio = rows[1][1] / rows[0][1]
    missed = "   MISSED" if abs(ratio - 1) > FORWARD_TARGET else ""
    print(f"{'ratio':30}{ratio:8.3f}       target 1 within {FORWARD_TARGET:.0%}{missed}")
    return rows


def main(quick: bool = False) -> dict[str, list[tuple[str, float]]]:
    """Print and return the tables; compiling is all the cost."""
    print(f"Held at once, in copies of the parameters (Adam, K = {K})")
    tables = {"copies": copies()}
    if quick:
        return tables
    print(f"Temporary memory: a whole-run hypergradient at T = {NUM_STEPS}, and forward mode")
    return tables | {"reverse": reverse(), "forward": forward()}


if __name__ == "__main__":
    main()
