"""Count the files that a call enters: how far a reader walks to follow it.

Run: `python -m benchmarks.rooms` (ten seconds). Files of `hypergrad` in which a function runs while
the call is traced for the first time, `trees` aside; imports do not count.
"""

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg

PACKAGE = os.path.dirname(hg.__file__)
# Files visited, at most.
TARGETS = {"one hypergradient": 7, "one alternating update": 10, "one sweep trial": 22}

SPACE = hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log")})
DATA = hg.Splits(jnp.ones((20, 3)), jnp.ones((4, 3)), jnp.ones((4, 3)))
TRAIN, KEY = hg.Minibatches(DATA.train, 4, 5), jax.random.key(0)


def problem(choices: dict[str, Any]) -> hg.Problem:
    def loss(w: jax.Array, hyper: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean((w - batch) ** 2)

    return hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda hyper: optax.sgd(hyper["rate"]))


def files_entered(call: Callable[[], Any], begin: str = "", end: str = "") -> list[str]:
    """The files of hypergrad, by their paths in it, in which a function runs during `call`.

    From the first function called `begin` on, up to the first call after it of one named `end`.
    """
    entered, begun, ended = set(), not begin, False

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal begun, ended
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        begun = begun or code.co_name == begin
        ended = ended or (begun and code.co_name == end)
        # A module or a class that is loaded is no step of the call.
        if begun and not ended and code.co_flags & inspect.CO_OPTIMIZED:
            entered.add(os.path.relpath(code.co_filename, PACKAGE))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(entered - {"trees.py", "__init__.py"})


def hypergradient() -> list[str]:
    """From `hg.hypergradient` to the estimate."""
    made = problem({})
    inner = made.init({"rate": 0.1}, KEY)
    arguments = ({"rate": 0.1}, inner, TRAIN, DATA.valid, KEY)
    return files_entered(lambda: hg.hypergradient(made, *arguments))


def update() -> list[str]:
    """From `tuner.update` to the next state."""
    tuner = hg.alternating(problem({}), SPACE)
    state = tuner.init({"rate": 1e-3}, KEY)
    return files_entered(lambda: jax.jit(tuner.update)(state, TRAIN, DATA.valid))


def trial() -> list[str]:
    """From asking to telling, of the first trial of a sweep, once its study is open."""
    space = hg.Space({**SPACE, "width": hg.Categorical([1, 2])})
    settings = {"num_trials": 1, "num_steps": 20, "batch_size": 4, "progress": False}
    refine = hg.Refine(steps_per_update=5)
    return files_entered(
        lambda: hg.sweep(problem, space, DATA, refine=refine, **settings),
        begin="_ask_or_wait",
        end="_look_back",
    )


def main(quick: bool = False) -> dict[str, int]:
    """Prints each call's files; returns how many they are."""
    counts = {}
    for (name, target), call in zip(TARGETS.items(), (hypergradient, update, trial), strict=True):
        files = call()
        counts[name] = len(files)
        checked = ", one of them for its arguments alone (checks.py)" * ("checks.py" in files)
        print(f"{name}: {len(files)} files{checked} (target {target})\n  {' '.join(files)}")
    return counts


if __name__ == "__main__":
    main()
