"""A sweep that is killed, at any write of one process and at random moments of several."""

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

import hypergrad as hg
from benchmarks.crash import Outcome, crash, with_result
from hypergrad.study import workers
from hypergrad.study.study import open_study

SPACE = hg.Space({"rate": hg.Float(1e-4, 1.0, scale="log"), "width": hg.Categorical([8, 16])})
KNOWN = {"rate": 0.5, "width": 8}
TRIALS = 5


class Death(BaseException):
    """What `kill -9` is to a process, except that handlers run: they find no storage."""


class Storage(InMemoryStorage):
    """Memory that outlives its process, which dies before its write number `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.last: int | None = None
        self.writes = 0

    def write(self) -> None:
        if self.last is not None and self.writes >= self.last:
            raise Death
        self.writes += 1


def _counted(name: str) -> Any:
    def method(self: Storage, *args: Any, **kwargs: Any) -> Any:
        self.write()
        return getattr(InMemoryStorage, name)(self, *args, **kwargs)

    return method


for _name in dir(InMemoryStorage):
    if _name.startswith(("set_", "create_")):
        setattr(Storage, _name, _counted(_name))


def sweep(storage: Storage, population: int) -> None:
    """Do to a study what a sweep does: two rungs, at which all but the first are stopped."""
    with open_study(SPACE, storage, "random", seed=0, num_trials=TRIALS) as opened:
        opened.enqueue(KNOWN)
        while first := opened.ask(record=False):
            others = [opened.ask(first.choices, record=False) for _ in range(population - 1)]
            for member in (first, *filter(None, others)):
                opened.report(member, member.start["rate"], 10)
            for member in filter(None, others):
                opened.prune(member, 9.0, 10, {"rate": 0.25}, {"steps": 10})
            if first.choices["width"] == 16:
                opened.fail(first, "ValueError: the score is nan after 20 steps.")
            else:
                opened.finish(first, 1.0, {"rate": 0.125}, {"steps": 20})


def results(storage: Storage) -> list[Any]:
    """Check that every slot has one result and nothing is left; returns starts and choices."""
    study = optuna.load_study(study_name="hypergrad", storage=storage)
    assert not [t for t in study.trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    ended = with_result(study.trials)
    slots = [t.system_attrs.get("hypergrad:root", t.number) for t in ended]
    assert len(slots) == len(set(slots)) == TRIALS
    for trial in ended:
        if trial.state != TrialState.FAIL:
            finished = trial.state == TrialState.COMPLETE
            assert trial.params["rate"] == (0.125 if finished else 0.25)
            assert trial.user_attrs["steps"] == (20 if finished else 10)
    return sorted((t.user_attrs["start"]["rate"], t.params["width"]) for t in ended)


def die(storage: Storage, population: int, last: int) -> None:
    storage.writes, storage.last = 0, last
    with pytest.raises(Death):
        sweep(storage, population)
    storage.last = None
    workers._open_here.clear()


def straight(population: int) -> Storage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = Storage()
    sweep(storage, population)
    return storage


@pytest.mark.parametrize("population", [1, 2])
def test_a_death_before_any_write_changes_nothing(population: int) -> None:
    """Each slot once, and no trial left behind, wherever the process died.

    Alone, trials even start from the same values. A partner that is proposed anew takes the
    choices of whoever it is paired with.
    """
    model = straight(population)
    expected = results(model)
    assert len(expected) == len(set(expected)) == TRIALS
    for last in range(model.writes):
        storage = Storage()
        die(storage, population, last)
        sweep(storage, population)
        found = results(storage)
        assert len(set(found)) == TRIALS and (KNOWN["rate"], KNOWN["width"]) in found, last
        assert population > 1 or found == expected, f"died before write {last}"


def test_deaths_in_a_row_change_nothing() -> None:
    """Also while what an earlier death left is put in order."""
    model, rng = straight(1), random.Random(0)
    expected = results(model)
    for _ in range(100):
        storage, deaths = Storage(), [rng.randrange(model.writes // 4) for _ in range(4)]
        for last in deaths:
            die(storage, 1, last)
        sweep(storage, 1)
        assert results(storage) == expected, f"died before writes {deaths}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which processes find the programs of those before them."""
    return tmp_path_factory.mktemp("compiled")


def crash_one_program(storage: str, **options: Any) -> Outcome:
    """Spare the second program and the timed choice between ways to train two members."""
    return crash(storage, programs=1, population=1, **options)


def test_a_sweep_killed_three_times(tmp_path: Path, compiled: Path) -> None:
    storage = str(tmp_path / "a.journal")
    outcome = crash_one_program(storage, num_trials=32, kills=3, folder=compiled, hyperband=True)
    assert outcome.kills == 3
    assert (outcome.finished, outcome.lost, outcome.doubled, outcome.zombies) == (32, 0, 0, 0)


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_two_processes_share_a_sweep(
    kind: str, tmp_path: Path, compiled: Path, request: pytest.FixtureRequest
) -> None:
    remote = kind == "postgresql"
    storage = request.getfixturevalue(kind) if remote else str(tmp_path / "a.journal")
    outcome = crash_one_program(storage, num_trials=12, kills=0, folder=compiled, processes=2)
    assert (outcome.finished, outcome.lost, outcome.doubled, outcome.zombies) == (12, 0, 0, 0)
    assert outcome.restarted == 0
