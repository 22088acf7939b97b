"""Hyperparameters tuned while the one training run goes on (Luketina et al. 2016)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad.checks import integer, random_key
from hypergrad.data.batches import num_steps
from hypergrad.estimators.base import Estimator, Window
from hypergrad.estimators.hypergradient import as_estimator
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.eager import compiled_outside_jit
from hypergrad.problem.problem import Problem, run_key
from hypergrad.problem.structure import naming_missing
from hypergrad.space.space import Space
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Leaf,
    Params,
    Train,
    Tree,
    cast_like,
    norm,
    path_name,
    select,
)
from hypergrad.tuners.base import Info, Position, Tuner, TunerState, refuse_wrong
from hypergrad.tuners.estimates import shorten, unit_estimate, unit_state
from hypergrad.tuners.refusals import warning
from hypergrad.tuners.trust import (
    Trust,
    first_state,
    info_of,
    judge,
    next_state,
    outer_update,
)


class SteadyAdamState(NamedTuple):
    """Moments of `steady_adam`; the largest gradients so far and the moves, of its beginning."""

    updates: jax.Array
    mean: Params
    square: Params
    largest: Params
    moved: Params


def steady_adam(
    learning_rate: float, b1: float = 0.3, b2: float = 0.99
) -> optax.GradientTransformation:
    """Adam that outliers at the beginning neither move nor freeze.

    The first hypergradients of a run can be 1e4 times the usual ones (a dropout rate under AdamW,
    whose first steps are nearly signs), and Adam divides by their squares for hundreds of updates.
    Here an entry whose gradient falls to a tenth of an earlier one, within the first four updates,
    begins anew: its moves are taken back and its moments forgotten. Otherwise it is Adam without
    eps, as the gradients of a small penalty lie below any.

    >>> import jax.numpy as jnp
    >>> optimizer = steady_adam(0.1)
    >>> state, place = optimizer.init(jnp.zeros(())), 0.0
    >>> for grad in (5e3, 0.1, 0.1, 0.1, 0.1, 0.1):
    ...     move, state = optimizer.update(jnp.asarray(grad), state)
    ...     place += move
    >>> round(float(place), 3), round(float(move), 3)
    (-0.4, -0.1)
    """

    def init(params: Params) -> SteadyAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SteadyAdamState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, zeros)

    def update(
        grads: Params, state: SteadyAdamState, params: Params | None = None
    ) -> tuple[Params, SteadyAdamState]:
        del params
        count = state.updates + 1
        early = count <= 4
        mean_so_far, square_so_far = 1 - b1**count, 1 - b2**count

        def step(
            g: jax.Array, m: jax.Array, v: jax.Array, largest: jax.Array, moved: jax.Array
        ) -> tuple[jax.Array, ...]:
            anew = early & (10 * jnp.abs(g) < largest)
            m = jnp.where(anew, mean_so_far.astype(g.dtype) * g, b1 * m + (1 - b1) * g)
            v = jnp.where(anew, square_so_far.astype(g.dtype) * g**2, b2 * v + (1 - b2) * g**2)
            rms = jnp.sqrt(v / square_so_far.astype(g.dtype))
            # an all-zero gradient moves nothing, instead of 0 / 0
            move = m / mean_so_far.astype(g.dtype) / jnp.where(rms == 0, 1, rms)
            move = jnp.where(anew, -moved, move)
            largest = jnp.where(anew, jnp.abs(g), jnp.maximum(largest, jnp.abs(g)))
            return move, m, v, largest, jnp.where(early, moved + move, 0)

        columns = jax.tree.map(step, grads, state.mean, state.square, state.largest, state.moved)
        updates, *moments = jax.tree.transpose(
            jax.tree.structure(grads), jax.tree.structure((0,) * 5), columns
        )
        return updates, SteadyAdamState(count, *moments)

    direction = optax.GradientTransformation(init, update)
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def horizon(num_steps: int, updates: int = 40, least: int = 10) -> int:
    """K, the training steps between two outer steps of `alternating` in a run of `num_steps`.

    About so many `updates` in all, each of at `least` so many steps: shorter ones see less than
    what momentum, dropout and a decay do to a run, longer ones leave too few outer steps
    (docs/experiments.md). A divisor of `num_steps` where one is near, so that none are left over.

    Raises:
      ValueError: fewer than 8 steps.

    >>> [horizon(n) for n in (40, 300, 1000, 1001, 10_000)]
    [10, 10, 25, 13, 250]
    """
    num_steps = integer("num_steps", num_steps)
    if num_steps < 8:
        raise ValueError(
            f"num_steps={num_steps} is too short for any horizon: four updates of two steps are "
            "the least. Train for longer, or tune over whole runs (hypergrad.restarting)."
        )
    wanted = min(max(num_steps // updates, least), num_steps // 4)
    near = [k for k in range(2, num_steps // 4 + 1) if num_steps % k == 0]
    near = [k for k in near if wanted / 2 <= k <= 2 * wanted]
    return min(near, key=lambda k: abs(k - wanted), default=wanted)


def alternating(
    problem: Problem,
    space: Space,
    estimator: Estimator | Literal["auto"] = Unrolled(validate_at=0.8),  # noqa: B008  frozen
    outer_optimizer: optax.GradientTransformation | None = None,
    *,
    max_move: float = 0.07,
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
        `hypergrad.tuners.alternating.steady_adam(0.04)`: Adam with b1 = 0.3, b2 = 0.99 and no eps,
        whose first steps no outlier owns.
      max_move: the most a unit coordinate moves in one update.
      trust: when a hypergradient is refused. A refused update returns to the last trusted position
        (hyperparameters, outer optimiser, parameters, estimator state), see `Trust`.

    Cost per update with the default: 3 K gradient evaluations and one validation gradient. Memory:
    the training state is held twice, for going back; once with `Trust(rewinds="hyper")`.

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
    refuse_wrong(problem, space, outer_optimizer, trust, max_move)
    # Chosen on the gauntlet's tasks, see docs/experiments.md.
    optimizer = outer_optimizer or steady_adam(0.04)

    def init(hyper: Hyper, key: Key, inner: InnerState = None) -> TunerState:
        random_key("key", key)
        hyper = space.validate(hyper)
        unit = space.to_unit(hyper)
        if inner is None:
            with naming_missing(hyper):
                inner = problem.init(hyper, key)
        else:
            inner = _checked(inner, jax.eval_shape(problem.init, hyper, key))
        estimator_state = unit_state(estimator, problem, space, unit, inner, key)
        return first_state(trust, Position(unit, optimizer.init(unit), inner, estimator_state), key)

    def update(state: TunerState, train: Train, valid: Batch) -> tuple[TunerState, Info]:
        now, steps = state.now, num_steps(train)
        key = run_key(state.key, now.inner, state.updates)
        hyper = space.from_unit(now.unit)
        window = Window(problem, now.inner, train, valid, key)
        chosen = estimator.resolve(window, hyper)
        estimate, estimator_state = unit_estimate(
            chosen, shorten(window, state.trust), space, now.unit, now.estimator_state
        )
        refused = judge(trust, state.trust, norm(estimate.grad), estimate.info)
        outer = outer_update(
            optimizer, space, max_move, state, estimate.grad, refused, steps, retries=True
        )
        ahead = Position(outer.unit, outer.outer_state, estimate.inner, estimator_state)
        here, back = (_returned(trust, position, ahead) for position in (now, state.trusted))
        # What was not trusted, or was cut short, may show where to move, but is no training.
        again = back._replace(unit=outer.unit, outer_state=outer.outer_state)
        back = select(outer.moves_on, again, back)
        # Late iterates count most: a far start is forgotten, and training anneals on its way.
        new = next_state(trust, state, outer, ahead, here, back, power=3)
        return new, info_of(estimate.loss, hyper, estimate.grad, refused, outer, estimate.info)

    def best(state: TunerState) -> Hyper:
        return space.from_unit(space.project(state.average.unit))

    return Tuner(init, compiled_outside_jit(update), warning(compiled_outside_jit(best)), space)


def _returned(trust: Trust, position: Position, ahead: Position) -> Position:
    """`position` to go on from, after the steps that led `ahead`."""
    if trust.rewinds == "hyper":
        return position._replace(inner=ahead.inner, estimator_state=ahead.estimator_state)
    # The steps were spent all the same: a restored state must not replay their noise.
    return position._replace(inner=_with_step_of(position.inner, ahead.inner))


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
