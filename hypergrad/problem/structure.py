"""What reaches what: whether each hyperparameter has a differentiable path to an output.

A derivative that is zero by structure is a silent zero: the tuner would sit still and look
converged. The path is read from the traced program (a jaxpr), before anything runs.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from hypergrad.problem.inner_gradient import OWN
from hypergrad.problem.mistakes import explained, raised_by_user
from hypergrad.problem.rules import declared_rules, function_name
from hypergrad.program import interpolated
from hypergrad.trees import Hyper, Params, Tree, is_inexact, leaf_names

# Primitives whose derivative is zero wherever it exists.
_FLAT = {"stop_gradient", "sign", "round", "floor", "ceil", "argmax", "argmin", "is_finite"}

_RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"}

_EXPLANATIONS = {
    "stop_gradient": "stop_gradient (equinox.nn.Dropout has one, hypergrad.nn.EquinoxDropout none)",
    "sign": "the sign of the update (lion, sign_sgd), whose derivative is zero",
    "a comparison": "a comparison (a hard mask), whose derivative is zero; use hypergrad.dropout",
}


class StructureError(ValueError):
    """A hyperparameter that is missing, or has no gradient, by how the problem is written."""


@contextlib.contextmanager
def naming_missing(hyper: Hyper) -> Iterator[None]:
    """Turns the KeyError of a function that reads what `hyper` lacks into one that says so.

    So too what Python wanted of a traced value, cf. `explained`.
    """
    try:
        with explained("A function of the problem"):
            yield
    except KeyError as error:
        missing = error.args[0]
        if not isinstance(hyper, Mapping) or missing in hyper or not raised_by_user(error):
            raise
        raise StructureError(
            f"A function of the problem reads hyper[{missing!r}], which hyper lacks: it holds "
            f"{list(hyper)}. Give it a value, or take it out of the problem."
        ) from error


class NoForwardModeError(StructureError):
    """A function on the way that declares a backward rule alone."""


@contextlib.contextmanager
def naming_backward_rules(function: Callable[..., Any], *args: Any) -> Iterator[None]:
    """Turns JAX's refusal of a forward derivative of `function(*args)` into one that says whose."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise NoForwardModeError(
            "Forward mode has no way through "
            f"{', '.join(declared_rules(function, *args, backward=True))}: a custom_vjp rule is "
            "for reverse mode alone. Use Unrolled(), or declare the rule by jax.custom_jvp."
        ) from error


class Reach(NamedTuple):
    """How one leaf of the hyperparameters reaches an output.

    Attributes:
      name: the leaf's path.
      used: the output depends on it at all.
      differentiable: it does so along a path whose derivative is not zero by structure.
      cut_by: where it is used but not differentiable, the primitives that cut its paths.
      compared_with_noise: it decides, together with fresh random bits, which side of a jump the
        output is on (a random mask), and no `stop_gradient` says that this is meant.
      through_float16: a path of its derivative passes float16.
    """

    name: str
    used: bool
    differentiable: bool
    cut_by: tuple[str, ...]
    compared_with_noise: bool
    through_float16: bool


def reaches(function: Callable[..., Any], hyper: Hyper, *args: Any) -> list[Reach]:
    """How each leaf of `hyper` reaches the scalar `function(hyper, *args)`.

    Traces `function` once; runs nothing. Exact up to values: a path multiplied by a number that
    happens to be zero counts as a path.

    >>> import jax, jax.numpy as jnp
    >>> f = lambda h: h["a"] ** 2 + jnp.sign(h["b"])
    >>> [(r.name, r.used, r.differentiable) for r in reaches(f, {"a": 1.0, "b": 1.0, "c": 1.0})]
    [('a', True, True), ('b', True, False), ('c', False, False)]
    """
    closed = jax.make_jaxpr(function)(hyper, *args)
    num_hyper = len(jax.tree.leaves(hyper))
    taints = [
        _begun(1 << i) if is_inexact(leaf) else _DATA._replace(used=1 << i)
        for i, leaf in enumerate(jax.tree.leaves(hyper))
    ]
    rest = [_DATA] * (len(closed.jaxpr.invars) - num_hyper)
    (out, *_) = _propagate(closed.jaxpr, [*taints, *rest])
    return [
        Reach(
            name,
            bool(out.used >> i & 1),
            bool(out.smooth >> i & 1),
            tuple(sorted({cut for leaf, cut in out.cuts if leaf >> i & 1})),
            bool(out.diced >> i & 1),
            bool(out.half >> i & 1),
        )
        for i, name in enumerate(leaf_names(hyper))
    ]


