"""Variance reduction for training, linear system and hypergradient at once: SAGA on two levels."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.data.batches import Minibatches, num_examples
from hypergrad.data.keys import SOLVER
from hypergrad.estimators.base import Estimate, Estimator, Progress, Window, summary
from hypergrad.estimators.conditions import Condition, Vector, only, vector_of
from hypergrad.estimators.implicit import Implicit
from hypergrad.linear.base import axpy, size_or_one
from hypergrad.linear.series import Richardson
from hypergrad.problem.problem import judged_params, steps_done
from hypergrad.problem.rules import declared_rules
from hypergrad.problem.structure import StructureError
from hypergrad.trees import Batch, Hyper, Key, State, Tree, all_finite, is_inexact, norm


class Memory(NamedTuple):
    """What was last seen of each block, and its mean.

    Attributes:
      rows: leaves `[blocks, ...]`.
      mean: leaves `[...]`.
    """

    rows: Tree
    mean: Tree


class SABAState(NamedTuple):
    """One memory for each of the five sums over blocks, and the solution that is tracked.

    Attributes:
      solution: x of (dF/dz)^T x = dE/dz, as it stands.
      updates: of training.
      products: (dF/dz)^T x.
      crossed: (dF/dhyper)^T x.
      errors: dE/dz.
      direct: dE/dhyper.
    """

    solution: Vector
    updates: Memory
    products: Memory
    crossed: Memory
    errors: Memory
    direct: Memory


@dataclasses.dataclass(frozen=True)
class SABA(Estimator):
    """SOBA with SAGA's memory: converges linearly where the noise of minibatches stops the others.

    The data are `blocks` fixed minibatches. Each step of training, each product of the linear
    system and each hypergradient takes a random one of them, less what it said when it was last
    taken, plus the mean over all blocks of what they last said. All three are then unbiased, and
    their variance goes to 0 with the distance to the solution. So constant step sizes, also of the
    outer optimiser, lead to the solution and not to a neighbourhood of it.

    Args:
      step_size: of the linear system, below 2 / lambda_max of the training loss's second
        derivative on a block.
      blocks: training examples over batch size.
      valid_blocks: the same of `valid`; 1 for a fixed batch.
      steps: products per call.

    `train` must be a `Minibatches` whose batch size divides its examples, `valid` one too, or a
    batch: blocks are stretches of their arrays, in order, so shuffle sorted data first. Training is
    by the problem's own step, of which the change of the parameters is averaged: it must be
    without memory (SGD, with decay or without). Like `Implicit(of="stationary")` it sees what acts
    through the training loss.

    `info["residual"]` is the linear system's, relative to its right hand side, by the memory.

    Cost in gradient evaluations: K, 2 per product, and 5, whatever the number of blocks; memory
    (2 |params| + |hyper|) blocks + (|params| + |hyper|) valid_blocks: it is for problems of which
    that fits, not for networks.

    Raises:
      ValueError: data that are not `blocks` batches; an optimiser with memory (momentum, Adam); a
        hyperparameter that the training loss's gradient does not depend on.

    Source: Dagreou et al. 2022, algorithm 2 with eq. 8 (SABA); training and products one after
    another instead of at one point, memories zero at first.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> train = lambda w, h, batch, key: jnp.mean((w - batch) ** 2) + h["l2"] * w**2
    >>> valid = lambda w, h, batch, key: jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), train, valid, lambda h: optax.sgd(0.2))
    >>> data = hg.Minibatches(jnp.array([0.5, 1.5]), 1, num_steps=300)
    >>> arguments = {"l2": 1.0}, None, data, jnp.ones(3), jax.random.key(0)
    >>> estimate = hg.hypergradient(problem, *arguments, hg.SABA(0.2, blocks=2, steps=300))
    >>> round(float(estimate.grad["l2"]), 4)  # of the mean, 1, as a whole batch would give it
    0.25
    """

    step_size: float
    blocks: int
    valid_blocks: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        checks.positive("step_size", self.step_size)
        for name in ("blocks", "valid_blocks", "steps"):
            checks.integer_field(self, name)

    def init(self, window: Window, hyper: Hyper) -> State:
        """Empty memories, at zero."""
        z, _ = vector_of(window.start(hyper), "stationary", 0)
        return SABAState(
            solution=jax.tree.map(jnp.zeros_like, z),
            updates=_empty(z, self.blocks),
            products=_empty(z, self.blocks),
            crossed=_empty(hyper, self.blocks),
            errors=_empty(z, self.valid_blocks),
            direct=_empty(hyper, self.valid_blocks),
        )

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One value and gradient of the validation loss; see the class."""
        start = window.begin(hyper)
        offset = steps_done(start.inner)
        end, updates = self._trained(window, hyper, start, state.updates)
        z, inner_at = vector_of(end.inner, "stationary", offset)

        def on_block(draw: Key) -> tuple[jax.Array, Condition]:  # i, and F on block i
            i = jax.random.randint(draw, (), 0, self.blocks)
            batch, keys = jax.tree.map(lambda x: x[None], (_block(window.train, i), draw))
            return i, Condition(
                window.problem,
                "stationary",
                z,
                inner_at,
                batch,
                keys,
                lambda _: (batch, draw),
                rules,
            )

        block = _block(window.train, 0)
        rules = declared_rules(
            window.problem.train_loss, end.inner.params, hyper, block, window.key
        )
        draws = jax.random.split(_key(window, offset, 1), self.steps + 1)
        _, first = on_block(draws[0])
        moves = first.moves(hyper, lambda x: x)

        j = jax.random.randint(_key(window, offset, 2), (), 0, self.valid_blocks)
        error = lambda z, hyper: window.problem.valid_loss(  # noqa: E731
            judged_params(window.problem, inner_at(z)), hyper, _block(window.valid, j), window.key
        )
        loss, (by_z, by_hyper) = jax.value_and_grad(error, (0, 1))(z, hyper)
        v, errors = _reduced(state.errors, j, only(moves, by_z))
        direct, directs = _reduced(state.direct, j, by_hyper)

        def product_step(carry: tuple[Vector, Memory], draw: Key) -> Any:
            (x, products), (i, condition) = carry, on_block(draw)
            seen = only(moves, condition.transposed(hyper)[1](x))
            product, products = _reduced(products, i, seen)
            gap = axpy(-1, v, product)
            return (axpy(-self.step_size, gap, x), products), norm(gap)

        begun = state.solution, state.products
        (x, products), gaps = jax.lax.scan(product_step, begun, draws[1:])
        i, condition = on_block(draws[0])
        (seen,) = jax.vjp(lambda hyper: condition(z, hyper), hyper)[1](x)
        indirect, crossed = _reduced(state.crossed, i, seen)
        grad = jax.tree.map(jnp.subtract, direct, indirect)

        info = summary(loss, grad, end.first_bad_step)
        info["residual"] = gaps[-1] / size_or_one(v)
        state = SABAState(x, updates, products, crossed, errors, directs)
        return Estimate(loss, grad, end.inner, info), state

    def _trained(
        self, window: Window, hyper: Hyper, start: Progress, updates: Memory
    ) -> tuple[Progress, Memory]:
        """K steps, each by a block's own change of the parameters less its last one, plus all's."""
        offset = steps_done(start.inner)
        draws = jax.random.split(_key(window, offset, 3), window.num_steps)

        def step(carry: tuple[Progress, Memory], x: tuple[jax.Array, Key]) -> Any:
            (t, draw), (progress, updates) = x, carry
            i = jax.random.randint(draw, (), 0, self.blocks)
            key = jax.random.fold_in(window.key, offset + t)
            moved = window.problem.step(progress.inner, hyper, _block(window.train, i), key)
            before, _ = vector_of(progress.inner, "stationary", offset)
            after, inner_at = vector_of(moved, "stationary", steps_done(moved))
            change, updates = _reduced(updates, i, axpy(-1, before, after))
            inner = inner_at(axpy(1, before, change))
            bad = (progress.first_bad_step < 0) & ~all_finite(inner.params)
            first = jnp.where(bad, t, progress.first_bad_step)
            return (Progress(inner, None, first), updates), None

        steps = jnp.arange(window.num_steps, dtype=jnp.int32)
        return jax.lax.scan(step, (start, updates), (steps, draws))[0]

    def check_structure(self, window: Window, hyper: Hyper) -> None:
        """Raises where data or optimiser do not fit, or a gradient would be missing."""
        for name, data, blocks in (
            ("train", window.train, self.blocks),
            ("valid", window.valid, self.valid_blocks),
        ):
            _require_blocks(name, data, blocks)
        Implicit(Richardson(1, self.step_size), batches="last").check_structure(window, hyper)
        memory = getattr(window.start(hyper), "opt_state", ())
        if any(is_inexact(leaf) for leaf in jax.tree.leaves(memory)):
            raise StructureError(
                "SABA averages changes of the parameters, and this optimiser keeps a memory of "
                "its own (momentum, second moments), which would be that of other gradients: use "
                "optax.sgd(rate), or Implicit(Richardson(1, step_size), batches='last')."
            )


