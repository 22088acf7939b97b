"""What a run is a run of, as JSON: so that a checkpoint of another problem or space is refused."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import numpy as np

from hypergrad.data.contents import as_array
from hypergrad.space.description import fingerprint, first_difference, space_of
from hypergrad.trees import Hyper, Leaf, State, is_key, leaf_names
from hypergrad.tuners.base import Tuner

# Of what is written here and in `checkpoints`; another one is refused.
_FORMAT = 2
# Before, a checkpoint held the lower end, the middle and the upper end of each range, and no space.
_FORMAT_OF_RANGES = 1
_PLAIN = (bool, int, float, str, type(None))
# Starting values of more numbers than this are not compared.
_FEW = 1000


def describe(tuner: Tuner, state: State, steps_per_update: int) -> dict[str, Any]:
    """The run that `fit` starts from `state`: its hyperparameters, space, leaves and key."""
    leaves = jax.tree.leaves(state)
    named = zip(leaf_names(state), leaves, strict=True)
    return {
        "format": _FORMAT,
        "hyper": {
            name: [list(np.shape(leaf)) for leaf in jax.tree.leaves(part)]
            for name, part in jax.eval_shape(tuner.best, state).items()
        },
        "space": None if tuner.space is None else fingerprint(tuner.space),
        "start": _few(tuner.best(state)),
        "first": int(getattr(state, "updates", 0)),
        "steps_per_update": steps_per_update,
        "leaves": [[name, *_kind(leaf)] for name, leaf in named],
        "key": [np.asarray(jax.random.key_data(x)).tolist() for x in leaves if is_key(x)],
    }


def _kind(leaf: Leaf) -> tuple[str, list[int]]:
    return str(leaf.dtype if is_key(leaf) else jax.numpy.result_type(leaf)), [*np.shape(leaf)]


def _few(hyper: Hyper) -> dict[str, list[float]]:
    return {
        name: [float(x) for leaf in jax.tree.leaves(part) for x in np.ravel(np.asarray(leaf))]
        for name, part in hyper.items()
        if sum(np.size(leaf) for leaf in jax.tree.leaves(part)) <= _FEW
    }


def difference(stored: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In words, how the run of a checkpoint differs from this one; None where it does not."""
    if stored.get("format") not in (_FORMAT, _FORMAT_OF_RANGES):
        return "it was written by another version of hypergrad"
    # What a person would name comes first: much of it shows in the leaves as well.
    for name in stored["hyper"]:
        if name not in now["hyper"]:
            return f"it tunes {name!r}, which this space lacks"
    for name, shapes in now["hyper"].items():
        if name not in stored["hyper"]:
            return f"it does not tune {name!r}"
        if stored["hyper"][name] != shapes:
            return f"{name!r} has the shapes {stored['hyper'][name]} there and {shapes} here"
    if now["space"] and (differs := _other_space(stored, now["space"])):
        return differs
    for name, values in now["start"].items():
        there = stored["start"].get(name, values)
        if not np.allclose(there, values, rtol=1e-4, atol=1e-12, equal_nan=True):
            return f"{name!r} starts at {_short(there)} there and at {_short(values)} here"
    for name, words in (("steps_per_update", "K steps per update"), ("first", "first update")):
        if stored[name] != now[name]:
            return f"it has {stored[name]} as its {words}, and this run {now[name]}"
    before = {leaf[0]: leaf[1:] for leaf in stored["leaves"]}
    after = {leaf[0]: leaf[1:] for leaf in now["leaves"]}
    for name in [*before, *after]:
        if before.get(name) != after.get(name):
            there, here = _leaf(before.get(name)), _leaf(after.get(name))
            return f"the state's leaf {name} is {there} there and {here} here"
    if stored["key"] != now["key"]:
        return f"its key is {stored['key']} and this one's {now['key']}"
    for name, leaves_now in now.get("data", {}).items():
        # A checkpoint of an earlier version says nothing of its data.
        there = stored.get("data", {}).get(name) or leaves_now
        for leaf, here in leaves_now.items():
            if there.get(leaf) != here:
                return f"its {name} has {leaf} of {there.get(leaf)}, and this one of {here}"
    return None