def keeps(function: Callable[..., Any], tree: Tree, *args: Any) -> list[bool]:
    """Which leaves of `function(tree, *args)` depend on the same leaf of `tree` and nothing else.

    The result has the structure of `tree`. A training step keeps frozen parameters in this sense.

    >>> keeps(lambda x, y: (x[0], x[1] + y), (1.0, 1.0), 1.0)
    [True, False]
    """
    closed = jax.make_jaxpr(function)(tree, *args)
    taints = [_DATA._replace(used=1 << i) for i in range(len(closed.jaxpr.invars))]
    outputs = _propagate(closed.jaxpr, taints)
    return [out.used == 1 << i for i, out in enumerate(outputs)]


def require_reach(function: Callable[..., Any], hyper: Hyper, *args: Any) -> None:
    """Raises unless every leaf of `hyper` has a gradient in the scalar `function(hyper, *args)`.

    Raises:
      ValueError: names each hyperparameter that never reaches the loss, is an integer, reaches it
        only where derivatives are zero, is compared with random bits, or passes float16, with the
        remedy.
    """
    for reach in require_use(function, hyper, *args):
        if reach.differentiable and reach.compared_with_noise:
            raise StructureError(
                f"The hyperparameter {reach.name!r} is compared with random bits (a hard random "
                "mask): that path has no derivative, and the gradient of its other paths alone is "
                "a wrong number that looks plausible. Use hypergrad.dropout, whose rate has a "
                "gradient, or hypergrad.Evolution; jax.lax.stop_gradient around the mask says that "
                "its path is to be left out."
            )
        if reach.differentiable and reach.through_float16:
            raise StructureError(
                f"The hyperparameter {reach.name!r} reaches the validation loss through float16, "
                "whose range (6e-8 to 65504) the derivatives of a training run leave: they would "
                "turn to 0 or to NaN, under loss scaling above all. Compute in bfloat16 or float32."
            )
        if not reach.differentiable:
            why = "; ".join(_EXPLANATIONS.get(cut, cut) for cut in reach.cut_by)
            raise StructureError(
                f"The hyperparameter {reach.name!r} reaches the validation loss only through "
                f"{why}: its gradient would be a silent zero. Tune it by black-box search, by "
                "hypergrad.Evolution, or give it a smooth path."
            )


def require_slope(name: str, loss: Callable[..., Any], params: Params, *args: Any) -> None:
    """Raises where `loss(params, ...)` depends on its parameters but is flat wherever it is smooth.

    Such a loss (an accuracy, an AUC) trains nothing and gives no hypergradient; a loss that does
    not read its parameters at all (a placeholder) passes.

    Raises:
      ValueError: names the loss, what makes it flat, and what to do.
    """
    pairs = zip(reaches(loss, params, *args), jax.tree.leaves(params), strict=True)
    # A loss of integers alone is none of its own making: the training state has no slope.
    found = [reach for reach, leaf in pairs if is_inexact(leaf)]
    if any(reach.used for reach in found) and not any(reach.differentiable for reach in found):
        cuts = ", ".join(sorted({cut for reach in found for cut in reach.cut_by}))
        raise StructureError(
            f"{name} is piecewise constant in the parameters (an accuracy, an AUC; its only way "
            f"from them is {cuts}), so that all gradients of it are 0: use a "
            "smooth loss such as the cross entropy here, name this one in metrics=, and select by "
            "it, as sweep(metric=..., direction='maximize') does."
        )


