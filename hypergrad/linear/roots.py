"""Solutions as functions of what they solve: derivatives of any solver by the implicit function."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import checks
from hypergrad.linear.base import LinearSolver, MatVec, relative_residual
from hypergrad.linear.krylov import GMRES, ConjugateGradient
from hypergrad.problem.structure import Reach, StructureError, naming_backward_rules, reaches
from hypergrad.trees import Params, is_inexact, leaf_names, path_name, split_inexact

Solve = Callable[..., Params]
# z, or a vector of its space: inexact arrays of one dtype of at least float32
Vector = list[jax.Array]
Arrays = list[jax.Array]  # those among the arguments of a solver


def custom_root(
    optimality: Callable[..., Params],
    solver: LinearSolver = ConjugateGradient(),  # noqa: B008  frozen, so safe to share
    *,
    max_residual: float | None = 0.1,
) -> Callable[[Solve], Solve]:
    """A decorator that gives a solver `(init, *args) -> params` the derivatives of its solution.

    Where optimality(params, *args) = F = 0, params move with args by -(dF/dparams)^-1 dF/dargs,
    however they were found. So the solver may be anything that JAX can run (a `while_loop`, an
    optimiser, where nothing is traced SciPy too): it is never differentiated. Reverse mode, forward
    mode, Jacobians, second derivatives, `vmap` and `jit` all work on the result.

    Args:
      optimality: `(params, *args) -> F`, of the structure of `params`: the gradient of what is
        minimised, an equation's two sides subtracted. What it closes over has derivatives too.
      solver: of the linear system. `ConjugateGradient`, `Cholesky` and `Nystrom` need a symmetric
        positive definite dF/dparams, as the second derivative of a loss at a minimum is; `GMRES`
        and `BiCGSTAB` do not.
      max_residual: the derivative is NaN where the linear system's residual, relative to its right
        hand side, is above this: too few steps, a singular matrix, one that is not symmetric under
        a solver that needs it. None lets everything pass, as a truncated series wants it.

    The derivative in `init` is zero, as in all that `solve` alone reads. Integers and PRNG keys
    among params and args are carried along; arguments that are no arrays reach both functions as
    they are. How close F is to 0 is the solver's business: the derivative is off by as much.

    Cost: none forward but a trace of `optimality`; per derivative, one evaluation of F, one of
    dF/dargs and two evaluations of F per product of the linear solver and for its residual; memory
    that of one evaluation, whatever way `solve` went.

    Raises:
      ValueError: F has another structure than params; an argument that is differentiated reaches
        the solution through `solve` alone (a step size): its derivative would be a silent zero.

    Source: Blondel et al. 2022, eq. 2-4.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> @hg.custom_root(lambda w, l2, x, y: x.T @ (x @ w - y) + l2 * w)
    ... def ridge(init, l2, x, y):
    ...     return jnp.linalg.solve(x.T @ x + l2 * jnp.eye(2), x.T @ y)
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.ones(2)
    >>> jax.jacobian(ridge, 1)(None, 1.0, x, y).round(4).tolist()  # -1 / 2^2, -2 / 5^2
    [-0.25, -0.07999999821186066]
    """
    return _decorator("optimality", optimality, optimality, solver, max_residual)


def custom_fixed_point(
    map: Callable[..., Params],
    solver: LinearSolver = GMRES(),  # noqa: B008  frozen, so safe to share
    *,
    max_residual: float | None = 0.1,
) -> Callable[[Solve], Solve]:
    """`custom_root` for a solver of params = map(params, *args).

    map: `(params, *args) -> params`: a proximal or projected gradient step, a layer in equilibrium,
    one step of an optimiser. Its matrix I - dmap/dparams is rarely symmetric, so that `GMRES` is
    the default; `Neumann(terms)` is the series over further steps, which converges where the map
    contracts.

    >>> import jax, hypergrad as hg
    >>> @hg.custom_fixed_point(lambda x, a: (x + a / x) / 2)  # Heron's square root
    ... def root(init, a):
    ...     return jax.lax.while_loop(
    ...         lambda x: abs(x * x - a) > 1e-5, lambda x: (x + a / x) / 2, init
    ...     )
    >>> round(float(jax.grad(root, 1)(1.0, 4.0)), 4)
    0.25
    """

    @functools.wraps(map)
    def optimality(params: Params, *args: Any, **kwargs: Any) -> Params:
        moved = map(params, *args, **kwargs)
        _require_like("map", moved, params)
        return jax.tree.map(lambda x, y: x - y if is_inexact(x) else x, params, moved)

    return _decorator("map", map, optimality, solver, max_residual)


def _decorator(
    name: str,
    given: Callable[..., Params],
    optimality: Callable[..., Params],
    solver: LinearSolver,
    max_residual: float | None,
) -> Callable[[Solve], Solve]:
    checks.instance(name, given, Callable, "a function of (params, *args)")
    checks.instance("solver", solver, LinearSolver, "one such as hypergrad.GMRES()")
    if max_residual is not None:
        checks.positive("max_residual", max_residual, "or None for no limit")

    def decorate(solve: Solve) -> Solve:
        checks.instance("solve", solve, Callable, "a function of (init, *args)")

        @functools.wraps(solve)
        def solved(init: Params, *args: Any, **kwargs: Any) -> Params:
            leaves, call_with, names = _arrays_of(given, args, kwargs)
            init, held = jax.lax.stop_gradient((init, leaves))
            run = lambda leaves: call_with(leaves, solve, init)  # noqa: E731
            found = jax.lax.stop_gradient(run(held))
            z, params_at = _vector_of(found)

            def residual(z: Vector, leaves: Arrays) -> Vector:
                value = call_with(leaves, optimality, params_at(z))
                _require_like(name, value, found)
                return [f.astype(x.dtype) for f, x in zip(_vector_of(value)[0], z, strict=True)]

            # what the function closes over moves the root as its arguments do
            closed, constants = jax.closure_convert(residual, z, leaves)
            count = len(leaves)

            def of_all(z: Vector, leaves: Arrays) -> Vector:
                return closed(z, leaves[:count], *leaves[count:])

            root = _Root(name, of_all, run, names, solver, max_residual)
            return params_at(root.moving(z, [*leaves, *constants]))

        return solved

    return decorate


@dataclasses.dataclass(frozen=True)
class _Root:
    """What a root is a root of, and how its derivative is found.

    Attributes:
      name: of the function that the user gave.
      residual: F of z and of the arrays among the arguments, and after them of those closed over.
      run: the solver, as a function of the arrays among the arguments.
      names: of the arrays among the arguments.
      solver: of the linear system.
      max_residual: above it, the derivative is NaN.
    """

    name: str
    residual: Callable[[Vector, Arrays], Vector]
    run: Callable[[Arrays], Params]
    names: list[str]
    solver: LinearSolver
    max_residual: float | None

    def moving(self, z: Vector, leaves: Arrays) -> Vector:
        """The root z again, as a function of the leaves."""

        @jax.custom_jvp
        def root(z: Vector, leaves: Arrays) -> Vector:
            return z

        def rule(primals: Any, tangents: Any) -> tuple[Vector, Vector]:
            z = root(*primals)  # once more, so that second derivatives see it move
            leaves = primals[1]
            zero = jax.custom_derivatives.SymbolicZero
            moved = {
                i: t
                for i, t in enumerate(tangents[1])
                if is_inexact(leaves[i]) and not isinstance(t, zero)
            }
            self._require_reach(z, leaves, moved)

            def of_moved(some: Arrays) -> Vector:
                every = dict(enumerate(leaves)) | dict(zip(moved, some, strict=True))
                return self.residual(z, list(every.values()))

            with naming_backward_rules(self.residual, z, leaves):
                some = [leaves[i] for i in moved]
                pushed = jax.jvp(of_moved, (some,), (list(moved.values()),))[1]  # dF/dargs dargs
                product = jax.linearize(lambda z: self.residual(z, leaves), z)[1]  # x -> dF/dz x
            return z, self._solved(product, [-x for x in pushed])

        root.defjvp(rule, symbolic_zeros=True)
        return root(z, leaves)

    def _solved(self, product: MatVec, b: Vector) -> Vector:
        """X of dF/dz x = b, with the transposed system for reverse mode."""

        def solve(matvec: MatVec, b: Vector, true: MatVec) -> Vector:
            key = jax.random.key(0)
            x, _ = self.solver.solve(matvec, b, key, self.solver.init(b))
            if self.max_residual is None:
                return x
            right = relative_residual(true, x, b) <= self.max_residual
            return jax.tree.map(lambda x: jnp.where(right, x, jnp.nan), x)

        def transposed(matvec: MatVec, b: Vector) -> Vector:
            # A symmetric matrix is its own transpose, and forward mode its cheaper product; that
            # it is one shows in the residual.
            return solve(product if self.solver.symmetric else matvec, b, matvec)

        once = lambda matvec, b: solve(matvec, b, matvec)  # noqa: E731
        return jax.lax.custom_linear_solve(product, b, once, transposed)

    def _require_reach(self, z: Vector, leaves: Arrays, moved: Collection[int]) -> None:
        """Raises where an argument acts through the solver alone, or through F without a slope."""
        total = lambda leaves: _total(self.residual(z, leaves))  # noqa: E731
        found = reaches(total, leaves)
        lost = [i for i in moved if i < len(self.names) and not found[i].differentiable]
        for i in lost:
            if found[i].used:
                raise StructureError(
                    f"The argument {self.names[i]!r} enters {self.name} only through "
                    f"{', '.join(found[i].cut_by)}, whose derivative is 0: that of the root would "
                    "be a silent zero. Give it a smooth path, or jax.lax.stop_gradient."
                )
        if lost and (read := self._read_by_solver(leaves)) is not None:
            for i in lost:
                if read[i].differentiable:
                    raise StructureError(
                        f"The argument {self.names[i]!r} enters the solver and not {self.name}: a "
                        "root does not move with how it is found (a step size, a start), and the "
                        "derivative would be a silent zero. Differentiate the solver itself, or "
                        "pass jax.lax.stop_gradient of it."
                    )

    def _read_by_solver(self, leaves: Arrays) -> list[Reach] | None:
        """How the arguments reach what the solver returns; None where it cannot be traced."""
        own = leaves[: len(self.names)]
        try:
            return reaches(lambda leaves: _total(_vector_of(self.run(leaves))[0]), own)
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            return None


def _arrays_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Arrays, Callable[..., Any], list[str]]:
    """The arrays among the arguments, how to call a function with them, and their names.

    What is neither an array nor a float (a number of steps, a function, a text) stays as it is.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
    chosen = [isinstance(x, jax.Array | np.ndarray | np.generic | float) for _, x in paths]
    positional = _positional_names(function, len(args))
    names = []
    for path in (path for flag, (path, _) in zip(chosen, paths, strict=True) if flag):
        owner = positional[path[1].idx] if path[0].idx == 0 else path[1].key
        names.append("/".join([owner, *([path_name(path[2:])] if path[2:] else [])]))

    def call_with(leaves: Arrays, function: Callable[..., Any], params: Params) -> Any:
        supply = iter(leaves)
        given = [next(supply) if flag else x for flag, (_, x) in zip(chosen, paths, strict=True)]
        args, kwargs = treedef.unflatten(given)
        return function(params, *args, **kwargs)

    arrays = [jnp.asarray(x) for flag, (_, x) in zip(chosen, paths, strict=True) if flag]
    return arrays, call_with, names


