"""The sampler of a study, and its random state, kept so that a resumed study continues it.

A Mersenne Twister's state is 2.5 KB. As it only ever moves forward in blocks of 624 words, its
first state is kept once, and then the number of blocks and the place in the block.
"""

import base64
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from hypergrad.checks import choice
from hypergrad.study.optuna_private import random_generators
from hypergrad.study.slots import ASKED
from hypergrad.study.workers import Worker

# Of Optuna, with its defaults, and the package that one needs beyond Optuna's own; a grid is ours.
SAMPLERS: dict[str, tuple[str, str | None]] = {
    "tpe": ("TPESampler", None),
    "random": ("RandomSampler", None),
    "grid": ("RandomSampler", None),
    "gp": ("GPSampler", "torch"),
    "cmaes": ("CmaEsSampler", "cmaes"),
    "qmc": ("QMCSampler", "scipy"),
    "nsga2": ("NSGAIISampler", None),
}

# System attributes of a study: full states by their index, and the place after the last tell.
_START = "hypergrad:random:start:"
_PLACE = "hypergrad:random:place"

_BLOCK = 624
# What a search for the current block may cost, about 0.3 s: further off, it was seeded again.
_MOST_BLOCKS = 50_000


def make_sampler(sampler: str | BaseSampler, seed: int | None) -> BaseSampler:
    """Return the sampler that a name stands for; a grid needs one for what it leaves open."""
    if isinstance(sampler, BaseSampler):
        if seed is not None:
            raise ValueError(
                f"seed={seed!r} cannot reach a sampler that is made already: give it to "
                f"{type(sampler).__name__}(seed=...) and leave seed=None here."
            )
        return sampler
    kind, package = SAMPLERS[choice("sampler", sampler, SAMPLERS, "or give a sampler of Optuna")]
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"sampler={sampler!r} needs the package {package!r}: install it.")
    # What these cannot model is drawn at random, as the documentation says and a log need not.
    options = {"warn_independent_sampling": False} if package else {}
    # Otherwise its first point is a corner of the space.
    options |= {"scramble": True} if sampler == "qmc" else {}
    return getattr(optuna.samplers, kind)(seed=seed, **options)


class Randomness:
    """The state of every `numpy.random.RandomState` inside `sampler`; other kinds are not saved.

    >>> sampler = optuna.samplers.RandomSampler(seed=0)
    >>> (generator,) = random_generators(sampler)
    >>> randomness = Randomness(sampler)
    >>> start, place = randomness.start(), randomness.place()
    >>> first = generator.uniform()
    >>> _ = randomness.restore(start, place)
    >>> first == generator.uniform()
    True
    """

    def __init__(self, sampler: BaseSampler) -> None:
        self._generators = list(random_generators(sampler))
        self.start()

    def start(self) -> list[str]:
        """Return the present state in full, from which places are counted from now on."""
        keys = [_legacy(generator)[1] for generator in self._generators]
        self._shadows = [_twister(key) for key in keys]
        self._blocks = [0] * len(keys)
        # Little-endian, as the next process may run on another kind of machine.
        return [base64.b64encode(key.astype("<u4").tobytes()).decode() for key in keys]

    def place(self) -> list[list[Any]] | None:
        """Return the present place; None where a generator was seeded again since `start`."""
        result = []
        for i, generator in enumerate(self._generators):
            _, key, position, has_gauss, gauss = _legacy(generator)
            most = self._blocks[i] + _MOST_BLOCKS
            # Numbers are drawn from a block; which one it is shows only by generating them again.
            while not np.array_equal(_block(self._shadows[i]), key):
                if self._blocks[i] == most:
                    return None
                self._shadows[i].random_raw(_BLOCK, output=False)
                self._blocks[i] += 1
            result.append([self._blocks[i], int(position), int(has_gauss), float(gauss)])
        return result

    def restore(self, start: list[str], place: list[list[Any]]) -> bool:
        """Continue from a place after `start`; False, and no change, for another sampler's."""
        if len(start) != len(self._generators) or len(place) != len(start):
            return False
        keys = [np.frombuffer(base64.b64decode(text), "<u4").astype(np.uint32) for text in start]
        self._shadows = [_twister(key) for key in keys]
        self._blocks = [int(blocks) for blocks, *_ in place]
        for i, (blocks, *rest) in enumerate(place):
            self._shadows[i].random_raw(_BLOCK * blocks, output=False)
            self._generators[i].set_state(("MT19937", _block(self._shadows[i]), *rest))
        return True


