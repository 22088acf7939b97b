"""The condition F = 0 that training brings about: of a stationary point, or of a fixed point."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad.data.batches import Minibatches, last_batch, mix_bits, num_batches, num_steps
from hypergrad.data.keys import SOLVER
from hypergrad.estimators.base import Window
from hypergrad.linear.base import FreshProducts, MatVec, each_product
from hypergrad.problem.problem import Problem
from hypergrad.problem.rules import declared_rules
from hypergrad.problem.structure import StructureError, keeps
from hypergrad.trees import (
    Batch,
    Hyper,
    InnerState,
    Key,
    Train,
    Tree,
    is_inexact,
    leaf_names,
    path_name,
    widen,
    zeros,
)

Of = Literal["stationary", "fixed_point"]
Batches = Literal["all", "last", "fresh"]
# z, or a vector of its space: inexact arrays of one dtype of at least float32
Vector = list[jax.Array]
Mask = list[jax.Array]  # booleans of its shapes


@dataclasses.dataclass(frozen=True)
class Condition:
    """F(z, hyper), which training brings to 0.

    Attributes:
      problem: what is trained.
      of: "stationary": F is the gradient of the training loss; "fixed_point": minus the update.
      z: where training stands.
      inner_at: puts a z back into the training state.
      batches: leaves `[n, batch, ...]`: F is the mean over them.
      keys: of their steps, `[n]`.
      fresh: `index -> (batch, key)`, further ones for products on batches of their own; or None.
      rules: the functions with a derivative of their own that the training loss calls.
    """

    problem: Problem
    of: Of
    z: Vector
    inner_at: Callable[[Vector], InnerState]
    batches: Batch
    keys: Key
    fresh: Callable[[jax.Array | int], tuple[Batch, Key]] | None
    rules: list[str]

    def __call__(self, z: Vector, hyper: Hyper) -> Vector:
        """F."""
        if self.of == "stationary":
            return self._gradient(z, hyper)
        return self._minus_update(z, hyper)

    def transposed(self, hyper: Hyper) -> tuple[Vector, MatVec]:
        """F at z, and x -> (dF/dz)^T x."""
        if self.of == "stationary" and not self.rules:
            # a Hessian is its own transpose, and forward over reverse is the cheaper product
            return jax.linearize(lambda z: self(z, hyper), self.z)
        value, pull_back = jax.vjp(lambda z: self(z, hyper), self.z)
        return value, lambda x: pull_back(x)[0]

    def fresh_products(self, hyper: Hyper) -> FreshProducts:
        """(dF/dz)^T x, each product on a batch of its own."""

        def at(index: jax.Array | int, x: Vector) -> Vector:
            assert self.fresh is not None
            batches, keys = jax.tree.map(lambda x: x[None], self.fresh(index))
            return dataclasses.replace(self, batches=batches, keys=keys).transposed(hyper)[1](x)

        return FreshProducts(at)

    def moves(self, hyper: Hyper, product: MatVec | None) -> Mask:
        """Which entries of z training moves, and for "stationary" the training loss depends on.

        Frozen parameters, batch statistics, the rows of an embedding that no batch holds: they do
        not answer to `hyper`, and with them the matrix is singular, or that of another problem.
        Without a `product` that may be as it is, and whole leaves are told apart, at no cost.
        """
        batch, key = jax.tree.map(lambda x: x[0], (self.batches, self.keys))
        kept = keeps(self._stepped, self.z, hyper, batch, key)
        if product is None:
            return [jnp.bool_(not still) for still in kept]
        # Along a random direction the derivative of what no batch touches is exactly 0. That of the
        # update alone would not do: in float32 a small learning rate vanishes beside the parameter.
        t = [_scattered(x, seed) for seed, x in enumerate(self.z)]

        def answers(f: Callable[[Vector, Hyper], Vector]) -> Mask:
            if self.rules:  # which may have no forward mode; columns tell as well as rows
                return [d != 0 for d in jax.vjp(lambda z: f(z, hyper), self.z)[1](t)[0]]
            return [d != 0 for d in jax.jvp(lambda z: f(z, hyper), (self.z,), (t,))[1]]

        if self.fresh is not None:  # one batch does not tell what others touch
            used = [jnp.bool_(True)] * len(t)
        elif self.of == "stationary":
            used = [d != 0 for d in product(t)]
        else:
            used, moved = answers(self._gradient), answers(self._minus_update)
            used = [a | b for a, b in zip(used, moved, strict=True)]
        return [(not still) & flag for still, flag in zip(kept, used, strict=True)]

    def _gradient(self, z: Vector, hyper: Hyper) -> Vector:
        def gradient(batch: Batch, key: Key) -> Vector:
            loss = self.problem.train_loss
            return jax.grad(lambda z: loss(self.inner_at(z).params, hyper, batch, key))(z)

        return self._mean(gradient)

    def _minus_update(self, z: Vector, hyper: Hyper) -> Vector:
        mean = self._mean(lambda batch, key: self._stepped(z, hyper, batch, key))
        return jax.tree.map(jnp.subtract, z, mean)

    def _stepped(self, z: Vector, hyper: Hyper, batch: Batch, key: Key) -> Vector:
        return vector_of(self.problem.step(self.inner_at(z), hyper, batch, key), self.of, 0)[0]

    def _mean(self, f: Callable[[Batch, Key], Vector]) -> Vector:
        examples = (self.batches, self.keys)
        if self.keys.shape[0] == 1:
            return f(*jax.tree.map(lambda x: x[0], examples))
        # Summed up on the way: a mean over n stacked vectors would hold n of them.
        nothing = zeros(self.z)
        add = lambda total, x: (jax.tree.map(jnp.add, total, f(*x)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, nothing, examples)
        return jax.tree.map(lambda x: x / self.keys.shape[0], total)


def condition_of(
    of: Of,
    batches: Batches,
    window: Window,
    hyper: Hyper,
    inner: InnerState,
    offset: jax.typing.ArrayLike,
) -> Condition:
    """F around the training state `inner`, on the batches that `Implicit` takes it on."""
    z, inner_at = vector_of(inner, of, offset)
    taken, keys = _examples(window.train, window.key, offset, batches)
    fresh = None
    if batches == "fresh":
        fresh = lambda i: _fresh(window.train, window.key, offset, i + 1)  # noqa: E731
    batch, key = jax.tree.map(lambda x: x[0], (taken, keys))
    rules = declared_rules(window.problem.train_loss, inner.params, hyper, batch, key)
    return Condition(window.problem, of, z, inner_at, taken, keys, fresh, rules)


def vector_of(
    inner: InnerState, of: Of, offset: jax.typing.ArrayLike
) -> tuple[Vector, Callable[[Vector], InnerState]]:
    """Z of a training state, and the function that puts a z back into it."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(inner)
    chosen = [
        is_inexact(leaf) and (of == "fixed_point" or path_name(path[:1]) == "params")
        for path, leaf in paths_and_leaves
    ]
    # At the count of the window's start: a tuner may let training stand still after it.
    leaves = [
        jnp.asarray(offset) if path_name(path[:1]) == "step" else leaf
        for path, leaf in paths_and_leaves
    ]
    floats = [leaf for flag, leaf in zip(chosen, leaves, strict=True) if flag]
    dtype = jnp.result_type(jnp.float32, *floats)

    def inner_at(z: Vector) -> InnerState:
        supply = iter(z)
        return treedef.unflatten(
            next(supply).astype(jnp.result_type(leaf)) if flag else leaf
            for flag, leaf in zip(chosen, leaves, strict=True)
        )

    return [jnp.asarray(f, dtype) for f in floats], inner_at