def require_use(function: Callable[..., Any], hyper: Hyper, *args: Any) -> list[Reach]:
    """Raises unless every leaf of `hyper` is a float that `function(hyper, *args)` depends on.

    Returns what `reaches` found, whose paths may still have no derivative.

    Raises:
      ValueError: names each hyperparameter that never reaches the loss, or is an integer.
    """
    _refuse_integers(hyper)
    found = reaches(function, hyper, *args)
    for reach in found:
        if not reach.used:
            raise StructureError(
                f"The hyperparameter {reach.name!r} never reaches the validation loss, so its "
                "gradient would be a silent zero. Use it in train_loss, valid_loss or optimizer, "
                "or take it out of hyper."
            )
    return found


def _refuse_integers(hyper: Hyper) -> None:
    for name, leaf in zip(leaf_names(hyper), jax.tree.leaves(hyper), strict=True):
        if not is_inexact(leaf):
            raise StructureError(
                f"The hyperparameter {name!r} is of dtype {jax.numpy.result_type(leaf)} and has no "
                "gradient. Make it a float, or leave discrete choices to a sweep."
            )


class _Taint(NamedTuple):
    used: int  # a bit per leaf of hyper: depends on it
    smooth: int  # the same, along a differentiable path
    cuts: frozenset[tuple[int, str]]  # (leaves, primitive) where a differentiable path ended
    fresh: int  # of the smooth ones, those that came here in this step, not in the state
    diced: int  # leaves that decide together with random bits
    drawn: int  # leaves added to noise as it was drawn: what the largest of them decides is random
    half: int  # smooth ones that passed float16
    mixture: int  # of what: bits of _HYPER, _NOISE and _OTHER, or 0 for constants

    def __or__(self, other: "_Taint") -> "_Taint":
        return _Taint(*map(operator.or_, self, other))

    def in_state(self) -> "_Taint":
        """As it goes around a loop: what decides in a later step is data to it."""
        return self._replace(fresh=0, drawn=0, mixture=self.mixture and _OTHER)


_HYPER, _NOISE, _OTHER = 1, 2, 4
_CLEAN = _Taint(0, 0, frozenset(), 0, 0, 0, 0, 0)
_DATA = _CLEAN._replace(mixture=_OTHER)


def _begun(leaf: int) -> _Taint:
    return _CLEAN._replace(used=leaf, smooth=leaf, fresh=leaf, mixture=_HYPER)


