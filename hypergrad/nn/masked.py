"""One program for all widths: layers of the largest width, of which a traced number of units is on.

A network of masked layers computes what the narrow one computes, and so does its training: what
is off gets no gradient, starts at zero, and the rest starts at the narrow one's scale. A penalty in
the loss must leave it out, too, as `masked_kernel` does: Adam's steps are full ones however small a
gradient is.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import ArrayLike, DTypeLike

from hypergrad import checks
from hypergrad.trees import Key

Fan = Literal["in", "out", "avg"]


def unit_mask(units: ArrayLike, most: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """`[most]`: 1 for the first `units`, which may be traced, 0 for the others.

    >>> unit_mask(2, 4).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return (jnp.arange(checks.integer("most", most)) < units).astype(dtype)


def masked_dense(
    params: Mapping[str, Any],
    inputs: jax.Array,
    units: ArrayLike | None = None,
    input_units: ArrayLike | None = None,
) -> jax.Array:
    """`inputs @ kernel + bias`, of which the first `input_units` and the first `units` count.

    Args:
      params: `kernel` `[most inputs, most units]`, and `bias` `[most units]` or none.
      inputs: `[..., most inputs]`; those beyond `input_units` are ignored, whatever they are.
      units: an int, traced or not; outputs beyond are 0. None for all.
      input_units: the `units` of the layer before. None for all.

    Cost: that of the largest layer.
    """
    dtype = inputs.dtype
    if input_units is not None:
        inputs = inputs * unit_mask(input_units, inputs.shape[-1], dtype)
    outputs = inputs @ params["kernel"]
    if params.get("bias") is not None:
        outputs = outputs + params["bias"]
    if units is None:
        return outputs
    return outputs * unit_mask(units, outputs.shape[-1], outputs.dtype)


def masked_kernel(
    params: Mapping[str, Any],
    units: ArrayLike | None = None,
    input_units: ArrayLike | None = None,
) -> jax.Array:
    """The kernel of a masked layer with what is off at zero, for a penalty on what is on.

    >>> kernel = masked_kernel({"kernel": jnp.ones((3, 4))}, 2, 1)
    >>> float(jnp.sum(kernel**2))
    2.0
    """
    kernel = params["kernel"]
    return kernel * _on(kernel.shape, units, input_units, kernel.dtype)


class MaskedDense(linen.Module):
    """`flax.linen.Dense` whose width is a traced number: see `masked_dense` for the call.

    Takes the place of flax's own in a sweep whose space holds `Int(..., traced=True)`. The start
    depends on the width too, so give `problem.init` the hyperparameters (docs/sweeps.md).

    Args:
      features: the largest width.
      use_bias: whether there is one; it starts at 0.
      kernel_init: of the largest kernel, whose entries are then scaled as its variance asks for.
      fan: what that variance is one over: "in" (lecun, he), "out" or "avg" (glorot).

    >>> layer, x = MaskedDense(8), jnp.ones((1, 4))
    >>> params = layer.init(jax.random.key(0), x, 3)["params"]
    >>> (layer.apply({"params": params}, x, 3) != 0).tolist()
    [[True, True, True, False, False, False, False, False]]
    """

    features: int
    use_bias: bool = True
    kernel_init: Callable[..., jax.Array] = linen.initializers.lecun_normal()
    fan: Fan = "in"

    @linen.compact
    def __call__(
        self,
        inputs: jax.Array,
        units: ArrayLike | None = None,
        input_units: ArrayLike | None = None,
    ) -> jax.Array:
        """The first `units` features of the first `input_units` inputs; the others are 0."""
        checks.choice("MaskedDense(fan", self.fan, ("in", "out", "avg"))
        shape = inputs.shape[-1], self.features

        def narrow(key: Key) -> jax.Array:
            kernel = self.kernel_init(key, shape, inputs.dtype)
            return kernel * _rescaled(shape, units, input_units, self.fan, inputs.dtype)

        params = {"kernel": self.param("kernel", narrow)}
        if self.use_bias:
            zeros = linen.initializers.zeros_init()
            params["bias"] = self.param("bias", zeros, (self.features,), inputs.dtype)
        return masked_dense(params, inputs, units, input_units)


def _rescaled(
    shape: tuple[int, int],
    units: ArrayLike | None,
    input_units: ArrayLike | None,
    fan: Fan,
    dtype: DTypeLike,
) -> jax.Array:
    """What takes a kernel's start at the largest size to that of the part that is on, `shape`."""
    inputs = jnp.asarray(shape[0] if input_units is None else input_units, dtype)
    outputs = jnp.asarray(shape[1] if units is None else units, dtype)
    most = {"in": shape[0], "out": shape[1], "avg": shape[0] + shape[1]}[fan]
    here = {"in": inputs, "out": outputs, "avg": inputs + outputs}[fan]
    return jnp.sqrt(most / here) * _on(shape, units, input_units, dtype)


def _on(
    shape: tuple[int, ...],
    units: ArrayLike | None,
    input_units: ArrayLike | None,
    dtype: DTypeLike,
) -> jax.Array:
    """1 where both ends of a weight are on, `shape`."""
    inputs = unit_mask(shape[0] if input_units is None else input_units, shape[0], dtype)
    return inputs[:, None] * unit_mask(shape[1] if units is None else units, shape[1], dtype)