def _examples(
    train: Train, key: Key, offset: jax.typing.ArrayLike, batches: Batches
) -> tuple[Batch, Key]:
    """Batches with a leading axis [n], and the keys of their steps [n]."""
    steps = num_steps(train)
    if batches == "fresh":
        return jax.tree.map(lambda x: x[None], _fresh(train, key, offset, 0))
    if batches == "last":
        data = jax.tree.map(lambda x: jnp.asarray(x)[None], last_batch(train, key, offset))
        return data, jax.random.fold_in(key, offset + steps - 1)[None]
    count = num_batches(train)
    data = train
    if isinstance(train, Minibatches):
        size = jax.tree.leaves(train.arrays)[0].shape[0]
        rows = (np.arange(count * train.batch_size) % size).reshape(count, -1)
        data = jax.tree.map(lambda x: jnp.asarray(x)[rows], train.arrays)
    return data, jax.vmap(lambda t: jax.random.fold_in(key, offset + t))(jnp.arange(count))


def _fresh(
    train: Train, key: Key, offset: jax.typing.ArrayLike, index: jax.Array | int
) -> tuple[Batch, Key]:
    """A random batch and a key for it, independent of all others."""
    # Drawn without repeats, products of two would not have the mean's product for their mean.
    own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, SOLVER), offset), index)
    if isinstance(train, Minibatches):
        return train.batch(0, own), own
    i = jax.random.randint(own, (), 0, num_steps(train))
    return jax.tree.map(lambda x: jnp.asarray(x)[i], train), own


