"""Evolution strategies: the gradient of a smoothed loss from perturbed runs alone."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hypergrad import checks
from hypergrad.data.keys import NOISE
from hypergrad.estimators.base import (
    Estimate,
    Estimator,
    ValidateAt,
    Window,
    refuse_wrong_place,
    summary,
)
from hypergrad.problem.problem import steps_done
from hypergrad.trees import Hyper, InnerState, Key, Leaf, Scalar, State, path_name, strong, widen

Method = Literal["pes", "es", "es_single"]


class Particles(NamedTuple):
    """What `Evolution` remembers between calls.

    Attributes:
      calls: int32, estimates so far: fresh noise even where key and step stay the same.
      inner: training states `[2 * pairs, ...]`, those under +noise before those under -noise; None
        where each call starts its particles anew.
      noise: `[pairs, |hyper|]`; of PES the sum over the episode, of ES-Single the one draw; None
        where nothing of it lasts.
    """

    calls: jax.Array
    inner: Any
    noise: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Evolution(Estimator):
    """Antithetic evolution strategies: the gradient of the loss smoothed by Gaussian noise.

    2 `pairs` particles train under `hyper` + e_i and `hyper` - e_i, e_i ~ N(0, std^2 I), and

        grad = 1 / pairs sum_i w_i (E(+i) - E(-i)) / (2 std^2),

    E the validation loss at the end of the window. Nothing is differentiated: hard masks, sign
    steps, integer states and chaos are fine. All particles share the step keys and minibatches of
    the unperturbed run, which `Estimate.loss` and `Estimate.inner` come from.

    Args:
      pairs: antithetic pairs.
      std: standard deviation of the noise, in the coordinates of the `hyper` received, the same for
        every entry: give `hyper` entries of one scale (tuners hand over unit coordinates).
      method: what a window sees of the windows before it.
        "es": nothing; particles start from `inner` in each call and w_i = e_i. Biased by
        truncation, as `Unrolled` is on a window.
        "pes": particles go on from window to window, each under fresh noise, and w_i is the sum of
        particle i's noise over the episode (since `init`). Unbiased.
        "es_single": particles go on, each under the one e_i that `init` drew, and w_i = e_i.
        Unbiased.
      validate_at: as in `Unrolled`.

    An episode starts with `init(window, hyper)`, whose particles all stand at `window.inner`.
    Where it ends, call `init` again with the new start and a new key: kept particles would belong
    to the old run, and under an old key ES-Single repeats its directions. With `inner=None` each
    call is a whole run from `problem.init(hyper +- e_i, key)`, an episode of one window, in which
    the three methods are one; the state then only counts calls.

    What is estimated: with windows 1..M of an episode and `hyper` held fixed, the estimates of
    "pes" and "es_single" sum in expectation to the gradient of E_1 + ... + E_M, the sum of the
    windows' validation losses (not of the last one alone), each through the whole episode before
    it. "pes" smooths each window's use of `hyper` by noise of its own, "es_single" all by the same.
    An outer step between windows moves `hyper` under running particles, an error that vanishes
    with the step (hysteresis).

    Bias: smoothing, O(std^2), none for a loss that is quadratic in `hyper`. Variance of one pair
    where the loss is nearly linear within std: (|hyper| + 1) |grad|^2 in total, so the relative
    error is about sqrt((|hyper| + 1) / pairs); "pes" weighs a window by the noise of all windows
    before it, so that its variance may grow with their number, that of "es_single" does not.

    Cost: 2 pairs + 1 gradient evaluations per step, one `vmap`, plus as many validation losses;
    memory (2 pairs + 1) |inner| and what 2 pairs + 1 steps at once take, at any K. "pes" and
    "es_single" keep 2 pairs |inner| + pairs |hyper| in the state.

    `info["std_error"]` is the standard error of `grad` (the norm of the entries' errors) from the
    spread over pairs, infinite for one pair: compare it with the norm of `grad`.
    `info["nonfinite"]` is the share of particles whose validation loss is not finite: a single one
    makes `grad` non-finite, and stays so until the state is restored or made anew.
    `info["first_bad_step"]` is the earliest over particles and the unperturbed run.

    Raises:
      ValueError: pairs below 1, std that is not positive, an unknown method.

    Source: Salimans et al. 2017, section 2 and algorithm 1 (ES; truncated: Vicol 2023, algorithm
    1); Vicol, Metz and Sohl-Dickstein 2021, section 4 (PES; restated as the estimator of section 2
    in Vicol 2023); Vicol, Kolter and Swersky 2023, eq. 4, algorithm 2 and propositions 3.1 and 3.2
    (ES-Single: bias and variance).

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad.estimators.hypergradient import hypergradient
    >>> from hypergrad.problem import bilevel
    >>> import optax
    >>> def loss(w, hyper, batch, key):
    ...     return jnp.mean((w - batch) ** 2)
    >>> problem = bilevel(lambda key: jnp.zeros(()), loss, loss, lambda h: optax.sign_sgd(h["lr"]))
    >>> arguments = ({"lr": 0.1}, None, jnp.ones((5, 3)), jnp.ones(3), jax.random.key(0))
    >>> estimate = hypergradient(problem, *arguments, Evolution(pairs=1000, std=0.01))
    >>> print(f"{estimate.grad['lr']:.0f}")  # d/dlr (5 lr - 1)^2 at 0.1
    -5
    """

    pairs: int
    std: float
    method: Method = "pes"
    validate_at: ValidateAt = "last"
    perturbs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_wrong_place(self.validate_at)
        checks.integer_field(self, "pairs", remedy="antithetic pairs of particles, for instance 16")
        checks.positive("std", self.std, "in the coordinates of hyper, for instance 0.01")
        checks.choice("method", self.method, get_args(Method))

    def init(self, window: Window, hyper: Hyper) -> Particles:
        """The state at an episode's start: all particles at `inner`; see the class."""
        calls = jnp.zeros((), jnp.int32)
        if not self._lasting(window):
            return Particles(calls, None, None)
        like = ravel_pytree(strong(hyper))[0]
        noise = jnp.zeros((self.pairs, like.size), like.dtype)
        if self.method == "es_single":
            noise = self._draw(window.key, steps_done(window.inner), calls, like)
        particles = jax.tree.map(lambda x: _repeat(x, 2 * self.pairs), window.inner)
        return Particles(calls, particles, noise)

    def estimate(self, window: Window, hyper: Hyper, state: State) -> tuple[Estimate, State]:
        """One window of all particles and of the unperturbed run; see the class."""
        flat, unravel = ravel_pytree(hyper)
        window = window.judging(self.validate_at)
        offset = steps_done(window.start(hyper))
        weight, noise = self._noise(window.key, offset, state, flat)  # [pairs, |hyper|] both

        def run(move: jax.Array, inner: InnerState) -> tuple[Scalar, InnerState, jax.Array]:
            moved, own = unravel(flat + move), dataclasses.replace(window, inner=inner)
            # The unperturbed run's offset for all: a count per particle would draw the same
            # minibatch once per particle.
            end = own.trained(moved, own.begin(moved), offset)
            return own.loss(own.judged(end), moved, offset), end.inner, end.first_bad_step

        # The unperturbed run is one more member of the same vmap: a program of its own would double
        # what is compiled.
        lasting = self._lasting(window)
        starts = _with_particles(window.inner, state.inner) if lasting else window.inner
        moves = jnp.concatenate([jnp.zeros_like(flat)[None], noise, -noise])  # [1 + 2 pairs, ...]
        losses, ends, bad = jax.vmap(run, in_axes=(0, 0 if lasting else None))(moves, starts)

        perturbed = widen(losses)[1:]
        slopes = (perturbed[: self.pairs] - perturbed[self.pairs :]) / (2 * self.std**2)
        grads = weight * slopes[:, None].astype(weight.dtype)
        mean = jnp.mean(grads, 0)
        end = jax.tree.map(lambda x: x[0], ends)
        grad = unravel(mean.astype(flat.dtype))
        info = summary(losses[0], grad, _earliest(bad, window.num_steps))
        info["std_error"] = _standard_error(grads, mean)
        info["nonfinite"] = jnp.mean(~jnp.isfinite(perturbed), dtype=jnp.float32)
        if lasting:
            kept = weight if self.method == "pes" else noise
            particles = jax.tree.map(lambda x: x[1:], ends)
            state = Particles(state.calls + 1, particles, kept.astype(state.noise.dtype))
        else:
            state = state._replace(calls=state.calls + 1)
        return Estimate(losses[0], grad, end, info), state

    def _lasting(self, window: Window) -> bool:
        return window.inner is not None and self.method != "es"

    def _draw(
        self, key: Key, step: jax.typing.ArrayLike, calls: jax.Array, like: jax.Array
    ) -> jax.Array:
        """Noise `[pairs, |hyper|]`, fresh for each step of the run and for each call.

        The step serves single calls of `hypergradient` and a tuner that restores this state but not
        the step; the count of calls serves runs that do not count steps or start anew each time.
        """
        stream = jax.random.fold_in(jax.random.fold_in(key, NOISE), step)
        shape = (self.pairs, like.size)
        noise = jax.random.normal(jax.random.fold_in(stream, calls), shape, like.dtype)
        return jnp.asarray(self.std, like.dtype) * noise

    def _noise(
        self, key: Key, step: jax.typing.ArrayLike, state: Particles, like: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What a pair's difference is weighted with, and what moves `hyper` in this window."""
        if state.noise is not None and self.method == "es_single":
            return state.noise, state.noise.astype(like.dtype)
        noise = self._draw(key, step, state.calls, like)
        return (noise if state.noise is None else state.noise + noise), noise


def _repeat(leaf: Leaf, count: int) -> jax.Array:
    # jnp.array makes a copy that is strongly typed: weak types recompile at the second window.
    leaf = jnp.asarray(leaf)
    leaf = leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.astype(leaf.dtype)
    return jnp.broadcast_to(leaf, (count, *leaf.shape))


def _with_particles(inner: InnerState, particles: InnerState) -> InnerState:
    """The unperturbed state in front of the particles, `[1 + 2 pairs, ...]`, at one step."""

    def join(path: tuple[Any, ...], first: Leaf, rest: jax.Array) -> jax.Array:
        if path_name(path[:1]) == "step":
            # A tuner that goes back restores the particles, but never the count of steps.
            return _repeat(first, 1 + rest.shape[0])
        return jnp.concatenate([jnp.asarray(first)[None], rest])

    return jax.tree_util.tree_map_with_path(join, inner, particles)


def _earliest(bad: jax.Array, steps: int) -> jax.Array:
    first = jnp.min(jnp.where(bad < 0, steps, bad))
    return jnp.where(first == steps, -1, first).astype(jnp.int32)


def _standard_error(grads: jax.Array, mean: jax.Array) -> jax.Array:
    pairs = grads.shape[0]
    if pairs == 1:
        return jnp.full((), jnp.inf, grads.dtype)
    return jnp.sqrt(jnp.sum((grads - mean) ** 2) / pairs / (pairs - 1))
