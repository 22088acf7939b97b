"""Members of one program trained together: hyperparameters and seeds traced, compiled once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.data.batches import Minibatches
from hypergrad.problem.problem import Problem
from hypergrad.space.space import Space
from hypergrad.trees import path_name
from hypergrad.tuners.population.exploit import explored, parents_of
from hypergrad.tuners.population.member import (
    Data,
    PopulationState,
    Report,
    member_of,
    moved_to,
    unit_of,
)
from hypergrad.tuners.population.placement import Mode, Placement, seconds_of
from hypergrad.tuners.population.plain import plain
from hypergrad.tuners.population.refine import Refine, check_steps


@dataclasses.dataclass
class Execution:
    """How a population's members are run, as decided by argument or at the first `advance`.

    Attributes:
      mode: "vmap", "map", or None while undecided.
      seconds: what one update of all members took in either mode, where it was measured.
    """

    mode: Mode | None
    seconds: dict[str, float]


class Population(NamedTuple):
    """A program for many members as functions of a `PopulationState`, each compiled per width.

    They compile themselves and are called from outside of `jax.jit`. None changes its arguments.

    Attributes:
      init: `(hypers, keys, width=None) -> state` from starting values `[n, ...]` and keys `[n]`;
        a larger `width` leaves slots empty.
      advance: `(state, num_updates) -> state`, that many updates of `steps_per_update` training
        steps; an int or one per slot `[n]`, traced, so that all lengths are one program.
      report: `state -> Report`.
      select: `(state, indices, width=None) -> state`, the members in those slots, in that order;
        a larger `width` is filled with inactive copies.
      put: `(state, slots, hypers, keys) -> state` with new members in those slots.
      exploit: `(state, key, fraction=0.25, perturb=0.05, resample=0.0, scores=None) -> (state,
        parents [n])`, one round of population based training, see `population`.
      steps_per_update: K.
      execution: how members are run.
    """

    init: Callable[..., PopulationState]
    advance: Callable[..., PopulationState]
    report: Callable[[PopulationState], Report]
    select: Callable[..., PopulationState]
    put: Callable[..., PopulationState]
    exploit: Callable[..., tuple[PopulationState, jax.Array]]
    steps_per_update: int
    execution: Execution


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
    if n < 1:
        raise ValueError(f"n={n} members need no width: give at least one.")
    if available is None:
        return 4 ** (((n - 1).bit_length() + 1) // 2)
    fitting = [width for width in available if width >= n]
    if not fitting:
        raise ValueError(
            f"n={n} members exceed the largest of available={list(available)}: add a width, or "
            "split the members."
        )
    return min(fitting)


def population(
    problem: Problem,
    space: Space,
    refine: Refine | None,
    train: Any,
    valid: Any,
    batch_size: int,
    *,
    steps_per_update: int | None = None,
    test: Any = None,
    valid_batch_size: int | None = None,
    mode: Literal["auto", "vmap", "map"] = "auto",
    trail: int = 32,
    devices: Sequence[jax.Device] | None = None,
) -> Population:
    """Members that differ in continuous hyperparameters and seeds, trained by one program.

    Each member does what it would do alone, under its own key: `alternating`'s updates on
    `Minibatches(train, batch_size, steps_per_update)`, or without `refine` the steps of `rollout`.
    One that diverges leaves the others alone. Training advances by whole updates: a caller that
    counts in steps rounds them to multiples of `steps_per_update`.

    Args:
      problem: what is trained and judged, equal for all members.
      space: the ranges. `hypers` holds exactly the continuous hyperparameters to be used; leave
        conditional ones that are not active out of it.
      refine: how hypergradients are followed; None for plain training.
      train: arrays `[examples, ...]`, drawn from in the program.
      valid: arrays, one batch for `valid_loss`.
      batch_size: examples per training step.
      steps_per_update: K of plain training; None for 10. A `Refine` has its own.
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

    Population based training (`exploit`): the worst `fraction` of the active members, and those not
    finite, take over all of a random member of the best fraction but its key; each copied
    hyperparameter then moves by `perturb` up or down in unit coordinates, or is drawn anew with
    probability `resample`. Ranked by validation loss, or by `scores` `[n]`, where lower is better
    and NaN loses. `parents` says from which slot each member came. (Jaderberg 2017, section 3.)

    Cost: one compilation per width of each function used (two of `advance` at the first width under
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
    >>> members = population(problem, space, None, jnp.ones(8), jnp.ones(4), 4, mode="vmap")
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> state = members.init({"lr": jnp.array([1e-3, 1e-1, 1e-2])}, keys)
    >>> state = members.advance(state, 2)
    >>> int(jnp.argmin(members.report(state).score)), members.report(state).steps.tolist()
    (1, [20, 20, 20])
    """
    if refine is not None and steps_per_update is not None:
        raise ValueError(
            f"steps_per_update={steps_per_update} is given beside a Refine, which has its own "
            f"({refine.steps_per_update}): leave it out."
        )
    if refine is None:
        steps = 10 if steps_per_update is None else steps_per_update
        check_steps("population", steps)
        tuner = plain(problem, space)
    else:
        steps = refine.steps_per_update
        tuner = refine.tuner(problem, space)
    if mode not in ("auto", "vmap", "map"):
        raise ValueError(f"mode={mode!r} is unknown: choose 'auto', 'vmap' or 'map'.")
    if trail < 2 or trail % 2:
        raise ValueError(f"trail={trail} must be an even number of blocks, at least 2.")
    guide = valid if valid_batch_size is None else Minibatches(valid, valid_batch_size)
    place = Placement(jax.local_devices() if devices is None else devices, devices is None)
    execution = Execution(None if mode == "auto" else mode, {})
    data_at: Callable[[int], Data] = place.replicated(
        Data(Minibatches(train, batch_size, steps), guide, valid, test)
    )

    member = member_of(problem, space, tuner, steps, trail)

    def evolve(
        state: PopulationState,
        key: jax.Array,
        numbers: tuple[Any, Any, Any],
        scores: jax.Array | None,
        data: Data,
        mode: Mode,
    ) -> tuple[PopulationState, jax.Array]:
        fraction, perturb, resample = numbers
        if scores is None:
            members = place.each(lambda m, _, d: member.score(m, d.valid), mode)
            scores = members(state, jnp.zeros(state.active.shape, jnp.int32), data)
        draw, explore = jax.random.split(key)
        parents = parents_of(scores, state.active, draw, fraction)
        moved = parents != jnp.arange(parents.size)
        copied = jax.tree.map(lambda x: x[parents], state)
        run = copied.run._replace(key=state.run.key)
        unit = explored(space, unit_of(space, run), explore, perturb, resample)
        copied = copied._replace(run=moved_to(space, run, unit))
        return _where(moved, copied, state), parents

    start_all = jax.jit(jax.vmap(member.start))
    advance_all = jax.jit(
        lambda state, counts, data, mode: place.each(member.move_on, mode)(state, counts, data),
        static_argnames="mode",
    )
    report_all = jax.jit(
        lambda state, data, mode: place.each(lambda m, _, d: member.describe(m, d), mode)(
            state, jnp.zeros(state.active.shape, jnp.int32), data
        ),
        static_argnames="mode",
    )
    take = jax.jit(
        lambda state, indices, active: (lambda new: new._replace(active=new.active & active))(
            jax.tree.map(lambda x: x[indices], state)
        )
    )
    renew = jax.jit(
        lambda state, hypers, keys, new: _where(
            new, jax.vmap(member.start)(hypers, keys, new), state
        )
    )
    evolve_all = jax.jit(evolve, static_argnames="mode")

    def init(hypers: Any, keys: jax.Array, width: int | None = None) -> PopulationState:
        n = _count_members(space, hypers, keys, refine)
        width = _checked_width(n, width)
        source = np.minimum(np.arange(width), n - 1)
        arguments = (_rows(hypers, source), _rows(keys, source), np.arange(width) < n)
        return place(start_all(*place(arguments, width)), width)

    def advance(state: PopulationState, num_updates: Any) -> PopulationState:
        width = _width(state)
        counts = place(jnp.broadcast_to(jnp.asarray(num_updates, jnp.int32), (width,)), width)
        state, data = place(state, width), data_at(width)
        return advance_all(state, counts, data, mode=decide(state, data))

    def decide(state: PopulationState, data: Data) -> Mode:
        width = _width(state)
        if execution.mode is None and place.local(width) > 1:
            counts = [place(jnp.full(width, n, jnp.int32), width) for n in (0, 1)]
            for candidate in ("map", "vmap"):
                program = lambda n, m=candidate: advance_all(state, n, data, mode=m)  # noqa: E731
                execution.seconds[candidate] = seconds_of(program, *counts)
            faster = execution.seconds["vmap"] < execution.seconds["map"]
            execution.mode = "vmap" if faster else "map"
        return execution.mode or "map"

    def report(state: PopulationState) -> Report:
        width = _width(state)
        return report_all(place(state, width), data_at(width), mode=execution.mode or "map")

    def select(
        state: PopulationState, indices: Sequence[int], width: int | None = None
    ) -> PopulationState:
        kept = _checked_slots("indices", indices, _width(state))
        width = _checked_width(kept.size, width)
        source = kept[np.minimum(np.arange(width), kept.size - 1)]
        return place(take(state, source, np.arange(width) < kept.size), width)

    def put(
        state: PopulationState, slots: Sequence[int], hypers: Any, keys: jax.Array
    ) -> PopulationState:
        width, n = _width(state), _count_members(space, hypers, keys, refine)
        filled = _checked_slots("slots", slots, width)
        if len(set(filled.tolist())) != n or filled.size != n:
            raise ValueError(
                f"slots={filled.tolist()} do not take {n} new members: name {n} different ones."
            )
        source, new = np.zeros(width, int), np.zeros(width, bool)
        source[filled], new[filled] = np.arange(n), True
        arguments = (_rows(hypers, source), _rows(keys, source), new)
        return place(renew(place(state, width), *place(arguments, width)), width)

    def exploit(
        state: PopulationState,
        key: jax.Array,
        fraction: float = 0.25,
        perturb: float = 0.05,
        resample: float = 0.0,
        scores: jax.Array | None = None,
    ) -> tuple[PopulationState, jax.Array]:
        if not 0 < fraction <= 0.5:
            raise ValueError(
                f"fraction={fraction} must lie in (0, 0.5]: the worst copy the best, and nobody is "
                "both."
            )
        width = _width(state)
        numbers = tuple(np.float32(x) for x in (fraction, perturb, resample))
        state, parents = evolve_all(
            place(state, width),
            place.everywhere(key, width),
            place.everywhere(numbers, width),
            None if scores is None else place(jnp.asarray(scores, jnp.float32), width),
            data_at(width),
            mode=execution.mode or "map",
        )
        return place(state, width), parents

    return Population(init, advance, report, select, put, exploit, steps, execution)


def _where(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    """Leafwise `where` by slot, `[n]` against `[n, ...]`."""
    wide = lambda x: condition.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), if_true, if_false)


def _width(state: PopulationState) -> int:
    return int(state.active.shape[0])


def _rows(tree: Any, source: np.ndarray) -> Any:
    """Rows `source` of every leaf, on the host: on the device each number of rows would compile."""

    def rows(x: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(x))[source]
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return np.asarray(x)[source]

    return jax.tree.map(rows, tree)


def _count_members(space: Space, hypers: Any, keys: jax.Array, refine: Refine | None) -> int:
    if not isinstance(hypers, Mapping):
        raise TypeError(f"hypers is {hypers!r}: give a dict from names to values [n, ...].")
    if refine is not None and not jax.tree.leaves(hypers):
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
            "[n, ...]. Make lists arrays (a list is a subtree); add the axis with x[None] for a "
            "single member."
        )
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"hypers and keys disagree on the number of members: {shapes}. Give one row per member."
        )
    n = int(shapes["keys"][0])
    if n == 0:
        raise ValueError(f"The population is empty: {shapes}. Give at least one member.")
    return n


def _checked_width(n: int, width: int | None) -> int:
    if width is not None and width < n:
        raise ValueError(f"width={width} does not hold {n} members: leave it out, or widen it.")
    return n if width is None else width


def _checked_slots(name: str, slots: Sequence[int], width: int) -> np.ndarray:
    indices = np.asarray(slots, int).reshape(-1)
    if indices.size == 0 or indices.min() < 0 or indices.max() >= width:
        raise ValueError(
            f"{name}={indices.tolist()} must name at least one of the slots 0 to {width - 1}."
        )
    return indices
