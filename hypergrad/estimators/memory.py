"""What a program needs and what a device has, in bytes: asked of XLA, before anything runs."""

import os
from collections.abc import Callable
from typing import Any

import jax


def compiled_for(function: Callable[..., Any], *args: Any) -> Any:
    """`function` compiled for arguments of these shapes and dtypes.

    `args` may be arrays, tracers or `jax.ShapeDtypeStruct`; works while another function is traced.
    """
    return jax.jit(function).lower(*shapes_of(args)).compile()


def temporary_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results, on one device."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(
            f"XLA's {jax.default_backend()!r} backend does not say what memory a program needs: "
            "choose the checkpoint yourself."
        )
    return int(analysis.temp_size_in_bytes)


def shapes_of(tree: Any) -> Any:
    """The tree with a `jax.ShapeDtypeStruct` for each leaf, tracers included."""

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    return jax.tree.map(shape_of, tree)


def device_bytes() -> int:
    """Half of what the first device may use: what it says of itself, or the host's memory."""
    stats = jax.devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", host)) // 2
