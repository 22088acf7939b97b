"""For tests of estimators: problems with closed-form hypergradients, and a contract to inherit."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad.estimators.base import Estimator
from hypergrad.estimators.hypergradient import hypergradient
from hypergrad.problem.problem import Problem, bilevel, rollout
from hypergrad.trees import Batch, Hyper, InnerState, Key, Params, Train, Tree


class Oracle(NamedTuple):
    """A problem whose validation loss and hypergradient are known in closed form.

    `loss` and `grad` come from NumPy in float64, without any automatic differentiation.
    """

    problem: Problem
    hyper: Any
    train: Any
    valid: Any
    key: jax.Array
    loss: float
    grad: Any


def ridge(num_steps: int = 400, dim: int = 5) -> Oracle:
    """Ridge regression trained by gradient descent until it has converged.

    hyper: `{"l2": scalar}`. With A = X^T X / n, b = X^T y / n, the solution is w = (A + l2)^-1 b
    and the hypergradient of |Xv w - yv|^2 / 2m is -(Xv^T (Xv w - yv) / m)^T (A + l2)^-1 w. The
    default contracts by .93 or better a step, so 400 steps end at 1e-13.
    """
    rng = np.random.default_rng(0)
    n, l2, rate = 40, 0.3, 0.2
    x, xv = rng.normal(size=(2, n, dim))
    truth = rng.normal(size=dim)
    y, yv = x @ truth + rng.normal(size=n), xv @ truth + rng.normal(size=n)
    inverse = np.linalg.inv(x.T @ x / n + l2 * np.eye(dim))
    w = inverse @ (x.T @ y / n)
    residual = xv @ w - yv
    grad = -(xv.T @ residual / n) @ inverse @ w

    def squares(w: Any, batch: Batch) -> jax.Array:
        inputs, targets = batch
        return 0.5 * jnp.mean((inputs @ w - targets) ** 2)

    problem = bilevel(
        lambda key: jnp.zeros(dim),
        lambda w, hyper, batch, key: squares(w, batch) + 0.5 * hyper["l2"] * jnp.sum(w**2),
        lambda w, hyper, batch, key: squares(w, batch),
        lambda hyper: optax.sgd(rate),
    )
    asarray = lambda *arrays: tuple(jnp.asarray(a, jnp.result_type(float)) for a in arrays)  # noqa: E731
    train = jax.tree.map(lambda a: jnp.broadcast_to(a, (num_steps, *a.shape)), asarray(x, y))
    loss = 0.5 * float(np.mean(residual**2))
    (start,) = asarray(np.asarray(l2))
    return Oracle(
        problem, {"l2": start}, train, asarray(xv, yv), jax.random.key(0), loss, {"l2": grad}
    )


def momentum_quadratic(num_steps: int = 15) -> Oracle:
    """A diagonal quadratic under SGD with momentum: a linear recurrence with a known derivative.

    hyper: `{"learning_rate", "momentum", "target" [4]}`. Per dimension with curvature c the state
    s = (w - target, v) obeys s' = M s, M = [[1 - lr c, -lr m], [c, m]], so that
    dM^T = sum_k M^(T-1-k) dM M^k. The validation loss is |w - 1|^2 / 2.
    """
    curvature = np.array([0.1, 0.5, 1.0, 2.0])
    target = np.array([1.0, -1.0, 0.5, 2.0])
    rate, momentum, start = 0.2, 0.7, 3.0
    w, grad_rate, grad_momentum, grad_target = (np.zeros(4) for _ in range(4))
    for i, c in enumerate(curvature):
        m = np.array([[1 - rate * c, -rate * momentum], [c, momentum]])
        d_rate = np.array([[-c, -momentum], [0, 0]])
        d_momentum = np.array([[0, -rate], [0, 1.0]])
        powers = [np.linalg.matrix_power(m, k) for k in range(num_steps + 1)]
        s = np.array([start - target[i], 0.0])
        w[i] = target[i] + (powers[-1] @ s)[0]
        for d, out in ((d_rate, grad_rate), (d_momentum, grad_momentum)):
            total = sum(powers[num_steps - 1 - k] @ d @ powers[k] for k in range(num_steps))
            out[i] = (w[i] - 1) * (total @ s)[0]
        grad_target[i] = (w[i] - 1) * (1 - powers[-1][0, 0])
    dtype = jnp.result_type(float)
    curvatures = jnp.asarray(curvature, dtype)
    problem = bilevel(
        lambda key: jnp.full(4, start, dtype),
        lambda w, hyper, batch, key: 0.5 * jnp.sum(curvatures * (w - hyper["target"]) ** 2),
        lambda w, hyper, batch, key: 0.5 * jnp.sum((w - 1) ** 2),
        lambda hyper: optax.sgd(hyper["learning_rate"], momentum=hyper["momentum"]),
    )
    hyper = {
        "learning_rate": jnp.asarray(rate, dtype),
        "momentum": jnp.asarray(momentum, dtype),
        "target": jnp.asarray(target, dtype),
    }
    grad = {
        "learning_rate": grad_rate.sum(),
        "momentum": grad_momentum.sum(),
        "target": grad_target,
    }
    train, valid = jnp.zeros((num_steps, 1)), jnp.zeros(1)
    loss = 0.5 * float(np.sum((w - 1) ** 2))
    return Oracle(problem, hyper, train, valid, jax.random.key(0), loss, grad)


def relative_error(grad: Tree, reference: Tree) -> float:
    """The largest error over leaves, each relative to its reference's norm, which must not be 0."""
    errors = []
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(reference), strict=True):
        size = np.linalg.norm(np.asarray(b, np.float64))
        if size == 0:
            raise ValueError("The reference is zero: a test against it would pass for any bug.")
        errors.append(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / size)
    return float(max(errors))


