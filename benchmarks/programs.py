"""Measure hypergradients of random programs against plain `jax.grad` and float64 differences.

Run: `python -m benchmarks.programs [--quick] [--count 5000] [--minutes M] [--seed 0] [--out FILE]`
(some five seconds for each program of 8 examples on one core; quick: 80 examples).

An example is a program at a random position of its hyperparameters, bounds included; 8 positions of
a program are judged in one compiled call. A program is a chain of 1 to 4 of the optax
transformations in PARTS, in a wrapper or not, an activation with or without kinks, and with or
without a function whose derivative rule is its own: two training steps of a small network, in
float64. For each example, `Unrolled()` is compared with plain `jax.grad` of the same loop (its
gradients lifted by `hypergrad.nonzero_gradient`, as `bilevel` does), with `Forward()`, and, unless
a rule is declared, with central differences along a random direction, the nearest of several step
sizes.

Prints the median, the 99th percentile and the worst relative error of each comparison, and every
disagreement above 1e-4 with its cause: a kink (the slopes to both sides differ), a step of
differences that is too coarse (they do not settle), rounding (the hypergradient moves as much
where hyperparameters move in their last places, as in a run that blows up), or unexplained.
`finite` False counts as flagged; a value that is not finite while `finite` is True would be named.
"""

import argparse
import collections
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.problem.structure import reaches

STEPS = 2
TOLERANCE = 1e-4
X = np.random.default_rng(0).normal(size=(STEPS, 4, 3))
Y = np.tanh(X @ np.arange(3.0))
VALID = np.random.default_rng(1).normal(size=(4, 3))
TARGET = np.tanh(VALID @ np.arange(3.0))
Hyper = dict[str, Any]
Maker = Callable[[Hyper], optax.GradientTransformation]

# Each hyperparameter's range; a program's positions lie in [0, 1].
RANGES = {
    "lr": (1e-3, 0.3),
    "l2": (0.0, 0.1),
    "rate": (0.0, 0.95),
    "decay": (0.5, 0.99),
    "bound": (0.05, 2.0),
    "coefficient": (0.0, 0.1),
}
MIDDLE = {name: (low + high) / 2 for name, (low, high) in RANGES.items()}
PARTS: dict[str, Maker] = {
    "adam": lambda h: optax.scale_by_adam(h["rate"], h["decay"]),
    "nesterov adam": lambda h: optax.scale_by_adam(h["rate"], h["decay"], nesterov=True),
    "amsgrad": lambda h: optax.scale_by_amsgrad(h["rate"], h["decay"]),
    "adamax": lambda h: optax.scale_by_adamax(h["rate"], h["decay"]),
    "belief": lambda h: optax.scale_by_belief(h["rate"], h["decay"]),
    "yogi": lambda h: optax.scale_by_yogi(h["rate"], h["decay"]),
    "adan": lambda h: optax.scale_by_adan(h["rate"]),
    "rms": lambda h: optax.scale_by_rms(h["decay"]),
    "stddev": lambda h: optax.scale_by_stddev(h["decay"]),
    "rss": lambda h: optax.scale_by_rss(),
    "adadelta": lambda h: optax.scale_by_adadelta(h["decay"], eps=1e-3),
    "novograd": lambda h: optax.scale_by_novograd(h["rate"], h["decay"]),
    "momentum": lambda h: optax.trace(h["rate"]),
    "nesterov": lambda h: optax.trace(h["rate"], nesterov=True),
    "ema": lambda h: optax.ema(h["rate"]),
    "optimistic": lambda h: optax.scale_by_optimistic_gradient(h["rate"], h["bound"]),
    "sign": lambda h: optax.scale_by_sign(),
    "lion": lambda h: optax.scale_by_lion(),
    "clip": lambda h: optax.clip(h["bound"]),
    "global norm": lambda h: optax.clip_by_global_norm(h["bound"]),
    "block rms": lambda h: optax.clip_by_block_rms(h["bound"]),
    "weight decay": lambda h: optax.add_decayed_weights(h["coefficient"]),
    "trust ratio": lambda h: optax.scale_by_trust_ratio(),
    "schedule": lambda h: optax.scale_by_schedule(lambda step: h["decay"] ** step),
    "centralize": lambda h: optax.centralize(),
    "apply every": lambda h: optax.apply_every(2),
    "zero nans": lambda h: optax.zero_nans(),
    "tree rates": lambda h: hg.scale_by_tree(h["bound"]),
}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: o,
    "apply_if_finite": lambda o: optax.apply_if_finite(o, 5),
    # in float32 by default, in which differences drown
    "MultiSteps": lambda o: optax.MultiSteps(
        o, 2, accumulator_dtype=float
    ).gradient_transformation(),
    "masked": lambda o: optax.masked(o, {"w": True, "b": False, "v": True}),
    "flatten": optax.flatten,
    "partition": lambda o: optax.partition(
        {"a": o, "z": optax.sgd(0.01)}, {"w": "a", "b": "z", "v": "a"}
    ),
    "conditionally_mask": lambda o: optax.conditionally_mask(o, lambda step: step > 0),
    "conditionally_transform": lambda o: optax.conditionally_transform(o, lambda step: step < 1),
}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "hard_tanh": jax.nn.hard_tanh,
    "abs": jnp.abs,
}


