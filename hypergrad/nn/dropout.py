"""Flax modules, linen and nnx, whose hyperparameters may be traced values with a gradient."""

from collections.abc import Sequence

import jax
from flax import linen, nnx
from flax.nnx.module import first_from

from hypergrad.problem.noise import Form, check_rate, dropout
from hypergrad.trees import Leaf

_NO_RATE = "got no rate: pass it to the constructor or as rate= to the call"


class LinenDropout(linen.Module):
    """`flax.linen.Dropout` with a rate that has a gradient, given here or at the call.

    Takes the place of flax's own: the same attributes, call and stream (`"dropout"`). rate: a
    number or a traced value in [0, 1), a scalar or one per unit; `rate` at the call goes before the
    attribute. Evaluation (`deterministic=True`) returns the input untouched. form: see
    `hypergrad.dropout`, as for bias, variance and what happens at rate 0.

    Raises `ValueError` where neither place gives a rate, and for a concrete rate outside [0, 1);
    flax's own errors stand for a missing `deterministic` or random stream.

    >>> import jax, jax.numpy as jnp
    >>> class Net(linen.Module):
    ...     @linen.compact
    ...     def __call__(self, x, rate, train):
    ...         return LinenDropout()(linen.Dense(4)(x), rate=rate, deterministic=not train)
    >>> net, x = Net(), jnp.ones((32, 3))
    >>> variables = net.init(jax.random.key(0), x, 0.1, False)
    >>> def loss(rate, key):
    ...     return jnp.sum(net.apply(variables, x, rate, True, rngs={"dropout": key}) ** 2)
    >>> bool(jax.jit(jax.grad(loss))(0.1, jax.random.key(1)) != 0)
    True
    """

    rate: Leaf | None = None
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    form: str | Form = "bernoulli"

    @linen.compact
    def __call__(
        self,
        inputs: jax.Array,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
        rate: Leaf | None = None,
    ) -> jax.Array:
        """Drop units of `inputs`, or return them untouched where `deterministic`."""
        deterministic = linen.merge_param("deterministic", self.deterministic, deterministic)
        # Before the rate and the key are asked for: evaluation needs neither.
        if deterministic:
            return inputs
        rate = first_from(rate, self.rate, error_msg=f"LinenDropout {_NO_RATE}")
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return dropout(inputs, rate, key, self.form, self.broadcast_dims)


class NNXDropout(nnx.Module):
    """`flax.nnx.Dropout` with a rate that has a gradient, given here, at the call, or assigned.

    Takes the place of flax's own: the same arguments, `train()` and `eval()`, and random stream
    (`"dropout"`). rate: a number or a traced value in [0, 1), a scalar or one per unit; `rate` at
    the call goes before the attribute and is what to use under `nnx.jit`, where a number stored in
    the module is part of the program. Evaluation returns the input untouched. form: see
    `hypergrad.dropout`, as for bias, variance and what happens at rate 0.

    Raises `ValueError` where neither place gives a rate, where noise is wanted and no `rngs` was
    given, and for a concrete rate outside [0, 1).

    >>> import jax, jax.numpy as jnp
    >>> layer, x = NNXDropout(rngs=nnx.Rngs(0)), jnp.ones((32, 4))
    >>> loss = lambda rate, key: jnp.sum(layer(x, rate=rate, rngs=key) ** 2)
    >>> bool(jax.jit(jax.grad(loss))(0.1, jax.random.key(1)) != 0)
    True
    >>> layer.eval()
    >>> bool(jnp.all(layer(x, rate=0.1) == x))
    True
    """

    def __init__(
        self,
        rate: Leaf | None = None,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        form: str | Form = "bernoulli",
    ) -> None:
        if rate is not None:
            check_rate(rate)
        # An array among the attributes must be declared data, or nnx refuses to split the module.
        self.rate = nnx.data(rate) if isinstance(rate, jax.Array) else rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        self.form = form
        # A stream of its own, as flax's layer has: another layer's draws leave it where it is.
        stream = rngs[rng_collection] if isinstance(rngs, nnx.Rngs) else rngs
        self.rngs = nnx.data(None) if stream is None else stream.fork()

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        rate: Leaf | None = None,
    ) -> jax.Array:
        """Drop units of `inputs`, or return them untouched where `deterministic`."""
        message = (
            "NNXDropout got no deterministic: pass deterministic=True or False to the constructor "
            "or the call, or use model.train() and model.eval()"
        )
        if first_from(deterministic, self.deterministic, error_msg=message):
            return inputs
        rate = first_from(rate, self.rate, error_msg=f"NNXDropout {_NO_RATE}")
        return dropout(inputs, rate, self._key(rngs), self.form, self.broadcast_dims)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _key(self, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None) -> jax.Array:
        message = (
            "NNXDropout trains and has no rngs: pass rngs=nnx.Rngs(dropout=seed) to the "
            "constructor, or a key, a stream or nnx.Rngs to the call"
        )
        rngs = first_from(rngs, self.rngs, error_msg=message)
        if isinstance(rngs, nnx.Rngs):
            return rngs[self.rng_collection]()
        return rngs() if isinstance(rngs, nnx.RngStream) else rngs