def _require_blocks(name: str, data: Any, blocks: int) -> None:
    if not isinstance(data, Minibatches):
        if name == "valid" and blocks == 1:
            return
        raise StructureError(
            f"{name} is no hypergrad.Minibatches: SABA remembers what each of {blocks} fixed "
            "blocks said, and batches of a stream come once. Give the whole data, or use "
            "Implicit(Richardson(1, step_size), batches='last')."
        )
    examples = num_examples(data.arrays)
    if examples != blocks * data.batch_size:
        field = "blocks" if name == "train" else "valid_blocks"
        raise StructureError(
            f"{field}={blocks} blocks of {data.batch_size} are not the {examples} examples of "
            f"{name}: choose a batch_size that divides them, and {field} to match."
        )


def _block(data: Batch, i: jax.Array | int) -> Batch:
    """Block i of a `Minibatches`; anything else is the one block that there is."""
    if not isinstance(data, Minibatches):
        return data
    size = data.batch_size
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), i * size, size), data.arrays
    )


def _reduced(memory: Memory, i: jax.Array, new: Tree) -> tuple[Tree, Memory]:
    """SAGA: what block i says now, less what it said last, plus the mean of what all said last."""
    change = jax.tree.map(lambda rows, x: x - rows[i], memory.rows, new)
    direction = axpy(1, memory.mean, change)
    rows = jax.tree.map(lambda rows, x: rows.at[i].set(x), memory.rows, new)
    blocks = jax.tree.leaves(rows)[0].shape[0]
    return direction, Memory(rows, axpy(1 / blocks, change, memory.mean))


def _key(window: Window, offset: jax.typing.ArrayLike, stream: int) -> Key:
    own = jax.random.fold_in(jax.random.fold_in(window.key, SOLVER), offset)
    return jax.random.fold_in(own, stream)


def _empty(like: Tree, blocks: int) -> Memory:
    rows = jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), like)
    return Memory(rows, jax.tree.map(jnp.zeros_like, like))