@jax.custom_vjp
def _reversal(z: jax.Array, s: jax.Array) -> jax.Array:
    return z


_reversal.defvjp(lambda z, s: (z, s), lambda s, g: (-s * g, jnp.zeros_like(s)))


@jax.custom_vjp
def _clipped(z: jax.Array, s: jax.Array) -> jax.Array:
    return z


_clipped.defvjp(lambda z, s: (z, s), lambda s, g: (jnp.clip(g, -0.02, 0.02) * s, jnp.zeros_like(s)))


@jax.custom_vjp
def _own_tanh(z: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.tanh(z)


_own_tanh.defvjp(
    lambda z, s: (_own_tanh(z, s), (z, s)),
    lambda r, g: ((1 - jnp.tanh(r[0]) ** 2) * g, jnp.zeros_like(r[1])),
)


@jax.custom_jvp
def _scaled(z: jax.Array, s: jax.Array) -> jax.Array:
    return z


_scaled.defjvp(lambda x, t: (x[0], -x[1] * t[0]))


def _straight_through(z: jax.Array, s: jax.Array) -> jax.Array:
    return z + jax.lax.stop_gradient(jnp.round(4 * z) / 4 - z)


RULES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": lambda z, s: z,
    "reversal": _reversal,
    "clipped backward": _clipped,
    "forward rule calls the function": _own_tanh,
    "custom_jvp": _scaled,
    "straight-through": _straight_through,
}


@dataclass(frozen=True)
class Program:
    """A random program, its structure: compiled once for all positions."""

    parts: tuple[str, ...]
    wrapper: str
    activation: str
    rule: str
    checkpoint: str
    seed: int

    def hyper(self, positions: np.ndarray) -> Hyper:
        """The values at positions [n, |RANGES|] in [0, 1], of what has a derivative here."""
        pairs = zip(RANGES.items(), positions.T, strict=True)
        values = {name: jnp.asarray(low + p * (high - low)) for (name, (low, high)), p in pairs}
        smooth = {r.name for r in reaches(self.plain, MIDDLE) if r.differentiable}
        return {name: value for name, value in values.items() if name in smooth}

    def init(self, key: jax.Array) -> Any:
        """The network's start, its biases 0."""
        rng = np.random.default_rng(self.seed)
        w, v = 0.7 * rng.normal(size=(3, 2)), 0.7 * rng.normal(size=2)
        return {"w": jnp.asarray(w), "b": jnp.zeros(2), "v": jnp.asarray(v)}

    def optimizer(self, h: Hyper) -> optax.GradientTransformation:
        """The chain, wrapped."""
        h = {**MIDDLE, **h}
        chain = optax.chain(*(PARTS[part](h) for part in self.parts), optax.scale(-h["lr"]))
        return WRAPPERS[self.wrapper](chain)

    def train_loss(self, p: Any, h: Hyper, batch: Any, key: jax.Array) -> jax.Array:
        """Squares of the network's errors, a penalty, and the declared rule on the hidden units."""
        h = {**MIDDLE, **h}
        hidden = RULES[self.rule](ACTIVATIONS[self.activation](batch[0] @ p["w"] + p["b"]), h["lr"])
        return jnp.mean((hidden @ p["v"] - batch[1]) ** 2) + h["l2"] * jnp.sum(p["w"] ** 2)

    def valid_loss(self, p: Any, h: Hyper, batch: Any, key: jax.Array) -> jax.Array:
        """Squares, smooth in the parameters."""
        return jnp.mean((jnp.tanh(batch[0] @ p["w"] + p["b"]) @ p["v"] - batch[1]) ** 2)

    def problem(self, **options: Any) -> hg.Problem:
        """As a bilevel problem."""
        losses = self.init, self.train_loss, self.valid_loss
        return hg.bilevel(*losses, self.optimizer, **options)

    def plain(self, h: Hyper) -> jax.Array:
        """The validation loss of the same loop, without hypergrad's steps."""
        params = self.init(None)
        state = self.optimizer(h).init(params)
        for x, y in zip(X, Y, strict=True):
            value, grads = jax.value_and_grad(self.train_loss)(params, h, (x, y), None)
            grads = hg.nonzero_gradient(grads)
            optimizer = optax.with_extra_args_support(self.optimizer(h))
            updates, state = optimizer.update(grads, state, params, value=value, grad=grads)
            params = optax.apply_updates(params, updates)
        return self.valid_loss(params, h, (VALID, TARGET), None)


