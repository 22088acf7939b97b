"""Where a population's slots live, and how its members are run: side by side or in turn."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hypergrad.trees import Tree

_AXIS = "members"
Mode = Literal["vmap", "map"]


class Placement:
    """Where slots live: sharded over the devices, or on the first, or wherever JAX puts them."""

    def __init__(self, devices: Sequence[jax.Device] | None) -> None:
        self.devices = list(jax.local_devices() if devices is None else devices)
        # One device that nobody chose: committing arrays to it could only get in the user's way.
        self.free = devices is None and len(self.devices) == 1
        self.mesh = jax.sharding.Mesh(np.array(self.devices), (_AXIS,))

    def is_sharded(self, width: int) -> bool:
        """Whether slots of this width are spread over the devices."""
        return len(self.devices) > 1 and width % len(self.devices) == 0

    def local(self, width: int) -> int:
        """Slots per device."""
        return width // len(self.devices) if self.is_sharded(width) else width

    def __call__(self, tree: Tree, width: int) -> Tree:
        """`tree`, leaves `[width, ...]`, where slots of this width live."""
        return self._put(tree, width, PartitionSpec(_AXIS))

    def everywhere(self, tree: Tree, width: int) -> Tree:
        """`tree` on every device that slots of this width live on."""
        return self._put(tree, width, PartitionSpec())

    def _put(self, tree: Tree, width: int, spec: PartitionSpec) -> Tree:
        if self.free:
            return tree
        if self.is_sharded(width):
            return jax.device_put(tree, NamedSharding(self.mesh, spec))
        return jax.device_put(tree, SingleDeviceSharding(self.devices[0]))

    def each(
        self, function: Callable[..., Tree], mode: Mode, slots: tuple[Tree, ...], data: Tree
    ) -> Tree:
        """`function(*slot, data)` of every slot; `slots` are its arguments, leaves `[n, ...]`."""
        run = functools.partial(_each, function, mode)
        if not self.is_sharded(jax.tree.leaves(slots)[0].shape[0]):
            return run(slots, data)
        # Members never talk to one another: each device runs its own, with no agreement needed on
        # when a loop ends.
        return jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(PartitionSpec(_AXIS), PartitionSpec()),
            out_specs=PartitionSpec(_AXIS),
            check_vma=False,
        )(slots, data)


def _each(function: Callable[..., Tree], mode: Mode, slots: tuple[Tree, ...], data: Tree) -> Tree:
    def one(slot: tuple[Tree, ...]) -> Tree:
        return function(*slot, data)

    return jax.vmap(one)(slots) if mode == "vmap" else jax.lax.map(one, slots)


@dataclasses.dataclass
class Execution:
    """How a population's members are run, as decided by argument or at the first `advance`.

    Attributes:
      mode: "vmap", "map", or None while undecided.
      seconds: what one update of all members took in either mode, where it was measured.
    """

    mode: Mode | None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def decide(self, update: Callable[..., Tree], nothing: jax.Array, one: jax.Array) -> None:
        """Keeps the mode in which `update(one, mode=mode)` is faster; `nothing` updates nothing."""
        modes: tuple[Mode, Mode] = ("map", "vmap")
        for mode in modes:
            self.seconds[mode] = _seconds_of(functools.partial(update, mode=mode), nothing, one)
        self.mode = "vmap" if self.seconds["vmap"] < self.seconds["map"] else "map"


def _seconds_of(update: Callable[..., Tree], nothing: jax.Array, one: jax.Array) -> float:
    """What one update takes once compiled; infinite where it does not fit the memory."""
    try:
        jax.block_until_ready(update(nothing))
        best, begin = float("inf"), time.perf_counter()
        # A second look where it costs next to nothing: the first may be a hiccup.
        while best == float("inf") or time.perf_counter() - begin < 0.02:
            called = time.perf_counter()
            jax.block_until_ready(update(one))
            best = min(best, time.perf_counter() - called)
        return best
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("inf")
