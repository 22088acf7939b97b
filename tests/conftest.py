"""Fixtures shared by all tests."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test with 64-bit types, as oracles by finite differences need them."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[jnp.dtype]:
    """Run the test twice: in float32, and in float64 with 64-bit types enabled."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)
