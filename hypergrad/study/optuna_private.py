"""Every use of Optuna's private names: what its public interface does not do, one function each.

No other file reads one (a test sees to it), so that a new release of Optuna is checked here.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial


def read_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Read all trials once for an ask, as `Study.ask` does: the sampler then reads them here.

    The public `get_trials` reads for itself alone, so that a database would be read twice.
    """
    study._thread_local.cached_all_trials = None
    return study._get_trials(deepcopy=False, use_cache=True)


def id_of(trial: Trial | FrozenTrial) -> int:
    """Return the id by which a storage's (public) methods know a trial; a number needs a search."""
    return trial._trial_id


def frozen(trial: Trial) -> FrozenTrial:
    """Return what a trial of ours holds, without reading the storage again."""
    return trial._cached_frozen_trial


def fix(trial: Trial, params: dict[str, Any]) -> None:
    """Give a running trial its parameters; `study.enqueue_trial` does so before it runs only."""
    trial._fixed_params = params


def suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """Propose a parameter and record it; public are only methods for one kind of it each."""
    return trial._suggest(name, distribution)


def propose(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """Do what `suggest` does, but record nothing.

    What a trial has recorded cannot be overwritten on databases, and is what samplers learn from.
    """
    if trial._is_fixed_param(name, distribution):
        return trial._fixed_params[name]
    if trial._is_relative_param(name, distribution):
        return trial.relative_params[name]
    return trial.study.sampler.sample_independent(
        trial.study, trial._get_latest_trial(), name, distribution
    )


def note(
    trial: Trial,
    params: Mapping[str, tuple[float, BaseDistribution]],
    user_attrs: Mapping[str, Any],
) -> None:
    """Write parameters (as Optuna represents them) and user attributes of a running trial.

    On a database in one transaction: it waits for the disk at the end of each, which is most of
    what a trial costs there.
    """
    storage, trial_id = trial.storage, id_of(trial)
    backend = backend_of(storage)
    written = isinstance(backend, RDBStorage) and _written(backend, trial_id, params, user_attrs)
    if not written:
        for name, param in params.items():
            storage.set_trial_param(trial_id, name, *param)
        for key, attr in user_attrs.items():
            storage.set_trial_user_attr(trial_id, key, attr)
    frozen(trial).user_attrs.update(user_attrs)


def _written(
    database: RDBStorage,
    trial_id: int,
    params: Mapping[str, tuple[float, BaseDistribution]],
    user_attrs: Mapping[str, Any],
) -> bool:
    """Write all in one transaction; False, and nothing is, where some of it stands there."""
    import sqlalchemy
    from optuna.storages._rdb import models, storage

    rows: dict[Any, list[dict[str, Any]]] = {
        models.TrialParamModel: [
            {
                "param_name": name,
                "param_value": value,
                "distribution_json": distribution_to_json(distribution),
            }
            for name, (value, distribution) in params.items()
        ],
        models.TrialUserAttributeModel: [
            {"key": key, "value_json": json.dumps(attr)} for key, attr in user_attrs.items()
        ],
    }
    try:
        with storage._create_scoped_session(database.scoped_session) as session:
            trial = models.TrialModel.find_or_raise_by_id(trial_id, session)
            database.check_trial_is_updatable(trial_id, trial.state)  # type: ignore[arg-type]
            for table, own in rows.items():
                if own:
                    named = [{"trial_id": trial_id, **row} for row in own]
                    session.execute(sqlalchemy.insert(table), named)
    except sqlalchemy.exc.IntegrityError:
        return False
    return True


class FixedChoices(PartialFixedSampler):
    """Optuna's sampler with some values given, without its warning that it is experimental.

    The others are proposed by their marginal model over all trials, whatever is given.
    """

    def __init__(self, fixed_params: dict[str, Any], base_sampler: BaseSampler) -> None:
        self._fixed_params = fixed_params
        self._base_sampler = base_sampler


def random_generators(sampler: BaseSampler) -> Iterator[np.random.RandomState]:
    """Find every Mersenne Twister inside a sampler, in the order of its attributes.

    Publicly a sampler's random state can only be seeded again. Optuna's own hold no other kind.
    """
    return _generators(sampler, set())


def _generators(sampler: BaseSampler, seen: set[int]) -> Iterator[np.random.RandomState]:
    for value in vars(sampler).values():
        value = value.rng if isinstance(value, LazyRandomState) else value
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, BaseSampler):
            yield from _generators(value, seen)
        elif (
            isinstance(value, np.random.RandomState)
            and value.get_state(legacy=False)["bit_generator"] == "MT19937"
        ):
            yield value


@contextlib.contextmanager
def stoppable(study: optuna.Study) -> Iterator[None]:
    """`study.stop()` is allowed within, as in `study.optimize`, which callbacks are written for."""
    study._thread_local.in_optimize_loop = True
    study._stop_flag = False
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False


def stop_is_asked(study: optuna.Study) -> bool:
    """Say whether `study.stop()` was called."""
    return study._stop_flag


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return where a study is kept, which it does not tell."""
    return study._storage


def backend_of(storage: BaseStorage) -> object:
    """Return what a storage keeps its studies in: itself, or the database or file it wraps."""
    if isinstance(storage, _CachedStorage | JournalStorage):
        return storage._backend
    return storage


def path_of(journal: JournalFileBackend) -> str:
    """Return a journal's path as it was given, which it does not tell."""
    return journal._file_path
