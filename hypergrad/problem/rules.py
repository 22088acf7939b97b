"""A function as its program, and which functions with a derivative of their own it calls.

A declared rule need not be the derivative of the value (gradient reversal, clipping in the backward
pass, straight-through estimators). The gradient of a loss that calls one need not be the gradient
of anything, so its derivative need not be symmetric.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

# Their custom_jvp rules are derivatives, written down for their digits or their speed alone.
_TRUSTED = tuple(str(Path(str(package.__file__)).parent / "_")[:-1] for package in (jax, optax))


class Traced:
    """A function as its program, whose Python runs once, however often it is differentiated.

    Called with arguments of the shapes that it was traced for; of other dtypes (mixed mode widens
    bfloat16 parameters) it is the function itself.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        self.program: Any = closed.jaxpr
        self.consts, self._out = closed.consts, jax.tree.structure(shapes)
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        pairs = zip(jax.tree.leaves(args), self.program.invars, strict=True)
        if any(jax.typeof(x).dtype != v.aval.dtype for x, v in pairs):
            return self._function(*args)
        return self.under(self.consts, *args)

    def under(self, consts: Sequence[Any], *args: Any) -> Any:
        """The same where what the function closes over are these `consts`."""
        out = jax.core.eval_jaxpr(self.program, consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(self._out, out)

    def uses(self, primitives: Collection[str]) -> bool:
        """Whether one of these operations makes an array (not a number)."""
        return _uses(self.program, primitives)


def _uses(program: Any, primitives: Collection[str]) -> bool:
    return any(
        (eqn.primitive.name in primitives and eqn.outvars[0].aval.shape != ())
        or any(_uses(inner, primitives) for inner in inner_programs(eqn.params))
        for eqn in program.eqns
    )


def declared_rules(function: Callable[..., Any], *args: Any, backward: bool = False) -> list[str]:
    """The names of the functions with a rule of their own that `function(*args)` calls.

    Those with a `custom_vjp` or a `linear_call`, at any depth of the traced program (scans,
    branches, calls), and unless only `backward` rules are asked for, those with a `custom_jvp` that
    is not JAX's or optax's own. Traces `function` once; runs nothing.

    >>> import jax
    >>> reverse = jax.custom_vjp(lambda x: x)
    >>> reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    >>> declared_rules(lambda x: jax.checkpoint(reverse)(jax.nn.relu(x)), 1.0)
    ['<lambda>']
    """
    return rules_within(jax.make_jaxpr(function)(*args).jaxpr, backward)


def rules_within(program: Any, backward: bool = False) -> list[str]:
    """The same of a program that is traced already."""
    return list(dict.fromkeys(_rules(program, backward)))


def function_name(jaxpr: Any) -> str:
    """The name of the function that a call's program was traced from."""
    # "name at file:line", or the bare name, as JAX records it for error messages
    return str(jaxpr.debug_info.func_src_info).split(" at ")[0].rsplit(".", 1)[-1]


def _rules(jaxpr: Any, backward: bool) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, list(inner_programs(eqn.params))
        if name.startswith(("custom_vjp_call", "linear_call")) or (
            name == "custom_jvp_call" and not (backward or _is_trusted(inner[0]))
        ):
            yield function_name(inner[0])
        for program in inner:
            yield from _rules(program, backward)


def inner_programs(params: dict[str, Any]) -> Iterator[Any]:
    """Those of the calls, loops and branches that an equation of these parameters is."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            program = getattr(item, "jaxpr", item)  # of a closed one
            if hasattr(program, "eqns"):
                yield program


def _is_trusted(jaxpr: Any) -> bool:
    source = str(jaxpr.debug_info.func_src_info).partition(" at ")[2]
    return source.startswith(_TRUSTED)