class Outcome(NamedTuple):
    """Relative errors of one example, None where not compared, and the cause of a large one."""

    program: Program
    values: dict[str, float]
    plain: float | None
    forward: float | None
    differences: float | None
    cause: str


STEP_SIZES = (1e-5, 1e-6, 1e-7, 1e-8)


def judge(program: Program, positions: np.ndarray, forward: bool = True) -> list[Outcome]:
    """Compares at positions [n, |RANGES|]; with 64-bit types enabled."""
    hyper = program.hyper(positions)
    names, problem = sorted(hyper), program.problem()
    rng = np.random.default_rng(program.seed)
    sizes = np.array([RANGES[name][1] - RANGES[name][0] for name in names])
    directions = sizes * rng.choice([-1.0, 1.0], (len(positions), len(names)))

    def flat(tree: Hyper) -> jax.Array:
        return jnp.stack([tree[name] for name in names])

    def gradient(h: Hyper, estimator: hg.Estimator) -> tuple[jax.Array, ...]:
        arguments = (X, Y), (VALID, TARGET), jax.random.key(0), estimator
        estimate = hg.hypergradient(problem, h, None, *arguments)
        return flat(estimate.grad), estimate.info["finite"], estimate.loss

    def moved(h: Hyper, direction: jax.Array, t: jax.Array) -> jax.Array:
        return program.plain({n: h[n] + t * d for n, d in zip(names, direction, strict=True)})

    @jax.jit
    @jax.vmap
    def run(h: Hyper, direction: jax.Array) -> tuple[Any, ...]:
        steps = jnp.array([0.0, *(sign * d for d in STEP_SIZES for sign in (1, -1))])
        losses = jax.lax.map(lambda t: moved(h, direction, t), steps)
        found, finite, loss = gradient(h, hg.Unrolled(checkpoint=program.checkpoint))
        # Where rounding flips a sign, the two loops are two runs.
        same = jnp.abs(loss - losses[0]) <= 1e-9 * (1 + jnp.abs(loss))
        return found, finite, flat(jax.grad(program.plain)(h)), losses, same

    try:
        found, finite, want, losses, same = map(np.asarray, run(hyper, directions))
    except ValueError as error:
        return [Outcome(program, {}, None, None, None, f"refused: {str(error)[:120]}")]
    tangents = np.full_like(found, np.nan)
    if forward:
        with contextlib.suppress(ValueError):  # a rule without a forward mode
            tangents = np.asarray(jax.jit(jax.vmap(lambda h: gradient(h, hg.Forward())[0]))(hyper))
    rows = zip(found, finite, want, tangents, losses, same, directions, strict=True)
    values = [{n: float(hyper[n][i]) for n in names} for i in range(len(positions))]
    return [_outcome(program, v, *row) for v, row in zip(values, rows, strict=True)]


def _outcome(
    program: Program,
    values: dict[str, float],
    found: np.ndarray,
    finite: bool,
    want: np.ndarray,
    tangents: np.ndarray,
    losses: np.ndarray,
    same: bool,
    direction: np.ndarray,
) -> Outcome:
    unexplained = []
    known = np.isfinite(found).all()
    if known and not same:
        return Outcome(
            program, values, None, None, None, "jump: rounding flips a sign at this point"
        )
    if bool(finite) != bool(known):
        unexplained.append("finite is wrong")
    if not known:
        unexplained += ["plain jax.grad is finite"] * bool(np.isfinite(want).all())
        return Outcome(program, values, None, None, None, _named(unexplained) or "flagged")
    to_plain = _relative(found, want) if np.isfinite(want).all() else None
    to_forward = _relative(tangents, found) if np.isfinite(tangents).all() else None
    if (to_plain or 0) > TOLERANCE:
        unexplained.append("plain jax.grad differs")
    if (to_forward or 0) > TOLERANCE and program.rule in ("none", "straight-through"):
        unexplained.append("forward differs")
    if unexplained:
        decided = max(rounding(program, values, forward) for forward in (False, True))
        # Where they decide all of it, no digit of either is known.
        if decided > 1 or max(to_plain or 0, to_forward or 0) < 4 * decided:
            cause = f"rounding: the last places decide {decided:.0e} of it"
            return Outcome(program, values, to_plain, to_forward, None, cause)
    if program.rule != "none":
        return Outcome(program, values, to_plain, to_forward, None, _named(unexplained))
    error, why = _against_differences(found, losses, direction)
    unexplained += [why] * (why not in ("", "kink"))
    cause = _named(unexplained) or why
    return Outcome(program, values, to_plain, to_forward, error, cause)


