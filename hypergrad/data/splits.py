"""The three splits of a data set: trained on, tuned on, reported on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad.trees import Tree


class Splits(NamedTuple):
    """Arrays of a data set, each split a pytree of arrays `[examples, ...]`.

    Attributes:
      train: what training draws minibatches from.
      valid: what hyperparameters are chosen on; the scores that a sweep selects by.
      test: what nothing is chosen on, or None: without it no score of a sweep is a result.
    """

    train: Tree
    valid: Tree
    test: Tree = None


def check_splits(data: Any, label: str) -> None:
    """Refuse what does not hold arrays of examples to train and to validate on."""
    if not isinstance(data, Splits):
        raise TypeError(
            f"{label} is a {type(data).__name__}: give hypergrad.Splits(train, valid, test)."
        )
    for name, split in zip(data._fields, data, strict=True):
        if name == "test" and split is None:
            continue
        leaves = jax.tree.leaves(split)
        if not leaves or not all(jnp.ndim(leaf) for leaf in leaves):
            raise ValueError(
                f"{label}.{name} must hold arrays of examples, [examples, ...]: give all of "
                "hypergrad.Splits(train, valid, test)."
            )
        # The mean over no examples is NaN, which would look like training that diverged.
        if not any(jnp.shape(leaf)[0] for leaf in leaves):
            raise ValueError(
                f"{label}.{name} holds 0 examples: give some{', or None' * (name == 'test')}."
            )
