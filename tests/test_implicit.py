"""Implicit differentiation against closed forms, explicit matrices, and the contract."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.testing import EstimatorContract, momentum_quadratic, relative_error, ridge
from hypergrad.tuners.trust import NOT_SOLVED


class TestConjugateGradient(EstimatorContract):
    estimator = hg.Implicit(hg.ConjugateGradient())
    oracle = staticmethod(ridge)


class TestGMRES(EstimatorContract):
    estimator = hg.Implicit(hg.GMRES())
    oracle = staticmethod(ridge)


class TestNeumann(EstimatorContract):
    estimator = hg.Implicit(hg.Neumann(200, 0.2))
    oracle = staticmethod(ridge)


class TestNystrom(EstimatorContract):
    # biased by its damping; with a smaller one rounding, divided by it, would show
    estimator = hg.Implicit(hg.Nystrom(5, 1e-2))
    oracle = staticmethod(ridge)
    float32_tolerance = 3e-2


class TestRichardson(EstimatorContract):
    estimator = hg.Implicit(hg.Richardson(200, 0.2))
    oracle = staticmethod(ridge)


class TestFixedPoint(EstimatorContract):
    estimator = hg.Implicit(hg.GMRES(), of="fixed_point")
    oracle = staticmethod(ridge)


def estimate_of(oracle: Any, estimator: hg.Estimator, inner: Any = None) -> Any:
    arguments = (oracle.hyper, inner, oracle.train, oracle.valid, oracle.key, estimator)
    return jax.jit(lambda: hg.hypergradient(oracle.problem, *arguments))()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "estimator",
    [
        hg.Implicit(hg.ConjugateGradient(), batches="last"),
        hg.Implicit(hg.GMRES(), batches="last"),
        hg.Implicit(hg.GMRES(), of="fixed_point", batches="last"),
        hg.Implicit(hg.Neumann(1000, 1.0), of="fixed_point", batches="last"),
    ],
)
def test_ridge_in_closed_form(estimator: hg.Estimator) -> None:
    oracle = ridge()
    estimate = estimate_of(oracle, estimator)
    assert relative_error(estimate.grad, oracle.grad) <= 1e-10
    assert float(estimate.info["residual"]) < 1e-8
    assert float(estimate.info["unconverged"]) < 1e-10


def _dense_fixed_point(oracle: Any, w: np.ndarray, trace: np.ndarray) -> Any:
    """NumPy: B^T (I - A^T)^-1 v of SGD with momentum on `momentum_quadratic`, per dimension."""
    rate, momentum = (float(oracle.hyper[k]) for k in ("learning_rate", "momentum"))
    target = np.asarray(oracle.hyper["target"])
    grads = {"learning_rate": 0.0, "momentum": 0.0, "target": np.zeros(4)}
    for i, c in enumerate((0.1, 0.5, 1.0, 2.0)):
        new_trace = momentum * trace[i] + c * (w[i] - target[i])
        a = np.array([[1 - rate * c, -rate * momentum], [c, momentum]])
        x = np.linalg.solve(np.eye(2) - a.T, np.array([w[i] - 1, 0.0]))
        grads["learning_rate"] += np.array([-new_trace, 0.0]) @ x
        grads["momentum"] += np.array([-rate * trace[i], trace[i]]) @ x
        grads["target"][i] = np.array([rate * c, -c]) @ x
    return grads


@pytest.mark.usefixtures("x64")
def test_fixed_point_sees_learning_rate_and_momentum() -> None:
    """Where training stands after 5 steps, against explicit matrices."""
    oracle = momentum_quadratic(5)
    estimate = estimate_of(oracle, hg.Implicit(hg.GMRES(20), of="fixed_point"))
    trace = jax.tree.leaves(estimate.inner.opt_state)[0]
    dense = _dense_fixed_point(oracle, np.asarray(estimate.inner.params), np.asarray(trace))
    assert relative_error(estimate.grad, dense) < 1e-10
    assert float(estimate.info["update_norm"]) > 1e-2


@pytest.mark.usefixtures("x64")
def test_fixed_point_neumann_is_clarkes_sum() -> None:
    """B^T sum_{j < 4} A^T^j v, with A and B from jax.jacobian of the whole state."""
    oracle = momentum_quadratic(5)
    estimate = estimate_of(oracle, hg.Implicit(hg.Neumann(4, 1.0), of="fixed_point"))
    inner = estimate.inner
    floats, treedef = jax.tree.flatten((inner.params, inner.opt_state))
    flat, unravel = jax.flatten_util.ravel_pytree(floats)

    def step(flat: jax.Array, hyper: Any) -> jax.Array:
        params, opt_state = treedef.unflatten(unravel(flat))
        end = oracle.problem.step(
            inner._replace(params=params, opt_state=opt_state), hyper, None, oracle.key
        )
        return jax.flatten_util.ravel_pytree((end.params, end.opt_state))[0]

    def judged(flat: jax.Array) -> jax.Array:
        params = treedef.unflatten(unravel(flat))[0]
        return oracle.problem.valid_loss(params, oracle.hyper, None, None)

    a, b = jax.jacobian(step, (0, 1))(flat, oracle.hyper)
    term = jax.grad(judged)(flat)
    total = term
    for _ in range(3):
        term = a.T @ term
        total = total + term
    expected = jax.tree.map(lambda b: jnp.tensordot(total, b, 1), b)
    assert relative_error(estimate.grad, expected) < 1e-12


@pytest.mark.usefixtures("x64")
def test_agrees_with_unrolling_on_a_network_that_has_converged() -> None:
    """Penalties of a small tanh network: no closed form, two different ways."""
    inputs = jax.random.normal(jax.random.key(0), (2, 20, 3))
    labels = jnp.sin(inputs.sum(-1))

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"]) @ params["v"]

    def squares(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)

    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return squares(params, batch) + sum(
            l2 * jnp.sum(p**2) for l2, p in zip(hyper["l2"], params.values(), strict=True)
        )

    problem = hg.bilevel(
        lambda key: {"v": jnp.ones(2), "w": jax.random.normal(key, (3, 2))},
        train_loss,
        lambda params, hyper, batch, key: squares(params, batch),
        lambda hyper: optax.sgd(0.3, momentum=0.9),
    )
    hyper = {"l2": [0.02, 0.03]}
    train = hg.Minibatches((inputs[0], labels[0]), 20, 1500)
    arguments = (problem, hyper, None, train, (inputs[1], labels[1]), jax.random.key(1))
    estimators = hg.Unrolled(), hg.Implicit(hg.ConjugateGradient(40))
    unrolled, implicit = jax.jit(lambda: [hg.hypergradient(*arguments, e) for e in estimators])()
    assert float(implicit.info["inner_gradient_norm"]) < 1e-8
    assert relative_error(implicit.grad, unrolled.grad) < 1e-6


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("lr", lambda h: optax.sgd(h["lr"])),
        ("m", lambda h: optax.sgd(0.1, momentum=h["m"])),
        ("wd", lambda h: optax.adamw(0.1, weight_decay=h["wd"])),
    ],
)
def test_optimiser_hyperparameters_are_refused(name: str, optimizer: Any) -> None:
    """Exactly zero under the stationary point, for decoupled decay too."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum((w - batch) ** 2) + hyper["l2"] * jnp.sum(w**2)

    problem = hg.bilevel(lambda key: jnp.ones(2), loss, loss, optimizer)
    hyper = {"l2": 0.1, name: 0.1}
    arguments = (problem, hyper, None, jnp.zeros((3, 2)), jnp.zeros(2), jax.random.key(0))
    with pytest.raises(ValueError, match=rf"'{name}' does not enter the gradient of train_loss"):
        hg.hypergradient(*arguments, hg.Implicit())
    fixed = hg.hypergradient(*arguments, hg.Implicit(hg.GMRES(), of="fixed_point"))
    assert float(fixed.grad[name]) != 0


