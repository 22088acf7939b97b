"""Which estimator when: the field's rules of thumb as code, checked on the problem at hand."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hypergrad.analysis.causes import cause_of_nan
from hypergrad.analysis.smoothness import judged_smoothness, random_direction, smoothness_around
from hypergrad.checks import instance, positive
from hypergrad.estimators.auto import (
    CG,
    Choice,
    NothingFitsError,
    cheapest_exact,
    count_of,
    evaluations_of,
)
from hypergrad.estimators.base import Estimator, ValidateAt, Window, compiled_estimate
from hypergrad.estimators.conditions import condition_of, total_of
from hypergrad.estimators.evolution import Evolution
from hypergrad.estimators.memory import device_bytes, temporary_bytes
from hypergrad.problem.mistakes import refuse_no_problem
from hypergrad.problem.problem import Problem, judged_params, steps_done
from hypergrad.problem.structure import reaches, require_use
from hypergrad.space.space import Space
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Params,
    Scalar,
    Train,
    Unit,
    inner_product,
    norm,
    strong,
)


def choose_estimator(
    problem: Problem,
    space: Space,
    inner: InnerState | None,
    hyper: Hyper,
    train: Train,
    valid: Batch,
    key: Key,
    *,
    memory_limit: int | None = None,
    validate_at: ValidateAt = "last",
) -> Estimator:
    """The estimator that suits this problem at these values; prints it with the reason.

    1. The cheapest exact one whose program fits `memory_limit`, by XLA's own analysis: `Unrolled`
       with the least checkpointing, or `Forward` for very few hyperparameters. Where a
       hyperparameter's path has no derivative (a hard mask, a sign), `Evolution`.
    2. A probe runs it, and two runs half a percent of the range to either side along its own
       gradient. A hypergradient that is not finite, or whose adjoint grows along the unroll while
       it mispredicts that difference by more than half, is chaos: `Evolution`. Three more runs,
       3% of the range apart, give the `metasmoothness` that is printed beside the reason.
    3. Where all hyperparameters act through the training loss, and the run is so long that
       `Implicit` is cheaper, it is tried on the same point, and taken if the system was solved and
       its gradient agrees to 5%, or, where nothing exact fits, if the point is stationary.

    `SABA`, `F2SA` and `SelfTuning` are never chosen: each wants a step size of its own, which no
    probe here can find, and says nothing true in its first estimates. Where one of them would do
    what the choice cannot, the reason (or the error's note, where nothing fits) names it.

    Args:
      problem: as in `hypergradient`.
      space: gives the unit coordinates that steps are taken in.
      inner: the training state, or None for whole runs.
      hyper: values in the user's units.
      train: K batches.
      valid: one batch.
      key: randomness.
      memory_limit: bytes beside arguments and results; None for half of the device's memory.
      validate_at: as in `Unrolled`.

    Cost: one to four compilations, one hypergradient of each kind tried, five runs. Not jit-able.

    Raises:
      ValueError: a hyperparameter never reaches the loss, nothing fits, or the loss is not finite
        at `hyper`, with the likely cause.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> space = hg.Space({"lr": hg.Float(1e-3, 1.0, scale="log")})
    >>> data = jnp.ones((5, 3)), jnp.ones(3)
    >>> chosen = choose_estimator(problem, space, None, {"lr": 0.1}, *data, jax.random.key(0))
    Unrolled(window=None, checkpoint='none', ...): 1 hyperparameter over 5 steps; ...
    """
    refuse_no_problem(problem)
    instance("space", space, Space, "a hypergrad.Space")
    if memory_limit is not None:
        positive("memory_limit", memory_limit, "bytes, or None")
    hyper = strong(space.validate(hyper))
    window = Window(problem, inner, train, valid, key)
    limit = device_bytes() if memory_limit is None else memory_limit
    chosen = _without_derivative(window, hyper, validate_at)
    chosen = chosen or _examined(window, space, hyper, validate_at, limit)
    print(f"{chosen.estimator}: {chosen.reason}")
    return chosen.estimator


def _examined(
    window: Window, space: Space, hyper: Hyper, validate_at: ValidateAt, limit: int
) -> Choice:
    try:
        exact = cheapest_exact(window, hyper, validate_at, limit)
    except NothingFitsError as error:
        implicit = _implicit(window, space, hyper, limit, None)
        if implicit is None and _through_the_loss(window, hyper):
            error.add_note(
                "All hyperparameters act through train_loss: hypergrad.F2SA(step_size) takes no "
                "second derivative and holds two more copies of the parameters."
            )
        if implicit is None:
            raise
        return implicit
    unit = space.to_unit(hyper)
    estimate = compiled_estimate(exact.estimator, window, hyper)(window, hyper)
    if not bool(jnp.isfinite(estimate.loss)):
        # No estimator has a gradient of a loss that is none, and it is no sign of chaos.
        raise ValueError(cause_of_nan(window, hyper, []))
    grad = jax.vjp(space.from_unit, unit)[1](estimate.grad)[0]
    size = norm(grad)
    if float(size) == 0:
        return exact._replace(reason=f"{exact.reason}; the gradient is 0 here: nothing to probe")
    judged = window.judging(validate_at)

    @jax.jit
    def run(unit: Unit) -> tuple[Scalar, Params]:
        loss, end = judged.objective(space.from_unit(unit))
        return loss, judged_params(window.problem, end.inner)

    def moved(step: float) -> Unit:
        return space.project(jax.tree.map(lambda u, g: u + step * g / size, unit, grad))

    # Wide enough for float32 differences, narrow enough for a line: see benchmarks/choice.py.
    up, down = moved(0.005), moved(-0.005)
    promised = inner_product(grad, jax.tree.map(jnp.subtract, up, down))
    ratio = float((run(up)[0] - run(down)[0]) / promised)
    growth = float(estimate.info.get("growth", jnp.nan))
    # without a growth, differences alone must tell, and they may be coarse
    calm = 0.5 <= ratio <= 1.5 or (0.1 <= ratio <= 10 if math.isnan(growth) else growth <= 2)
    if not bool(estimate.info["finite"]) or not calm:
        why = (
            f"training is chaotic here: the hypergradient's norm is {float(size):.2g} in unit "
            f"coordinates, {ratio:.2g} of what it promises happens over 1% of the range, and the "
            f"adjoint grows {growth:.2g} times along the run"
        )
        return Choice(_evolution(window, validate_at), why)
    if evaluations_of(exact.estimator, window, hyper) > evaluations_of(CG, window, hyper):
        implicit = _implicit(window, space, hyper, limit, grad)
        if implicit is not None:
            return implicit
    why = f"{exact.reason}; differences are {ratio:.2f} of what it promises"
    return exact._replace(reason=why + _smoothness(lambda u: run(u)[1], unit, space, window.key))


def _smoothness(trained: Callable[[Unit], Params], unit: Unit, space: Space, key: Key) -> str:
    """How far the prediction can be trusted beyond the point, over an outer step or so."""
    direction = random_direction(unit, lambda leaf: 0.03, key)
    value = smoothness_around(trained, unit, direction, space.project)
    return "" if math.isnan(value) else f"; {judged_smoothness(value)}"


def _without_derivative(window: Window, hyper: Hyper, validate_at: ValidateAt) -> Choice | None:
    for reach in require_use(lambda hyper: window.objective(hyper)[0], hyper):
        if not reach.differentiable:
            why = f"the path of {reach.name!r} has no derivative ({', '.join(reach.cut_by)})"
            if _through_the_loss(window, hyper):
                why += "; in alternating, SelfTuning sees it too, by 3 gradient evaluations a step"
            return Choice(_evolution(window, validate_at), why)
    return None


def _through_the_loss(window: Window, hyper: Hyper) -> bool:
    """Whether training sees every hyperparameter in the gradient of its loss, smoothly or not."""
    start = window.start(hyper)
    at = condition_of("stationary", "last", window, hyper, start, steps_done(start))
    return all(reach.used for reach in reaches(lambda hyper: total_of(at(at.z, hyper)), hyper))


def _evolution(window: Window, validate_at: ValidateAt) -> Evolution:
    # a whole run is an episode of one window, for which the plainest method is enough
    return Evolution(8, 0.03, "es" if window.inner is None else "pes", validate_at)


def _implicit(
    window: Window, space: Space, hyper: Hyper, limit: int, reference: Unit | None
) -> Choice | None:
    """`Implicit`, if it is right here; `reference` is an exact gradient in unit coordinates."""
    try:
        CG.check_structure(window, hyper)
    except ValueError:
        return None  # something acts through the optimiser or the start
    compiled = compiled_estimate(CG, window, hyper)
    if temporary_bytes(compiled) > limit:
        return None
    estimate = compiled(window, hyper)
    names = ("residual", "unconverged", "unconverged_share")
    residual, unconverged, share = (float(estimate.info[k]) for k in names)
    what = f"all {count_of(hyper)} hyperparameters act through the loss, residual {residual:.1g}"
    if not residual <= 1e-2:
        return None
    if reference is None:
        stationary = share <= 0.01
        why = f"nothing exact fits; {what}; converging would change the loss by {unconverged:.1g}"
        return Choice(CG, why) if stationary else None
    grad = jax.vjp(space.from_unit, space.to_unit(hyper))[1](estimate.grad)[0]
    gap = float(norm(jax.tree.map(jnp.subtract, grad, reference)) / norm(reference))
    why = f"{what}; the run is long, and it is within {gap:.1%} of the exact gradient"
    return Choice(CG, why) if gap <= 0.05 and share <= 0.1 else None