def _propagate(jaxpr: Any, inputs: Sequence[_Taint]) -> list[_Taint]:
    taint: dict[Any, _Taint] = {v: _DATA if v.aval.shape else _CLEAN for v in jaxpr.constvars}
    taint.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda v: _CLEAN if hasattr(v, "val") else taint[v]  # noqa: E731  literals have .val
    knots = interpolated(jaxpr)
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if knots.intersection(eqn.outvars):
            inputs = [t._replace(fresh=0) for t in inputs]
        outputs = _through(eqn, inputs)
        taint.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _through(eqn: Any, inputs: list[_Taint]) -> list[_Taint]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
        # Not by the equation's own counts, which JAX 0.11 renamed: what is carried or constant has
        # the same shape inside and outside.
        num_fixed = _num_of_same_rank(eqn.invars, body.invars)
        num_carry = _num_of_same_rank(eqn.outvars, body.outvars)
        num_consts = num_fixed - num_carry
        return _to_fixed_point(
            lambda carry: _propagate(body, [*inputs[:num_consts], *carry, *inputs[num_fixed:]]),
            inputs[num_consts:num_fixed],
        )
    if name == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        body_consts = inputs[n_cond : n_cond + n_body]
        carry = _to_fixed_point(
            lambda carry: _propagate(params["body_jaxpr"].jaxpr, [*body_consts, *carry]),
            inputs[n_cond + n_body :],
        )
        (predicate,) = _propagate(params["cond_jaxpr"].jaxpr, [*inputs[:n_cond], *carry])
        return [t | _cut(predicate, "a comparison") for t in carry]
    if name == "cond":
        index = _cut(inputs[0], "a comparison")
        branches = [_propagate(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
        return [_join([index, *outs]) for outs in zip(*branches, strict=True)]
    if name in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"):
        inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return _propagate(getattr(inner, "jaxpr", inner), inputs)
    # Any other custom rule is taken at its word below: all that goes in reaches all that comes out.
    if name == "custom_jvp_call":
        inner = params["call_jaxpr"].jaxpr
        if function_name(inner).startswith(OWN):
            return _propagate(inner, inputs)
    if name in _RANDOM:
        return [_join(inputs)._replace(mixture=_NOISE) for _ in eqn.outvars]
    if name == "select_n" and any(_is_shifted_noise(t) for t in inputs[1:]):
        # the two sides of a kink, such as a leaky relu's, not a mask
        inputs = [inputs[0]._replace(diced=0), *inputs[1:]]
    merged = _join(inputs)
    if name in ("add", "sub") and any(t.mixture == _NOISE for t in inputs):
        merged = merged._replace(drawn=merged.drawn | merged.fresh)
    diced = _dice(inputs) * _is_flat(eqn)
    # Gumbel noise beside logits. Not of a sort, whose order the derivative of sorted values takes.
    diced |= merged.drawn * (name in ("argmax", "argmin"))
    merged = merged._replace(diced=merged.diced | diced)
    return [_output(merged, name, v.aval.dtype) for v in eqn.outvars]


def _num_of_same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many of a scan's variables are not slices along its axis; they come first."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(o.aval.shape) == len(i.aval.shape) for o, i in pairs)


def _is_shifted_noise(taint: _Taint) -> bool:
    return taint.mixture == _HYPER | _NOISE


def _dice(inputs: list[_Taint]) -> int:
    """The leaves whose values meet fresh noise among the operands of a function with jumps."""
    met = [t.fresh for t in inputs if _is_shifted_noise(t)]
    if any(t.mixture == _NOISE for t in inputs):
        met += [t.fresh for t in inputs if t.mixture != _NOISE]
    return _union(met)


def _union(bits: Iterable[int]) -> int:
    return functools.reduce(operator.or_, bits, 0)


def _is_flat(eqn: Any) -> bool:
    integers = not any(jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact) for v in eqn.outvars)
    return integers or (eqn.primitive.name in _FLAT and eqn.primitive.name != "stop_gradient")


def _output(merged: _Taint, name: str, dtype: Any) -> _Taint:
    if name == "stop_gradient":
        merged = merged._replace(diced=0)
    if name in _FLAT:
        return _cut(merged, name)
    if not jax.numpy.issubdtype(dtype, jax.numpy.inexact):
        return _cut(merged, "a comparison" if jax.numpy.issubdtype(dtype, bool) else "an integer")
    if dtype == jax.numpy.float16:
        return merged._replace(half=merged.half | merged.smooth)
    return merged


def _cut(taint: _Taint, by: str) -> _Taint:
    cuts = taint.cuts | {(taint.smooth, by)} if taint.smooth else taint.cuts
    return taint._replace(smooth=0, cuts=cuts, fresh=0, half=0)


def _join(taints: Sequence[_Taint]) -> _Taint:
    return functools.reduce(operator.or_, taints, _CLEAN)


# A loop may carry a leaf's influence from one variable to the next in each turn: the taint of its
# carry is what a turn no longer enlarges.
def _to_fixed_point(
    body: Callable[[list[_Taint]], list[_Taint]], carry: list[_Taint]
) -> list[_Taint]:
    carry = [t.in_state() for t in carry]
    while True:
        outputs = [t.in_state() for t in body(carry)]
        grown = [a | b for a, b in zip(carry, outputs[: len(carry)], strict=True)]
        if grown == list(carry):
            return [*grown, *outputs[len(carry) :]]
        carry = grown