def test_a_learned_start_is_refused() -> None:
    """The stationary point has forgotten it."""
    base = ridge(5)
    problem = base.problem._replace(
        init=lambda hyper, key: base.problem.init(hyper, key)._replace(
            params=hyper["start"] * jnp.ones(5)
        )
    )
    oracle = base._replace(problem=problem, hyper=dict(base.hyper, start=jnp.float32(1.0)))
    with pytest.raises(ValueError, match=r"'start' does not enter"):
        estimate_of(oracle, hg.Implicit())
    unused = base._replace(hyper=dict(base.hyper, width=jnp.float32(1.0)))
    with pytest.raises(ValueError, match=r"'width' never reaches the validation loss"):
        estimate_of(unused, hg.Implicit())


@pytest.mark.usefixtures("x64")
def test_a_point_that_is_not_stationary_is_said() -> None:
    """`unconverged` is the change of the validation loss that convergence brings."""
    oracle = ridge()
    early = jax.tree.map(lambda x: x[:20], oracle.train)
    estimate = estimate_of(oracle._replace(train=early), hg.Implicit(batches="last"))
    assert float(estimate.info["inner_gradient_norm"]) > 1e-4
    assert float(estimate.info["residual"]) < 1e-8
    missing = float(estimate.info["unconverged"])
    assert missing == pytest.approx(abs(oracle.loss - float(estimate.loss)), rel=0.1)
    converged = float(estimate.info["converged_loss"])
    assert abs(converged - oracle.loss) < 0.1 * abs(float(estimate.loss) - oracle.loss)


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        (hg.Neumann(30, 2.0), 1.5, np.inf),  # above 2 / lambda_max: diverges
        (hg.ConjugateGradient(1), 1e-2, 1.5),
        (hg.ConjugateGradient(10), 0, 1e-5),
    ],
)
def test_a_system_that_is_not_solved_is_said(solver: Any, low: float, high: float) -> None:
    estimate = estimate_of(ridge(), hg.Implicit(solver, batches="last"))
    assert low <= float(estimate.info["residual"]) <= high


