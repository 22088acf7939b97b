"""What reaches what: whether each hyperparameter has a differentiable path to an output.

A derivative that is zero by structure is a silent zero: the tuner would sit still and look
converged. The path is read from the traced program (a jaxpr), before anything runs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from hypergrad.problem.inner_gradient import NAME as INNER_GRADIENT
from hypergrad.problem.mistakes import explained
from hypergrad.trees import Hyper, Params, Tree, is_inexact, leaf_names

# Primitives whose derivative is zero wherever it exists.
_FLAT = {"stop_gradient", "sign", "round", "floor", "ceil", "argmax", "argmin", "is_finite"}

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
        if not isinstance(hyper, Mapping) or missing in hyper:
            raise
        raise StructureError(
            f"A function of the problem reads hyper[{missing!r}], which hyper lacks: it holds "
            f"{list(hyper)}. Give it a value, or take it out of the problem."
        ) from error


class Reach(NamedTuple):
    """How one leaf of the hyperparameters reaches an output.

    Attributes:
      name: the leaf's path.
      used: the output depends on it at all.
      differentiable: it does so along a path whose derivative is not zero by structure.
      cut_by: where it is used but not differentiable, the primitives that cut its paths.
    """

    name: str
    used: bool
    differentiable: bool
    cut_by: tuple[str, ...]


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
        _Taint(1 << i, (1 << i) if is_inexact(leaf) else 0, frozenset())
        for i, leaf in enumerate(jax.tree.leaves(hyper))
    ]
    rest = [_CLEAN] * (len(closed.jaxpr.invars) - num_hyper)
    (out, *_) = _propagate(closed.jaxpr, [*taints, *rest])
    return [
        Reach(
            name,
            bool(out.used >> i & 1),
            bool(out.smooth >> i & 1),
            tuple(sorted({cut for leaf, cut in out.cuts if leaf >> i & 1})),
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
    taints = [_Taint(1 << i, 0, frozenset()) for i in range(len(closed.jaxpr.invars))]
    outputs = _propagate(closed.jaxpr, taints)
    return [out.used == 1 << i for i, out in enumerate(outputs)]


def require_reach(function: Callable[..., Any], hyper: Hyper, *args: Any) -> None:
    """Raises unless every leaf of `hyper` has a gradient in the scalar `function(hyper, *args)`.

    Raises:
      ValueError: names each hyperparameter that never reaches the loss, is an integer, or reaches
        it only where derivatives are zero, with the remedy.
    """
    for reach in require_use(function, hyper, *args):
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

    def __or__(self, other: "_Taint") -> "_Taint":
        return _Taint(self.used | other.used, self.smooth | other.smooth, self.cuts | other.cuts)


_CLEAN = _Taint(0, 0, frozenset())


def _propagate(jaxpr: Any, inputs: Sequence[_Taint]) -> list[_Taint]:
    taint: dict[Any, _Taint] = dict.fromkeys(jaxpr.constvars, _CLEAN)
    taint.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda v: _CLEAN if hasattr(v, "val") else taint[v]  # noqa: E731  literals have .val
    for eqn in jaxpr.eqns:
        outputs = _through(eqn, [read(v) for v in eqn.invars])
        taint.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _through(eqn: Any, inputs: list[_Taint]) -> list[_Taint]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        body = params["jaxpr"].jaxpr
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        return _to_fixed_point(
            lambda carry: _propagate(
                body, [*inputs[:num_consts], *carry, *inputs[num_consts + num_carry :]]
            ),
            inputs[num_consts : num_consts + num_carry],
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
    if name == "custom_jvp_call" and _function_name(params["call_jaxpr"].jaxpr) == INNER_GRADIENT:
        return _propagate(params["call_jaxpr"].jaxpr, inputs)
    merged = _join(inputs)
    return [_output(merged, name, v.aval.dtype) for v in eqn.outvars]


def _function_name(jaxpr: Any) -> str:
    # "name at file:line", or the bare name, as JAX records it for error messages
    return str(jaxpr.debug_info.func_src_info).split(" at ")[0].rsplit(".", 1)[-1]


def _output(merged: _Taint, name: str, dtype: Any) -> _Taint:
    if name in _FLAT:
        return _cut(merged, name)
    if not jax.numpy.issubdtype(dtype, jax.numpy.inexact):
        return _cut(merged, "a comparison" if jax.numpy.issubdtype(dtype, bool) else "an integer")
    return merged


def _cut(taint: _Taint, by: str) -> _Taint:
    cuts = taint.cuts | {(taint.smooth, by)} if taint.smooth else taint.cuts
    return _Taint(taint.used, 0, cuts)


def _join(taints: Sequence[_Taint]) -> _Taint:
    out = _CLEAN
    for taint in taints:
        out = out | taint
    return out


# A loop may carry a leaf's influence from one variable to the next in each turn: the taint of its
# carry is what a turn no longer enlarges.
def _to_fixed_point(
    body: Callable[[list[_Taint]], list[_Taint]], carry: list[_Taint]
) -> list[_Taint]:
    while True:
        outputs = body(carry)
        grown = [a | b for a, b in zip(carry, outputs[: len(carry)], strict=True)]
        if grown == list(carry):
            return [*grown, *outputs[len(carry) :]]
        carry = grown