class SavedRandomness:
    """The random state of a study's sampler, kept in the study by the one worker that owns it.

    The place after an ask stands in the trial (`place` gives it), so that an ask and its state are
    saved in one write; the place after a tell in the study, where telling moved it (CMA-ES).
    """

    def __init__(self, sampler: BaseSampler, seed: int | None, worker: Worker) -> None:
        self._sampler, self._worker = sampler, worker
        self._about = {"sampler": type(sampler).__name__, "seed": seed}
        self._randomness: Randomness | None = None
        self._index = -1
        self._count = 0
        self._last: list[list[Any]] | None = None

    def open(self, alone: bool, trials: Sequence[FrozenTrial]) -> None:
        """Go on from the saved state where nobody else may; otherwise draw from the system's.

        Two workers with one seed would propose the same trials twice.
        """
        if not alone:
            self._sampler.reseed_rng()
            return
        self._randomness = Randomness(self._sampler)
        attributes = self._worker.storage.get_study_system_attrs(self._worker.study_id)
        keys = [key for key in attributes if key.startswith(_START)]
        starts = {int(key.removeprefix(_START)): attributes[key] for key in keys}
        if starts:
            self._index = max(starts)
            begun = {"count": 0, "start": self._index, "place": None}
            # Asks write into their trials and tells into the study, but both count on one counter.
            asks = [t.system_attrs[ASKED].get("random") for t in trials if ASKED in t.system_attrs]
            known = [place for place in (begun, attributes.get(_PLACE), *asks) if place]
            latest = max(known, key=lambda place: place["count"])
            self._count = latest["count"]
            start = starts[latest["start"]]
            if self._about.items() <= start.items():
                place = latest["place"] or [[0, *rest] for rest in start["rest"]]
                if self._randomness.restore(start["states"], place):
                    self._index, self._last = latest["start"], place
                    return
        elif trials:
            # Made by Optuna alone: a seed would repeat its first trials.
            self._sampler.reseed_rng()
        self._begin()

    def place(self) -> dict[str, Any] | None:
        """Return what to save now; None for a worker that does not own the state."""
        if self._randomness is None:
            return None
        place = self._randomness.place()
        if place is None:
            # Somebody has seeded the sampler again: places count from a new start.
            self._begin()
            place = self._last
        self._last = place
        self._count += 1
        return {"count": self._count, "start": self._index, "place": place}

    def save_if_moved(self) -> None:
        """Save the place in the study where it is another one than the last that `place` gave."""
        if self._randomness is not None and self._randomness.place() != self._last:
            self._write(_PLACE, self.place())

    def _begin(self) -> None:
        """Count places from the present state on, which is written in full."""
        assert self._randomness is not None
        self._index += 1
        states = self._randomness.start()
        self._last = self._randomness.place()
        assert self._last is not None
        rest = [entry[1:] for entry in self._last]
        self._write(f"{_START}{self._index}", {**self._about, "states": states, "rest": rest})

    def _write(self, key: str, value: dict[str, Any] | None) -> None:
        self._worker.storage.set_study_system_attr(self._worker.study_id, key, value)


def _legacy(generator: np.random.RandomState) -> tuple[Any, ...]:
    state = generator.get_state(legacy=True)
    assert isinstance(state, tuple)
    return state


def _twister(key: np.ndarray) -> np.random.MT19937:
    """Return a generator that has used up the block `key`."""
    twister = np.random.MT19937(0)
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": _BLOCK}}
    return twister


def _block(twister: np.random.MT19937) -> np.ndarray:
    """Return the block that a generator draws from: each time a new array."""
    return twister.state["state"]["key"]
