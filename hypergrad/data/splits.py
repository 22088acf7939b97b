"""The three splits of a data set: trained on, tuned on, reported on."""

from typing import NamedTuple

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
