"""Mistakes in functions of the user's, said in one sentence with the line that they stand in."""

import contextlib
import linecache
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np

from hypergrad.checks import WrongTypeError, having

_OTHERS = {"absl", "chex", "equinox", "flax", "haiku", "hypergrad", "jax", "jaxlib", "jmp", "numpy"}
_OTHERS |= {"optax", "scipy", "sklearn"}
_STANDARD = sysconfig.get_paths()["stdlib"]

# What stands in for an optax schedule whose Python code compares its arguments. Those that call
# another one, which is where the comparison stands, come first.
_SCHEDULES = {
    "sgdr_schedule": "optax.join_schedules([hypergrad.warmup_cosine(...), ...], boundaries)",
    "warmup_exponential_decay_schedule": "optax.join_schedules([hypergrad.piecewise_linear([start, "
    "peak], warmup), hypergrad.exponential_decay(peak, rate, steps)], [warmup])",
    "warmup_cosine_decay_schedule": "hypergrad.warmup_cosine(peak, warmup_steps, decay_steps, "
    "floor, start)",
    "warmup_constant_schedule": "hypergrad.piecewise_linear([start, peak], warmup_steps)",
    "linear_onecycle_schedule": "hypergrad.piecewise_linear(values, positions=)",
    "cosine_onecycle_schedule": "hypergrad.piecewise_cosine(values, positions=)",
    "piecewise_interpolate_schedule": "hypergrad.piecewise_linear or piecewise_cosine(values, "
    "positions=)",
    "piecewise_constant_schedule": "hypergrad.piecewise_constant(values, steps_each)",
    "cosine_decay_schedule": "hypergrad.warmup_cosine(peak, 0, decay_steps, floor)",
    "exponential_decay": "hypergrad.exponential_decay(initial, rate, transition_steps)",
    "linear_schedule": "hypergrad.piecewise_linear([first, last], num_steps)",
    "polynomial_schedule": "hypergrad.polynomial_decay(initial, final, power, num_steps)",
}

_BRANCH = (
    "branches in Python on a traced value",
    "use jnp.where(condition, a, b), jnp.minimum or jnp.maximum; a choice that changes the program "
    "is a hypergrad.Categorical of a sweep",
)
_ARRAY = (
    "hands a traced value to NumPy",
    "use jax.numpy in place of numpy, and keep what only reports (scikit-learn's scores) out of it",
)
_MASK = ("indexes with a traced mask", "use jnp.where(mask, x, 0), whose shape is known")
_TEXT = ("formats a traced value as a number", "use jax.debug.print to look at it")
_NUMBER = (
    "makes a Python number of a traced value",
    "leave out float(), int(), .item() and the functions of math, as jax.numpy computes with "
    "traced values; a number that fixes shapes or loops has no gradient: make it a hypergrad.Int "
    "of a sweep, or a constant",
)
_TRACED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
# Of the plain TypeErrors that a traced value may cause: as a shape, in range(), in a format, as a
# dict's key.
_SIGNS = (
    "Shapes must be 1D sequences of concrete values",
    "Only integer scalar arrays can be converted to a scalar index",
    "Tracer.__format__",
    "unhashable type: 'DynamicJaxprTracer'",
    "unhashable type: 'JVPTracer'",
    "unhashable type: 'LinearizeTracer'",
    "unhashable type: 'BatchTracer'",
)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns JAX's refusal to make a Python value of a traced one into one that says where and how.

    `what` is the argument whose function is called inside.

    Raises:
      ValueError: names `what`, the line of the user's code and the remedy.
    """
    try:
        yield
    except (*_TRACED, TypeError) as error:
        if not isinstance(error, _TRACED) and not any(sign in str(error) for sign in _SIGNS):
            raise
        raise ValueError(_sentence(what, error)) from error


def metrics_of(metrics: Callable[..., Any] | None, *args: Any) -> dict[str, Any]:
    """What a problem's `metrics` return for `(params, hyper, batch, key)`; empty without any.

    Raises:
      ValueError: they are no dict of scalars.
    """
    if metrics is None:
        return {}
    with explained("metrics"):
        found = metrics(*args)
    if not isinstance(found, Mapping):
        raise WrongTypeError(
            f"metrics returns a {type(found).__name__}: return a dict of scalars, such as "
            "{'accuracy': jnp.mean(hits)}."
        )
    for name, value in found.items():
        if jax.tree.structure(value) != jax.tree.structure(0) or np.ndim(value):
            what = f"shape {np.shape(value)}" if hasattr(value, "shape") else type(value).__name__
            raise WrongTypeError(
                f"metrics returns {name!r} of {what}: return scalars, such as jnp.mean of it."
            )
    return dict(found)


def _sentence(what: str, error: Exception) -> str:
    frames = list(_frames(error.__traceback__))
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    # flax's Dropout lives in `stochastic`.
    if any(name.startswith("flax.") and name.endswith("stochastic") for name in modules):
        return (
            "flax's Dropout was given a traced rate: it branches on the rate in Python and its "
            "hard mask carries no gradient. Use hypergrad.nn.LinenDropout, hypergrad.nn.NNXDropout "
            "or hypergrad.dropout instead."
        )
    where = _place(frames)
    within = {
        frame.f_code.co_name
        for (frame, _), module in zip(frames, modules, strict=True)
        if module.startswith("optax.")
    }
    called = next((name for name in _SCHEDULES if name in within), None)
    if called is not None:
        return (
            f"{what} gives optax.{called} a traced value{where}, which it compares in Python: use "
            f"{_SCHEDULES[called]}, whose numbers may all be traced."
        )
    kind, remedy = _NUMBER
    if isinstance(error, jax.errors.TracerBoolConversionError):
        kind, remedy = _BRANCH
    elif isinstance(error, jax.errors.TracerArrayConversionError):
        kind, remedy = _ARRAY
    elif "__format__" in str(error):
        kind, remedy = _TEXT
    elif "unhashable" in str(error):
        kind, remedy = "looks a traced value up in Python", _BRANCH[1]
    elif isinstance(error, jax.errors.NonConcreteBooleanIndexError):
        kind, remedy = _MASK
    return f"{what} {kind}{where}. Hyperparameters, parameters and batches are traced: {remedy}."


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _place(frames: list[tuple[FrameType, int]]) -> str:
    """The innermost line of the user's own, if there is one."""
    for frame, line in reversed(frames):
        file = frame.f_code.co_filename
        root = str(frame.f_globals.get("__name__", "")).split(".")[0]
        standard = file.startswith((_STANDARD, "<frozen")) and "site-packages" not in file
        if root not in _OTHERS and not standard:
            source = linecache.getline(file, line, frame.f_globals).strip()
            return f" at {file}:{line}" + (f", `{source}`" if source else "")
    return ""


