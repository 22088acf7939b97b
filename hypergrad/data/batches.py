"""K batches as arrays, or drawn inside the compiled program, so that no run has to fit memory."""

import dataclasses

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.data.contents import refuse_text
from hypergrad.data.keys import SHUFFLE
from hypergrad.trees import Batch, Key, Train, Tree, leaf_names

# Why a number must be a Python integer.
FIXES_A_SHAPE = "it fixes a shape of the compiled program"
# A Feistel cipher's rounds. Four give a pseudo-random permutation in theory; the halves of a small
# data set's index have few bits, so that more rounds are needed before all orders look alike.
_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Minibatches:
    """Draws `num_steps` minibatches from `arrays`, shuffled by epoch without replacement.

    Stands wherever a batch stands: as `train` it is K = `num_steps` batches, as `valid` it gives
    one batch per estimate. It is a pytree: `arrays` are traced, the two integers are static.
    Several of one size can be stacked leaf by leaf (folds of a cross-validation) for `jax.vmap`.

    Step t takes examples t * batch_size, ... of an endless stream in which each epoch is a fresh
    permutation of all examples, so a batch may straddle two epochs and no example is ever left out.
    Cost: O(batch_size) time and memory per step at any data-set size (the permutation is a cipher
    of the index, never an array). The position t * batch_size must stay below 2**31.

    Args:
      arrays: a pytree whose leaves share their first axis, `[examples, ...]`.
      batch_size: examples per step.
      num_steps: the number of steps K.

    Raises:
      ValueError: leaves that are no arrays or of unequal length, or a batch larger than the data.

    >>> import jax, jax.numpy as jnp
    >>> data = Minibatches({"x": jnp.arange(6.0)}, batch_size=3, num_steps=2)
    >>> key = jax.random.key(0)
    >>> epoch = jnp.concatenate([data.batch(t, key)["x"] for t in range(2)])
    >>> sorted(epoch.tolist())
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    arrays: Tree
    batch_size: int
    num_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_steps"):
            checks.integer_field(self, name, remedy=FIXES_A_SHAPE)
        refuse_text("arrays", self.arrays)
        size = num_examples(self.arrays)
        if size < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} exceeds the {size} examples in arrays. Choose a "
                "batch_size no larger than the data."
            )

    def batch(self, step: jax.typing.ArrayLike, key: Key) -> Batch:
        """The batch of step `step` (an int32, traced or not) of the stream that `key` shuffles."""
        size = num_examples(self.arrays)
        # Unsigned numbers and an index known to be valid spare the program the handling of negative
        # ones: a third of its instructions.
        start = jnp.asarray(step, jnp.uint32) * jnp.uint32(self.batch_size)
        position = start + jnp.arange(self.batch_size, dtype=jnp.uint32)
        epoch = position // jnp.uint32(size)
        index = _shuffle(position - epoch * jnp.uint32(size), epoch, size, key)
        rows = lambda leaf: jnp.asarray(leaf).at[index].get(mode="promise_in_bounds")  # noqa: E731
        return jax.tree.map(rows, self.arrays)


def _flatten(data: Minibatches) -> tuple[list[tuple[object, Tree]], tuple[int, int]]:
    return [(jax.tree_util.GetAttrKey("arrays"), data.arrays)], (data.batch_size, data.num_steps)


def _unflatten(integers: tuple[int, int], children: tuple[Tree]) -> Minibatches:
    # Not by the constructor: the placeholders of transformations and stacked arrays come this way.
    data = object.__new__(Minibatches)
    data.__dict__.update(arrays=children[0], batch_size=integers[0], num_steps=integers[1])
    return data


jax.tree_util.register_pytree_with_keys(Minibatches, _flatten, _unflatten)


def num_examples(arrays: Tree) -> int:
    """The first axis that all leaves share. Raises ValueError."""
    shapes = _shapes(arrays)
    if not shapes or () in shapes.values():
        raise ValueError(
            f"arrays has leaves of shapes {_first(shapes)}: every leaf must be an array with a "
            "leading axis of examples, [examples, ...]; numpy.asarray makes one of nested lists."
        )
    sizes = {name: shape[0] for name, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"arrays disagree on the first axis (examples): {sizes}. Give every leaf one row per "
            "example."
        )
    return min(sizes.values())


def _shuffle(index: jax.Array, epoch: jax.Array, size: int, key: Key) -> jax.Array:
    """Where the permutation of epoch `epoch` sends `index`, both uint32 [batch], as int32 [batch].

    A Feistel cipher with cycle walking.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = jnp.uint32((1 << half) - 1)
    words = jax.random.bits(key, (_ROUNDS,), jnp.uint32)
    words = words[:, None] ^ mix_bits(epoch)

    def turn(i: jax.Array, halves: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, right = halves
        return right, left ^ (mix_bits(right + words[i]) & mask)

    def walk(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, walking = carry
        # a loop, as eight rounds written out take twice as long to compile and no less to run
        left, right = jax.lax.fori_loop(0, _ROUNDS, turn, (x >> half, x & mask))
        x = jnp.where(walking, (left << half) | right, x)
        return x, x >= size

    # The cipher permutes the next power of four; walking along its cycles until the value is a
    # valid index permutes the indices themselves.
    start = index, jnp.ones(index.shape, bool)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), walk, start)[0].astype(jnp.int32)


