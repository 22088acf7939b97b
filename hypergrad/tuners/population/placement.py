"""Where a population's slots live, and how its members are run: side by side or in turn."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

_AXIS = "members"
Mode = Literal["vmap", "map"]


class Placement:
    """Where slots live: sharded over the devices, or on the first, or wherever JAX puts them."""

    def __init__(self, devices: Sequence[jax.Device], default: bool) -> None:
        self.devices = list(devices)
        # One device that nobody chose: committing arrays to it could only get in the user's way.
        self.free = default and len(self.devices) == 1
        self.mesh = jax.sharding.Mesh(np.array(self.devices), (_AXIS,))

    def is_sharded(self, width: int) -> bool:
        """Whether slots of this width are spread over the devices."""
        return len(self.devices) > 1 and width % len(self.devices) == 0

    def local(self, width: int) -> int:
        """Slots per device."""
        return width // len(self.devices) if self.is_sharded(width) else width

    def __call__(self, tree: Any, width: int) -> Any:
        """`tree`, leaves `[width, ...]`, where slots of this width live."""
        return self._put(tree, width, PartitionSpec(_AXIS))

    def everywhere(self, tree: Any, width: int) -> Any:
        """`tree` on every device that slots of this width live on."""
        return self._put(tree, width, PartitionSpec())

    def _put(self, tree: Any, width: int, spec: PartitionSpec) -> Any:
        if self.free:
            return tree
        if self.is_sharded(width):
            return jax.device_put(tree, NamedSharding(self.mesh, spec))
        return jax.device_put(tree, SingleDeviceSharding(self.devices[0]))

    def replicated(self, tree: Any) -> Callable[[int], Any]:
        """`tree` for slots of a width, copied once."""
        copies: dict[bool, Any] = {}

        def at(width: int) -> Any:
            sharded = self.is_sharded(width)
            if sharded not in copies:
                # Also without placement: numpy arrays would be sent to the device at every call.
                on_device = jax.tree.map(jnp.asarray, tree)
                copies[sharded] = self.everywhere(on_device, width)
            return copies[sharded]

        return at

    def each(self, function: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
        """`function(member, number, data)` for all members and numbers."""

        def run(members: Any, numbers: jax.Array, data: Any) -> Any:
            if mode == "vmap":
                return jax.vmap(function, (0, 0, None))(members, numbers, data)
            return jax.lax.map(lambda x: function(*x, data), (members, numbers))

        def placed(members: Any, numbers: jax.Array, data: Any) -> Any:
            if not self.is_sharded(numbers.size):
                return run(members, numbers, data)
            slots, whole = PartitionSpec(_AXIS), PartitionSpec()
            # Members never talk to one another: each device runs its own, with no agreement needed
            # on when a loop ends.
            return jax.shard_map(
                run,
                mesh=self.mesh,
                in_specs=(slots, slots, whole),
                out_specs=slots,
                check_vma=False,
            )(members, numbers, data)

        return placed


def seconds_of(program: Callable[[Any], Any], nothing: Any, one: Any) -> float:
    """What one update takes once compiled; infinite where it does not fit the memory."""
    try:
        jax.block_until_ready(program(nothing))
        best, begin = float("inf"), time.perf_counter()
        # A second look where it costs next to nothing: the first may be a hiccup.
        while best == float("inf") or time.perf_counter() - begin < 0.02:
            called = time.perf_counter()
            jax.block_until_ready(program(one))
            best = min(best, time.perf_counter() - called)
        return best
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("inf")