def raised_by_user(error: Exception) -> bool:
    """Whether the line that raised stands in the user's own code, not in a library's."""
    (frame, _) = list(_frames(error.__traceback__))[-1]
    return str(frame.f_globals.get("__name__", "")).split(".")[0] not in _OTHERS


def refuse_modules(params: Any) -> None:
    """Refuses parameters that are a module or hold what is no array, and names the adapter.

    Raises:
      WrongTypeError: names what stands among the parameters and what to do.
    """
    holds = {"flax.nnx": "nnx_problem", "flax.linen": "linen_problem"}
    # A module of arrays alone is a pytree like any other, unless its library treats it otherwise.
    leaves = jax.tree.leaves(params, is_leaf=lambda x: _family(x) in holds)
    for leaf in leaves:
        family = _family(leaf)
        if family in holds:
            raise WrongTypeError(
                f"init_params returns a {family} module, {type(leaf).__name__}: give it to "
                f"hypergrad.nn.{holds[family]}, which takes its parameters out and puts them back."
            )
    odd = [x for x in leaves if not (hasattr(x, "dtype") or isinstance(x, int | float | complex))]
    if odd and _family(params) == "equinox":
        raise WrongTypeError(
            f"init_params returns an Equinox module, {type(params).__name__}, that holds "
            f"{_shown(odd[0])}: give it to hypergrad.nn.equinox_problem, which trains its arrays "
            "and keeps the rest."
        )
    if odd:
        raise WrongTypeError(
            f"init_params returns {_shown(odd[0])} among the parameters, which is no array: return "
            "arrays alone and close over the rest, or use an adapter of hypergrad.nn "
            "(equinox_problem, nnx_problem, linen_problem)."
        )


def _family(value: Any) -> str:
    """The library whose module `value` is, or nothing."""
    for kind in type(value).__mro__:
        if kind.__name__ == "Module":
            root = kind.__module__.split(".")
            if root[0] == "equinox":
                return "equinox"
            if root[0] == "flax":
                return ".".join(root[:2])
    return ""


def _shown(value: Any) -> str:
    text = getattr(value, "__name__", None) or repr(value)
    return f"{text[:60]!r} ({type(value).__name__})"


def refuse_no_problem(problem: Any) -> None:
    """Raises TypeError for what lacks a problem's functions, as swapped arguments do."""
    parts = ("init", "step", "train_loss", "valid_loss")
    having("problem", problem, parts, "a hypergrad.Problem, as hypergrad.bilevel makes it")