@pytest.mark.usefixtures("x64")
def test_all_batches_are_their_mean() -> None:
    """Two halves of the data as K = 2 batches make the Hessian of the whole, as all examples do."""
    oracle = ridge(1)
    losses = oracle.problem.train_loss, oracle.problem.valid_loss
    # a tiny learning rate keeps the point, so that only the Hessian's batches differ
    problem = hg.bilevel(lambda key: jnp.arange(1.0, 6.0), *losses, lambda hyper: optax.sgd(1e-14))
    data = jax.tree.map(lambda x: x[0], oracle.train)
    halves = jax.tree.map(lambda x: x.reshape(2, 20, *x.shape[1:]), data)

    def grad(train: Any, batches: str = "all") -> Any:
        estimator = hg.Implicit(hg.ConjugateGradient(), batches=batches)
        return estimate_of(oracle._replace(problem=problem, train=train), estimator).grad

    drawn = hg.Minibatches(data, 10, 2)
    whole, exact, partial = jax.jit(
        lambda: (
            grad(oracle.train),
            [grad(train) for train in (halves, drawn)],
            [grad(train, "last") for train in (halves, drawn)],
        )
    )()
    for both, last in zip(exact, partial, strict=True):
        assert relative_error(both, whole) < 1e-12
        assert relative_error(last, whole) > 1e-3


