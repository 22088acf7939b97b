"""Losses whose derivative is declared: every exact estimator against plain jax.grad of the loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from hypergrad.problem.inner_gradient import inner_gradient
from hypergrad.problem.rules import declared_rules
from hypergrad.testing import relative_error

K = 3
X = jax.random.normal(jax.random.key(0), (K, 8, 3))
Y = jnp.tanh(X @ jnp.arange(3.0))
HYPER = {"lr": 0.1, "s": 0.5}
KEY = jax.random.key(1)


@jax.custom_vjp
def reversal(z: jax.Array, s: jax.Array) -> jax.Array:
    return z


reversal.defvjp(lambda z, s: (z, s), lambda s, g: (-s * g, jnp.zeros_like(s)))


@jax.custom_jvp
def forward_reversal(z: jax.Array, s: jax.Array) -> jax.Array:
    return z


forward_reversal.defjvp(lambda x, t: (forward_reversal(*x), -x[1] * t[0]))


@jax.custom_vjp
def documented(z: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.tanh(s * z)


def documented_backward(residuals: Any, g: jax.Array) -> Any:
    z, s, out = residuals
    slope = (1 - out**2) * g
    return slope * s, jnp.sum(slope * z)


documented.defvjp(lambda z, s: (documented(z, s), (z, s, documented(z, s))), documented_backward)


@jax.custom_vjp
def clipped(z: jax.Array, s: jax.Array) -> jax.Array:
    return z


clipped.defvjp(lambda z, s: (z, s), lambda s, g: (jnp.tanh(g / s) * s, jnp.zeros_like(s)))


@jax.custom_vjp
def straight_through(z: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.round(z / s) * s


straight_through.defvjp(
    lambda z, s: (straight_through(z, s), s), lambda s, g: (jnp.cosh(g), jnp.sum(g * s))
)


def transposed(z: jax.Array, s: jax.Array) -> jax.Array:
    return jax.custom_derivatives.linear_call(lambda s, z: z, lambda s, g: -s * g, s, z)


def scanned(z: jax.Array, s: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, _: (reversal(jnp.sin(c), s), None), z, None, 2)[0]


RULES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "reversal": reversal,
    "custom_jvp": forward_reversal,
    "forward rule calls the function": documented,
    "clipped": clipped,
    "straight-through": straight_through,
    "scale_gradient": lambda z, s: optax.scale_gradient(z, -0.7) * s,
    "scan": scanned,
    "cond": lambda z, s: jax.lax.cond(s > 0, reversal, lambda z, s: z, z, s),
    "jit": jax.jit(reversal),
    "remat": jax.checkpoint(reversal),
    "vmap": jax.vmap(reversal, (0, None)),
    "while": lambda z, s: reversal(jax.lax.fori_loop(0, 2, lambda _, z: jnp.sin(z), z), s),
}


def start(key: jax.Array) -> Any:
    return jax.tree.map(
        lambda seed, shape: 0.5 * jax.random.normal(jax.random.fold_in(key, seed), shape),
        {"f": 0, "y": 1, "d": 2},
        {"f": (3, 4), "y": (4,), "d": (4,)},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def valid_loss(p: Any, h: Any, b: Any, key: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(b[0] @ p["f"]) @ p["y"] - b[1]) ** 2)


def case(rule: Callable[..., jax.Array], **options: Any) -> tuple[hg.Problem, Callable[..., Any]]:
    """The problem, and the same loop in plain JAX."""

    def loss(p: Any, h: Any, b: Any, key: Any) -> jax.Array:
        z = rule(jnp.tanh(b[0] @ p["f"]), h["s"])
        return valid_loss(p, h, b, key) + jnp.mean((jnp.sin(z) @ p["d"] - b[1]) ** 4)

    def plain(h: Any) -> jax.Array:
        w = start(KEY)
        for t in range(K):
            g = jax.grad(loss)(w, h, (X[t], Y[t]), None)
            w = jax.tree.map(lambda a, b: a - h["lr"] * b, w, g)
        return valid_loss(w, h, (X[0], Y[0]), None)

    return hg.bilevel(start, loss, valid_loss, lambda h: optax.sgd(h["lr"]), **options), plain


def gradient(problem: hg.Problem, estimator: hg.Estimator, hyper: Any = HYPER) -> Any:
    arguments = (X, Y), (X[0], Y[0]), KEY
    return hg.hypergradient(problem, hyper, None, *arguments, estimator=estimator).grad


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", RULES)
def test_equals_plain_reverse_mode(name: str) -> None:
    problem, plain = case(RULES[name])
    want = jax.jit(jax.grad(plain))(HYPER)
    assert all(abs(float(g)) > 1e-6 for g in want.values())

    assert relative_error(gradient(problem, hg.Unrolled()), want) < 1e-12


@pytest.mark.usefixtures("x64")
def test_under_vmap_and_in_forward_mode() -> None:
    """A rule that does not call its function has a forward mode."""
    problem, plain = case(reversal)
    several = {"lr": jnp.array([0.1, 0.2]), "s": jnp.array([0.5, 1.5])}
    want = jax.jit(jax.vmap(jax.grad(plain)))(several)
    for estimator in (hg.Unrolled(), hg.Unrolled(checkpoint="sqrt"), hg.Forward()):
        found = jax.jit(jax.vmap(lambda h, e=estimator: gradient(problem, e, h)))(several)
        assert relative_error(found, want) < 1e-12


def test_what_never_reaches_the_loss_is_still_named() -> None:
    problem, _ = case(reversal)
    with pytest.raises(ValueError, match="'unused' never reaches"):
        gradient(problem, hg.Unrolled(), {**HYPER, "unused": 1.0})


def test_forward_mode_is_refused_by_name() -> None:
    problem, _ = case(documented)
    with pytest.raises(ValueError, match=r"no way through documented: .*Unrolled.*custom_jvp"):
        gradient(problem, hg.Forward())
    gradient(problem, "auto")  # takes the next in order of cost


@pytest.mark.usefixtures("x64")
def test_implicit_differentiation_transposes_the_matrix_that_there_is() -> None:
    """Z = 0.5 (1, s) at rest, of F = (z0 - 0.5, z1 - s z0): not symmetric."""

    def loss(z: jax.Array, h: Any, b: Any, key: Any) -> jax.Array:
        towards = (z[0] - b[0]) ** 2 / 2 + (z[1] - jax.lax.stop_gradient(z[0] * h["s"])) ** 2 / 2
        return towards + 0 * reversal(z[0], h["s"])

    @jax.custom_vjp
    def follow(z: jax.Array, s: jax.Array) -> jax.Array:
        return z[1] ** 2 / 2 - s * z[0] * z[1]

    # the gradient that z1 has, and none for z0
    follow.defvjp(
        lambda z, s: (follow(z, s), (z, s)),
        lambda r, g: (g * jnp.array([0.0, 1.0]) * (r[0][1] - r[1] * r[0][0]), jnp.zeros(())),
    )

    def trained(z: jax.Array, h: Any, b: Any, key: Any) -> jax.Array:
        return (z[0] - b[0]) ** 2 / 2 + follow(z, h["s"])

    problem = hg.bilevel(
        lambda key: jnp.zeros(2),
        trained,
        lambda z, h, b, key: jnp.sum(z**2),
        lambda h: optax.sgd(0.5),
    )
    arguments = {"s": 2.0}, None, jnp.full((100, 1), 0.5), jnp.zeros(1), KEY
    for of in ("stationary", "fixed_point"):
        estimator = hg.Implicit(hg.GMRES(), of=of)
        grad = hg.hypergradient(problem, *arguments, estimator=estimator).grad
        assert abs(float(grad["s"]) - 2 * 0.5**2 * 2.0) < 1e-10
    with pytest.raises(ValueError, match=r"symmetric.*follow.*GMRES"):
        hg.hypergradient(problem, *arguments, estimator=hg.Implicit())


def test_rules_are_found_at_any_depth_and_jaxs_own_are_trusted() -> None:
    def nested(x: jax.Array) -> jax.Array:
        return jax.jit(lambda x: jax.lax.map(lambda x: forward_reversal(x, x), x))(x)

    assert declared_rules(nested, jnp.ones(2)) == ["forward_reversal"]
    assert declared_rules(nested, jnp.ones(2), backward=True) == []
    assert declared_rules(transposed, 1.0, 2.0) == ["<lambda>"]

    def ordinary(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x) + jax.nn.relu6(x) + jax.scipy.special.entr(jnp.abs(x))
        return optax.projections.projection_simplex(x)

    assert declared_rules(ordinary, jnp.ones(2)) == []


def test_three_levels() -> None:
    """A problem inside another one's training loss; mixed mode says that it cannot, and how to."""

    def inner_loss(w: jax.Array, h: Any, b: jax.Array, key: Any) -> jax.Array:
        return jnp.mean((w * b - jnp.sin(b)) ** 2) + jnp.exp(h) * w**2

    def judged(w: jax.Array, h: Any, b: jax.Array, key: Any) -> jax.Array:
        return jnp.mean((w - b) ** 2)

    def run(outer: Any, mixed_mode: bool, estimator: Any) -> Any:
        inner = hg.bilevel(
            lambda key: jnp.array(0.3), inner_loss, judged, lambda h: optax.sgd(0.1),
            mixed_mode=mixed_mode,
        )  # fmt: skip

        def middle_loss(log_l2: jax.Array, h: Any, b: jax.Array, key: Any) -> jax.Array:
            begun = inner.init(log_l2, key)
            end = hg.rollout(inner, log_l2, begun, jnp.broadcast_to(b, (4, 3)), key)
            return judged(end.params, None, b, key) + h["prior"] * log_l2**2

        middle = hg.bilevel(
            lambda key: jnp.array(-1.0), middle_loss, lambda p, h, b, key: jnp.sin(p),
            lambda h: optax.sgd(h["lr"]),
        )  # fmt: skip
        data = jnp.ones((2, 3)) * jnp.array([0.5, 1.0, 1.5])
        return hg.hypergradient(middle, outer, None, data, data[0], KEY, estimator=estimator)

    with jax.enable_x64(True):
        outer = {"prior": jnp.array(0.2), "lr": jnp.array(0.3)}
        grads = [run(outer, False, e).grad for e in (hg.Unrolled(), hg.Forward())]
        differences = run(outer, False, hg.FiniteDifference()).grad
        assert relative_error(*grads) < 1e-12
        assert relative_error(grads[0], differences) < 1e-7
        with pytest.raises(ValueError, match="mixed_mode=False"):
            run(outer, True, hg.Unrolled())


def test_mixed_mode_is_kept_where_no_rule_is_declared() -> None:
    """A relu network: forward over reverse stores nothing of the inner backward pass."""
    batch = jnp.ones((64, 8))

    def deep(w: jax.Array, h: jax.Array, batch: jax.Array) -> jax.Array:
        x = batch
        for _ in range(3):
            x = jax.nn.relu(x @ w)
        return jnp.mean(x**2) + h * jnp.sum(w**2)

    def temporary(mixed_mode: bool) -> int:
        ours = inner_gradient(deep, mixed_mode=mixed_mode)

        def run(h: jax.Array) -> jax.Array:
            step = lambda w, _: (w - 0.1 * ours(w, h, batch)[0], None)  # noqa: E731
            return jnp.sum(jax.lax.scan(step, jnp.eye(8), None, length=50)[0])

        compiled = jax.jit(jax.grad(run)).lower(0.1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(True) < temporary(False) / 4
