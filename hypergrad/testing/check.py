"""Is this hypergradient right? Measured against differences and forward mode, and said in words."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hypergrad.checks import instance, integer, positive, random_key
from hypergrad.data.batches import step_inputs
from hypergrad.estimators.base import Estimator, Window
from hypergrad.estimators.forward import Tangents, pushforward
from hypergrad.estimators.hypergradient import checked_hyper
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.problem import Problem, refuse_no_problem, steps_done, training_steps
from hypergrad.space.space import Space
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Scalar,
    Train,
    Tree,
    is_inexact,
    leaf_names,
    split_inexact,
)


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
    """What `check_hypergradient` found; `str(report)` is the table it prints."""

    loss: float
    rows: tuple[Row, ...]

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

    Prints a table, one row per number of `hyper`, and returns it. A disagreement is raised after
    printing, by name; an exact zero only stands in the table, as a warning.

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

    Cost: one estimate, and 6 runs and one forward tangent per number checked. Not jit-able.

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
    estimator.check_structure(window, hyper)
    judged = window.judging(getattr(estimator, "validate_at", "last"))
    unit = hyper if space is None else space.to_unit(hyper)
    flat, unravel = ravel_pytree(unit)

    def from_flat(u: jax.Array) -> Any:
        return unravel(u) if space is None else space.from_unit(unravel(u))

    def project(u: jax.Array) -> jax.Array:
        return u if space is None else ravel_pytree(space.project(unravel(u)))[0]

    @jax.jit
    def loss(u: jax.Array) -> jax.Array:
        return judged.objective(from_flat(u))[0]

    @jax.jit
    def estimated(u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        hyper, pull_back = jax.vjp(from_flat, u)
        estimate, _ = estimator.estimate(window, hyper, estimator.init(window, hyper))
        return estimate.loss, ravel_pytree(estimate.grad)[0], pull_back(estimate.grad)[0]

    value, raw, grad = (np.asarray(x, np.float64) for x in estimated(flat))
    if not (np.isfinite(value) and np.isfinite(grad).all()):
        bad = [n for n, g in zip(_entries(hyper), grad, strict=True) if not np.isfinite(g)]
        raise ValueError(_not_finite(window, hyper, bad))
    chosen = np.arange(flat.size)
    if flat.size > max_entries:
        chosen = np.sort(np.random.default_rng(0).choice(flat.size, max_entries, replace=False))
    tangent = jax.jit(lambda e: jax.jvp(loss, (flat,), (e,))[1])
    wide = flat.dtype == jnp.float64
    rtol = rtol if rtol is not None else (1e-5 if wide else 2e-2)
    # Rounding of the largest entry's terms, below which a small one cannot be judged.
    atol = (1e-12 if wide else 1e-6) * float(np.max(np.abs(grad)))
    bounded = np.asarray(project(jnp.full_like(flat, 2)) < 2)
    names, values = _entries(hyper), np.asarray(ravel_pytree(hyper)[0], np.float64)
    rows = []
    for i in chosen.tolist():
        direction = jnp.zeros_like(flat).at[i].set(1)
        difference, spread = _difference(loss, flat, i, bool(bounded[i]))
        slope = _unless_custom_vjp(tangent, direction)
        forward = None if slope is None else float(slope)
        verdict = _verdict(grad[i], forward, difference, spread, rtol, atol)
        rows.append(Row(names[i], values[i], raw[i], grad[i], forward, difference, spread, verdict))
    report = Report(float(value), tuple(rows))
    print(report)
    wrong = [row for row in rows if row.verdict.startswith("disagrees")]
    if wrong:
        forward = wrong[0].forward
        forward_says = "" if forward is None else f"forward mode gives {forward:.6g}, "
        raise ValueError(
            f"The hypergradient of {', '.join(row.name for row in wrong)} by {estimator} "
            f"{wrong[0].verdict}: it is {wrong[0].estimate:.6g}, {forward_says}differences give "
            f"{wrong[0].difference:.6g} +- {wrong[0].spread:.1g}. A truncated or implicit "
            "estimator may be biased; an exact one points to a wrong derivative rule "
            "(stop_gradient, custom_vjp) in the problem. The rate of hypergrad.dropout is right in "
            "expectation over keys only: differences at one key cannot confirm it."
        )
    return report


def _entries(hyper: Hyper) -> list[str]:
    names = []
    for name, leaf in zip(leaf_names(hyper), jax.tree.leaves(hyper), strict=True):
        size, shape = np.size(leaf), np.shape(leaf)
        names += [
            name + (f"[{', '.join(map(str, np.unravel_index(i, shape)))}]" if shape else "")
            for i in range(size)
        ]
    return names


def _difference(
    loss: Callable[[jax.Array], Scalar], flat: jax.Array, i: int, bounded: bool
) -> tuple[float, float]:
    """The central difference that agrees best with its neighbour in step size, and its error."""
    size = 1.0 if bounded else max(abs(float(flat[i])), 1e-3)
    wide = flat.dtype == jnp.float64
    found, rounding = [], []
    for step in (1e-4, 1e-5, 1e-6) if wide else (1e-2, 3e-3, 1e-3):
        up, down = flat.at[i].add(step * size), flat.at[i].add(-step * size)
        if bounded:  # a value at its bound has a neighbour on one side only
            up, down = up.at[i].min(1.0), down.at[i].max(0.0)
        width = float(up[i]) - float(down[i])
        high, low = float(loss(up)), float(loss(down))
        found.append((high - low) / width)
        rounding.append(float(jnp.finfo(flat.dtype).eps) * max(abs(high), abs(low)) / width)
    gaps = [abs(a - b) for a, b in itertools.pairwise(found)]
    best = int(np.argmin(gaps))
    chosen = best + 1 if wide else best
    return found[chosen], gaps[best] + rounding[chosen]


def _unless_custom_vjp(tangent: Callable[..., jax.Array], *args: Any) -> np.ndarray | None:
    """`tangent(*args)`, or None where a `custom_vjp` function forbids forward mode."""
    try:
        return np.asarray(tangent(*args))
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return None


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
        return "disagrees with differences"
    return "agrees"


def _not_finite(window: Window, hyper: Hyper, bad: list[str]) -> str:
    """Where the first number that is not finite arises: in training, or only in its derivative."""
    train, start = window.train, window.start
    first = start(hyper)
    named = zip(leaf_names(first), jax.tree.leaves(first), strict=True)
    names = [name for name, leaf in named if is_inexact(leaf)]
    which = f"The hypergradient of {', '.join(bad) or 'no hyperparameter, but the loss'}"

    def step_under(hyper: Hyper) -> Callable[..., Any]:
        return training_steps(window.problem, hyper, train, window.key, steps_done(first))

    def finite(floats: list[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.isfinite(x).all() for x in floats])

    def first_bad(flags: np.ndarray) -> tuple[int, str]:
        t = int(np.argmin(flags.all(1)))
        return t, names[int(np.argmin(flags[t]))]

    @jax.jit
    def training(hyper: Hyper) -> jax.Array:
        def body(inner: InnerState, x: Tree) -> tuple[InnerState, jax.Array]:
            inner = step_under(hyper)(inner, *x)
            return inner, finite(split_inexact(inner)[0])

        return jax.lax.scan(body, start(hyper), step_inputs(train))[1]

    flags = np.asarray(training(hyper))
    if not flags.all():
        t, leaf = first_bad(flags)
        return (
            f"{which} is not finite: training itself is not. First at step {t} of "
            f"{window.num_steps}, in {leaf!r}. Likely cause: {_cause_in_training(train, t)}."
        )
    if broken := _broken_leaves(window.valid):
        return (
            f"{which} is not finite, though training is: the validation batch holds values that "
            f"are not finite, in leaf {', '.join(broken)}."
        )

    flat, unravel = ravel_pytree(hyper)

    @jax.jit
    def tangents(flat: jax.Array, direction: jax.Array) -> jax.Array:
        push = pushforward(flat, direction[None])

        def body(carry: tuple[Tree, Tangents], x: Tree) -> tuple[Tree, jax.Array]:
            carry = push(lambda h, s: step_under(unravel(h))(s, *x), *carry)
            return carry, finite(carry[1])

        begun = push(lambda h, _: start(unravel(h)), (), [])
        return jax.lax.scan(body, begun, step_inputs(train))[1]

    entries = _entries(hyper)
    for name in bad[:8]:  # one run each; the first nearly always tells
        direction = jnp.zeros_like(flat).at[entries.index(name)].set(1)
        found = _unless_custom_vjp(tangents, flat, direction)
        if found is not None and not found.all():
            t, leaf = first_bad(found)
            return (
                f"{which} is not finite, though training is: the derivative of {leaf!r} in "
                f"{name!r} is lost at step {t} of {window.num_steps}. Likely cause: an infinite "
                "slope, such as the square root in Adam, or a norm, at exactly zero "
                "(hypergrad.nonzero_gradient in a hand-filled step)."
            )
    return (
        f"{which} is not finite, though training is and no tangent is lost on the way. Likely "
        "cause: valid_loss (a logarithm or a square root at 0), a NaN in the branch that jnp.where "
        "does not take, or an adjoint that overflows because training is chaotic at these values: "
        "lower the learning rate."
    )


def _broken_leaves(batch: Batch) -> list[str]:
    return [
        name
        for name, leaf in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True)
        if is_inexact(leaf) and not bool(jnp.isfinite(leaf).all())
    ]


def _cause_in_training(train: Train, t: int) -> str:
    arrays = getattr(train, "arrays", None)
    batch = arrays if arrays is not None else jax.tree.map(lambda x: x[t], train)
    if broken := _broken_leaves(batch):
        where = "the data" if arrays is not None else f"the batch of step {t}"
        return f"{where} holds values that are not finite, in leaf {', '.join(broken)}"
    return "training diverges: the learning rate or momentum is too high for this problem"
