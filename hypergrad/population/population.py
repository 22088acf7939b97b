"""Members of one program trained together: hyperparameters and seeds traced, compiled once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from hypergrad.checks import choice, integer, positive, within
from hypergrad.data.batches import Minibatches
from hypergrad.population.exploit import exploited
from hypergrad.population.held import WEIGHTS, HeldRuns, Runs, given, user_values
from hypergrad.population.member import Data, Member, PopulationReport, PopulationState
from hypergrad.population.placement import Execution, Mode, Placement
from hypergrad.population.refine import PlainRuns, Refine, RefinedRuns, plain
from hypergrad.problem.problem import Problem
from hypergrad.space.space import Space
from hypergrad.trees import Batch, Hyper, Key, Leaf, Tree, path_name, select


def width_for(n: int, available: Sequence[int] | None = None) -> int:
    """The smallest width that holds `n` members: a few fixed widths mean a few compilations.

    Args:
      n: members, at least 1.
      available: the widths to choose from; None for the powers of four.

    Raises:
      ValueError: n below 1, or above the largest width.

    >>> [width_for(n) for n in (1, 3, 27, 64)], width_for(27, [8, 32])
    ([1, 4, 64, 64], 32)
    """
    n = integer("n", n)
    if available is None:
        return 4 ** (((n - 1).bit_length() + 1) // 2)
    fitting = [width for width in available if width >= n]
    if not fitting:
        raise ValueError(
            f"n={n} members exceed the largest of available={list(available)}: add a width, or "
            "split the members."
        )
    return min(fitting)


class Population:
    """Members that differ in continuous hyperparameters and seeds, trained by one program.

    Each member does what it would do alone, under its own key: `alternating`'s updates on
    `Minibatches(train, batch_size, steps_per_update)`, or without `refine` the steps of `rollout`.
    One that diverges leaves the others alone. Training advances by whole updates: a caller that
    counts in steps rounds them to multiples of `steps_per_update`.

    The methods map a `PopulationState` to another and change none. They compile themselves, each
    once per width, and are called from outside of `jax.jit`.

    Args:
      problem: what is trained and judged, equal for all members.
      space: the ranges. `hypers` holds exactly the continuous hyperparameters to be used; leave
        conditional ones that are not active out of it.
      refine: how hypergradients are followed; None for plain training.
      train: arrays `[examples, ...]`, drawn from in the program.
      valid: arrays, one batch for `valid_loss`.
      batch_size: examples per training step.
      steps_per_update: K of plain training, or of a `Refine` that names none; None for 10.
      test: arrays of a held-out split for the report, or None.
      valid_batch_size: examples per hypergradient's validation; None for all. Scores use all.
      mode: "vmap" runs members side by side, "map" one after another (memory of one member at
        work; slots that are not active cost no time, so that one large width serves all). "auto"
        compiles both at the first `advance` with more than one member, times one update each and
        keeps the faster; members alone are mapped. The two agree to rounding only: name a mode
        where runs must repeat bit by bit.
      trail: C, the even number of blocks in which hyperparameters are recorded. Memory: that many
        copies of each member's hyperparameters; lower it where they are many.
      devices: where members live; None for all of this process. A width that they divide is
        sharded over them, any other stays on the first.
      held: names in `hypers` that the problem finds in `hyper`, too, and that nothing moves.
      followed: `(problem, weights) -> problem`, what hypergradients follow instead of the problem
        itself; `hypers` then holds a member's weights under `held.WEIGHTS`.

    Attributes:
      steps_per_update: K.
      execution: how members are run.

    Cost: one compilation per width of each method used (two of `advance` at the first width under
    "auto"); memory of `advance` under "vmap": all members at work.

    Raises:
      ValueError: a batch larger than the data; both `refine` and `steps_per_update`; a mode or
        trail out of range. `init` and `put`: no members, a leaf of `hypers` without the axis [n],
        other names than the space's, slots out of range or doubled.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = hg.bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sgd(h["lr"]))
    >>> space = hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")})
    >>> members = Population(problem, space, None, jnp.ones(8), jnp.ones(4), 4, mode="vmap")
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> state = members.init({"lr": jnp.array([1e-3, 1e-1, 1e-2])}, keys)
    >>> state = members.advance(state, 2)
    >>> int(jnp.argmin(members.report(state).score)), members.report(state).steps.tolist()
    (1, [20, 20, 20])
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        refine: Refine | None,
        train: Tree,
        valid: Batch,
        batch_size: int,
        *,
        steps_per_update: int | None = None,
        test: Batch | None = None,
        valid_batch_size: int | None = None,
        mode: Literal["auto", "vmap", "map"] = "auto",
        trail: int = 32,
        devices: Sequence[jax.Device] | None = None,
        held: Sequence[str] = (),
        followed: Callable[[Problem, jax.Array], Problem] | None = None,
    ) -> None:
        own = None if refine is None else refine.steps_per_update
        if own is not None and steps_per_update is not None:
            raise ValueError(
                f"steps_per_update={steps_per_update} is given beside a Refine, which has its own "
                f"({own}): leave it out."
            )
        choice("mode", mode, ("auto", "vmap", "map"))
        trail = integer("trail", trail, least=2)
        if trail % 2:
            raise ValueError(f"trail={trail} must be an even number of blocks, at least 2.")
        runs = _runs(problem, space, refine, tuple(held), followed)
        steps = steps_per_update if own is None else own
        steps = 10 if steps is None else integer("steps_per_update", steps)
        self.steps_per_update = steps
        self.execution = Execution(None if mode == "auto" else mode)
        guide = valid
        if valid_batch_size is not None:
            guide = Minibatches(valid, integer("valid_batch_size", valid_batch_size))
        self._data = Data(Minibatches(train, batch_size, steps), guide, valid, test)
        self._copies: dict[bool, Data] = {}
        self._refined = refine is not None
        self._place = Placement(devices)
        # Programs of another object: methods of this one would hold it, and with it the data, in a
        # circle that only the garbage collector frees.
        member = Member(problem, runs, steps, trail)
        slots = _Slots(member, self._place)
        self._start = jax.jit(jax.vmap(member.start))
        self._renew = jax.jit(slots.renew)
        self._advance = jax.jit(slots.advance, static_argnames="mode")
        self._report = jax.jit(slots.report, static_argnames="mode")
        self._exploit = jax.jit(slots.exploit, static_argnames="mode")

    def init(self, hypers: Hyper, keys: Key, width: int | None = None) -> PopulationState:
        """Members that begin at `hypers`, leaves `[n, ...]`, under `keys` `[n]`.

        A larger `width` leaves slots empty.
        """
        n = self._count_members(hypers, keys)
        width = _checked_width(n, width)
        # The slots beyond the members hold copies of the last one, which are never trained.
        source = np.minimum(np.arange(width), n - 1)
        arguments = (_rows(hypers, source), _rows(keys, source), np.arange(width) < n)
        return self._place(self._start(*self._place(arguments, width)), width)

    def advance(self, state: PopulationState, num_updates: ArrayLike) -> PopulationState:
        """The members after `num_updates` updates of `steps_per_update` training steps each.

        An int or one per slot `[n]`, traced, so that all lengths are one program.
        """
        width = _width(state)
        # On the host: each operation on the device would be dispatched, and compiled, alone.
        counts = np.broadcast_to(np.asarray(num_updates, np.int32), (width,))
        counts, state, data = self._place(counts, width), self._place(state, width), self._at(width)
        if self.execution.mode is None and self._place.local(width) > 1:
            nothing, one = (self._place(np.full(width, n, np.int32), width) for n in (0, 1))
            self.execution.decide(functools.partial(self._advance, state, data), nothing, one)
        return self._advance(state, data, counts, mode=self._mode)

    def report(self, state: PopulationState) -> PopulationReport:
        """What there is to know about the members."""
        width = _width(state)
        return self._report(self._place(state, width), self._at(width), mode=self._mode)

    def select(
        self, state: PopulationState, indices: Sequence[int], width: int | None = None
    ) -> PopulationState:
        """The members in the slots `indices`, in that order.

        A larger `width` is filled with inactive copies.
        """
        kept = _checked_slots("indices", indices, _width(state))
        width = _checked_width(kept.size, width)
        source = kept[np.minimum(np.arange(width), kept.size - 1)]
        return self._place(_taken(state, source, np.arange(width) < kept.size), width)

    def put(
        self, state: PopulationState, slots: Sequence[int], hypers: Hyper, keys: Key
    ) -> PopulationState:
        """The members with new ones in `slots`, which begin at `hypers` under `keys`."""
        width, n = _width(state), self._count_members(hypers, keys)
        filled = _checked_slots("slots", slots, width)
        if len(set(filled.tolist())) != n or filled.size != n:
            raise ValueError(
                f"slots={filled.tolist()} do not take {n} new members: name {n} different ones."
            )
        # All slots are started and only the new ones kept, so that any number is one program.
        source, new = np.zeros(width, int), np.zeros(width, bool)
        source[filled], new[filled] = np.arange(n), True
        arguments = (_rows(hypers, source), _rows(keys, source), new)
        state = self._renew(self._place(state, width), *self._place(arguments, width))
        return self._place(state, width)

    def exploit(
        self,
        state: PopulationState,
        key: Key,
        fraction: float = 0.25,
        perturb: float = 0.05,
        resample: float = 0.0,
        scores: Sequence[float] | jax.Array | None = None,
    ) -> tuple[PopulationState, jax.Array]:
        """The members after one round of population based training, and `parents` `[n]`.

        The worst `fraction` of the active members, and those not finite, take over all of a random
        member of the best fraction but its key; each copied hyperparameter then moves by `perturb`
        up or down in unit coordinates, or is drawn anew with probability `resample`. Ranked by
        validation loss, or by `scores` `[n]`, where lower is better and NaN loses. `parents` says
        from which slot each member came. (Jaderberg 2017, section 3.)
        """
        within("fraction", positive("fraction", fraction), 0, 0.5, "nobody is best and worst")
        width = _width(state)
        numbers = tuple(np.float32(x) for x in (fraction, perturb, resample))
        state, parents = self._exploit(
            self._place(state, width),
            self._at(width),
            None if scores is None else self._place(jnp.asarray(scores, jnp.float32), width),
            self._place.everywhere(key, width),
            self._place.everywhere(numbers, width),
            mode=self._mode,
        )
        return self._place(state, width), parents

    @property
    def _mode(self) -> Mode:
        # Undecided before several members first advance: all there is till then is one short pass.
        return self.execution.mode or "map"

    def _at(self, width: int) -> Data:
        """The data where slots of this width live, copied once."""
        sharded = self._place.is_sharded(width)
        if sharded not in self._copies:
            # Also without placement: numpy arrays would be sent to the device at every call.
            on_device = jax.tree.map(jnp.asarray, self._data)
            self._copies[sharded] = self._place.everywhere(on_device, width)
        return self._copies[sharded]

    def _count_members(self, hypers: Hyper, keys: Key) -> int:
        if not isinstance(hypers, Mapping):
            raise TypeError(f"hypers is {hypers!r}: give a dict from names to values [n, ...].")
        if self._refined and not jax.tree.leaves(hypers):
            raise ValueError(
                "hypers holds no continuous hyperparameter, so there is nothing to refine: use "
                "refine=None, or add a Float to the space."
            )
        shapes = {
            f"hypers[{path_name(path)!r}]": np.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(dict(hypers))
        } | {"keys": np.shape(keys)}
        if any(shape == () for shape in shapes.values()):
            raise ValueError(
                f"hypers and keys have shapes {shapes}: every one needs a leading axis of members, "
                "[n, ...]. Make lists arrays (a list is a subtree); add the axis with x[None] for "
                "a single member."
            )
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise ValueError(
                f"hypers and keys disagree on the number of members: {shapes}. Give one row per "
                "member."
            )
        n = int(shapes["keys"][0])
        if n == 0:
            raise ValueError(f"The population is empty: {shapes}. Give at least one member.")
        return n


