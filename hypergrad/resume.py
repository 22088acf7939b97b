"""Where a run goes on: the newest checkpoint that is whole, if it is one of this run."""

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hypergrad.checkpoints import Checkpoint, TornError, load, put_back, saved_updates
from hypergrad.history import History
from hypergrad.identity import difference

__all__ = ["Resumed", "refusal", "restore"]

_log = logging.getLogger("hypergrad")


class Resumed(NamedTuple):
    """Where a run begins, or goes on.

    Attributes:
      state: the tuner's state.
      done: updates that the state counts.
      history: the records so far.
      positions: where the streams of data stand, by name.
      program: what the checkpoint's update computes, see `identity.program_of`; None for a start.
    """

    state: Any
    done: int
    history: History
    positions: dict[str, Any]
    program: dict[str, Any] | None


def restore(checkpoint: Checkpoint, start: Resumed, about: dict[str, Any], stop: int) -> Resumed:
    """The newest whole checkpoint of the run that `about` describes; `start` where there is none.

    Torn ones are put aside. Raises ValueError where it is of another run, or beyond `stop` updates.
    """
    folder = checkpoint.path
    for done in saved_updates(folder):
        try:
            arrays, stored = load(folder, done)
        except TornError as error:
            _log.warning(
                "checkpoint: update %d in %s is torn (%s); it is put aside as %d.torn, and the one "
                "before taken.",
                done,
                folder,
                error,
                done,
            )
            # Not deleted: it may be somebody else's, if this is the wrong folder.
            shutil.rmtree(folder / f"{done}.torn", ignore_errors=True)
            (folder / str(done)).rename(folder / f"{done}.torn")
            continue
        differs = difference(stored, about)
        if differs:
            raise refusal(folder, done, differs)
        if done > stop:
            raise ValueError(
                f"checkpoint: the run in {str(folder)!r} has done {done} updates, more than the "
                f"{stop} that num_updates asks for: raise num_updates, or name another folder."
            )
        num = len(jax.tree.leaves(start.state))
        columns = dict(zip(stored["columns"], arrays[num:], strict=True))
        _log.info("checkpoint: going on from update %d in %s", done, folder)
        return Resumed(
            state=put_back(arrays[:num], start.state),
            done=done,
            history=History(start.history.hyper, columns),
            positions=stored["positions"],
            program=stored.get("program"),
        )
    return start


def refusal(folder: Path, done: int, differs: str) -> ValueError:
    """The error about a checkpoint of another run."""
    return ValueError(
        f"checkpoint: update {done} in {str(folder)!r} is of another run: {differs}. To begin a "
        "new run name another folder; to go on with that one make problem, space, tuner, start and "
        "data as they were."
    )
