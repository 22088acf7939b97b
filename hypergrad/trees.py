"""Pytrees: their names in signatures, the part that can carry a derivative, sums over leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# What a pytree of any structure is, so that a signature says it. A type checker sees `Any`, as
# containers are the user's own.
Tree = Any
Hyper = Any  # hyperparameters, in the user's own units
Unit = Any  # the same tree in unit coordinates
Params = Any  # what the losses receive
InnerState = Any  # a training state: anything with `.params`
Batch = Any  # one batch, leaves [batch, ...]
Train = Any  # K batches, leaves [K, batch, ...], or a `Minibatches`
State = Any  # what an estimator, a solver or a tuner needs at its next call
Leaf = Any  # an array, or a number that may stand for one
Key = jax.Array  # a PRNG key, typed or raw
Scalar = jax.Array  # shape []


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is of a floating (or complex) dtype and so can carry a tangent."""
    # A PRNG key has a dtype of its own, which `result_type` does not know.
    dtype = leaf.dtype if is_key(leaf) else jnp.result_type(leaf)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def split_inexact(tree: Tree) -> tuple[list[Any], Callable[[list[Any]], Tree]]:
    """The inexact leaves of `tree`, and the function that puts such leaves back among the rest.

    Counters, masks and PRNG keys live in training states beside the parameters. They have no
    tangent space worth storing, so derivatives are taken of the first value alone.
    """
    leaves, treedef = jax.tree.flatten(tree)
    inexact = [is_inexact(leaf) for leaf in leaves]

    def join(floats: list[Any]) -> Tree:
        supply = iter(floats)
        return treedef.unflatten(
            [next(supply) if flag else leaf for flag, leaf in zip(inexact, leaves, strict=True)]
        )

    return [leaf for flag, leaf in zip(inexact, leaves, strict=True) if flag], join


def flagged(leaves: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """Those whose flag is set."""
    return [x for x, flag in zip(leaves, flags, strict=True) if flag]


def select(condition: Any, if_true: Tree, if_false: Tree) -> Tree:
    """Leafwise `where`; works for PRNG keys too."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def row(stored: Tree, i: jax.typing.ArrayLike) -> Any:
    """The i-th entries along the leading axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stored)


def zeros(like: Tree) -> Any:
    """Zeros of its shapes, dtypes and shardings."""
    # `zeros_like` loses the sharding of an Explicit mesh that is not set as the current one.
    return jax.tree.map(lambda x: jnp.where(False, x, 0), like)


def inner_product(a: Tree, b: Tree) -> jax.Array:
    """The sum over leaves of the products, in float32 or wider, so that bf16 sums keep digits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    # Not jnp.vdot, which ravels: a leaf that is sharded would be gathered whole.
    return sum(
        (jnp.sum(jnp.conj(widen(x)) * widen(y)) for x, y in pairs),
        start=jnp.zeros((), jnp.float32),
    )


def norm(tree: Tree) -> jax.Array:
    """The Euclidean norm over all inexact leaves."""
    return jnp.sqrt(inner_product(split_inexact(tree)[0], split_inexact(tree)[0]))


def widen(leaf: Any) -> jax.Array:
    """The leaf in at least float32; an integer in the widest float that is enabled."""
    dtype = jnp.result_type(leaf if is_inexact(leaf) else float)
    return jnp.asarray(leaf, jnp.promote_types(dtype, jnp.float32))


def strong(tree: Tree) -> Tree:
    """The tree as strongly typed arrays of at least float32: weakly typed scalars recompile."""
    return jax.tree.map(lambda x: widen(x) if is_inexact(x) else jnp.asarray(x), tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """The tree in the dtypes of `like`, as arrays."""
    return jax.tree.map(
        lambda x, y: x if is_key(y) else jnp.asarray(x, jnp.result_type(y)), tree, like
    )


def all_finite(tree: Tree) -> jax.Array:
    """Whether every inexact leaf is finite; one pass, which XLA fuses with what made the leaves."""
    # 0 * x is 0 unless x is infinite or NaN; unlike a sum of x it cannot overflow.
    return jnp.isfinite(
        sum((jnp.sum(0 * leaf) for leaf in split_inexact(tree)[0]), start=jnp.zeros(()))
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as a person writes it: `learning_rate`, `layers/0/weight`."""
    parts = [getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path]
    return "/".join(str(part) for part in parts) or "(the value itself)"


def leaf_names(tree: Tree) -> list[str]:
    """The names of all leaves, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