def _other_space(stored: dict[str, Any], now: dict[str, Any]) -> str | None:
    if stored["format"] == _FORMAT:
        return stored["space"] and first_difference(stored["space"], now)
    places = {name: np.array([0.0, 0.5, 1.0], np.float32) for name in stored["ranges"] or {}}
    for name, values in space_of(now).from_unit(places).items():
        ends, here = stored["ranges"][name], values.tolist()
        # Another machine's exp may differ in the last digit.
        if not np.allclose(ends, here, rtol=1e-4, atol=1e-12):
            return f"{name!r} ranges over {_short(ends)} there and {_short(here)} here"
    return None


def _leaf(kind: list[Any] | None) -> str:
    return "missing" if kind is None else f"{kind[0]}{kind[1]}"


def _short(values: list[float]) -> str:
    shown = ", ".join(f"{x:.5g}" for x in values[:4])
    return f"[{shown}, ...]" if len(values) > 4 else f"[{shown}]"


def program_of(traced: Any) -> dict[str, Any]:
    """A traced update as JSON: a digest of all it computes, and how often it uses what."""
    digest, used = hashlib.sha256(), Counter[str]()
    for line in _lines(traced.jaxpr):
        digest.update(line.encode())
        used[line.split(" ", 1)[0]] += 1
    for const in traced.jaxpr.consts:
        digest.update(np.asarray(as_array(const)).tobytes())
    # JAX traces the same update otherwise for arrays on a mesh than for those of one device.
    where = jax.default_backend() + (", on a mesh" if used["reshard"] else "")
    return {"jax": f"{jax.__version__} on {where}", "digest": digest.hexdigest(), "used": used}


def digest_of(function: Callable[..., Any], *arguments: Any) -> str:
    """A digest of what a function computes of arguments of these shapes, what it closes over too.

    Under another JAX the same function may have another one.
    """
    return program_of(jax.jit(function).trace(*arguments))["digest"]


def program_difference(stored: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In words, how two updates differ; None where they do not, or by their JAX alone."""
    if stored["jax"] != now["jax"] or stored["digest"] == now["digest"]:
        return None
    for name in sorted({*stored["used"], *now["used"]}):
        there, here = stored["used"].get(name, 0), now["used"].get(name, 0)
        if there != here:
            return f"its update computes {name!r} {there} times and this one {here} times"
    return "its update computes the same operations on other constants or in another order"


def _lines(jaxpr: Any) -> Iterator[str]:
    """What a jaxpr computes, line by line: operations, types, literals and who feeds whom.

    Not its own text, in which functions have addresses and sets have no order.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    names: dict[Any, str] = {}
    for var in [*jaxpr.constvars, *jaxpr.invars]:
        names[var] = str(len(names))
        yield f"in {_type(var.aval)}"

    def name(atom: Any) -> str:
        if hasattr(atom, "val"):
            return f"{np.asarray(atom.val).tolist()!r}:{_type(atom.aval)}"
        return names.get(atom, "")

    for eqn in jaxpr.eqns:
        ins = " ".join(map(name, eqn.invars))
        for var in eqn.outvars:
            names[var] = str(len(names))
        outs = " ".join(_type(var.aval) for var in eqn.outvars)
        # A function that was renamed computes the same.
        settings = [f"{k}={v!r}" for k, v in eqn.params.items() if k != "name" and _is_plain(v)]
        yield f"{eqn.primitive.name} {ins} -> {outs} {sorted(settings)}"
        for _, sub in sorted(_subprograms(eqn.params)):
            yield from _lines(sub)
    yield "out " + " ".join(map(name, jaxpr.outvars))


@cache  # A program has thousands of operations and few types.
def _type(aval: Any) -> str:
    return aval.str_short()


def _is_plain(value: Leaf) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _subprograms(params: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, _PLAIN):
            continue
        for i, item in enumerate(value if isinstance(value, tuple | list) else (value,)):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield f"{key}/{i:04}", item
