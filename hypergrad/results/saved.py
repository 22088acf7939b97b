"""Trained networks in folders: written by a result, read without problem and data."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hypergrad.checks import folder_name, in_one_sentence
from hypergrad.files.toml import VALUES, readable, write_toml
from hypergrad.optim.schedules import Schedule
from hypergrad.results.layout import arranged, arrays_of, layout
from hypergrad.training.arrays import (
    TornError,
    cannot_now,
    read_checkpoint,
    saved_updates,
    take_apart,
    write_checkpoint,
)
from hypergrad.training.checkpoints import Checkpoint
from hypergrad.trees import Hyper, InnerState, Params

# Where a folder holds arrays.
_NETWORK = "network"
# Of what is written here; another one is refused.
_FORMAT = 1


class Saved(NamedTuple):
    """A trained network and its hyperparameters, as `result.save` wrote and `hypergrad.load` reads.

    Attributes:
      params: what is judged: those of `state`, or what `problem.evaluate` made of it.
      state: the training state, to go on from.
      hyper: the values to keep, in the user's units; of a sweep the choices, too.
      schedule: the continuous values that `state` was trained with, as a schedule.
      score: the validation score of this network.
    """

    params: Params
    state: InnerState
    hyper: Hyper
    schedule: Schedule
    score: float


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder that a network can be saved in.

    Raises:
      ValueError: a file, or a folder in one that does not exist.
    """
    return Checkpoint(folder_name("folder", folder)).path


def write(folder: str | os.PathLike[str], saved: Saved) -> Path:
    """Saves a network in `folder`, in the place of an earlier one; returns the path.

    Arrays go through orbax, with checksums; `hyper.toml` holds values and score for people.

    Raises:
      ValueError: what `checked_folder` refuses.
      OSError: the folder cannot be written; an earlier network is then still there.
    """
    path = checked_folder(folder)
    place = path / _NETWORK
    # Parameters that are the state's own are not written twice.
    own = saved.params is getattr(saved.state, "params", None)
    tree = saved._replace(params=None) if own else saved
    odd = [leaf for leaf in arrays_of(tree) if not hasattr(leaf, "dtype")]
    if odd:
        raise TypeError(
            f"the training state holds {odd[0]!r}, which is no array and cannot be saved: let the "
            "problem's init return arrays alone."
        )
    about = {"format": _FORMAT, "own_params": own, "tree": layout(tree)}
    before = saved_updates(place)
    number = before[0] + 1 if before else 0
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_checkpoint(place, number, take_apart(arrays_of(tree)), about)
        values = readable(saved.hyper, f"{_NETWORK}/")
        write_toml(path / VALUES, {"score": float(saved.score), "hyper": values})
    except Exception as error:
        found = cannot_now(error, place)
        if not isinstance(found, OSError):
            raise
        what = f"folder={str(path)!r} cannot be written"
        raise in_one_sentence(found, what, "make room, or give another folder") from None
    _remove(place, before)
    return path


def load(folder: str | os.PathLike[str], like: InnerState | None = None) -> Saved:
    """The network that `result.save` has written into `folder`; needs neither problem nor data.

    Dicts, lists, tuples and named tuples (optax's states among them) come back as they were; of
    another container, such as an Equinox module, what comes back has the same names, unless
    `like` says how it is built. Nothing in the folder is run.

    Args:
      folder: what `result.save` was given.
      like: a training state of the same problem, such as `problem.init(hyper, key)`, whose
        structure the loaded state gets.

    Raises:
      ValueError: a folder that holds no saved network, or a torn one; a `like` of another
        structure; float64 where JAX holds none.
      OSError: the folder cannot be read now.

    >>> import tempfile, jax.numpy as jnp, hypergrad as hg
    >>> state = hg.Inner({"w": jnp.ones(2)}, (), jnp.int32(5), jnp.float32(0.1))
    >>> schedule = hg.Schedule({"rate": jnp.array([0.5])}, 5)
    >>> found = Saved(state.params, state, {"rate": 0.5, "act": "relu"}, schedule, 0.25)
    >>> loaded = load(write(tempfile.mkdtemp(), found))
    >>> loaded.hyper, loaded.score, loaded.params["w"].tolist(), type(loaded.state).__name__
    ({'act': 'relu', 'rate': 0.5}, 0.25, [1.0, 1.0], 'Inner')
    """
    path = Path(folder_name("folder", folder)).expanduser().absolute()
    if not path.is_dir():
        raise ValueError(f"folder={str(path)!r} is no folder: give one that result.save has made.")
    numbers = saved_updates(path / _NETWORK)
    if not numbers:
        raise ValueError(
            f"folder={str(path)!r} holds no saved network: give one that result.save has made."
        )
    try:
        arrays, about = read_checkpoint(path / _NETWORK, numbers[0])
    except TornError as error:
        raise ValueError(
            f"folder={str(path)!r} holds a network that is torn ({error}): save it again."
        ) from error
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"folder={str(path)!r} holds format {about.get('format')}, and this version reads "
            f"{_FORMAT}: use the version of hypergrad that saved it."
        )
    saved = Saved(*arranged(about["tree"], iter(arrays)))
    saved = saved if like is None else saved._replace(state=_like(saved.state, like))
    return saved._replace(params=saved.state.params) if about["own_params"] else saved


def _like(state: InnerState, like: InnerState) -> InnerState:
    """The leaves of `state` in the structure of `like`."""
    leaves, (wanted, structure) = jax.tree.leaves(state), jax.tree.flatten(like)
    shapes = [[(np.shape(x), getattr(x, "dtype", None)) for x in xs] for xs in (leaves, wanted)]
    if shapes[0] != shapes[1]:
        differs = [f"{a} and {b}" for a, b in zip(*shapes, strict=False) if a != b]
        which = differs[0] if differs else f"{len(leaves)} and {len(wanted)} leaves"
        raise ValueError(
            f"like is a training state of another problem: {which} differ. Give "
            "problem.init(hyper, key) of the problem that was trained."
        )
    return structure.unflatten(leaves)


def _remove(place: Path, numbers: list[int]) -> None:
    for number in numbers:
        shutil.rmtree(place / str(number), ignore_errors=True)
