"""A sampler that also draws around where the user believes the optimum to be.

As in pi-BO (Hvarfner 2022) and PriorBand (Mallik 2023) the belief counts less with every trial, and
as in the latter its share follows what the trials say: where those near it rank among the worst,
it is dropped at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from hypergrad.knowledge.positions import distance, position, value_at
from hypergrad.space.space import Space
from hypergrad.study.distributions import Coordinates

# The standard deviation of what is drawn, in ranges; every other time a small one, for beliefs that
# are exact. And the believed choice's probability.
_SPREAD, _SMALL, _SURE = 0.1, 0.03, 0.7
# So large a share of the first trials follows the belief, and at the most twice that; after so many
# trials half of it.
_SHARE, _HALF_LIFE = 0.3, 10


def prior_point(space: Space) -> dict[str, Any]:
    """What is believed of each hyperparameter, without those inactive beside the others."""
    coordinates, point = Coordinates(space), dict[str, Any]()
    for name in coordinates.order:
        believed = space[name].prior
        if believed is None:
            continue
        known = {n: v for n, v in point.items() if n in space.discrete}
        try:
            active = space.is_active(name, known)
        except ValueError:  # its condition is still open
            active = True
        if active:
            point[name] = believed
    return point


def with_priors(sampler: BaseSampler, space: Space, seed: int) -> BaseSampler:
    """`sampler`, which follows the priors of `space` now and then; itself where there are none."""
    coordinates = Coordinates(space)
    believed = {name: space[name].prior for name in space if space[name].prior is not None}
    if not believed:
        return sampler
    names = coordinates.names
    beliefs = coordinates.to_study(believed)
    return PriorSampler(
        sampler, beliefs, {names[n]: coordinates.distributions[n] for n in believed}, seed
    )


class PriorSampler(BaseSampler):
    """Draws some trials around `beliefs`, parameters of the study by name, others by `base`.

    Of a trial that follows the beliefs, `base` proposes the parameters without one.
    """

    def __init__(
        self,
        base: BaseSampler,
        beliefs: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        seed: int,
    ) -> None:
        self.base, self._beliefs, self._distributions = base, dict(beliefs), dict(distributions)
        # Of its own, so that `base` draws what it draws alone.
        self._random = np.random.RandomState([seed % 2**32, 1])
        # The spread of each trial that follows the beliefs.
        self._following: dict[int, float] = {}

    def reseed_rng(self) -> None:
        """Draw anew, and differently, as a process that joins others must."""
        self._random.seed()
        self.base.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Decide whether this trial follows the beliefs."""
        self.base.before_trial(study, trial)
        if self._random.uniform() < self.share(study):
            self._following[trial.number] = _SPREAD if self._random.uniform() < 0.5 else _SMALL

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What `base` proposes together."""
        return self.base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What `base` proposes, but for what is drawn around a belief."""
        proposed = self.base.sample_relative(study, trial, search_space)
        if trial.number not in self._following:
            return proposed
        return {name: value for name, value in proposed.items() if name not in self._beliefs}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """One value, around its belief where the trial follows it."""
        if trial.number in self._following and param_name in self._beliefs:
            spread = self._following[trial.number]
            return self._draw(self._beliefs[param_name], param_distribution, spread)
        return self.base.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Let `base` learn."""
        self._following.pop(trial.number, None)
        self.base.after_trial(study, trial, state, values)

    def share(self, study: optuna.Study) -> float:
        """Of the next trials, the share that follows the beliefs.

        It falls with the number of trials, and rises or falls with how those near rank: with an
        average rank at the top it is twice, in the middle once, from two thirds on zero.
        """
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = [t for t in study.get_trials(deepcopy=False, states=states) if t.values]
        if not trials:
            return _SHARE
        near = np.array([self._nearness(trial) for trial in trials])
        favour = 1 - 2 * relative_ranks(study, trials)
        # One more, of no favour: a single trial says little.
        evidence = float(np.sum(near * favour) / (1 + near.sum()))
        share = _SHARE * (1 + (evidence if evidence > 0 else 3 * evidence))
        return max(share, 0.0) * _HALF_LIFE / (_HALF_LIFE + len(trials))

    def _nearness(self, trial: FrozenTrial) -> float:
        """1 at the beliefs, next to 0 far away."""
        shared = [n for n in self._beliefs if n in trial.params]
        if not shared:
            return 0.0
        far = [
            distance(self._distributions[n], trial.params[n], self._beliefs[n]) / (2 * _SPREAD)
            for n in shared
        ]
        return float(np.exp(-0.5 * np.mean(np.square(far))))

    def _draw(self, belief: Any, distribution: BaseDistribution, spread: float) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            others = [choice for choice in distribution.choices if choice != belief]
            if not others or self._random.uniform() < _SURE:
                return belief
            return others[self._random.randint(len(others))]
        place = position(distribution, belief)
        while not 0 <= (drawn := self._random.normal(place, spread)) <= 1:
            pass
        return value_at(distribution, drawn)


def relative_ranks(study: optuna.Study, trials: Sequence[FrozenTrial]) -> np.ndarray:
    """Of each trial the share of better ones, ties by half; of several objectives the mean.

    Trials that were stopped come after all complete ones, the longer run before the shorter.
    """
    signs = [-1.0 if d.name == "MAXIMIZE" else 1.0 for d in study.directions]
    ranks = []
    for i, sign in enumerate(signs):
        keys = [
            (-np.inf if t.state == TrialState.COMPLETE else -(t.last_step or 0), sign * t.values[i])
            for t in trials
        ]
        better = [sum(other < key for other in keys) for key in keys]
        equal = [keys.count(key) for key in keys]
        ranks.append([(b + e / 2) / len(keys) for b, e in zip(better, equal, strict=True)])
    return np.mean(ranks, axis=0)
