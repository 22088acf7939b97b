"""What a run did, on the host: one record per update, kept as columns that grow."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np

from hypergrad.trees import Hyper, Leaf, Tree, path_name

# A hyperparameter of more numbers than this is left out of records: a weight for each of a million
# examples would fill the host's memory within a few hundred updates.
LARGE = 10_000
# Of a hyperparameter of more numbers than this, trackers get the mean and the extremes.
_MOST_CURVES = 16

_NUMBERS = (
    "loss",
    "norm",
    "worth",
    "step_scale",
    "refused",
    "refusals",
    "first_bad_step",
    "finite",
)


class Record(NamedTuple):
    """What one update had to say, as Python numbers and NumPy arrays; cf. the tuner's `info`.

    Attributes:
      update: the number of this update, counted from 0 by the tuner's state.
      loss: the validation loss under `hyper`.
      train_loss: the training loss of the last step, where the tuner's state shows one
        (`state.inner.loss`; after a refused update it is that of the step gone back to); else NaN.
      hyper: the hyperparameters this update trained with, in the user's units; those of more than
        10,000 numbers are left out.
      grad: the hypergradient in unit coordinates, of the same ones.
      norm: its Euclidean norm, of all.
      worth: the decrease of the validation loss that the outer step promised, to first order.
      refused: 0 for a trusted step, else an index into `hypergrad.tuners.trust.REASONS`.
      refusals: how many of the last 16 updates were refused.
      step_scale: what outer steps are multiplied with after refusals, at most 1.
      finite: whether loss and hypergradient were.
      first_bad_step: the first training step of this update that was not finite; -1 if none.
      estimate: the estimator's own `info`.

    Fields that a tuner's `info` lacks are None.
    """

    update: int
    loss: float
    train_loss: float
    hyper: Hyper
    grad: Hyper | None
    norm: float | None = None
    worth: float | None = None
    refused: int | None = None
    refusals: int | None = None
    step_scale: float | None = None
    finite: bool | None = None
    first_bad_step: int | None = None
    estimate: dict[str, float] | None = None


def observe(update: int, info: Any, train_loss: Leaf | None) -> Record:
    """The record of one update; waits until the device has computed it."""
    values = {name: np.asarray(getattr(info, name)).item() for name in _NUMBERS if _has(info, name)}
    grad = _small(info.grad) if _has(info, "grad") else None
    about = getattr(info, "estimate", None)
    if isinstance(about, Mapping):
        values["estimate"] = {name: np.asarray(x).item() for name, x in about.items()}
    lost = float("nan") if train_loss is None else np.asarray(train_loss).item()
    return Record(update=update, train_loss=lost, hyper=_small(info.hyper), grad=grad, **values)


def _has(info: object, name: str) -> bool:
    return getattr(info, name, None) is not None


def _small(tree: Hyper) -> Hyper:
    """`tree` on the host, without the entries that are large."""
    if isinstance(tree, Mapping):
        tree = {name: part for name, part in tree.items() if _size(part) <= LARGE}
    return jax.tree.map(np.array, tree)


def _size(tree: Tree) -> int:
    # An array says so itself: every update asks, and walking a tree takes ten times as long.
    own = getattr(tree, "size", None)
    return sum(map(np.size, jax.tree.leaves(tree))) if own is None else own


class History(Sequence[Record]):
    """The records of a run, in order: a read-only sequence.

    `columns` holds one array `[updates, ...]` per number of a record; a slice is a list of records.
    `hyper` are hyperparameters as those of its records, which give it their structure.

    >>> from types import SimpleNamespace
    >>> history = History({"rate": 0.1})
    >>> info = SimpleNamespace(loss=2.0, hyper={"rate": 0.1}, refused=0)
    >>> history.append(observe(0, info, None))
    >>> len(history), history[-1].loss, history.columns["loss"].tolist()
    (1, 2.0, [2.0])
    """

    def __init__(self, hyper: Hyper, columns: Mapping[str, np.ndarray] | None = None) -> None:
        self.hyper = _small(hyper)
        self._structure = jax.tree.structure(self.hyper)
        self._columns = dict(columns or {})
        self._length = len(next(iter(self._columns.values()))) if self._columns else 0

    def append(self, record: Record) -> None:
        """Add the next record; costs constant time on average."""
        for name, value in _flat(record).items():
            column = self._columns.get(name)
            if column is None:
                column = np.empty((16, *np.shape(value)), np.asarray(value).dtype)
            if len(column) <= self._length:
                # Views that `columns` gave out stay as they are: a checkpoint may be reading them.
                column = np.concatenate([column, np.empty_like(column)])
            column[self._length] = value
            self._columns[name] = column
        self._length += 1

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Views of what was recorded so far, which later records leave alone."""
        return {name: column[: self._length] for name, column in self._columns.items()}

    @property
    def hypers(self) -> Hyper:
        """The hyperparameters of all records, leaves `[updates, ...]`."""
        columns = self.columns
        leaves = [columns[f"hyper/{i}"] for i in range(self._structure.num_leaves)]
        return self._structure.unflatten(leaves)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"history[{index}]: it holds {self._length} updates.")
        return self._record(index % self._length)

    def _record(self, i: int) -> Record:
        numbers: dict[str, Any] = {}
        about: dict[str, Any] = {}
        trees: dict[str, list[Any]] = {"hyper": [], "grad": []}
        for name, column in self._columns.items():
            group, _, rest = name.partition("/")
            if group in trees:
                trees[group].append(np.array(column[i]))
            elif rest:
                about[rest] = column[i].item()
            else:
                numbers[name] = column[i].item()
        grad = self._structure.unflatten(trees["grad"]) if trees["grad"] else None
        hyper = self._structure.unflatten(trees["hyper"])
        return Record(hyper=hyper, grad=grad, estimate=about or None, **numbers)


def _flat(record: Record) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record._asdict().items():
        if name in ("hyper", "grad"):
            flat |= {f"{name}/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(value))}
        elif name == "estimate":
            flat |= {f"{name}/{key}": number for key, number in (value or {}).items()}
        elif value is not None:
            flat[name] = value
    return flat


def scalars(record: Record) -> dict[str, float]:
    """A record as named numbers, for trackers: `loss`, `hyper/learning_rate`, `hyper/l2/0`, ....

    Of an array of more than 16 numbers come `/mean`, `/min` and `/max`. `grad` is left out.

    >>> record = Record(0, 2.0, 1.0, {"l2": np.array([0.5, 0.25])}, None, refused=0)
    >>> scalars(record)
    {'loss': 2.0, 'train_loss': 1.0, 'hyper/l2/0': 0.5, 'hyper/l2/1': 0.25, 'refused': 0.0}
    """
    found: dict[str, float] = {}
    for name, value in record._asdict().items():
        if name not in ("update", "grad"):
            for path, leaf in jax.tree_util.tree_leaves_with_path({name: value}):
                found |= _curves(path_name(path), np.asarray(leaf, float))
    return found


def _curves(name: str, values: np.ndarray) -> dict[str, float]:
    if values.ndim == 0:
        return {name: float(values)}
    if values.size > _MOST_CURVES:
        named = {"mean": values.mean(), "min": values.min(), "max": values.max()}
        return {f"{name}/{part}": float(value) for part, value in named.items()}
    places = np.ndindex(values.shape)
    return {"/".join([name, *map(str, place)]): float(values[place]) for place in places}