def moments_of(inner: InnerState) -> Vector:
    """The roots of Adam's second moments for z under "stationary", with a mean of 1.

    Raises:
      ValueError: the optimiser keeps none.
    """
    second = optax.tree_utils.tree_get_all_with_path(getattr(inner, "opt_state", ()), "nu")
    known = [
        (leaf_path, moment)
        for _, tree in second
        for leaf_path, moment in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    ]
    found = []
    for name, leaf in zip(leaf_names(inner.params), jax.tree.leaves(inner.params), strict=True):
        if is_inexact(leaf):
            ends = [m for end, m in known if name.endswith(end) and m.shape == jnp.shape(leaf)]
            found.append(ends[0] if ends else None)
    if not any(m is not None for m in found):
        raise StructureError(
            "solver.diagonal='adam' reads the second moments of an Adam-like optimiser, and this "
            "one keeps none for the parameters. Use diagonal='probes'."
        )
    return _with_mean_one(found, vector_of(inner, "stationary", 0)[0])


def _with_mean_one(moments: list[jax.Array | None], z: Vector) -> Vector:
    roots = [None if m is None else jnp.sqrt(widen(m)) for m in moments]
    held = [m for m in roots if m is not None]
    mean = sum(jnp.sum(m) for m in held) / sum(m.size for m in held)
    # before the first step all are 0, and D the identity
    mean = jnp.where(mean == 0, 1, mean)
    return [
        jnp.ones_like(x) if m is None else jnp.where(mean == 0, 1, m / mean).astype(x.dtype)
        for m, x in zip(roots, z, strict=True)
    ]


def only(moves: Mask, x: Vector) -> Vector:
    """X with zeros where training moves nothing."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, 0), moves, x)


def regular(product: MatVec, moves: Mask, krylov: bool) -> MatVec:
    """`product` on the entries that training moves, the identity elsewhere: a regular matrix."""

    def on_moving(product: MatVec) -> MatVec:
        def matvec(x: Vector) -> Vector:
            # Combinations of v and of products are 0 elsewhere by themselves, which spares a Krylov
            # solver a pass over all parameters.
            inside = product(x if krylov else only(moves, x))
            return jax.tree.map(lambda m, y, x: jnp.where(m, y, x), moves, inside, x)

        return matvec

    return each_product(product, on_moving)


def _scattered(like: jax.Array, seed: int) -> jax.Array:
    """Numbers in [0.5, 1.5] without pattern; threefry's would take several times their memory."""
    bits = mix_bits(jnp.arange(like.size, dtype=jnp.uint32), seed)
    return (0.5 + bits.astype(like.dtype) / 2.0**32).reshape(like.shape)


def total_of(tree: Tree) -> jax.Array:
    """The sum over all inexact leaves."""
    floats = [x for x in jax.tree.leaves(tree) if is_inexact(x)]
    return sum((jnp.sum(x) for x in floats), start=jnp.zeros(()))
