"""Measure hypergradients of random programs against plain `jax.grad` and float64 differences.

Run: `python -m benchmarks.programs [--quick] [--count 5000] [--seed 0] [--out FILE]` (about a
second for each program on one core; quick: 100).

A program is a chain of 1 to 4 of the optax transformations in PARTS, in a wrapper or not, an
activation with or without kinks, and with or without a function whose derivative rule is its own,
at a random position of its hyperparameters, bounds included. Two training steps of a small network,
in float64. For each, `Unrolled()` is compared with plain `jax.grad` of the same loop (its gradients
lifted by `hypergrad.nonzero_gradient`, as `bilevel` does), with `Forward()`, and, unless a rule is
declared, with central differences along a random direction, the nearest of several step sizes.

Prints the median, the 99th percentile and the worst relative error of each comparison, and every
disagreement above 1e-4 with its cause: a kink (the slopes to both sides differ), a step of
differences that is too coarse (they do not settle), or unexplained. `finite` False counts as
flagged; a value that is not finite while `finite` is True would be named.
"""

import argparse
import collections
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

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
    "tree rates": lambda h: hg.scale_by_tree({"w": 1.0, "b": h["rate"], "v": h["bound"]}),
}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: o,
    "apply_if_finite": lambda o: optax.apply_if_finite(o, 5),
    "MultiSteps": lambda o: optax.MultiSteps(o, 2).gradient_transformation(),
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
    """A random program; `positions` are those of RANGES, in [0, 1]."""

    parts: tuple[str, ...]
    wrapper: str
    activation: str
    rule: str
    checkpoint: str
    positions: tuple[float, ...]
    seed: int

    @property
    def hyper(self) -> Hyper:
        """The values at the positions, of what the program reads."""
        pairs = zip(RANGES.items(), self.positions, strict=True)
        values = {name: low + p * (high - low) for (name, (low, high)), p in pairs}
        read = _Reading(values)
        for part in self.parts:
            PARTS[part](read)
        if "schedule" in self.parts:
            read.names.add("decay")
        return {name: jnp.asarray(values[name]) for name in sorted({"lr", "l2", *read.names})}

    def init(self, key: jax.Array) -> Any:
        """The network's start, its biases 0."""
        rng = np.random.default_rng(self.seed)
        w, v = 0.7 * rng.normal(size=(3, 2)), 0.7 * rng.normal(size=2)
        return {"w": jnp.asarray(w), "b": jnp.zeros(2), "v": jnp.asarray(v)}

    def optimizer(self, h: Hyper) -> optax.GradientTransformation:
        """The chain, wrapped."""
        chain = optax.chain(*(PARTS[part](h) for part in self.parts), optax.scale(-h["lr"]))
        return WRAPPERS[self.wrapper](chain)

    def train_loss(self, p: Any, h: Hyper, batch: Any, key: jax.Array) -> jax.Array:
        """Squares of the network's errors, a penalty, and the declared rule on the hidden units."""
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


class _Reading(dict):
    """Hyperparameters that note which of them are read."""

    def __init__(self, values: Hyper) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


class Outcome(NamedTuple):
    """Relative errors of one program, None where not compared, and the cause of a large one."""

    program: Program
    plain: float | None
    forward: float | None
    differences: float | None
    cause: str


