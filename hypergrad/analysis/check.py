"""Is this hypergradient right? Measured against differences and forward mode, and said in words."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hypergrad.analysis.causes import cause_of_nan, entries_of, unless_custom_vjp
from hypergrad.analysis.smoothness import judged_smoothness, random_direction, smoothness_around
from hypergrad.checks import instance, integer, positive, random_key
from hypergrad.estimators.base import Estimator, Window, checked_estimate
from hypergrad.estimators.hypergradient import checked_hyper
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.mistakes import refuse_no_problem
from hypergrad.problem.problem import Problem, judged_params
from hypergrad.space.space import Space
from hypergrad.trees import Batch, Hyper, InnerState, Key, Params, Train, Tree, is_inexact


class Row(NamedTuple):
    """One number of `hyper` under `check_hypergradient`; gradients in unit coordinates.

    Without a space, unit coordinates are the raw ones. `forward` is None where forward mode is
    impossible (a `custom_vjp`). `spread` is how far differences of several step sizes lie apart,
    plus the loss's rounding: what they can be trusted to.
    """

    name: str
    value: float
    raw: float
    estimate: float
    forward: float | None
    difference: float
    spread: float
    verdict: str


class Report(NamedTuple):
    """What `check_hypergradient` found: `print` it for a table, one row per number.

    `metasmoothness` is the value that `hypergrad.metasmoothness` has over 3% of the space's range,
    without a space a tenth of the values: how far a right hypergradient predicts. None where
    training does not see `hyper`, or is not finite so far off.
    """

    loss: float
    rows: tuple[Row, ...]
    metasmoothness: float | None = None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = ("hyperparameter", "value", "raw", "unit", "forward", "differences", "verdict")
        cells = [
            (
                row.name,
                f"{row.value:.4g}",
                f"{row.raw:.5g}",
                f"{row.estimate:.5g}",
                "impossible" if row.forward is None else f"{row.forward:.5g}",
                f"{row.difference:.5g} +- {row.spread:.1g}",
                row.verdict,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        line = lambda row: "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))  # noqa: E731
        title = f"validation loss {self.loss:.6g}; hypergradient in raw and in unit coordinates"
        if self.metasmoothness is not None:
            smooth = judged_smoothness(self.metasmoothness)
            title += f"; metasmoothness {smooth.value:.3f}, {smooth.verdict}"
        return "\n".join([title, *(line(row).rstrip() for row in [head, *cells])])


def check_hypergradient(
    problem: Problem,
    hyper: Hyper,
    inner: InnerState | None,
    train: Train,
    valid: Batch,
    key: Key,
    estimator: Estimator = Unrolled(),  # noqa: B008  frozen, so safe to share
    space: Space | None = None,
    *,
    rtol: float | None = None,
    max_entries: int = 64,
) -> Report:
    """Compares an estimator's hypergradient with finite differences and with forward mode.

    A dropout rate disagrees with differences at one key by design: its gradient is right in
    expectation over keys (`hypergrad.dropout`; `benchmarks/dropout.py` checks that).

    Returns a table, one row per number of `hyper`, to be printed. A disagreement is raised by name,
    with the table printed before; an exact zero only stands in the table, as a warning. Where
    forward and reverse mode agree and differences do not, smaller steps in float64 decide whether a
    derivative rule is wrong, which is raised, or training is not smooth there (a kink; Adam's first
    steps are nearly signs), which stands in the table.

    Args:
      problem: as in `hypergradient`, like the five arguments that follow.
      hyper: raw values.
      inner: the training state, or None.
      train: K batches.
      valid: one batch.
      key: randomness.
      estimator: what is checked. A truncated one is biased and will disagree: that is its bias.
      space: gives unit coordinates, in which differences are taken (a step that suits a learning
        rate of 1e-3 drowns a penalty of 1e-6). None: raw coordinates.
      rtol: relative disagreement that is reported; None for 1e-5 in float64 and 2e-2 in float32,
        where differences carry no more. What differences of three step sizes disagree by among
        themselves is allowed on top.
      max_entries: numbers of `hyper` that are checked; beyond, a random choice of them.

    Cost: one estimate, three runs, and 6 runs and one forward tangent per number checked. Not
    jit-able.

    Raises:
      ValueError: a hyperparameter disagrees, never reaches the loss, is an integer, or its gradient
        is not finite (with the first step, the leaf, and the likely cause).
    """
    refuse_no_problem(problem)
    random_key("key", key)
    instance("estimator", estimator, Estimator, "one such as hypergrad.Unrolled()")
    if space is not None:
        instance("space", space, Space, "a hypergrad.Space, or None for raw coordinates")
    if rtol is not None:
        positive("rtol", rtol, "or None")
    hyper = checked_hyper(hyper)
    max_entries = integer("max_entries", max_entries)
    window = Window(problem, inner, train, valid, key)
    unit = hyper if space is None else space.to_unit(hyper)
    flat, unravel = ravel_pytree(unit)

    @jax.jit
    def estimated(u: jax.Array) -> tuple[jax.Array, ...]:
        hyper, pull_back = jax.vjp(lambda u: _raw(space, unravel(u)), u)
        estimate, _ = checked_estimate(estimator, window, hyper, estimator.init(window, hyper))
        grad, (in_unit,) = estimate.grad, pull_back(estimate.grad)
        share = estimate.info.get("unconverged_share", jnp.zeros(()))
        return estimate.loss, ravel_pytree(grad)[0], in_unit, share

    value, raw, grad, share = (np.asarray(x, np.float64) for x in estimated(flat))
    names = entries_of(hyper)
    if not (np.isfinite(value) and np.isfinite(grad).all()):
        bad = [n for n, g in zip(names, grad, strict=True) if not np.isfinite(g)]
        raise ValueError(cause_of_nan(window, hyper, bad))
    chosen = np.arange(flat.size)
    if flat.size > max_entries:
        chosen = np.sort(np.random.default_rng(0).choice(flat.size, max_entries, replace=False))
    judged = window.judging(getattr(estimator, "validate_at", "last"))
    measured = _Measured(judged, space, unit)
    wide = flat.dtype == jnp.float64
    rtol = rtol if rtol is not None else (1e-5 if wide else 2e-2)
    # Rounding of the largest entry's terms, below which a small one cannot be judged.
    atol = (1e-12 if wide else 1e-6) * float(np.max(np.abs(grad)))
    values = np.asarray(ravel_pytree(hyper)[0], np.float64)
    rows = []
    for i in chosen.tolist():
        difference, spread, _ = measured.difference(i)
        forward = measured.forward(i)
        verdict = _verdict(grad[i], forward, difference, spread, rtol, atol)
        if verdict == _BY_DIFFERENCES and forward is not None:
            verdict = _examined(measured, i)
        rows.append(Row(names[i], values[i], raw[i], grad[i], forward, difference, spread, verdict))
    report = Report(float(value), tuple(rows), measured.smoothness(key))
    if wrong := [row for row in rows if row.verdict.startswith("disagrees")]:
        print(report)
        raise ValueError(_disagreement(estimator, wrong, float(share)))
    return report


class _Measured:
    """The validation loss as a function of unit coordinates, its differences and its slope."""

    def __init__(self, window: Window, space: Space | None, unit: Tree) -> None:
        self.flat, unravel = ravel_pytree(unit)
        self.wide = self.flat.dtype == jnp.float64

        def run(u: jax.Array) -> tuple[jax.Array, Params]:
            value, end = window.objective(_raw(space, unravel(u)))
            return value, judged_params(window.problem, end.inner)

        self._run = jax.jit(run)
        loss = lambda u: run(u)[0]  # noqa: E731
        self._tangent = jax.jit(lambda e: jax.jvp(loss, (self.flat,), (e,))[1])
        far = jnp.full_like(self.flat, 2)
        projected = far if space is None else ravel_pytree(space.project(unravel(far)))[0]
        self.bounded = np.asarray(projected < 2)
        self._again = lambda: _Measured(_in_float64(window), space, _in_float64(unit))

    def loss(self, u: jax.Array) -> jax.Array:
        """The validation loss at unit coordinates."""
        return self._run(u)[0]

    def smoothness(self, key: Key) -> float | None:
        """The metasmoothness around here, None where it cannot be told."""
        project = lambda u: jnp.where(self.bounded, jnp.clip(u, 0, 1), u)  # noqa: E731
        size = jnp.where(self.bounded, 0.03, jnp.maximum(0.1 * jnp.abs(self.flat), 1e-4))
        direction = random_direction(self.flat, lambda _: size, key)
        value = smoothness_around(lambda u: self._run(u)[1], self.flat, direction, project)
        return None if np.isnan(value) else value

    def in_float64(self) -> "_Measured":
        """The same in float64, where its random numbers may be others; enable 64-bit types."""
        return self if self.wide else self._again()

    def forward(self, i: int) -> float | None:
        """The derivative in entry i by forward mode, or None where a `custom_vjp` forbids it."""
        slope = unless_custom_vjp(self._tangent, jnp.zeros_like(self.flat).at[i].set(1))
        return None if slope is None else float(slope)

    def difference(self, i: int, steps: tuple[float, ...] | None = None) -> tuple[float, ...]:
        """The central difference that agrees best with its neighbour, its error, and its step."""
        flat, bounded = self.flat, bool(self.bounded[i])
        size = 1.0 if bounded else max(abs(float(flat[i])), 1e-3)
        found, rounding = [], []
        steps = steps or ((1e-4, 1e-5, 1e-6) if self.wide else (1e-2, 3e-3, 1e-3))
        for step in steps:
            up, down = flat.at[i].add(step * size), flat.at[i].add(-step * size)
            if bounded:  # a value at its bound has a neighbour on one side only
                up, down = up.at[i].min(1.0), down.at[i].max(0.0)
            width = float(up[i]) - float(down[i])
            high, low = float(self.loss(up)), float(self.loss(down))
            found.append((high - low) / width)
            rounding.append(float(jnp.finfo(flat.dtype).eps) * max(abs(high), abs(low)) / width)
        gaps = [abs(a - b) for a, b in itertools.pairwise(found)]
        best = int(np.argmin(gaps))
        chosen = best + 1 if self.wide else best
        return found[chosen], gaps[best] + rounding[chosen], steps[chosen]

    def has_kink(self, i: int, step: float) -> bool:
        """Whether the slopes to both sides differ, by more than curvature explains."""
        flat = self.flat
        here = float(self.loss(flat))
        sides = [(float(self.loss(flat.at[i].add(d))) - here) / d for d in (step, -step)]
        half = [(float(self.loss(flat.at[i].add(d))) - here) / d for d in (step / 4, -step / 4)]
        gap, nearer = sides[0] - sides[1], half[0] - half[1]
        return abs(nearer) > 0.5 * abs(gap) and abs(gap) > 1e-4 * max(map(abs, sides))


_BY_DIFFERENCES = "disagrees with differences"
_FINE = (1e-5, 1e-6, 1e-7, 1e-8)


def _examined(measured: _Measured, i: int) -> str:
    """A verdict where both modes agree and differences do not: by smaller steps, in float64."""
    with jax.enable_x64(True):
        try:
            fine = measured.in_float64()
            slope, (difference, spread, step) = fine.forward(i), fine.difference(i, _FINE)
        except (TypeError, ValueError):  # the problem fixes a dtype
            return "not smooth at these steps; both modes agree"
        assert slope is not None
        if _verdict(slope, slope, difference, spread, 1e-4, 0.0) == "agrees":
            return f"agrees, at a step of {step:.0e} in float64: not smooth at larger ones"
        if spread > 1e-2 * abs(difference) or fine.has_kink(i, step):
            return "not smooth here: differences do not settle; both modes agree"
    return _BY_DIFFERENCES


def _raw(space: Space | None, unit: Tree) -> Hyper:
    return unit if space is None else space.from_unit(unit)


def _in_float64(tree: Any) -> Any:
    cast = lambda x: jnp.asarray(x, jnp.float64) if is_inexact(x) else x  # noqa: E731
    return jax.tree.map(cast, tree)


def _disagreement(estimator: Estimator, wrong: list[Row], share: float) -> str:
    row = wrong[0]
    forward_says = "" if row.forward is None else f"forward mode gives {row.forward:.6g}, "
    rest = (
        f"Training is not at rest here, or at a kink: converging would change the validation loss "
        f"by {share:.0%} (L1 and bounds: hypergrad.prox). "
    )
    return (
        f"The hypergradient of {', '.join(row.name for row in wrong)} by {estimator} "
        f"{row.verdict}: it is {row.estimate:.6g}, {forward_says}differences give "
        f"{row.difference:.6g} +- {row.spread:.1g}. "
        f"{rest if share > 0.01 else ''}A truncated or implicit estimator may be biased; an "
        "exact one points to a wrong derivative rule (stop_gradient, custom_vjp) in the problem. "
        "The rate of hypergrad.dropout is right in expectation over keys only: differences at one "
        "key cannot confirm it."
    )


def _verdict(
    estimate: float,
    forward: float | None,
    difference: float,
    spread: float,
    rtol: float,
    atol: float,
) -> str:
    if estimate == 0 and not forward and difference == 0:
        return "warning: exactly 0 here"
    size = max(abs(forward or 0), abs(difference))
    if forward is not None and not abs(estimate - forward) <= rtol * abs(forward) + atol:
        return "disagrees with forward mode"
    if not abs(estimate - difference) <= rtol * size + 2 * spread + atol:
        return _BY_DIFFERENCES
    return "agrees"
