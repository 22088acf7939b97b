"""Is training smooth in its hyperparameters? Three runs tell, before any is differentiated."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.checks import WrongTypeError, numbers, random_key
from hypergrad.data.keys import DIRECTION
from hypergrad.problem.eager import compiled_for_each, in_trace
from hypergrad.problem.mistakes import refuse_no_problem
from hypergrad.problem.problem import Problem, judged_params, rollout
from hypergrad.problem.structure import naming_missing
from hypergrad.trees import (
    Hyper,
    Key,
    Leaf,
    Params,
    Scalar,
    Train,
    all_finite,
    is_inexact,
    is_key,
    leaf_names,
    norm,
    split_inexact,
    strong,
    widen,
)

# Of 1 for a straight line and about 0 for chance: below, hypergradients predicted little of what
# retraining did (docs/metasmoothness.md has the settings that it was chosen on and checked on).
SMOOTH_ABOVE = 0.8
# Of what the direction changes: two equal runs that lie further apart are no experiment.
_MOST_NOISE = 0.1

REMEDIES = (
    "smooth activations: tanh, gelu or softplus in place of relu",
    "normalisation (layer, group or batch norm) in front of activations",
    "average pooling in place of maximum pooling",
    "a smaller scale of the network's outputs (divide the logits) and of its start",
    "a larger eps_root (1e-6 and up) in Adam and its kin, whose first steps are nearly signs",
    "larger batches, and a warm-up of the learning rate or a lower one",
)


class Metasmoothness(NamedTuple):
    """What `metasmoothness` found: `print` it for a sentence and the remedies.

    Attributes:
      value: in [-1, 1]; 1 where all weights move on along a line, about 0 by chance.
      verdict: "smooth", or "rough": a hypergradient may be exact there and predicts little.
      remedies: what makes training smoother; empty where it is smooth.
      noise: how far two runs of the same lie apart, as a share of what the direction changes: 0
        where training is deterministic.
    """

    value: float
    verdict: str
    remedies: tuple[str, ...]
    noise: float

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        says = (
            "hypergradients of whole runs can predict what retraining does"
            if self.verdict == "smooth"
            else "a hypergradient is a slope of noise here, and predicts little of what retraining "
            "does. What helped others:"
        )
        lines = [f"metasmoothness {self.value:.3f}, {self.verdict}: {says}", *self.remedies]
        if self.noise > 0:
            share = f"{self.noise:.1%} of what the direction changes"
            lines.append(f"two equal runs differ, by {share}")
        return "\n  - ".join(lines)


def metasmoothness(
    problem: Problem,
    hyper: Hyper,
    train: Train,
    key: Key,
    direction: Hyper | None = None,
) -> Metasmoothness:
    """Whether trained weights move along a line as `hyper` does: three runs, and no gradient.

    With trained weights t0, t1, t2 under hyper - direction, hyper and hyper + direction, the value
    is the sum of sign(t1 - t0) sign(t2 - t1) |t2 - t0| over the sum of |t2 - t0|. Where it is low,
    an exact hypergradient of the whole run predicts nothing at this distance.

    Args:
      problem: what is trained.
      hyper: the point, in raw units.
      train: K batches, leaves `[K, batch, ...]`, or a `Minibatches`.
      key: randomness of the runs, and of the direction.
      direction: like `hyper`, how far each number moves to either side. None: by a tenth of its
        leaf's root mean square, .01 where that is 0, with random signs. It should be what you want
        to predict: a data weight that moves by a tenth tells of leaving examples out.

    Cost: three runs from fresh starts, and one more that sees whether the same run comes out twice;
    one compilation. Not jit-able.

    Raises:
      ValueError: a run that is not finite, that no number of `direction` changes, or that comes out
        differently when it is repeated; a direction of another structure than `hyper`.

    Source: Engstrom et al. 2025, "Optimizing ML training with metagradient descent", 2503.13751 (at
    hyper, +h and +2h there; around hyper here).

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean(hyper["weight"] * (w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(0.1))
    >>> weights = {"weight": jnp.ones(3)}
    >>> metasmoothness(problem, weights, jnp.arange(15.0).reshape(5, 3), jax.random.key(0)).verdict
    'smooth'
    """
    refuse_no_problem(problem)
    random_key("key", key)
    refuse_trace("metasmoothness")
    refuse_streams(train)
    hyper = checked_floats("hyper", hyper)
    given = direction is not None
    direction = _like(direction, hyper) if given else random_direction(hyper, tenth, key)
    low, high = (jax.tree.map(lambda h, d, s=s: h + s * d, hyper, direction) for s in (-1, 1))
    with naming_missing(hyper):
        _require_one_program(problem, hyper, train, key)
        train_at = compiled_for_each(problem, "metasmoothness", _trained)
        places = {"hyper": hyper, "hyper - direction": low, "hyper + direction": high}
        here, *ends = (train_at(place, train, key) for place in places.values())
        again = train_at(hyper, train, key)
    for name, params in zip(places, (here, *ends), strict=True):
        if not bool(all_finite(params)):
            raise ValueError(
                f"Training is not finite at {name}: give a direction (like hyper) that is short "
                "enough to train with on either side, or a hyper that trains."
            )
    value, noise = float(sign_agreement(ends[0], here, ends[1])), _noise(here, again, ends)
    if noise > _MOST_NOISE:
        raise ValueError(
            f"Training is not deterministic: two runs with the same arguments differ by {noise:.0%}"
            " of what direction changes. Let data order and noise come from `train` and `key` "
            "alone, not from a loader, a callback or NumPy's generator."
        )
    if np.isnan(value):
        raise ValueError(
            "direction changes no trained weight: training does not see hyper there. Give a longer "
            "direction, and hyperparameters that act through training."
        )
    return judged_smoothness(value, noise)


def judged_smoothness(value: float, noise: float = 0.0) -> Metasmoothness:
    """A value with its verdict."""
    smooth = value >= SMOOTH_ABOVE
    return Metasmoothness(value, "smooth" if smooth else "rough", () if smooth else REMEDIES, noise)


def sign_agreement(low: Params, here: Params, high: Params) -> Scalar:
    """The value of `metasmoothness` of three trained parameters; NaN where nothing moved."""
    triples = zip(*(map(widen, split_inexact(p)[0]) for p in (low, here, high)), strict=True)
    parts = [
        (jnp.sum(jnp.sign(b - a) * jnp.sign(c - b) * jnp.abs(c - a)), jnp.sum(jnp.abs(c - a)))
        for a, b, c in triples
    ]
    agreeing, moved = (sum(part) for part in zip(*parts, strict=True))
    return agreeing / moved


def smoothness_around(
    trained: Callable[[Hyper], Params],
    at: Hyper,
    direction: Hyper,
    project: Callable[[Hyper], Hyper] = lambda at: at,
) -> float:
    """The value at `at`, moved into the box that `project` keeps to, so far that both ends fit."""
    low, high = (project(jax.tree.map(lambda x, d, s=s: x + s * d, at, direction)) for s in (-1, 1))
    middle = jax.tree.map(lambda a, b: (a + b) / 2, low, high)
    return float(sign_agreement(trained(low), trained(middle), trained(high)))


def random_direction(like: Hyper, sizes: Callable[[jax.Array], Leaf], key: Key) -> Hyper:
    """Random signs times the size that `sizes` gives each leaf."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.fold_in(key, DIRECTION), len(leaves))
    return treedef.unflatten(
        [
            sizes(x) * jax.random.rademacher(k, x.shape, x.dtype)
            for x, k in zip(leaves, keys, strict=True)
        ]
    )


def refuse_trace(name: str) -> None:
    """What looks at values cannot be compiled."""
    if in_trace():
        raise ValueError(
            f"{name} is called inside of jax.jit or another transformation, and has to look at "
            "values: call it outside; what it runs is compiled there too."
        )


def refuse_streams(train: Train) -> None:
    """What hands out batches may do so in another order at the next run."""
    # A loader first: JAX warns of iterators in trees.
    leaves = [train] if hasattr(train, "__next__") else jax.tree.leaves(train)
    for leaf in leaves:
        if not hasattr(leaf, "dtype") and hasattr(leaf, "__iter__"):
            raise WrongTypeError(
                f"train is or holds a {type(leaf).__name__}, which may hand out other data at each "
                "run: give arrays with a leading axis of steps, or hypergrad.Minibatches."
            )


def checked_floats(name: str, tree: Hyper) -> Hyper:
    """`tree` as strong arrays of floats, at least one."""
    leaves = jax.tree.leaves(tree)
    for leaf_name, leaf in zip(leaf_names(tree), leaves, strict=True):
        where = f"{name}[{leaf_name!r}]"
        numbers(where, leaf)
        if not is_inexact(leaf):
            raise WrongTypeError(f"{where} holds integers: give floats, which can move a little.")
    if not leaves:
        raise WrongTypeError(f"{name} is {tree!r} and holds no number: give a tree of floats.")
    return strong(tree)


def _trained(problem: Problem, hyper: Hyper, train: Train, key: Key) -> Params:
    inner = rollout(problem, hyper, problem.init(hyper, key), train, key)
    return judged_params(problem, inner)


def tenth(leaf: jax.Array) -> jax.Array:
    """A tenth of a leaf's root mean square, .01 where that is 0."""
    size = jnp.sqrt(jnp.mean(leaf**2))
    return jnp.where(size > 0, 0.1 * size, 0.01)


def _like(direction: Hyper, hyper: Hyper) -> Hyper:
    direction = checked_floats("direction", direction)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (direction, hyper)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"direction has the shapes {shapes[0]}, but hyper has {shapes[1]}: give a tree like "
            "hyper, how far each of its numbers moves."
        )
    if not bool(all_finite(direction)) or not bool(norm(direction) > 0):
        raise ValueError(
            "direction is 0 or not finite: give how far each number of hyper moves, a tenth of it "
            "or so."
        )
    return direction


def _noise(here: Params, again: Params, ends: list[Params]) -> float:
    apart, moved = (
        float(norm(jax.tree.map(jnp.subtract, *map(_floats, pair))))
        for pair in ((here, again), (ends[1], ends[0]))
    )
    return apart / moved if apart else 0.0


def _floats(params: Params) -> list[jax.Array]:
    return [widen(x) for x in split_inexact(params)[0]]


def _require_one_program(problem: Problem, hyper: Hyper, train: Train, key: Key) -> None:
    """Traced twice, a run is the same program, unless Python's or NumPy's dice stand in it."""
    traces = []
    for _ in range(2):
        # A new function each time: JAX keeps the traces of those it knows.
        traced = jax.make_jaxpr(lambda *args: _trained(problem, *args))(hyper, train, key)
        text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))
        traces.append((text, [c for c in traced.consts if not is_key(c)]))
    (text, consts), (other_text, other_consts) = traces
    alike = len(consts) == len(other_consts) and all(
        a is b or np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(consts, other_consts, strict=True)
    )
    if text != other_text or not alike:
        raise ValueError(
            "Training is not deterministic: traced twice, it is two different programs, so a "
            "function of the problem draws its own random numbers. Let data order and noise come "
            "from `train` and `key` alone."
        )
