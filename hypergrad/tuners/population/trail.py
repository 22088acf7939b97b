"""Where a member's hyperparameters have been, in memory that does not grow with the run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Trail(NamedTuple):
    """Where a member's hyperparameters have been, in a fixed number C of equal blocks of updates.

    When all blocks are full they are merged by twos, so that any run fits.

    Attributes:
      sums: of the unit coordinates after each update of a block, leaves `[C, ...]`.
      width: int32, updates per block.
      seen: int32, updates recorded.
    """

    sums: Any
    width: jax.Array
    seen: jax.Array


def new_trail(unit: Any, blocks: int) -> Trail:
    """A trail of `blocks` blocks, all still to come, for coordinates like `unit`."""
    sums = jax.tree.map(lambda u: jnp.zeros((blocks, *u.shape), u.dtype), unit)
    return Trail(sums, jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32))


def record(trail: Trail, unit: Any) -> Trail:
    """The trail after one more update, which led to `unit`."""

    def merged(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x[0::2] + x[1::2], jnp.zeros_like(x[0::2])])

    blocks = _blocks(trail)
    full = trail.seen == blocks * trail.width
    width = jnp.where(full, 2 * trail.width, trail.width)
    sums = jax.tree.map(
        lambda x, u: jnp.where(full, merged(x), x).at[trail.seen // width].add(u), trail.sums, unit
    )
    return Trail(sums, width, trail.seen + 1)


def read(trail: Trail, start: Any) -> tuple[Any, jax.Array, Any]:
    """(Means of the blocks, updates done at the end of each or 0, mean of the second half)."""
    first = jnp.arange(_blocks(trail)) * trail.width
    last = jnp.minimum(first + trail.width, trail.seen)
    inside = jnp.maximum(last - first, 0)
    late = jnp.maximum(last - jnp.maximum(first, trail.seen // 2), 0)

    def means(x: jax.Array) -> jax.Array:
        return x / jnp.maximum(inside, 1).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def second_half(x: jax.Array, u: jax.Array) -> jax.Array:
        weight = (late / jnp.maximum(late.sum(), 1)).astype(x.dtype)
        return jnp.where(trail.seen == 0, u, jnp.tensordot(weight, means(x), 1))

    blocks = jax.tree.map(means, trail.sums)
    mean = jax.tree.map(second_half, trail.sums, start)
    return blocks, jnp.where(inside > 0, last, 0), mean


def _blocks(trail: Trail) -> int:
    leaves = jax.tree.leaves(trail.sums)
    # Without hyperparameters nothing is recorded, and any even number does.
    return leaves[0].shape[0] if leaves else 2