def test_what_training_does_not_touch_leaves_the_system_solvable() -> None:
    """Batch statistics: judged, but not in the training loss, so their Hessian is zero."""
    base = ridge(50)

    def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return base.problem.valid_loss(params["w"], hyper, batch, key) + jnp.sum(params["stats"])

    def step(inner: Any, hyper: Any, batch: Any, key: Any) -> Any:
        end = base.problem.step(inner._replace(params=inner.params["w"]), hyper, batch, key)
        return end._replace(params={"w": end.params, "stats": inner.params["stats"]})

    def init(hyper: Any, key: Any) -> Any:
        start = base.problem.init(hyper, key)
        return start._replace(params={"w": start.params, "stats": jnp.ones(3)})

    problem = hg.Problem(
        init, step, lambda p, *rest: base.problem.train_loss(p["w"], *rest), valid_loss
    )
    estimate = estimate_of(base._replace(problem=problem), hg.Implicit(batches="last"))
    assert float(estimate.info["residual"]) < 1e-4
    alone = estimate_of(base, hg.Implicit(batches="last"))
    assert relative_error(estimate.grad, alone.grad) < 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("solver", "of"),
    [
        (hg.ConjugateGradient(), "stationary"),
        (hg.GMRES(), "stationary"),
        (hg.GMRES(), "fixed_point"),
        (hg.Neumann(2000, 1.0), "fixed_point"),
    ],
)
def test_frozen_parameters_are_not_solved_for(solver: Any, of: str) -> None:
    """The training loss depends on them, so the Hessian has a block for what does not move."""
    base = ridge(400)

    def train_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        scaled = (batch[0] * params["scales"], batch[1])
        return base.problem.train_loss(params["w"], hyper, scaled, key)

    def valid_loss(params: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        scaled = (batch[0] * params["scales"], batch[1])
        return base.problem.valid_loss(params["w"], hyper, scaled, key)

    problem = hg.bilevel(
        lambda key: {"w": jnp.zeros(5), "scales": jnp.linspace(0.8, 1.3, 5)},
        train_loss,
        valid_loss,
        lambda hyper: optax.sgd(0.2),
        trainable="w",
    )
    oracle = base._replace(problem=problem)
    estimators = hg.Unrolled(), hg.Implicit(solver, of=of, batches="last")
    exact, estimate = jax.jit(lambda: [estimate_of(oracle, e) for e in estimators])()
    assert relative_error(estimate.grad, exact.grad) < 1e-6
    # its rate, 0.2 times the smallest curvature, is that of gradient descent
    assert float(estimate.info["residual"]) < 1e-6


@pytest.mark.parametrize("solver", [hg.ConjugateGradient(), hg.GMRES()])
def test_rows_that_no_batch_holds_leave_the_system_solvable(solver: Any) -> None:
    """An embedding's unseen row is judged, and its Hessian is 0: CG used to give 1e96, finite."""
    ids, targets = jnp.array([0, 1, 2, 3, 0, 1]), jnp.array([1.0, -1.0, 0.5, 2.0, 0.8, -1.2])

    def train_loss(table: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        rows = table[ids]
        return jnp.mean((rows.sum(1) - targets) ** 2) + hyper["l2"] * jnp.mean(rows**2)

    def valid_loss(table: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.mean((table.sum(1) - 1) ** 2)

    problem = hg.bilevel(
        lambda key: jax.random.normal(key, (5, 2)),
        train_loss,
        valid_loss,
        lambda hyper: optax.sgd(0.3),
    )
    arguments = (problem, {"l2": 0.3}, None, jnp.zeros((600, 1)), jnp.zeros(1), jax.random.key(0))
    estimators = hg.Unrolled(), hg.Implicit(solver, batches="last")
    exact, estimate = jax.jit(lambda: [hg.hypergradient(*arguments, e) for e in estimators])()
    assert relative_error(estimate.grad, exact.grad) < 1e-3
    assert float(estimate.info["residual"]) < 1e-3


@pytest.mark.usefixtures("x64")
def test_all_batches_of_a_loss_that_sums() -> None:
    """A sum over 8 examples beside a penalty is not an eighth of a sum over 40."""
    base = ridge(1)
    data = jax.tree.map(lambda x: x[0], base.train)

    def train_loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum((batch[0] @ w - batch[1]) ** 2) / 8 + hyper["l2"] * jnp.sum(w**2)

    problem = hg.bilevel(
        lambda key: jnp.ones(5), train_loss, base.problem.valid_loss, lambda h: optax.sgd(1e-14)
    )
    oracle = base._replace(problem=problem)
    stacked = jax.tree.map(lambda x: x.reshape(5, 8, *x.shape[1:]), data)
    trains = stacked, hg.Minibatches(data, 8, 3)
    grads = jax.jit(
        lambda: [estimate_of(oracle._replace(train=t), hg.Implicit()).grad for t in trains]
    )()
    assert relative_error(grads[1], grads[0]) < 1e-10


def test_a_rate_that_also_stands_in_the_validation_loss_is_refused() -> None:
    """Its main part, through training, would be missing."""

    def loss(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum((w - batch) ** 2)

    def judged(w: Any, hyper: Any, batch: Any, key: Any) -> jax.Array:
        return loss(w, hyper, batch, key) + 1e-3 * hyper["lr"] + hyper["only"] ** 2

    problem = hg.bilevel(lambda key: jnp.ones(2), loss, judged, lambda h: optax.sgd(h["lr"]))
    arguments = (None, jnp.zeros((3, 2)), jnp.zeros(2), jax.random.key(0), hg.Implicit())
    with pytest.raises(ValueError, match=r"'lr' does not enter the gradient of train_loss"):
        hg.hypergradient(problem, {"lr": 0.1, "only": 2.0}, *arguments)
    fixed = problem._replace(
        step=lambda inner, hyper, batch, key: problem.step(inner, {"lr": 0.1}, batch, key),
        init=lambda hyper, key: problem.init({"lr": 0.1}, key),
    )
    grads = hg.hypergradient(fixed, {"lr": 0.1, "only": 2.0}, *arguments).grad
    np.testing.assert_allclose(grads["only"], 4.0)


@pytest.mark.parametrize("make", [hg.alternating, hg.restarting])
def test_the_fixed_point_tunes_a_learning_rate_in_a_tuner(make: Any) -> None:
    """Tuners let training stand still at the end of a shortened run; the step must not."""
    oracle = ridge(6)
    problem = hg.bilevel(
        lambda key: jnp.zeros(5),
        lambda w, hyper, batch, key: oracle.problem.train_loss(w, {"l2": 0.1}, batch, key),
        oracle.problem.valid_loss,
        lambda hyper: optax.sgd(hyper["lr"]),
    )
    space = hg.Space({"lr": hg.Float(1e-4, 1.0, scale="log")})
    tuner = make(problem, space, hg.Implicit(hg.GMRES(), of="fixed_point", batches="last"))
    state, update = tuner.init({"lr": 1e-2}, oracle.key), jax.jit(tuner.update)
    for _ in range(3):
        state, info = update(state, oracle.train, oracle.valid)
        assert float(info.grad["lr"]) < 0
        assert float(info.estimate["residual"]) < 1e-2
    assert float(info.hyper["lr"]) > 1e-2


def test_warm_richardson_tracks_the_solution_while_training_moves() -> None:
    """SOBA by `alternating`: one step, one product, one outer step."""
    oracle = ridge(1)
    estimator = hg.Implicit(hg.Richardson(1, 0.2), batches="last")
    space = hg.Space({"l2": hg.Float(1e-3, 10.0, scale="log")})
    tuner = hg.alternating(oracle.problem, space, estimator, optax.sgd(0.0))
    state, update = tuner.init(oracle.hyper, oracle.key), jax.jit(tuner.update)
    for _ in range(150):
        state, info = update(state, oracle.train, oracle.valid)
    assert int(info.refused) == 0
    assert float(info.estimate["residual"]) < 1e-3
    unit_slope = oracle.grad["l2"] * 0.3 * np.log(1e4)  # dh/du on a logarithmic scale
    assert float(info.grad["l2"]) == pytest.approx(unit_slope, rel=1e-2)


def test_bfloat16_parameters_have_float32_hypergradients() -> None:
    oracle = ridge(60)
    inner = oracle.problem.init(oracle.hyper, oracle.key)
    narrow = inner._replace(params=inner.params.astype(jnp.bfloat16))
    estimate = estimate_of(oracle, hg.Implicit(batches="last"), narrow)
    assert estimate.inner.params.dtype == jnp.bfloat16
    assert estimate.grad["l2"].dtype == jnp.float32
    assert relative_error(estimate.grad, oracle.grad) < 0.1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"solver='cg' is no solver"):
        hg.Implicit("cg")
    with pytest.raises(ValueError, match=r"of='best' is unknown"):
        hg.Implicit(of="best")
    with pytest.raises(ValueError, match=r"batches='first' is unknown"):
        hg.Implicit(batches="first")
    for solver in (hg.ConjugateGradient(), hg.Nystrom()):
        with pytest.raises(ValueError, match=r"needs a symmetric matrix"):
            hg.Implicit(solver, of="fixed_point")
    assert hash(hg.Implicit()) == hash(dataclasses.replace(hg.Implicit()))


def lasso(train_loss: Any) -> tuple[hg.Problem, Any]:
    """An L1 penalty, solved by subgradient steps or by proximal ones; data and arguments."""
    rng = np.random.RandomState(0)
    truth = np.r_[3, -2, 1.5, 1, -1, np.zeros(25)]
    x = rng.randn(60, 30)
    y = x @ truth + rng.randn(60)
    xv = rng.randn(60, 30)
    yv = xv @ truth + rng.randn(60)
    smooth = lambda w: jnp.mean((x @ w - y) ** 2) / 2  # noqa: E731
    problem = hg.bilevel(
        lambda key: jnp.zeros(30),
        lambda w, h, b, key: train_loss(smooth(w), w, h),
        lambda w, h, b, key: jnp.mean((xv @ w - yv) ** 2),
        lambda h: hg.prox(optax.sgd(0.3), hg.prox.l1(h["l1"])),
    )
    return problem, (jnp.zeros((1, 1)), jnp.zeros(()), jax.random.key(0))


@pytest.mark.usefixtures("x64")
def test_a_kink_is_refused_and_prox_is_right() -> None:
    """The residual of the linear system was 1e-12, and the sign was wrong."""
    hyper, space = {"l1": jnp.array(0.15)}, hg.Space({"l1": hg.Float(1e-3, 1.0, scale="log")})
    right, arguments = lasso(lambda smooth, w, h: smooth)
    kinked, _ = lasso(lambda smooth, w, h: smooth + h["l1"] * jnp.sum(jnp.abs(w)))
    trap = right._replace(train_loss=kinked.train_loss)
    key = arguments[-1]
    end = jax.jit(
        lambda: hg.rollout(right, hyper, right.init(hyper, key), jnp.zeros((3000, 1)), key)
    )()
    fixed_point = hg.Implicit(hg.GMRES(), of="fixed_point")
    found = hg.hypergradient(right, hyper, end, *arguments, estimator=fixed_point)
    cg = hg.Implicit(hg.ConjugateGradient(60))
    wrong = hg.hypergradient(trap, hyper, end, *arguments, estimator=cg)
    differences = hg.hypergradient(
        right, hyper, None, jnp.zeros((500, 1)), *arguments[1:], estimator=hg.FiniteDifference(1e-6)
    )
    assert abs(float(found.grad["l1"] / differences.grad["l1"]) - 1) < 1e-7
    assert float(found.grad["l1"]) == pytest.approx(2.6269, abs=1e-4)
    assert float(wrong.grad["l1"]) < 0
    assert float(wrong.info["residual"]) < 1e-9
    assert float(wrong.info["unconverged_share"]) > 0.1
    tuner = hg.alternating(trap, space, hg.Implicit())
    state = tuner.init(hyper, key, end)
    for _ in range(2):
        state, info = jax.jit(tuner.update)(state, *arguments[:2])
        assert int(info.refused) == NOT_SOLVED
        assert float(info.hyper["l1"]) == pytest.approx(0.15)
    with pytest.raises(ValueError, match=r"not at rest here, or at a kink.*hypergrad\.prox"):
        hg.check_hypergradient(trap, hyper, end, *arguments, hg.Implicit(), space)


def test_what_has_not_converged_trains_on_before_it_tunes() -> None:
    """A refusal that rewound training would never let it converge."""
    oracle = ridge(1)
    tuner = hg.alternating(
        oracle.problem, hg.Space({"l2": hg.Float(1e-3, 10.0, scale="log")}), hg.Implicit()
    )
    state, update = tuner.init({"l2": 0.01}, oracle.key), jax.jit(tuner.update)
    refused = []
    for _ in range(20):
        state, info = update(state, oracle.train, oracle.valid)
        refused.append(int(info.refused))
    assert refused[0] == NOT_SOLVED and refused[-1] == 0
    assert float(info.hyper["l2"]) != pytest.approx(0.01)


@pytest.mark.usefixtures("x64")
def test_fresh_batches_average_out_where_one_batch_is_biased() -> None:
    """E (I - a A_1) (I - a A_2) is the square of the mean's, E (I - a A_1)^2 is not."""
    oracle = ridge()
    losses = oracle.problem.train_loss, oracle.problem.valid_loss
    still = hg.bilevel(lambda key: jnp.zeros(5), *losses, lambda hyper: optax.sgd(1e-12))
    end = estimate_of(oracle, hg.Implicit(hg.Cholesky(), batches="last")).inner
    inner = still.init(oracle.hyper, oracle.key)._replace(params=end.params)
    train = hg.Minibatches(jax.tree.map(lambda a: a[0], oracle.train), 4)

    def draws(batches: Any, count: int) -> np.ndarray:
        estimator = hg.Implicit(hg.Neumann(30, 0.05), batches=batches)

        def grad(seed: Any) -> Any:
            data = inner, train, oracle.valid, jax.random.key(seed)
            return hg.hypergradient(still, oracle.hyper, *data, estimator).grad["l2"]

        return np.asarray(jax.jit(lambda: jax.lax.map(grad, jnp.arange(count)))())

    series = float(draws("all", 1)[0])
    for batches, biased in (("fresh", False), ("last", True)):
        found = draws(batches, 400)
        error = np.std(found) / 20
        assert (abs(np.mean(found) - series) > 4 * error) == biased, (series, found.mean(), error)
        assert error < 0.1 * abs(series)


@pytest.mark.usefixtures("x64")
def test_adams_second_moments_scale_the_system() -> None:
    """The same hypergradient, by a preconditioner that costs no product."""
    oracle = ridge()
    problem = hg.bilevel(
        lambda key: jnp.zeros(5),
        oracle.problem.train_loss,
        oracle.problem.valid_loss,
        lambda hyper: optax.adam(0.02),
    )
    inner = problem.init(oracle.hyper, oracle.key)
    arguments = oracle.hyper, inner, oracle.train, oracle.valid, oracle.key

    def grad(solver: Any) -> Any:
        estimator = hg.Implicit(solver, batches="last")
        return hg.hypergradient(problem, *arguments, estimator).grad

    solvers = (
        hg.Cholesky(),
        hg.Preconditioned(hg.ConjugateGradient(), "adam"),
        hg.Identity(),
        hg.Preconditioned(hg.Identity(), "adam"),
    )
    exact, same, plain, one_step = jax.jit(lambda: [grad(solver) for solver in solvers])()
    assert relative_error(same, exact) < 1e-8
    assert relative_error(one_step, plain) > 1e-3
    with pytest.raises(ValueError, match="keeps none for the parameters"):
        estimate_of(oracle, hg.Implicit(hg.Preconditioned(hg.GMRES(), "adam")))


@pytest.mark.usefixtures("x64")
def test_the_identity_is_the_derivative_of_one_step() -> None:
    """With no product it needs no entry left out but frozen ones, and reports no residual."""

    def score(params: Any, batch: Any) -> Any:
        rows = params["rows"][batch["row"]] + params["frozen"]
        return jnp.mean((jnp.tanh(rows) @ params["w"] - batch["y"]) ** 2)

    def loss(params: Any, hyper: Any, batch: Any, key: Any) -> Any:
        kept = jnp.sum(params["rows"] ** 2) + jnp.sum(params["frozen"] ** 2)
        return score(params, batch) + hyper["l2"] * kept

    def optimizer(hyper: Any) -> Any:
        freeze = {"rows": False, "w": False, "frozen": True}
        adam = optax.adamw(hyper["rate"], weight_decay=hyper["decay"], mask={**freeze, "w": True})
        return optax.chain(adam, optax.masked(optax.set_to_zero(), freeze))

    draw = np.random.default_rng(0)
    params = {"rows": draw.normal(size=(6, 3)), "w": draw.normal(size=3), "frozen": np.ones(3)}
    params = jax.tree.map(jnp.asarray, params)
    problem = hg.bilevel(lambda key: params, loss, lambda p, h, b, k: score(p, b), optimizer)
    hyper = {"rate": 0.01, "decay": 0.1, "l2": 0.02}
    hyper = {name: jnp.float64(x) for name, x in hyper.items()}
    # two of the six rows are in no batch
    train = {"row": draw.integers(0, 4, (5, 8)), "y": draw.normal(size=(5, 8))}
    valid, key = {"row": draw.integers(0, 6, 8), "y": draw.normal(size=8)}, jax.random.key(0)
    inner = problem.init(hyper, key)
    identity = hg.Implicit(hg.Identity(), of="fixed_point", batches="last")
    estimate = hg.hypergradient(problem, hyper, inner, train, valid, key, identity)
    assert "residual" not in estimate.info
    direction = jax.grad(lambda params: score(params, valid))(estimate.inner.params)
    last = jax.tree.map(lambda x: x[-1], train)

    def along(hyper: Any) -> Any:
        stepped = problem.step(estimate.inner._replace(step=0), hyper, last, key).params
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, direction, stepped)))

    oracle = jax.grad(along)(hyper)
    assert relative_error(estimate.grad, oracle) < 1e-10
    assert all(abs(float(x)) > 1e-5 for x in oracle.values())


def test_solvers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the same matrix in each of its products"):
        hg.Implicit(hg.ConjugateGradient(), batches="fresh")
    with pytest.raises(ValueError, match="diagonal='adam' scales the parameters"):
        hg.Implicit(hg.Preconditioned(hg.GMRES(), "adam"), of="fixed_point")
    with pytest.raises(ValueError, match="needs a symmetric matrix"):
        hg.Implicit(hg.Preconditioned(hg.Cholesky()), of="fixed_point")