def _runs(
    problem: Problem,
    space: Space,
    refine: Refine | None,
    held: tuple[str, ...],
    followed: Callable[[Problem, jax.Array], Problem] | None,
) -> Runs:
    """What trains the members."""

    def make(values: Hyper) -> RefinedRuns | PlainRuns:
        trained = given(problem, user_values(values)) if held else problem
        if refine is None:
            return PlainRuns(plain(trained, space), space)
        guided = trained if followed is None else followed(trained, values[WEIGHTS])
        return RefinedRuns(refine.tuner(guided, space), space)

    names = held if followed is None else (*held, WEIGHTS)
    return HeldRuns(make, names, space) if names else make({})


@dataclasses.dataclass(frozen=True)
class _Slots:
    """What all slots of a population do together: each method is one program of a width."""

    member: Member
    place: Placement

    def renew(
        self, state: PopulationState, hypers: Hyper, keys: Key, new: jax.Array
    ) -> PopulationState:
        return jax.vmap(select)(new, jax.vmap(self.member.start)(hypers, keys, new), state)

    def advance(
        self, state: PopulationState, data: Data, counts: jax.Array, mode: Mode
    ) -> PopulationState:
        return self.place.each(self.member.advance, mode, (state, counts), data)

    def report(self, state: PopulationState, data: Data, mode: Mode) -> PopulationReport:
        return self.place.each(self.member.report, mode, (state,), data)

    def exploit(
        self,
        state: PopulationState,
        data: Data,
        scores: jax.Array | None,
        key: Key,
        numbers: tuple[jax.Array, jax.Array, jax.Array],
        mode: Mode,
    ) -> tuple[PopulationState, jax.Array]:
        if scores is None:
            scores = self.place.each(self.member.score, mode, (state,), data.valid)
        return exploited(self.member.runs, state, scores, key, *numbers)


@jax.jit
def _taken(state: PopulationState, indices: jax.Array, active: jax.Array) -> PopulationState:
    taken = jax.tree.map(lambda x: x[indices], state)
    return taken._replace(active=taken.active & active)


def _width(state: PopulationState) -> int:
    return int(state.active.shape[0])


def _rows(tree: Tree, source: np.ndarray) -> Tree:
    """Rows `source` of every leaf, on the host: on the device each number of rows would compile."""

    def rows(x: Leaf) -> Leaf:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(x))[source]
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return np.asarray(x)[source]

    return jax.tree.map(rows, tree)


def _checked_width(n: int, width: int | None) -> int:
    if width is not None and integer("width", width) < n:
        raise ValueError(f"width={width} does not hold {n} members: leave it out, or widen it.")
    return n if width is None else int(width)


def _checked_slots(name: str, slots: Sequence[int], width: int) -> np.ndarray:
    indices = np.asarray(slots, int).reshape(-1)
    if indices.size == 0 or indices.min() < 0 or indices.max() >= width:
        raise ValueError(
            f"{name}={indices.tolist()} must name at least one of the slots 0 to {width - 1}."
        )
    return indices