def judge(program: Program, forward: bool = True) -> Outcome:
    """Compares; with 64-bit types enabled. Under `jax.disable_jit` it compiles nothing."""
    hyper = program.hyper
    arguments = program.problem(), hyper, None, (X, Y), (VALID, TARGET), jax.random.key(0)
    names = sorted(hyper)
    flat = lambda tree: np.array([float(tree[name]) for name in names])  # noqa: E731
    try:
        estimate = hg.hypergradient(*arguments, hg.Unrolled(checkpoint=program.checkpoint))
    except ValueError as error:
        return Outcome(program, None, None, None, f"refused: {str(error)[:120]}")
    found, finite = flat(estimate.grad), bool(estimate.info["finite"])
    if finite != bool(np.isfinite(found).all()):
        return Outcome(program, np.inf, None, None, "UNEXPLAINED: finite is wrong")
    want = flat(jax.grad(program.plain)(hyper))
    if not finite:
        cause = "flagged" if not np.isfinite(want).all() else "UNEXPLAINED: plain jax.grad is finite"
        return Outcome(program, None, None, None, cause)
    to_plain = _relative(found, want) if np.isfinite(want).all() else None
    cause = "" if (to_plain or 0) <= TOLERANCE else "UNEXPLAINED: plain jax.grad differs"
    to_forward = None
    if forward:
        try:
            tangents = flat(hg.hypergradient(*arguments, hg.Forward()).grad)
            to_forward = _relative(tangents, found) if np.isfinite(tangents).all() else None
        except ValueError:  # a rule without a forward mode
            pass
        if (to_forward or 0) > TOLERANCE:
            reversible = program.rule in ("none", "straight-through", "custom_jvp")
            cause = cause or ("UNEXPLAINED: forward differs" if reversible else "declared rule")
    if program.rule != "none":
        return Outcome(program, to_plain, to_forward, None, cause)
    to_differences, why = _against_differences(program, hyper, names, found)
    return Outcome(program, to_plain, to_forward, to_differences, cause or why)


def _relative(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(found - want).max() / max(np.abs(want).max(), 1e-8))


def _against_differences(
    program: Program, hyper: Hyper, names: list[str], grad: np.ndarray
) -> tuple[float, str]:
    sizes = np.array([RANGES[name][1] - RANGES[name][0] for name in names])
    direction = sizes * np.random.default_rng(program.seed + 1).choice([-1.0, 1.0], len(names))
    promised, scale = float(grad @ direction), float(np.abs(grad * direction).max())

    def loss(t: float) -> float:
        moved = {n: hyper[n] + t * d for n, d in zip(names, direction, strict=True)}
        return float(program.plain(moved))

    best = np.inf
    for step in (1e-5, 1e-6, 1e-7, 1e-8):
        slope = (loss(step) - loss(-step)) / (2 * step)
        best = min(best, abs(slope - promised) / max(abs(scale), 1e-8))
        if best <= TOLERANCE:
            return best, ""
    here = loss(0.0)
    sides = [(loss(t) - here) / t for t in (1e-6, -1e-6)]
    if abs(sides[0] - sides[1]) > 10 * TOLERANCE * scale:
        between = min(sides) - 1e-3 * scale <= promised <= max(sides) + 1e-3 * scale
        return best, "kink" if between else "kink, beyond both sides"
    return best, "UNEXPLAINED: differences settle elsewhere"


def random_program(rng: random.Random) -> Program:
    """One program, its positions at a bound one time in four."""
    return Program(
        tuple(rng.choice(list(PARTS)) for _ in range(rng.randint(1, 4))),
        rng.choice(["none", *WRAPPERS]),
        rng.choice(list(ACTIVATIONS)),
        rng.choice(["none", "none", *RULES]),
        rng.choice(["none", "step", "sqrt"]),
        tuple(rng.choice([0.0, 1.0]) if rng.random() < 0.25 else rng.random() for _ in RANGES),
        rng.randrange(1000),
    )


def main(
    quick: bool = False, count: int = 5000, seed: int = 0, out: str | None = None
) -> list[Outcome]:
    """Judge random programs; print the table and every disagreement."""
    rng, outcomes = random.Random(seed), []
    with jax.enable_x64(True), jax.disable_jit():
        for _ in range(100 if quick else count):
            outcomes.append(judge(random_program(rng)))
            if outcomes[-1].cause:
                print(outcomes[-1], flush=True)
    print("| against | compared | median | 99% | worst |\n|---|---|---|---|---|")
    for name in ("plain", "forward", "differences"):
        errors = np.array([e for o in outcomes if (e := getattr(o, name)) is not None])
        middle, most = np.quantile(errors, [0.5, 0.99])
        print(f"| {name} | {errors.size} | {middle:.1e} | {most:.1e} | {errors.max():.1e} |")
    print(collections.Counter(o.cause.split(":")[0] for o in outcomes if o.cause))
    if out:
        rows = [{**o.program.__dict__, **o._asdict(), "program": None} for o in outcomes]
        Path(out).write_text(json.dumps(rows, indent=1))
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    options = parser.parse_args()
    main(options.quick, options.count, options.seed, options.out)
