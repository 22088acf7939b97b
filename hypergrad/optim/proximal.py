"""Proximal steps: training losses with kinks (L1) and parameters with bounds, differentiable.

At a kink the gradient of the training loss is not 0, and nothing follows from the smooth part of
the loss alone. The proximal step is smooth there, and its fixed point is the solution.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hypergrad import checks
from hypergrad.optim.transforms import with_prefix
from hypergrad.trees import Leaf, Params, State, Tree, inner_product, split_inexact

# (params, step_size []) -> params
Penalty = Callable[[Params, jax.Array], Params]


def l1(strength: Tree) -> Penalty:
    """The proximal map of `strength * sum |p|`: soft thresholding.

    `strength`: a scalar, or a prefix of the parameters' tree (one per layer, one per weight).

    >>> l1(0.5)(jnp.array([2.0, 0.1]), 1.0).tolist()
    [1.5, 0.0]
    """
    return elastic_net(strength, 0.0)


def elastic_net(l1: Tree, l2: Tree) -> Penalty:
    """The proximal map of `l1 * sum |p| + l2 / 2 * sum p**2`; both as `strength` of `l1`.

    >>> elastic_net(0.5, 1.0)(jnp.array([2.0, 0.1]), 1.0).tolist()
    [0.75, 0.0]
    """

    def map_(params: Params, step_size: jax.Array) -> Params:
        def soft(strength: Leaf, p: jax.Array) -> jax.Array:
            # of the size, not a difference of two ramps: exact zeros stay exact
            return jnp.sign(p) * jnp.maximum(jnp.abs(p) - step_size * strength, 0)

        thresholded = with_prefix(soft, "l1", l1, params)
        return with_prefix(lambda c, p: p / (1 + step_size * c), "l2", l2, thresholded)

    return map_


def box(low: Tree, high: Tree) -> Penalty:
    """The projection onto `low <= p <= high`; both scalars or prefixes of the parameters' tree.

    >>> box(0.0, 1.0)(jnp.array([2.0, -0.1]), 1.0).tolist()
    [1.0, 0.0]
    """

    def map_(params: Params, step_size: jax.Array) -> Params:
        above = with_prefix(lambda bound, p: jnp.maximum(p, bound), "low", low, params)
        return with_prefix(lambda bound, p: jnp.minimum(p, bound), "high", high, above)

    return map_


def ball(radius: Leaf) -> Penalty:
    """The projection onto a Euclidean norm, over all leaves, of at most `radius`.

    >>> ball(2.0)(jnp.array([0.0, 4.0]), 1.0).tolist()
    [0.0, 2.0]
    """

    def map_(params: Params, step_size: jax.Array) -> Params:
        square = inner_product(params, params)
        # the root has no slope at 0, which is inside
        outside = square > radius**2
        factor = jnp.where(outside, radius / jnp.sqrt(jnp.where(outside, square, 1.0)), 1.0)
        return jax.tree.map(lambda p: factor.astype(p.dtype) * p, params)

    return map_


def simplex(total: Leaf = 1.0) -> Penalty:
    """The projection onto `p >= 0`, `sum p = total`, over all leaves.

    >>> simplex()(jnp.array([1.0, 0.5, -1.0]), 1.0).tolist()
    [0.75, 0.25, 0.0]
    """
    return lambda params, step_size: optax.projections.projection_simplex(params, total)


class _Prox:
    l1 = staticmethod(l1)
    elastic_net = staticmethod(elastic_net)
    box = staticmethod(box)
    ball = staticmethod(ball)
    simplex = staticmethod(simplex)

    def __call__(
        self, optimizer: optax.GradientTransformation, penalty: Penalty
    ) -> optax.GradientTransformationExtraArgs:
        """Follow each step of `optimizer` by the proximal map of a penalty or a constraint.

        params <- penalty(params + update, step_size): proximal gradient descent, to be
        differentiated by `Unrolled`, `Forward`, or at its fixed point by
        `Implicit(GMRES(), of="fixed_point")`. The penalty stands here and not in `train_loss`,
        where `Implicit(of="stationary")` takes its kinks for smooth.

        Args:
          optimizer: affine in the gradient, with one rate for all parameters: `optax.sgd`, with
            momentum or without, with a schedule or decay. The step size is read from it: by how
            much a lasting gradient of 1 moves a parameter, `learning_rate / (1 - momentum)`.
          penalty: `hypergrad.prox.l1(strength)`, `.elastic_net(l1, l2)`, `.box(low, high)`,
            `.ball(radius)`, `.simplex(total)`, or a function `(params, step_size) -> params`: the
            minimiser over q of step_size * penalty(q) + |q - params|^2 / 2. All numbers may be
            traced, and have gradients.

        Where the rates of parameters differ (`scale_by_tree`, frozen ones), the result is NaN: give
        each group of `optax.partition` a `prox` of its own.

        Cost: two to four times the optimiser's update.

        Raises:
          ValueError: an optimiser whose step size depends on the gradient (Adam, clipping); an
            update without `params`.

        Source: Parikh and Boyd 2014, section 4.2; derivative at the fixed point: Bertrand et al.
        2020.

        >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
        >>> optimizer = hg.prox(optax.sgd(0.1), hg.prox.l1(1.0))
        >>> params, grads = jnp.array([2.0, 0.1]), jnp.array([1.0, 0.5])
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).round(2).tolist()
        [1.7999999523162842, 0.0]
        """
        checks.optimizer("optimizer", optimizer)
        checks.function("penalty", penalty, "params", "step_size")
        inner = optax.with_extra_args_support(optimizer)

        def update(
            grads: Params, state: State, params: Params | None = None, **extra: Any
        ) -> tuple[Params, State]:
            if params is None:
                raise ValueError("params=None: prox needs them. Call update(grads, state, params).")

            def move(grads: Params, state: State) -> tuple[Params, State]:
                return inner.update(grads, state, params, **extra)

            updates, new_state = move(grads, state)
            moved = optax.apply_updates(params, updates)
            target = penalty(moved, _step_size(move, grads, state))
            return jax.tree.map(lambda new, old: new - old, target, params), new_state

        return optax.GradientTransformationExtraArgs(inner.init, update)


prox = _Prox()


def _step_size(
    move: Callable[[Params, State], tuple[Params, State]], grads: Params, state: State
) -> jax.Array:
    """By how much a lasting gradient of 1 moves parameters, a scalar; NaN where it differs."""
    g, join_grads = split_inexact(grads)
    s, join_state = split_inexact(state)

    def on_floats(g: list[jax.Array], s: list[jax.Array]) -> tuple[list[jax.Array], ...]:
        updates, new = move(join_grads(g), join_state(s))
        return split_inexact(updates)[0], split_inexact(new)[0]

    def slopes(g: list[jax.Array], s: list[jax.Array]) -> Any:
        one = lambda x: jax.tree.map(jnp.ones_like, x)  # noqa: E731
        none = lambda x: jax.tree.map(jnp.zeros_like, x)  # noqa: E731
        by_grad = jax.jvp(on_floats, (g, s), (one(g), none(s)))[1]
        return by_grad, jax.jvp(on_floats, (g, s), (none(g), one(s)))[1]

    if _varies(slopes, g, s) or len(s) not in (0, len(g)):
        raise ValueError(
            "optimizer's step size cannot be read: it depends on the gradient (Adam, clipping), or "
            "on more than one moment. Give prox an optimiser that is affine in the gradient, such "
            "as optax.sgd(learning_rate, momentum)."
        )
    (du_dg, ds_dg), (du_ds, ds_ds) = slopes(g, s)
    # A momentum s <- m s + g rests at g / (1 - m).
    resting = [a / (1 - m) for a, m in zip(ds_dg, ds_ds, strict=True)] or [0.0] * len(g)
    moved = [-(a + b * r) for a, b, r in zip(du_dg, du_ds, resting, strict=True)]
    low = jnp.min(jnp.stack([jnp.min(x) for x in moved]))
    high = jnp.max(jnp.stack([jnp.max(x) for x in moved]))
    return jnp.where(high - low <= 1e-4 * jnp.abs(high), high, jnp.nan)


def _varies(function: Callable[..., Any], *args: Any) -> bool:
    """Whether the derivative of `function(*args)` is more than zero by structure."""
    found: list[bool] = []

    @jax.custom_jvp
    def look(x: Any) -> Any:
        return x

    def rule(primals: Any, tangents: Any) -> Any:
        zero = jax.custom_derivatives.SymbolicZero
        found.extend(type(t) is not zero for t in jax.tree.leaves(tangents))
        return primals[0], jax.tree.map(jnp.zeros_like, primals[0])

    look.defjvp(rule, symbolic_zeros=True)
    # traced apart, as the rule would also be asked for derivatives that are taken around it
    jax.eval_shape(lambda *x: jax.jvp(lambda *x: look(function(*x)), x, x), *args)
    return any(found)
