"""The gradient of the training loss, in a form that every mode of differentiation can pass through.

Differentiating a training run means differentiating this gradient. Plain reverse over reverse
stores the whole backward pass of every step; forward over reverse stores nothing of it and costs
one Hessian-vector product (MixFlow-MG, Kemaev et al. 2025). JAX's `custom_vjp` would forbid
forward mode, so the rule is stated once as a tangent map with its own transpose.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.problem.rules import Traced, rules_within
from hypergrad.trees import Tree, inner_product, is_inexact, split_inexact, zeros

_Zero = jax.custom_derivatives.SymbolicZero

# `structure` looks inside calls whose names begin so: the tangent rule instantiates zeros, so which
# hyperparameter reaches the gradient can only be read from the primal program.
OWN = "hypergrad_"
NAME = "hypergrad_inner_gradient"


def inner_gradient(
    loss: Callable[..., Any], *, mixed_mode: bool = True
) -> Callable[..., tuple[Tree, tuple[jax.Array, Tree]]]:
    """The gradient of `loss` in its first argument, ready to be differentiated in every mode.

    `loss(params, hyper, *rest)` returns a scalar or `(scalar, aux)`; the result maps the same
    arguments to `(grads, (value, aux))`, with `aux == ()` where the loss has none. Reverse mode
    through it is forward over reverse ("mixed mode"): it stores the arguments and nothing of the
    inner backward pass, at the cost of one Hessian-vector product (two gradient evaluations) per
    step. `jax.jvp`, `jax.vmap`, `jax.checkpoint` and `jax.lax.scan` work on the same function.

    Derivatives flow into `params` and `hyper` (any pytrees; integer leaves are constants), never
    into `rest` (batch, key): what depends on hyperparameters, a learned batch or batch statistics,
    goes into `hyper`. The result can be differentiated once, and the loss must not close over a
    traced value: both are errors, never wrong numbers (JAX's own where we cannot name them).

    Mixed mode transposes a symmetric second derivative. That of a loss which calls a function with
    a declared rule (`custom_vjp`, or a `custom_jvp` of the user's) need not be symmetric, and such
    a loss gets plain `jax.grad`, as every loss does under `mixed_mode=False`: right for any rule,
    at any order, forward mode where the rules permit it, and none of the savings above
    (`checkpoint="step"` brings the memory back).

    Raises:
      ValueError: the loss is not a scalar, or `rest` carries a derivative.

    Source: Kemaev et al. 2025, "Scalable meta-learning via mixed-mode differentiation", section 3.

    >>> import jax, jax.numpy as jnp
    >>> gradient = inner_gradient(lambda w, penalty: 0.5 * penalty * w**2)
    >>> grads, (value, aux) = gradient(2.0, 3.0)
    >>> float(grads), float(value)
    (6.0, 6.0)
    >>> float(jax.grad(lambda penalty: gradient(2.0, penalty)[0])(3.0))
    2.0
    """

    @functools.wraps(loss)
    def gradient(params: Tree, hyper: Tree, *rest: Any) -> tuple[Tree, tuple[jax.Array, Tree]]:
        param_floats, param_constants, join_params = _partition(params)
        hyper_floats, hyper_constants, join_hyper = _partition(hyper)

        def on_floats(p: list[Any], h: list[Any], rest: Tree) -> tuple[jax.Array, Tree]:
            param_constants, hyper_constants, rest = rest
            params, hyper = join_params(p, param_constants), join_hyper(h, hyper_constants)
            return with_aux(loss)(params, hyper, *rest)

        rest = (param_constants, hyper_constants, rest)
        try:
            traced = _TracedLoss(on_floats, param_floats, hyper_floats, rest)
        except jax.errors.ConcretizationTypeError:
            # an eager call that branches on values
            grads, value_aux = _plain(on_floats)(param_floats, hyper_floats, rest)
        else:
            rule = _differentiation(mixed_mode, rules_within(traced.program))
            used, rest = traced.split(hyper_floats, rest)
            grads, value_aux = rule(traced)(param_floats, used, rest)
        # Integer leaves have no gradient; zeros keep the structure that optimisers expect.
        zeros = jax.tree.map(jnp.zeros_like, params)
        return split_inexact(zeros)[1](grads), value_aux

    return gradient


class _TracedLoss(Traced):
    """A loss (p, h, rest), called with what it reads of h alone.

    What it does not read (a learning rate) would cost the transpose a pass over all parameters, for
    a zero.
    """

    def __init__(self, loss: Callable[..., Any], p: list[Any], h: list[Any], rest: Tree) -> None:
        super().__init__(loss, p, h, rest)
        read = {id(v) for eqn in self.program.eqns for v in eqn.invars}
        read |= {id(v) for v in self.program.outvars}
        self._read = [id(v) in read for v in self.program.invars[len(p) : len(p) + len(h)]]

    def split(self, h: list[Any], rest: Tree) -> tuple[list[Any], Tree]:
        """The part of h that is read; and `rest` with the other, for calls."""
        pairs = list(zip(h, self._read, strict=True))
        others = [jax.lax.stop_gradient(x) for x, read in pairs if not read]
        return [x for x, read in pairs if read], (others, rest)

    def __call__(self, p: list[Any], h: list[Any], rest: Tree) -> tuple[jax.Array, Tree]:
        others, rest = rest
        supply, more = iter(h), iter(others)
        h = [next(supply) if read else next(more) for read in self._read]
        return super().__call__(p, h, rest)


def _differentiation(mixed_mode: bool, rules: list[str]) -> Callable[..., Any]:
    """Which of those below the gradient of a loss takes that calls functions of these rules."""
    if NAME in rules:
        return _not_differentiable
    if not mixed_mode:
        return _plain
    return _guarded if rules else _differentiable_once


def _plain(loss: Callable[..., Any]) -> Callable[..., Any]:
    """(p, h, rest) -> (grad_p loss, (value, aux)) for lists p, h of inexact arrays."""

    def hypergrad_inner_gradient(p: list[Any], h: list[Any], rest: Tree) -> Any:
        value_aux, grads = jax.value_and_grad(loss, has_aux=True)(p, h, rest)
        return grads, value_aux

    return hypergrad_inner_gradient


def _not_differentiable(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`_plain` of a loss that holds an inner gradient in mixed mode."""
    call = jax.custom_jvp(_plain(loss))
    call.defjvp(_refuse_third_derivative)
    return call


def _guarded(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`_plain`, whose transpose maps an exact zero to zero."""
    primal = _plain(loss)
    run = guarded(lambda floats, rest: primal(*floats, rest))
    return lambda p, h, rest: run((p, h), rest)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`(floats, rest) -> tree`, whose transpose in the inexact arrays `floats` maps 0 to 0."""

    def call(floats: Tree, rest: Tree) -> Any:
        floats, probe = _entrance((floats, jnp.zeros(())))
        out, join = split_inexact(function(floats, rest))
        return join(_exit((out, probe))[0])

    return call


def _linear_identity(transpose: Callable[[Tree, jax.Array], Tree]) -> Callable[[Tree], Tree]:
    """`(tree, probe) -> (tree, probe)`, whose tangent map has this transpose."""

    def hypergrad_identity(x: Tree) -> Tree:
        return x

    identity = jax.custom_jvp(hypergrad_identity)

    def rule(primals: Tree, tangents: Tree) -> Tree:
        (x,), (dx,) = primals, tangents
        out = jax.lax.custom_linear_solve(
            lambda x: x, _all_linear(dx, x), lambda _, b: b, lambda _, c: transpose(*c)
        )
        return x, out

    identity.defjvp(rule, symbolic_zeros=True)
    return identity


# On the way back the exit's probe tells the entrance whether any cotangent was not zero.
_exit = _linear_identity(lambda c, probe: (c, _any_nonzero(c).astype(probe.dtype)))
_entrance = _linear_identity(lambda c, probe: (_zero_unless(probe != 0, c), probe))


def while_true(condition: jax.Array, tree: Tree) -> Tree:
    """`tree`, to which no derivative comes unless `condition` holds: not even 0 NaN.

    For the arguments of a step that is taken and not used.
    """

    @jax.custom_jvp
    def hypergrad_kept_if(condition: jax.Array, floats: list[Any]) -> list[Any]:
        return floats

    def rule(primals: Tree, tangents: Tree) -> Any:
        return primals[1], _zero_unless(primals[0], tangents[1])

    hypergrad_kept_if.defjvp(rule)
    floats, join = split_inexact(tree)
    return join(hypergrad_kept_if(condition, floats))


def _differentiable_once(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`_plain`, whose transpose is forward over reverse."""
    primal = _plain(loss)
    # Under custom_vjp this would be one line, but jvp, and with it forward mode, would be refused.
    call = jax.custom_jvp(primal)

    def rule(primals: Tree, tangents: Tree) -> Any:
        (p, h, rest), (dp, dh, drest) = primals, tangents
        _refuse_derivative_of_rest(rest, drest)
        out = call(p, h, rest)
        _, value_aux = out
        floats, _ = split_inexact(value_aux)

        # The linear map stands as the "solution" of an identity system, because
        # `custom_linear_solve` is the one place where JAX takes a map with a transpose of its own.
        # Domain and range must then be one space: (p-like, h-like, outputs-like), partly unused.
        def forward(_: Any, b: Any) -> Any:
            def outputs(p: list[Any], h: list[Any]) -> Any:
                grads, value_aux = primal(p, h, rest)
                return grads, split_inexact(value_aux)[0]

            dgrads, dfloats = jax.jvp(outputs, (p, h), (b[0], b[1]))[1]
            return dgrads, zeros(h), dfloats

        def transpose(_: Any, cotangents: Tree) -> Any:
            c, _, cfloats = cotangents

            # d/de at 0 of the gradient of L(p + e c, h) + e <outputs, cfloats>
            def tilted(e: jax.Array) -> Any:
                def tilted_loss(p: list[Any], h: list[Any]) -> jax.Array:
                    value_aux = loss([x + e * y for x, y in zip(p, c, strict=True)], h, rest)
                    return value_aux[0] + e * inner_product(split_inexact(value_aux)[0], cfloats)

                return jax.grad(tilted_loss, (0, 1))(p, h)

            one = jnp.ones_like(value_aux[0])
            cp, ch = jax.jvp(tilted, (jnp.zeros_like(one),), (one,))[1]
            cp, ch = _zero_unless(_any_nonzero((c, cfloats)), (cp, ch))
            return cp, ch, zeros(floats)

        # A zero that is linear in the tangents: transposition needs every input to be so.
        none = [None] * len(floats)
        dp, dh, dout = _all_linear((dp, dh, none), (p, h, floats))
        dgrads, _, dfloats = jax.lax.custom_linear_solve(
            lambda x: _once(x, (p, h)), (dp, dh, dout), forward, transpose
        )
        return out, (dgrads, _with_integer_tangents(value_aux, dfloats))

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _partition(tree: Tree) -> tuple[list[Any], list[Any], Callable[[list[Any], list[Any]], Tree]]:
    """The inexact leaves, the other arrays, and the function that joins both with what is left.

    Integer arrays may be traced (a counter in a scan), so that no closure may hold them; Python
    numbers stay what they are.
    """
    leaves, treedef = jax.tree.flatten(tree)
    inexact = [is_inexact(leaf) for leaf in leaves]
    constant = [isinstance(x, jax.Array) and not f for x, f in zip(leaves, inexact, strict=True)]
    left = [None if a or b else x for x, a, b in zip(leaves, inexact, constant, strict=True)]

    def join(floats: list[Any], constants: list[Any]) -> Tree:
        supply, more = iter(floats), iter(constants)
        return treedef.unflatten(
            [
                next(supply) if a else next(more) if b else x
                for x, a, b in zip(left, inexact, constant, strict=True)
            ]
        )

    floats = [x for x, flag in zip(leaves, inexact, strict=True) if flag]
    return floats, [x for x, flag in zip(leaves, constant, strict=True) if flag], join


def _all_linear(tangents: Tree, primals: Tree) -> Tree:
    """`tangents`, in which None and symbolic zeros are zeros that depend on the others."""
    is_zero = lambda t: t is None or type(t) is _Zero  # noqa: E731
    leaves, treedef = jax.tree.flatten(tangents, is_leaf=is_zero)
    nothing = sum(jnp.sum(jnp.real(t[None][:0])) for t in leaves if not is_zero(t))
    filled = [
        zeros(x) + jnp.asarray(nothing, jnp.result_type(x)) if is_zero(t) else t
        for t, x in zip(leaves, jax.tree.leaves(primals), strict=True)
    ]
    return treedef.unflatten(filled)


# A step that is skipped (optax.apply_if_finite) sends back a cotangent of exact zeros, and may have
# a NaN for its gradient: the product with its Hessian, 0 NaN, is none of what the step did. Not a
# branch, which a GPU would wait for in every step.
def _any_nonzero(cotangents: Tree) -> jax.Array:
    leaves = jax.tree.leaves(cotangents)
    return functools.reduce(jnp.logical_or, [jnp.any(c != 0) for c in leaves], jnp.bool_(False))


def _zero_unless(condition: jax.typing.ArrayLike, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.where(condition, x, 0), tree)


def _with_integer_tangents(out: Tree, dfloats: list[Any]) -> Tree:
    float0 = jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), out)
    leaves, treedef = jax.tree.flatten(out)
    supply = iter(dfloats)
    tangents = [
        next(supply) if is_inexact(x) else zero
        for x, zero in zip(leaves, jax.tree.leaves(float0), strict=True)
    ]
    return treedef.unflatten(tangents)


def _refuse_derivative_of_rest(rest: Tree, tangents: Tree) -> None:
    for x, t in zip(jax.tree.leaves(rest), jax.tree.leaves(tangents), strict=True):
        if type(t) is not _Zero and is_inexact(x):
            raise ValueError(
                "A batch or key given to inner_gradient depends on hyperparameters or parameters, "
                "and that derivative would be lost. Pass what depends on them inside `hyper`."
            )


def _refuse_third_derivative(*_: Any) -> Any:
    raise ValueError(
        "A third derivative through inner_gradient: its rule can be differentiated once. Give "
        "bilevel (or inner_gradient) mixed_mode=False where higher orders are needed."
    )


@jax.custom_jvp
def _once(x: Any, at: Any) -> Any:
    return x


_once.defjvp(_refuse_third_derivative)


def _name(f: Callable[..., Any]) -> str:
    return getattr(f, "__name__", repr(f))


def with_aux(loss: Callable[..., Any], name: str = "loss") -> Callable[..., tuple[jax.Array, Tree]]:
    """`loss` with the return value `(scalar, aux)` in every case; `aux == ()` where it had none."""

    @functools.wraps(loss)
    def pair(*args: Any) -> tuple[jax.Array, Tree]:
        out = loss(*args)
        value, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, ())
        if jnp.shape(value) != ():
            raise ValueError(
                f"{name} {_name(loss)} returned an array of shape {jnp.shape(value)}, not a "
                "scalar. Take a mean or a sum over the batch."
            )
        return value, aux

    return pair
