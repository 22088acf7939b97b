"""One outer step: whether a hypergradient is trusted, and where it leads.

Unrolled gradients explode without the loss showing it. What shows it is the hypergradient: its
norm against its own running median, and the growth of the adjoint along the unroll.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad.checks import choice, integer_field, positive
from hypergrad.space.space import Space
from hypergrad.trees import (
    Hyper,
    Key,
    Scalar,
    State,
    Unit,
    inner_product,
    norm,
    select,
    widen,
)
from hypergrad.tuners.base import Average, Info, Position, TrustState, TunerState

# Updates that the share of refusals is taken over.
LATELY = 16

# Why a step was refused; `info.refused` holds one of them.
TRUSTED, NOT_FINITE, NORM_SPIKE, ADJOINT_GROWTH, NOT_LEARNED, NOT_SOLVED = range(6)

# Where an estimate stands, `TrustState.ground`: ahead of the trusted position; at the same place
# again after a refusal; back at the trusted position; one step on from there.
AHEAD, AGAIN, BACK, LEAVING = range(4)

REASONS = (
    "trusted",
    "the validation loss or the hypergradient is not finite",
    "the hypergradient's norm is far above its running median",
    "the adjoint grew along the unroll: training is chaotic here",
    "training did not get far enough below the untrained validation loss (Trust.max_loss)",
    "an implicit estimator's linear system is not solved, or training is not at rest (a kink?)",
)


@dataclasses.dataclass(frozen=True)
class Trust:
    """When a hypergradient is refused.

    What is refused leaves no trace in the training state. A run that goes on (`alternating`) stands
    for one update first, as the cause may be a bad batch; refused again, or because the adjoint
    grew, it returns to the last trusted position, and the next step from there is a half as long.
    If that one is refused as well it goes the other way, in full: what is trusted there does not
    see the chaos beside it. A hypergradient that is refused at the trusted position itself, or
    before anything was trusted, leaves nothing to return to (a start whose learning rate diverges):
    if finite, its direction is followed as the only guide there is, at the length of a usual one,
    and training starts over from the trusted parameters. Before anything was trusted it is then
    taken over a quarter of the steps, a sixteenth, ....

    Args:
      max_spike: refuse a norm (in unit coordinates) above this multiple of its running median.
      max_growth: refuse an adjoint that grew more than this along the unroll (`info["growth"]` of
        `Unrolled`; other estimators do not report it). Healthy runs on digits stay below 1,
        diverging ones start at 2 to 100; whole runs under Adam with a warm-up reach 2.3.
      max_residual: refuse a linear system whose residual is above this (`info["residual"]` of
        `Implicit`): 1 is no solution at all, a diverged Neumann series is far above.
      max_unconverged: refuse an implicit hypergradient where converging would change the validation
        loss by more than this share of it (`info["unconverged_share"]`), as at a kink (an L1
        penalty: see `hypergrad.prox`). This and `max_residual` rewind nothing: training goes on.
        Raise it, up to infinity, for smooth losses where the validation loss goes towards 0.
      warm_up: estimates before the running median is believed.
      rewinds: "all": the training state goes back too, of which a second copy is held for that
        (three times the parameters under Adam). "hyper": only the hyperparameters go back, and
        training goes on from where the refused ones led; what they made infinite stays so (`fit`
        raises then): for models that fill the memory, whose runs keep checkpoints.
      max_loss: `restarting` refuses a run whose validation loss does not end below this share of
        the untrained one (a diverged network can look calm: it is dead). Raise it, up to
        `float("inf")`, where the best that training can gain is little.

    A loss that rises is no reason: undoing such steps did harm wherever it was tried, while a jump
    of the norm comes before the damage.
    """

    max_spike: float = 10.0
    max_growth: float = 2.0
    warm_up: int = 3
    max_loss: float = 0.8
    max_residual: float = 10.0
    max_unconverged: float = 0.5
    rewinds: Literal["all", "hyper"] = "all"

    def __post_init__(self) -> None:
        choice("rewinds", self.rewinds, ("all", "hyper"))
        integer_field(self, "warm_up", 0)
        for name in ("max_spike", "max_growth", "max_loss", "max_residual", "max_unconverged"):
            positive(name, getattr(self, name), "infinity never refuses", infinite=True)


def initial_trust(dtype: jnp.dtype) -> TrustState:
    """No history, full steps, full horizon."""
    none = jnp.zeros((), jnp.int32)
    one, no_bits = jnp.ones((), dtype), jnp.zeros((), jnp.uint32)
    return TrustState(jnp.zeros((), dtype), one, none, one, none, none, no_bits)


def first_state(trust: Trust, now: Position, key: Key) -> TunerState:
    """The state of a tuner that begins at `now`."""
    history = initial_trust(jnp.result_type(*jax.tree.leaves(now.unit)))
    none = jnp.zeros((), jnp.int32)
    state = TunerState(now, held(trust, now), history, Average(now.unit, none), key, none)
    # Each leaf in a buffer of its own, none of them the caller's: the state may be donated.
    return jax.tree.map(jnp.copy, state)


def held(trust: Trust, position: Position) -> Position:
    """What of a trusted position is held, to go back to."""
    if trust.rewinds == "all":
        return position
    return position._replace(inner=(), estimator_state=())


def judge(trust: Trust, state: TrustState, norm: Scalar, info: dict[str, jax.Array]) -> jax.Array:
    """Why the hypergradient is refused, an index into `REASONS`; 0 if it is trusted."""
    spike = (state.seen > trust.warm_up) & (norm > trust.max_spike * state.bar * state.median)
    # gradients that were 0 so far are no measure of the next one
    spike &= state.median > 0
    # negated, so that a growth of NaN is refused
    chaotic = ~(info.get("growth", jnp.zeros(())) <= trust.max_growth)
    unsolved = ~(info.get("residual", jnp.zeros(())) <= trust.max_residual)
    unsolved |= ~(info.get("unconverged_share", jnp.zeros(())) <= trust.max_unconverged)
    finite = info["finite"] & jnp.isfinite(norm)
    # From the mildest to the gravest, each over the one before: NaN must not pass for a spike.
    reason = jnp.where(unsolved, NOT_SOLVED, TRUSTED)
    reason = jnp.where(spike, NORM_SPIKE, jnp.where(chaotic, ADJOINT_GROWTH, reason))
    return jnp.where(finite, reason, NOT_FINITE).astype(jnp.int32)


def stands(state: TrustState, refused: jax.Array) -> jax.Array:
    """Whether a refused estimate is taken again at the same place, with other batches.

    Not where the adjoint grew: that is the doing of the hyperparameters, not of a batch.
    """
    of_a_batch = (refused == NOT_FINITE) | (refused == NORM_SPIKE)
    return of_a_batch & (state.seen > 0) & (state.ground == AHEAD)


def remember(
    state: TrustState,
    norm: Scalar,
    refused: jax.Array,
    steps: int,
    again: jax.Array | bool = False,
) -> TrustState:
    """The history after one more estimate over `steps` steps, which is taken `again` or not."""
    bits = (state.refusals << 1) | (refused > 0).astype(jnp.uint32)
    state = state._replace(refusals=bits)
    # A step of 1.2 per estimate towards the sample's side: its rest point is the median, and one
    # outlier moves it no further than any other value does.
    towards = state.median * jnp.where(norm > state.median, 1.2, 1 / 1.2)
    trusted = TrustState(
        median=jnp.where(state.median == 0, norm, towards),
        bar=jnp.maximum(1.0, state.bar / 1.2),
        seen=state.seen + 1,
        # Whole again as soon as a step from returned ground was trusted: a product of halvings that
        # recovers slowly stands still where every third step is refused.
        scale=jnp.where(state.ground == BACK, state.scale, 1.0),
        shortened=state.shortened,
        ground=jnp.where(state.ground == BACK, LEAVING, AHEAD).astype(state.ground.dtype),
        refusals=bits,
    )
    longer = state._replace(shortened=state.shortened - 1)
    back = state._replace(
        # A lasting change of scale is accepted in the end. Not by way of the median, which is also
        # the length of the steps that follow a refused hypergradient.
        bar=2 * state.bar,
        scale=jnp.maximum(state.scale / 2, 0.125),
        ground=jnp.where(again, AGAIN, BACK).astype(state.ground.dtype),
    )
    # 16 steps still tell what a learning rate does; fewer only where those overflow.
    limit = jnp.where(refused == NOT_FINITE, _quarterings(steps), _quarterings(steps // 16))
    shorter = state._replace(
        shortened=jnp.maximum(jnp.minimum(state.shortened + 1, limit), state.shortened)
    )
    accepted = refused == 0
    cases = [accepted & (state.shortened == 0), accepted, state.seen > 0]
    return jax.tree.map(
        lambda *options: jnp.select(cases, options[:3], options[3]), trusted, longer, back, shorter
    )


def recent_refusals(state: TrustState) -> jax.Array:
    """Of the last 16 updates, int32."""
    return jax.lax.population_count(state.refusals & (2**LATELY - 1)).astype(jnp.int32)


def gropes(state: TrustState, refused: jax.Array) -> jax.Array:
    """Whether to follow a refused hypergradient, for want of trusted ground to return to."""
    lost = (state.seen == 0) | (state.ground == BACK)
    return (refused > 0) & (refused != NOT_FINITE) & lost


def retreats(state: TrustState, refused: jax.Array) -> jax.Array:
    """Whether the step from the trusted position was refused twice, and goes the other way now.

    To go back once more would take the same step again, for ever. Nor is the refused hypergradient
    a guide: where the adjoint grows a hundredfold its sign is chance.
    """
    return (refused > 0) & (state.seen > 0) & (state.ground == LEAVING)


def temper(grad: Unit, norm: Scalar, state: TrustState, refused: jax.Array) -> Unit:
    """A refused hypergradient at the length of a usual one; a trusted one as it is."""
    usual = jnp.where(state.median > 0, state.median, 1.0)
    # Never longer than it is: a gradient near 0 says that there is little to gain, not much.
    factor = jnp.where(refused > 0, jnp.minimum(1.0, usual / norm), 1.0)
    return jax.tree.map(lambda g: factor.astype(g.dtype) * g, grad)


def _quarterings(steps: int) -> int:
    return max(steps.bit_length() - 1, 0) // 2


class Outer(NamedTuple):
    """What one hypergradient leads to.

    Attributes:
      unit: the hyperparameters after the outer step.
      outer_state: the outer optimiser's state after it.
      trust: the history with this hypergradient in it.
      accepted: go on from here: the hypergradient is trusted and the run was whole.
      stands: stand where this update began, hyperparameters and all.
      moves_on: go back to the trusted position, but with the new hyperparameters.
      worth: the decrease of the validation loss that the step promises, to first order.
    """

    unit: Unit
    outer_state: State
    trust: TrustState
    accepted: jax.Array
    stands: jax.Array
    moves_on: jax.Array
    worth: Scalar


def outer_update(
    optimizer: optax.GradientTransformation,
    space: Space,
    max_move: float,
    state: TunerState,
    grad: Unit,
    refused: jax.Array,
    steps: int,
    *,
    retries: bool,
) -> Outer:
    """One projected step along a judged hypergradient; `retries`: a refused one may be again."""
    trust, unit = state.trust, state.now.unit
    size = norm(grad)
    again = stands(trust, refused) & retries
    history = remember(trust, size, refused, steps, again)
    step_grad = temper(grad, size, trust, refused)
    updates, outer_state = optimizer.update(step_grad, state.now.outer_state, unit)
    # What is not at rest yet trains on from here, and moves nothing else.
    waits = refused == NOT_SOLVED
    as_before = (trust._replace(refusals=history.refusals), state.now.outer_state)
    history, outer_state = select(waits, as_before, (history, outer_state))
    updates = jax.tree.map(lambda u: jnp.where(waits, 0, u), updates)
    # The limit holds per coordinate and after the scale: Adam's first step has the length of its
    # rate whatever the gradient, and a user's optimiser may take any.
    scale = jnp.where(gropes(trust, refused), 1.0, history.scale)
    moves = jax.tree.map(lambda u: jnp.clip(scale * u, -max_move, max_move), updates)
    moved = space.project(optax.apply_updates(unit, moves))
    # Away from chaos by a whole step, as towards it they are shortened (by this scale): else the
    # trusted hypergradient, which does not see it, would undo each step away.
    mirrored = jax.tree.map(lambda t, u: t + (t - u) / trust.scale, state.trusted.unit, unit)
    away = retreats(trust, refused) & ~waits
    moved, outer_state = select(
        away, (space.project(mirrored), state.trusted.outer_state), (moved, outer_state)
    )
    whole = trust.shortened == 0
    accepted = ((refused == 0) & whole) | waits
    moves_on = ((refused == 0) & ~whole) | gropes(trust, refused) | away
    worth = inner_product(step_grad, jax.tree.map(jnp.subtract, unit, moved))
    worth = jnp.where(accepted, worth, 0.0)
    return Outer(moved, outer_state, history, accepted, again, moves_on, worth)


def next_state(
    trust: Trust,
    state: TunerState,
    outer: Outer,
    ahead: Position,
    here: Position,
    back: Position,
    power: int = 0,
) -> TunerState:
    """On from `ahead` where the hypergradient was trusted, else from `here` again or from `back`.

    Selects, not branches: under `vmap` all sides would run anyway. `power`: see `include`.
    """
    return TunerState(
        now=select(outer.accepted, ahead, select(outer.stands, here, back)),
        trusted=select(
            outer.accepted,
            held(trust, state.now),
            select(outer.stands, state.trusted, held(trust, back)),
        ),
        trust=outer.trust,
        average=include(state.average, state.now.unit, outer.accepted, power),
        key=state.key,
        updates=state.updates + 1,
    )


def include(average: Average, unit: Unit, trusted: jax.Array, power: int = 0) -> Average:
    """The mean with one more iterate, if it is trusted; the n-th has a weight of about n**power.

    Source: polynomial-decay averaging, Shamir and Zhang 2013, section 4.
    """
    seen = average.seen + trusted
    weight = jnp.where(trusted, (1.0 + power) / (seen + power), 0.0)
    mean = jax.tree.map(lambda m, u: m + weight.astype(m.dtype) * (u - m), average.unit, unit)
    return Average(mean, seen)


def info_of(
    loss: Scalar,
    hyper: Hyper,
    grad: Unit,
    refused: jax.Array,
    outer: Outer,
    about: dict[str, jax.Array],
) -> Info:
    """The `info` of an update; `about` is the estimator's own."""
    return Info(
        loss=widen(loss),
        hyper=hyper,
        grad=grad,
        norm=norm(grad),
        worth=outer.worth,
        refused=refused,
        refusals=recent_refusals(outer.trust),
        step_scale=outer.trust.scale,
        finite=about["finite"],
        first_bad_step=about["first_bad_step"],
        estimate=about,
    )