def rounding(program: Program, values: dict[str, float], forward: bool = False) -> float:
    """How far plain `jax.grad` moves where hyperparameters move in their last places, relatively.

    Or `Forward()`, which may hang on them where the other does not. 1e-8 where roots of tiny
    squares are chained (amsgrad, adan), all of it where a run blows up (belief without momentum):
    more than that no two orders of the same sums agree to.
    """
    problem, data = program.problem(), ((X, Y), (VALID, TARGET), jax.random.key(0))

    def by_forward(hyper: Hyper) -> Any:
        return hg.hypergradient(problem, hyper, None, *data, hg.Forward()).grad

    gradient = jax.jit(by_forward if forward else jax.grad(program.plain))

    def at(factor: float) -> np.ndarray:
        hyper = {name: jnp.float64(factor * value) for name, value in values.items()}
        return np.array([float(gradient(hyper)[name]) for name in sorted(hyper)])

    here = at(1.0)
    moved = (np.abs(at(1 + ulps * 2e-16) - here).max() for ulps in (-4, -2, -1, 1, 2, 4))
    return float(max(moved) / max(np.abs(here).max(), 1e-8))


def _named(unexplained: list[str]) -> str:
    return f"UNEXPLAINED: {', '.join(unexplained)}" if unexplained else ""


def _relative(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(found - want).max() / max(np.abs(want).max(), 1e-8))


def _against_differences(
    grad: np.ndarray, losses: np.ndarray, direction: np.ndarray
) -> tuple[float, str]:
    """The error against the nearest central difference, and why it is large."""
    promised = float(grad @ direction)
    # What a difference of losses can resolve is no smaller than their rounding over its step.
    scale = max(float(np.abs(grad * direction).max()), 1e-6 * (1 + abs(float(losses[0]))))
    here, pairs = losses[0], losses[1:].reshape(-1, 2)
    steps = np.array(STEP_SIZES)
    error = float(np.abs((pairs[:, 0] - pairs[:, 1]) / (2 * steps) - promised).min()) / scale
    if error <= TOLERANCE:
        return error, ""
    sides = [(pairs[1, 0] - here) / steps[1], (here - pairs[1, 1]) / steps[1]]
    if abs(sides[0] - sides[1]) > 10 * TOLERANCE * scale:
        return error, "kink"
    return error, "differences settle elsewhere"


def random_program(rng: random.Random) -> Program:
    """One program of 1 to 4 parts."""
    return Program(
        tuple(rng.choice(list(PARTS)) for _ in range(rng.randint(1, 4))),
        rng.choice(["none", *WRAPPERS]),
        rng.choice(list(ACTIVATIONS)),
        rng.choice(["none", "none", *RULES]),
        rng.choice(["none", "step", "sqrt"]),
        rng.randrange(1000),
    )


def random_positions(seed: int, count: int = 8) -> np.ndarray:
    """Positions [count, |RANGES|], each number at a bound one time in four."""
    rng = np.random.default_rng(seed)
    inside, at_bound = rng.uniform(size=(2, count, len(RANGES)))
    return np.where(at_bound < 0.25, np.round(inside), inside)


def main(
    quick: bool = False,
    count: int = 5000,
    seed: int = 0,
    out: str | None = None,
    minutes: float = float("inf"),
) -> list[Outcome]:
    """Judge random programs; print the table and every disagreement."""
    rng, outcomes, end = random.Random(seed), [], time.monotonic() + 60 * minutes
    with jax.enable_x64(True):
        for i in range((80 if quick else count) // 8):
            found = judge(random_program(rng), random_positions(seed + i))
            outcomes += found
            for outcome in found:
                if outcome.cause:
                    print(outcome, flush=True)
            jax.clear_caches()
            if time.monotonic() > end:
                break
    print(f"{len(outcomes)} examples")
    print("| against | compared | median | 99% | worst |\n|---|---|---|---|---|")
    for name in ("plain", "forward", "differences"):
        errors = np.array([e for o in outcomes if (e := getattr(o, name)) is not None])
        middle, most = np.quantile(errors, [0.5, 0.99]) if errors.size else (np.nan, np.nan)
        print(
            f"| {name} | {errors.size} | {middle:.1e} | {most:.1e} | {errors.max(initial=0):.1e} |"
        )
    print(collections.Counter(o.cause.split(":")[0] for o in outcomes if o.cause))
    if out:
        rows = [{**o._asdict(), "program": o.program.__dict__} for o in outcomes]
        Path(out).write_text(json.dumps(rows, indent=1))
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out")
    options = parser.parse_args()
    main(options.quick, options.count, options.seed, options.out, options.minutes)