def _positional_names(function: Callable[..., Any], count: int) -> list[str]:
    """The names of `count` positional arguments after the first."""
    numbered = [f"args[{i}]" for i in range(count)]
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):  # of code that is not Python's
        return numbered
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in parameters if p.kind in positional][:count]
    return [*named, *numbered[len(named) :]]


def _vector_of(params: Params) -> tuple[Vector, Callable[[Vector], Params]]:
    """The inexact leaves in one dtype of at least float32, and how to put such a vector back."""
    floats, join = split_inexact(params)
    # By their dtypes: a weakly typed float64 beside float32 would be taken for one of 32 bits.
    wide = jnp.result_type(jnp.float32, *(jnp.asarray(x).dtype for x in floats))
    if jnp.issubdtype(wide, jnp.complexfloating):
        raise StructureError(
            f"solve returns params of dtype {wide}, which have no one derivative: give real and "
            "imaginary parts as two arrays."
        )

    def params_at(z: Vector) -> Params:
        return join([x.astype(jnp.result_type(y)) for x, y in zip(z, floats, strict=True)])

    return [jnp.asarray(x, wide) for x in floats], params_at


def _require_like(name: str, value: Params, params: Params) -> None:
    """Raises unless what the function `name` returns is of the structure of params."""
    returned, wanted = (
        dict(zip(leaf_names(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True))
        for tree in (value, params)
    )
    if returned != wanted:
        raise StructureError(
            f"{name} returns entries of shapes {returned}, and params have {wanted}: give one "
            f"entry of {name} for each entry of params, in the same structure."
        )


def _total(vector: Vector) -> jax.Array:
    return sum((jnp.sum(x) for x in vector), start=jnp.zeros(()))
