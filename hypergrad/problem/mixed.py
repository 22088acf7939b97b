"""A categorical choice as a mixture of its options, which has a gradient."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad import checks
from hypergrad.problem.structure import StructureError
from hypergrad.trees import Tree, is_key


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """A choice among functions, relaxed: sum_i softmax(logits)_i option_i(*args).

    While it is tuned, every option runs and the logits are a hyperparameter like any other, under
    `hypergrad.Float()` in a space. `choice` names the option of the largest weight; a sweep over
    `Categorical(list(mixed.options))` begins with it by `enqueue=`.

    Args:
      options: functions by name, or a list of them, which are then named by what they are called,
        or by number; all called with the same arguments (parameters too, where an option has its
        own), and of results of one structure and shape.
      temperature: of the softmax; lower ones are nearer to a choice, with smaller gradients off it.

    `logits` may have leading axes, as with one choice per layer: then index it, one row a call.

    The best mixture need not hold the best option: what is chosen has to be trained again by
    itself. Options that train fast (an identity beside convolutions) are favoured early, and
    options that are linear in one another blend into one more (DARTS' known failures).

    Cost: all options, in time and in memory of the backward pass.

    Raises:
      ValueError: fewer than two options, logits of another length, results whose shapes differ: a
        choice that changes shapes belongs to a sweep, or its results must be padded.

    Source: Liu et al. 2019, eq. 2 (DARTS).

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> mixed = hg.Mixed({"tanh": jnp.tanh, "relu": jax.nn.relu})
    >>> round(float(mixed(mixed.start(), 2.0)), 3), mixed.choice(jnp.array([0.1, 0.3]))
    (1.482, 'relu')
    """

    options: Mapping[str, Callable[..., Tree]]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.options, list | tuple):
            object.__setattr__(self, "options", _named(self.options))
        checks.instance("options", self.options, Mapping, "functions by name, {name: function}")
        for name, option in self.options.items():
            checks.text(f"the option {name!r}", name)
            checks.instance(f"options[{name!r}]", option, Callable, "a function")
        if len(self.options) < 2:
            raise ValueError(f"options has {len(self.options)} entries: give at least two.")
        checks.positive("temperature", self.temperature)

    def start(self) -> jax.Array:
        """Logits of equal weights, `[options]`."""
        return jnp.zeros(len(self.options))

    def weights(self, logits: jax.Array) -> jax.Array:
        """The shares of the options, `[..., options]`."""
        if jnp.shape(logits)[-1:] != (len(self.options),):
            raise ValueError(
                f"logits is of shape {jnp.shape(logits)}: give one number for each of the "
                f"{len(self.options)} options, as Mixed.start() does."
            )
        return jax.nn.softmax(jnp.asarray(logits) / self.temperature)

    def __call__(self, logits: jax.Array, *args: Any, **kwargs: Any) -> Tree:
        """The mixture; logits `[options]`."""
        weights = self._row(logits)
        results = {name: option(*args, **kwargs) for name, option in self.options.items()}
        _require_one_shape(results)

        def mix(*values: jax.Array) -> jax.Array:
            # of the arrays' own dtypes: a weak type would give way to a narrower one
            dtype = jnp.result_type(*(jnp.asarray(value).dtype for value in values))
            shares = weights.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else weights
            return sum(share * value for share, value in zip(shares, values, strict=True))

        return jax.tree.map(mix, *results.values())

    def choice(self, logits: jax.Array) -> str:
        """The name of the option with the largest weight, of logits `[options]` with values."""
        weights = self._row(logits)
        if isinstance(weights, jax.core.Tracer):
            raise TypeError(
                f"logits={logits} has no value while it is traced, and a name follows from one: "
                "call choice outside of jit and vmap, on what a tuner's best(state) returns."
            )
        if not bool(jnp.isfinite(weights).all()):
            raise ValueError(f"logits={logits!r} is not finite, so that no option is the largest.")
        return list(self.options)[int(jnp.argmax(weights))]

    def _row(self, logits: jax.Array) -> jax.Array:
        weights = self.weights(logits)
        if weights.ndim != 1:
            raise ValueError(
                f"logits is of shape {weights.shape}: a call takes one row of it, logits[i]."
            )
        return weights


def _named(options: Sequence[Callable[..., Tree]]) -> dict[str, Callable[..., Tree]]:
    names = [getattr(option, "__name__", "<lambda>") for option in options]
    own = "<lambda>" not in names and len(set(names)) == len(names)
    return dict(zip(names if own else map(str, range(len(options))), options, strict=True))


def _require_one_shape(results: dict[str, Tree]) -> None:
    shapes = {
        name: (jax.tree.structure(result), [jnp.shape(x) for x in jax.tree.leaves(result)])
        for name, result in results.items()
    }
    for name, result in results.items():
        if any(is_key(leaf) for leaf in jax.tree.leaves(result)):
            raise StructureError(f"options[{name!r}] gives a PRNG key, of which there is no mean.")
    (first, wanted), *rest = shapes.items()
    for name, shape in rest:
        if shape != wanted:
            raise StructureError(
                f"options[{name!r}] gives shapes {shape[1]} where options[{first!r}] gives "
                f"{wanted[1]}, and a mixture needs one shape: pad the results (a convolution's "
                "padding='SAME'), or leave this choice to a sweep, as hypergrad.Categorical."
            )
