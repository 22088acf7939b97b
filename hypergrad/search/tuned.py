"""What `tune` found: a trained network, the values to keep, and every run on the way."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from hypergrad.checks import integer
from hypergrad.optim.schedules import Schedule
from hypergrad.problem.eager import compiled_for_each
from hypergrad.problem.mistakes import metrics_of
from hypergrad.problem.problem import Problem, judged_params, validation_loss
from hypergrad.results.result import Audit, audit_of
from hypergrad.results.saved import Saved, write
from hypergrad.search.candidates import Candidate, Workshop
from hypergrad.trees import Batch, Hyper, InnerState, Params


@dataclasses.dataclass(frozen=True, repr=False)
class TuneResult:
    """What `tune` returns.

    It can be pickled; problem and data are left out, so that what was unpickled trains nothing.

    Attributes:
      params: the parameters to keep: those of `state`, or what `problem.evaluate` makes of it.
      state: the training state of the network with the lowest validation loss; with the running
        mean of its run's weights as parameters, where that mean is the better network.
      hyper: the values to keep: of the constant ones that were trained, those whose last weights
        have the lowest validation loss.
      schedule: the values that `state` was trained with, to replay or as optax schedules; with one
        entry where they stood still. A hyperparameter of more than 10,000 numbers that moved is
        not in it.
      score: the validation loss of `state`: the lowest of several, so that it flatters a little.
      std_error: of the score, from the spread over parts of the validation split.
      candidates: every trained network, in order, see `hypergrad.search.candidates.Candidate`.
      evaluations: gradient evaluations in all: a training step counts 1, its way back 2, a
        validation gradient by its examples; a plain run of `num_steps` is the unit of `budget`.
      remarks: what is odd about the run that trained `state`, or about the whole, a sentence each.
    """

    params: Params
    state: InnerState
    hyper: Hyper
    schedule: Schedule
    score: float
    std_error: float
    candidates: tuple[Candidate, ...]
    evaluations: float
    remarks: tuple[str, ...]
    _workshop: Workshop | None

    @classmethod
    def of(cls, shop: Workshop) -> Self:
        """The result of a workshop that has trained at least one network."""
        assert shop.best is not None
        best = min(shop.candidates, key=lambda candidate: candidate.score)
        return cls(
            params=judged_params(shop.problem, shop.best),
            state=shop.best,
            hyper=shop.lowest_constant().hyper,
            schedule=best.schedule,
            score=best.score,
            std_error=best.std_error,
            candidates=tuple(shop.candidates),
            evaluations=shop.spent,
            remarks=shop.remarks,
            _workshop=shop,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_workshop": None}

    def __repr__(self) -> str:
        return f"<TuneResult: {self.best.kind}, validation loss {self.score:.4g}>"

    @property
    def best(self) -> Candidate:
        """The candidate that trained `state`."""
        return min(self.candidates, key=lambda candidate: candidate.score)

    def table(self) -> str:
        """Every candidate as text, the best first."""
        # The untuned start is always the first, and one plain run.
        unit = self.candidates[0].evaluations
        lines = [
            f"{'kind':12}{'horizon':>8}{'valid loss':>12}{'± s.e.':>10}{'runs':>7}  trained with"
        ]
        for c in sorted(self.candidates, key=lambda candidate: candidate.score):
            mean = "; the mean of its weights" if c.is_averaged else ""
            lines.append(
                f"{c.kind:12}{c.horizon or '':>8}{c.score:12.4g}{c.std_error:10.2g}"
                f"{c.evaluations / unit:7.2f}  {_shown(c)}{mean}"
            )
        return "\n".join([*lines, f"{self.evaluations / unit:.2f} runs in all"])

    def retrain(self, hyper: Mapping[str, Any] | None = None, seed: int = 0) -> InnerState:
        """The training state of a whole run under constant values; None for `hyper`.

        Raises:
          ValueError: values that are not those of the space.
          FloatingPointError: the run diverges.
        """
        return self._with_problem().plain_run(self._checked(hyper), integer("seed", seed, 0))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Saves the trained network and the values in `folder`, for `hypergrad.load`.

        Returns the folder, which also gets `hyper.toml`, the values to keep for people. What was
        unpickled can be saved, too.

        Raises:
          ValueError: a folder that cannot be made.
          OSError: the folder cannot be written.
        """
        found = Saved(self.params, self.state, self.hyper, self.schedule, self.score)
        return write(folder, found)

    def audit(self, seeds: int = 10, hyper: Mapping[str, Any] | None = None) -> Audit:
        """Constant values retrained in full on `seeds` fresh seeds, scored on the test split.

        The trained network that `params` holds is often better than a retraining of `hyper`, as
        hyperparameters moved while it trained; this is what the values are worth by themselves.

        Args:
          seeds: how many; `tune` has used none of them.
          hyper: the values, such as an untuned default to compare with; None for `self.hyper`.

        Raises:
          ValueError: the data have no test split; values that are not those of the space; no seeds.
        """
        seeds = integer("seeds", seeds)
        shop = self._with_problem()
        if shop.data.test is None:
            raise ValueError(
                "data.test=None: an audit is taken on a split that nothing was tuned on. Give "
                "hypergrad.Splits(train, valid, test)."
            )
        values = self._checked(hyper)
        found = [_tested(shop, values, seed) for seed in range(seeds)]
        names = dict.fromkeys(name for _, metrics in found for name in metrics)
        nan = float("nan")
        metrics = {name: [named.get(name, nan) for _, named in found] for name in names}
        return audit_of([loss for loss, _ in found], metrics)

    def save_pictures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes pictures of the candidates and of the schedule into `folder` as PNG.

        Returns their paths. Needs matplotlib (extra `plots`).
        """
        # Loaded on use, as tuning needs no matplotlib.
        from hypergrad.plotting.tuned import save_candidates

        shop = self._with_problem()
        return save_candidates(self.candidates, shop.space, shop.num_steps, folder)

    def _with_problem(self) -> Workshop:
        if self._workshop is None:
            raise ValueError(
                "This result was unpickled, and holds neither problem nor data: call "
                "hypergrad.tune again with the same checkpoint, which trains nothing anew, and use "
                "what it returns."
            )
        return self._workshop

    def _checked(self, hyper: Mapping[str, Any] | None) -> Hyper:
        return self._with_problem().space.validate(dict(self.hyper if hyper is None else hyper))


def _tested(shop: Workshop, values: Hyper, seed: int) -> tuple[float, dict[str, float]]:
    """Loss and metrics on the test split after a whole run; without any if it diverged."""
    try:
        params = judged_params(shop.problem, shop.plain_run(values, seed))
    except FloatingPointError:
        return float("inf"), {}
    judge = compiled_for_each(shop.problem, "audit", _on_test_split)
    loss, metrics = jax.device_get(judge(params, values, shop.data.test))
    return float(loss), {name: float(value) for name, value in metrics.items()}


def _on_test_split(
    problem: Problem, params: Params, hyper: Hyper, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    key = jax.random.key(0)
    loss = validation_loss(problem, params, hyper, batch, key, 0)
    return loss, metrics_of(problem.metrics, params, hyper, batch, key)


def _shown(candidate: Candidate) -> str:
    if not candidate.is_constant:
        return "a schedule"
    leaves = jax.tree_util.tree_leaves_with_path(candidate.hyper)
    return ", ".join(
        f"{'/'.join(str(getattr(k, 'key', k)) for k in path)} {float(x):.3g}"
        for path, x in leaves
        if np.size(x) == 1
    )
