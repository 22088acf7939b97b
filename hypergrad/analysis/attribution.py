"""Derivatives of many test losses in the hyperparameters of one training run."""

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.analysis.causes import cause_of_nan
from hypergrad.analysis.smoothness import (
    checked_floats,
    metasmoothness,
    refuse_streams,
    refuse_trace,
)
from hypergrad.checks import WrongTypeError, flag, integer, random_key
from hypergrad.data.contents import refuse_text
from hypergrad.estimators.base import Estimator, Window, checked_estimate
from hypergrad.estimators.hypergradient import as_estimator
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.problem.eager import compiled_for_each
from hypergrad.problem.mistakes import refuse_no_problem
from hypergrad.problem.problem import Problem
from hypergrad.trees import Batch, Hyper, Key, Train, leaf_names


def attribution(
    problem: Problem,
    hyper: Hyper,
    train: Train,
    tests: Iterable[Batch],
    key: Key,
    estimator: Estimator = Unrolled(),  # noqa: B008  frozen, so safe to share
    *,
    chunk: int = 1,
    check: bool = True,
) -> Hyper:
    """The derivative of each test loss in `hyper`, through one whole training run.

    With one weight per training example, `{"weight": ones}`, entry [i, j] predicts, to first order,
    how test loss i changes when example j is left out: by minus itself. Negative entries belong to
    examples that help.

    Args:
      problem: what is trained; its `valid_loss` is the test loss.
      hyper: the point, raw values; one weight per example, or anything else.
      train: K batches, leaves `[K, batch, ...]`, or a `Minibatches`, whose arrays then hold
        the index of each example for the loss to look up its weight.
      tests: batches for `valid_loss`, one per test loss: a list, or any iterable that makes them
        one after another, so that a test set need not fit memory.
      key: randomness of the run; the start is `problem.init(hyper, key)`.
      estimator: how; the default is exact. `Unrolled(checkpoint="sqrt")` for long runs.
      chunk: test losses at once, which share the run's way forward. More are faster where the
        device has room; on a CPU convolutions lose by it.
      check: whether to measure `metasmoothness` first, which warns where it is rough.

    Returns NumPy arrays: the structure of `hyper`, leaves `[tests, ...]`.

    Cost per test loss: a hypergradient's, 3 to 5 runs (of which `chunk` test losses share 1); for
    the check four more runs in all. Memory: that of `chunk` hypergradients. Not jit-able.

    Raises:
      ValueError: a test loss or a derivative that is not finite (with the step and the likely
        cause), no tests, a run that is not deterministic (where `check` is on), and what
        `hypergradient` refuses.

    Warns:
      UserWarning: metasmoothness is so low that the derivatives will predict little.

    Source: Ilyas and Engstrom 2025, "MAGIC: near-optimal data attribution for deep learning".

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> def weighted(w, hyper, batch, key):
    ...     x, index = batch
    ...     return jnp.mean(hyper["weight"][index] * (w - x) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), weighted, loss, lambda h: optax.sgd(0.1))
    >>> train = hg.Minibatches((jnp.array([1.0, 2.0, 9.0]), jnp.arange(3)), 3, 20)
    >>> tests = [jnp.array([1.0]), jnp.array([9.0])]
    >>> found = attribution(problem, {"weight": jnp.ones(3)}, train, tests, jax.random.key(0))
    >>> found["weight"].argmin(1)  # the example that helps most
    array([0, 2])
    """
    refuse_no_problem(problem)
    random_key("key", key)
    refuse_trace("attribution")
    estimator = as_estimator(estimator)
    chunk = integer("chunk", chunk)
    flag("check", check)
    refuse_streams(train)
    hyper = checked_floats("hyper", hyper)
    chunks = _chunks(tests, chunk)
    if check:
        _warn_where_rough(problem, hyper, train, key)
    function = functools.partial(_derivatives, estimator)
    derivatives = compiled_for_each(problem, ("attribution", estimator), function)
    parts = []
    for first, batches in chunks:
        losses, part = jax.tree.map(np.asarray, derivatives(hyper, train, batches, key))
        _require_finite(problem, hyper, train, batches, key, losses, part, first)
        parts.append(part)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _derivatives(
    estimator: Estimator, problem: Problem, hyper: Hyper, train: Train, tests: Batch, key: Key
) -> tuple[jax.Array, Hyper]:
    def derivative(test: Batch) -> tuple[jax.Array, Hyper]:
        window = Window(problem, None, train, test, key)
        state = estimator.init(window, hyper)
        found = checked_estimate(estimator, window, hyper, state)[0]
        return found.loss, found.grad

    # The run forward does not depend on the test loss, so that vmap makes it once.
    return jax.vmap(derivative)(tests)


# Iterable, but not over batches.
_NO_LISTS = (str, dict, np.ndarray, jax.Array)


def _chunks(tests: Iterable[Batch], size: int) -> Iterator[tuple[int, Batch]]:
    """(index of the first, up to `size` tests stacked), as long as their shapes are the same."""
    one = isinstance(tests, tuple) and any(hasattr(item, "dtype") for item in tests)
    if one or not isinstance(tests, Iterable) or isinstance(tests, _NO_LISTS):
        raise WrongTypeError(
            f"tests is a {type(tests).__name__}{' of arrays, which is one batch' * one}: give a "
            "list of batches, one per test loss, such as [x[i : i + 1] for i in range(len(x))]."
        )
    stacked = _stacked(tests, size)
    first = next(stacked, None)
    if first is None:
        raise ValueError("tests is empty: give at least one batch.")
    return itertools.chain([first], stacked)


def _stacked(tests: Iterable[Batch], size: int) -> Iterator[tuple[int, Batch]]:
    alike = itertools.groupby(enumerate(tests), lambda numbered: _shapes(*numbered))
    for _, group in alike:
        while pairs := list(itertools.islice(group, size)):
            batches = [test for _, test in pairs]
            yield pairs[0][0], jax.tree.map(lambda *x: jnp.stack(x), *batches)


def _shapes(i: int, tree: Batch) -> str:
    refuse_text(f"tests[{i}]", tree)
    return str(jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree))


def _warn_where_rough(problem: Problem, hyper: Hyper, train: Train, key: Key) -> None:
    found = metasmoothness(problem, hyper, train, key)
    if found.verdict != "smooth":
        warnings.warn(f"attribution: {found}", stacklevel=3)


def _require_finite(
    problem: Problem,
    hyper: Hyper,
    train: Train,
    tests: Batch,
    key: Key,
    losses: np.ndarray,
    part: Hyper,
    first: int,
) -> None:
    for i, loss in enumerate(losses):
        bad = [
            name
            for name, leaf in zip(leaf_names(part), jax.tree.leaves(part), strict=True)
            if not np.isfinite(leaf[i]).all()
        ]
        if bad or not np.isfinite(loss):
            test = jax.tree.map(lambda x, i=i: x[i], tests)
            cause = cause_of_nan(Window(problem, None, train, test, key), hyper, bad)
            raise ValueError(f"tests[{first + i}]: {cause}")