class EstimatorContract:
    """What every estimator must do. Subclass it, set `estimator`, and let pytest collect it.

    Attributes:
      estimator: what is tested.
      oracle: `num_steps -> Oracle`, the problem with a closed form; one whose hyperparameters this
        estimator can see.
      float32_tolerance: relative error allowed against the closed form in float32. Loosen it for a
        biased or stochastic estimator and say why there; the closed form is never zero.
      as_train: K batches, leaves `[K, batch, ...]` and equal in the oracle, as this estimator wants
        its `train`; as they are by default.

    >>> import hypergrad as hg
    >>> class TestForward(EstimatorContract):
    ...     estimator = hg.Forward()
    >>> TestForward().test_grad_has_the_structure_and_dtypes_of_hyper()
    """

    estimator: ClassVar[Estimator]
    oracle: ClassVar[Callable[..., Oracle]] = staticmethod(momentum_quadratic)
    float32_tolerance: ClassVar[float] = 1e-4
    as_train: ClassVar[Callable[..., Train]] = staticmethod(lambda batches: batches)

    def _estimate(self, oracle: Oracle, hyper: Hyper = None, inner: InnerState = None) -> Any:
        hyper = oracle.hyper if hyper is None else hyper
        inner = oracle.problem.init(hyper, oracle.key) if inner is None else inner
        arguments = (inner, self.as_train(oracle.train), oracle.valid, oracle.key, self.estimator)
        return hypergradient(oracle.problem, hyper, *arguments)

    def test_grad_has_the_structure_and_dtypes_of_hyper(self) -> None:
        """The gradient can be fed to optax beside `hyper`."""
        oracle = self.oracle(10)
        estimate = self._estimate(oracle)
        assert jax.tree.structure(estimate.grad) == jax.tree.structure(oracle.hyper)
        for grad, leaf in zip(
            jax.tree.leaves(estimate.grad), jax.tree.leaves(oracle.hyper), strict=True
        ):
            assert grad.shape == leaf.shape
            assert grad.dtype == leaf.dtype
        assert estimate.loss.shape == ()
        assert bool(estimate.info["finite"])
        assert int(estimate.info["first_bad_step"]) == -1

    def test_agrees_with_the_closed_form(self) -> None:
        """At the oracle's own number of steps."""
        oracle = self.oracle()
        estimate = self._estimate(oracle)
        error = relative_error(estimate.grad, oracle.grad)
        assert error <= self.float32_tolerance, f"relative error {error:.3g}"
        np.testing.assert_allclose(estimate.loss, oracle.loss, rtol=1e-4)

    def test_training_advances_as_rollout_does(self) -> None:
        """`estimate.inner` is where K plain steps lead."""
        oracle = self.oracle(7)
        inner = oracle.problem.init(oracle.hyper, oracle.key)
        train = self.as_train(oracle.train)
        end = rollout(oracle.problem, oracle.hyper, inner, train, oracle.key)
        estimate = self._estimate(oracle, inner=inner)
        for a, b in zip(jax.tree.leaves(estimate.inner), jax.tree.leaves(end), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)

    def test_jit_gives_the_same_and_compiles_once(self) -> None:
        """A second call with other values must not compile again."""
        oracle = self.oracle(10)
        traces = []

        @jax.jit
        def jitted(hyper: Hyper) -> Any:
            traces.append(hyper)
            return self._estimate(oracle, hyper)

        first = jitted(oracle.hyper)
        assert relative_error(first.grad, self._estimate(oracle).grad) < 1e-4
        other = jax.tree.map(lambda x: 0.9 * x, oracle.hyper)
        assert relative_error(jitted(other).grad, first.grad) > 1e-3
        assert len(traces) == 1

    def test_vmap_over_a_population(self) -> None:
        """Members do not see one another."""
        oracle = self.oracle(10)
        scales = jnp.array([0.8, 1.0])
        population = jax.tree.map(
            lambda x: scales.reshape(-1, *[1] * jnp.ndim(x)).astype(x.dtype) * x, oracle.hyper
        )
        grads = jax.vmap(lambda hyper: self._estimate(oracle, hyper))(population).grad
        alone = self._estimate(oracle, jax.tree.map(lambda x: x[0], population)).grad
        assert relative_error(jax.tree.map(lambda g: g[0], grads), alone) < 1e-4
        assert relative_error(jax.tree.map(lambda g: g[1], grads), alone) > 1e-3

    def test_any_pytree(self) -> None:
        """Tuples, nested containers, integer leaves in the state, scalars and arrays in `hyper`."""

        def loss(params: Params, hyper: Hyper, batch: Batch, key: Key) -> jax.Array:
            (w, [b]), _count = params
            fit = jnp.mean((w * batch["x"] + b - hyper[0]) ** 2)
            # without b**2 a trained b would follow hyper[0], whose gradient would vanish
            return fit + jnp.vdot(hyper[1][0], w**2) + b**2

        class Counting(NamedTuple):
            params: Any
            seen: jax.Array

        def step(inner: Counting, hyper: Hyper, batch: Batch, key: Key) -> Counting:
            (weights, count), seen = inner
            grads = jax.grad(lambda p: loss((p, count), hyper, batch, key))(weights)
            moved = jax.tree.map(lambda p, g: p - 0.1 * g, weights, grads)
            return Counting((moved, count + 1), seen + batch["x"].size)

        def init(hyper: Hyper, key: Key) -> Counting:
            weights = (jnp.ones(2), [jnp.zeros(())])
            return Counting((weights, jnp.zeros((), jnp.int32)), jnp.zeros((), jnp.int32))

        hyper = (jnp.float32(0.5), [jnp.array([0.1, 0.2])])
        problem = Problem(init, step, loss, loss)
        batches = {"x": jnp.linspace(-1, 1, 12).reshape(3, 2, 2)}
        arguments = (
            init(hyper, jax.random.key(0)),
            self.as_train(batches),
            {"x": jnp.ones((2, 2))},
            jax.random.key(0),
        )
        estimate = hypergradient(problem, hyper, *arguments, self.estimator)
        assert jax.tree.structure(estimate.grad) == jax.tree.structure(hyper)
        assert all(np.all(np.asarray(g) != 0) for g in jax.tree.leaves(estimate.grad))
        assert int(estimate.inner.seen) == 12
