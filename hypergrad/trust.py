"""Whether a hypergradient can be trusted, from its own size and its history.

Unrolled gradients explode without the loss showing it. What shows it is the hypergradient: its
norm against its own running median, and the growth of the adjoint along the unroll.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Why a step was refused; `info.refused` holds one of them.
TRUSTED, NOT_FINITE, NORM_SPIKE, ADJOINT_GROWTH, NOT_LEARNED = range(5)

REASONS = (
    "trusted",
    "the validation loss or the hypergradient is not finite",
    "the hypergradient's norm is far above its running median",
    "the adjoint grew along the unroll: training is chaotic here",
    "training did not get below the untrained validation loss",
)


@dataclasses.dataclass(frozen=True)
class Trust:
    """When a hypergradient is refused.

    Args:
      max_spike: refuse a norm (in unit coordinates) above this multiple of its running median.
      max_growth: refuse an adjoint that grew more than this along the unroll (`info["growth"]` of
        `Unrolled`; other estimators do not report it); infinity to allow any.
      warm_up: estimates before the running median is believed.

    A loss that rises is no reason: undoing such steps did harm wherever it was tried
    (docs/experiments.md), while a jump of the norm comes before the damage.
    """

    max_spike: float = 10.0
    max_growth: float = float("inf")
    warm_up: int = 3


class TrustState(NamedTuple):
    """The history that trust is judged against.

    Attributes:
      median: running median of the trusted norms.
      seen: trusted estimates so far.
      scale: what outer steps are multiplied with; halves at a refusal, recovers slowly.
    """

    median: jax.Array
    seen: jax.Array
    scale: jax.Array


def initial_trust(dtype: Any) -> TrustState:
    """No history, full steps."""
    return TrustState(jnp.zeros((), dtype), jnp.zeros((), jnp.int32), jnp.ones((), dtype))


def judge(
    trust: Trust, state: TrustState, norm: jax.Array, info: dict[str, jax.Array]
) -> jax.Array:
    """Why the hypergradient is refused, as an int32 index into `REASONS`; 0 if it is trusted."""
    spike = (state.seen > trust.warm_up) & (norm > trust.max_spike * state.median)
    chaotic = ~(info.get("growth", jnp.ones(())) <= trust.max_growth)
    finite = info["finite"] & jnp.isfinite(norm)
    reason = jnp.where(spike, NORM_SPIKE, jnp.where(chaotic, ADJOINT_GROWTH, TRUSTED))
    return jnp.where(finite, reason, NOT_FINITE).astype(jnp.int32)


def remember(state: TrustState, norm: jax.Array, refused: jax.Array) -> TrustState:
    """The history after one more estimate."""
    # A step of 1.2 per estimate towards the sample's side: its rest point is the median, and one
    # outlier moves it no further than any other value does.
    towards = state.median * jnp.where(norm > state.median, 1.2, 1 / 1.2)
    trusted = TrustState(
        median=jnp.where(state.median == 0, norm, towards),
        seen=state.seen + 1,
        scale=jnp.minimum(1.0, 1.1 * state.scale),
    )
    # Refusals in a row raise the bar, so that a lasting change of scale is accepted in the end.
    distrusted = TrustState(2 * state.median, state.seen, state.scale / 2)
    return TrustState(*jax.tree.map(lambda a, b: jnp.where(refused > 0, a, b), distrusted, trusted))