def mix_bits(x: jax.Array, seed: jax.typing.ArrayLike = 0) -> jax.Array:
    """A bijection of uint32 whose every output bit depends on every input bit; `seed` picks it.

    Wellons' `lowbias32`: two multiplications and three shifts, which XLA vectorises; threefry costs
    ten times as much. Good enough to order examples and to draw noise, never for secrets.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) ^ jnp.uint32(seed)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def last_batch(train: Train, key: Key, offset: jax.typing.ArrayLike) -> Batch:
    """The batch of the last of the K steps of `train`, which began after `offset` steps."""
    if isinstance(train, Minibatches):
        return train.batch(offset + train.num_steps - 1, jax.random.fold_in(key, SHUFFLE))
    return jax.tree.map(lambda x: x[-1], train)


def step_inputs(train: Train) -> tuple[jax.Array, Train]:
    """What a scan over the K training steps runs along: (step index [K], batches [K, ...])."""
    steps = jnp.arange(num_steps(train), dtype=jnp.int32)
    return steps, None if isinstance(train, Minibatches) else train


def num_steps(train: Train) -> int:
    """K, the number of steps in `train`."""
    if isinstance(train, Minibatches):
        return train.num_steps
    if isinstance(train, list) and not any(hasattr(batch, "shape") for batch in train):
        raise ValueError(
            f"train is a list of {len(train)} batches, whose leaves have no axis K of steps. Stack "
            "them: train = jax.tree.map(lambda *x: numpy.stack(x), *batches)."
        )
    shapes = _shapes(train)
    if not shapes or () in shapes.values():
        raise ValueError(
            f"train has leaves of shapes {_first(shapes)}: every leaf needs a leading axis K of "
            "steps, [K, batch, ...]. Add one with x[None] for a single step."
        )
    if any(shape[0] == 0 for shape in shapes.values()):
        raise ValueError(f"train has no steps: its leaves are {shapes}. Give at least one batch.")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"train's leaves disagree on the leading axis K (steps): {shapes}. Stack K whole "
            "batches, so that every leaf is [K, batch, ...]."
        )
    return next(iter(shapes.values()))[0]


def num_batches(train: Train) -> int:
    """How many batches "all" of `train` are: K, or those of an epoch of a `Minibatches`."""
    if isinstance(train, Minibatches):
        return -(-jax.tree.leaves(train.arrays)[0].shape[0] // train.batch_size)
    return num_steps(train)


def _first(shapes: dict[str, tuple[int, ...]]) -> str:
    shown = ", ".join(f"{name!r}: {shape}" for name, shape in list(shapes.items())[:4])
    return f"{{{shown}{', ...' if len(shapes) > 4 else ''}}}"


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return dict(zip(leaf_names(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True))
