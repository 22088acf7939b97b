"""Hyperparameters tuned while the one training run goes on (Luketina et al. 2016)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from hypergrad.checks import positive
from hypergrad.data.batches import num_steps
from hypergrad.eager import compiled_outside_jit
from hypergrad.estimators.base import Estimator, Window
from hypergrad.estimators.hypergradient import as_estimator
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.problem import Problem, run_key
from hypergrad.problem.structure import naming_missing
from hypergrad.space.space import Space
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Leaf,
    Train,
    Tree,
    cast_like,
    norm,
    path_name,
    select,
)
from hypergrad.tuners.base import Info, Position, Tuner
from hypergrad.tuners.trust import (
    Trust,
    TunerState,
    first_state,
    info_of,
    judge,
    next_state,
    outer_update,
    shorten,
    unit_estimate,
    unit_state,
)


def alternating(
    problem: Problem,
    space: Space,
    estimator: Estimator | Literal["auto"] = Unrolled(validate_at=0.8),  # noqa: B008  frozen
    outer_optimizer: optax.GradientTransformation | None = None,
    *,
    max_move: float = 0.05,
    trust: Trust = Trust(),  # noqa: B008
) -> Tuner:
    """Tunes within one training run: K training steps, one outer step, and on from there.

    `tuner.init(hyper, key)` starts training and tuning, `tuner.init(hyper, key, inner=inner)` goes
    on from a training state that exists (`hypergrad.nn` reads one from a flax `TrainState`);
    `tuner.update(state, train, valid)` takes the K steps in `train`, the hypergradient through
    them, and one outer step in unit coordinates, in which a step of 0.03 means 3% of every
    hyperparameter's range.

    Args:
      problem: what is trained and judged.
      space: the ranges; only its continuous hyperparameters are tuned.
      estimator: the default validates at the mean of the window's last parameters (80%), which
        does not punish the noise of the steps: the last one's loss drives learning rates down
        too early. "auto": the cheapest exact one that fits the device's memory, chosen by shapes
        when the update is compiled, and logged (see `choose_estimator` for a probe of values).
      outer_optimizer: any optax optimiser over unit coordinates; None for
        `optax.adam(0.03, b1=0.3, b2=0.99, eps=1e-20)` (unit gradients of a small penalty lie below
        1e-8, which a usual eps would drown).
      max_move: the most a unit coordinate moves in one update.
      trust: when a hypergradient is refused. A refused update returns to the last trusted position
        (hyperparameters, outer optimiser, parameters, estimator state) and halves the outer steps.

    Cost per update with the default: 3 K gradient evaluations and one validation gradient. Memory:
    the training state is held twice, for going back.

    Raises:
      TypeError: an `inner` of another type than `problem.init`'s.
      ValueError: one that has not its structure, shapes and dtypes.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> tuner = hg.alternating(problem, hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")}))
    >>> state = tuner.init({"lr": 1e-3}, jax.random.key(0))
    >>> state, info = jax.jit(tuner.update)(state, jnp.ones((5, 3)), jnp.ones(3))
    >>> bool(tuner.update(state, jnp.ones((5, 3)), jnp.ones(3))[1].hyper["lr"] > 1e-3)
    True
    """
    estimator = as_estimator(estimator, validate_at=0.8)
    positive("max_move", max_move, "a share of the range", infinite=True)
    # Chosen among some sixty settings, see docs/experiments.md.
    optimizer = outer_optimizer or optax.adam(0.03, b1=0.3, b2=0.99, eps=1e-20)

    def init(hyper: Hyper, key: Key, inner: InnerState = None) -> TunerState:
        hyper = space.validate(hyper)
        unit = space.to_unit(hyper)
        if inner is None:
            with naming_missing(hyper):
                inner = problem.init(hyper, key)
        else:
            inner = _checked(inner, jax.eval_shape(problem.init, hyper, key))
        estimator_state = unit_state(estimator, problem, space, unit, inner, key)
        return first_state(Position(unit, optimizer.init(unit), inner, estimator_state), key)

    def update(state: TunerState, train: Train, valid: Batch) -> tuple[TunerState, Info]:
        now, steps = state.now, num_steps(train)
        key = run_key(state.key, now.inner, state.updates)
        hyper = space.from_unit(now.unit)
        window = Window(problem, now.inner, train, valid, key)
        # For the problem as it is: a shortened one is a new object, and would be compiled anew.
        chosen = estimator.resolve(window, hyper)
        limited = shorten(problem, now.inner, state.trust, steps)
        window = dataclasses.replace(window, problem=limited)
        estimate, estimator_state = unit_estimate(
            chosen, window, space, now.unit, now.estimator_state
        )
        refused = judge(trust, state.trust, norm(estimate.grad), estimate.info)
        outer = outer_update(optimizer, space, max_move, state, estimate.grad, refused, steps)
        ahead = Position(outer.unit, outer.outer_state, estimate.inner, estimator_state)
        # The steps were spent all the same: a restored state must not replay their noise.
        back = state.trusted._replace(inner=_with_step_of(state.trusted.inner, estimate.inner))
        # What was not trusted, or was cut short, may show where to move, but is no training.
        again = back._replace(unit=outer.unit, outer_state=outer.outer_state)
        back = select(outer.moves_on, again, back)
        # Late iterates count most: a far start is forgotten, and training anneals on its way.
        new = next_state(state, outer, ahead, back, power=3)
        return new, info_of(estimate.loss, hyper, estimate.grad, refused, outer, estimate.info)

    def best(state: TunerState) -> Hyper:
        return space.from_unit(space.project(state.average.unit))

    return Tuner(init, compiled_outside_jit(update), compiled_outside_jit(best), space)


def _with_step_of(inner: InnerState, other: InnerState) -> InnerState:
    """`inner` with the leaf `step` of `other`, where it has one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a, b: b if path[0] == jax.tree_util.GetAttrKey("step") else a, inner, other
    )


def _checked(inner: InnerState, like: InnerState) -> InnerState:
    """`inner` as strong arrays, refused where it is not what `problem.init` gives, `like`."""
    if type(inner) is not type(like):
        raise TypeError(
            f"inner is a {type(inner).__name__}, and this problem trains a {type(like).__name__}: "
            "give the state.inner of an earlier run, or what hypergrad.nn.from_train_state or "
            "from_nnx makes of a script's own state."
        )

    def leaves(tree: Tree) -> dict[str, Leaf]:
        return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    def kind(leaf: Leaf) -> str:
        # A step that was counted as another integer is no other state.
        dtype = jnp.result_type(leaf)
        return f"{'integer' if jnp.issubdtype(dtype, jnp.integer) else dtype}{jnp.shape(leaf)}"

    got, wanted = ({name: kind(x) for name, x in leaves(tree).items()} for tree in (inner, like))
    names = sorted({*got, *wanted})
    other = [n for n in names if got.get(n) != wanted.get(n)]
    if other or jax.tree.structure(inner) != jax.tree.structure(like):
        lines = [f"{n}: {got.get(n, 'nothing')}, not {wanted.get(n, 'nothing')}" for n in other[:5]]
        raise ValueError(
            "inner is no training state of this problem: "
            + ("; ".join(lines) or "its containers are others than those of problem.init")
            + f" ({len(other)} leaves differ). Build the optimizer of the problem from the same "
            "transformations as the running one's, or start its state anew with "
            "inner._replace(opt_state=problem.init(hyper, key).opt_state)."
        )
    return cast_like(inner, like)
