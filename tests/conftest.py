"""Fixtures shared by all tests."""

import contextlib
import gc
import os
import uuid
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from benchmarks.postgresql import UnavailableError, server

# Two thirds of a run is XLA compiling tiny programs once each: with the older emitters (which JAX
# 0.11 has no more), and without the expensive passes, it takes a third of the time. Values agree to
# rounding, and benchmarks/ run with all, the examples with most. The flags are read when the
# backend starts; the variable is for the processes that tests start, as this one has imported JAX.
if jax.__version_info__ < (0, 11):
    flags = os.environ.get("XLA_FLAGS", "")
    # A tiny program is not worth the up to 32 parts into which it would be split to be compiled.
    flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = flags
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes millions of small objects, which Python would search for cycles every 700.
gc.set_threshold(20_000)


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


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """Give the URL of a PostgreSQL server that is started here, and installed where need be."""
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(server())
        except UnavailableError as error:
            pytest.skip(f"PostgreSQL: {error}")
        yield url


@pytest.fixture
def postgresql(postgresql_server: str) -> str:
    """Give the URL of a new, empty database."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    plain = postgresql_server.replace("+psycopg", "")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgresql_server.rpartition('/')[0]}/{name}"
