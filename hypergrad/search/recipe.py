"""What makes the scores of a study comparable, as JSON that stands in the study."""

import dataclasses
import json
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import optuna

from hypergrad.data.contents import contents
from hypergrad.data.splits import Splits
from hypergrad.population.refine import Refine
from hypergrad.results.programs import Program
from hypergrad.training.identity import digest_of
from hypergrad.trees import Hyper

_log = logging.getLogger("hypergrad")

# A user attribute of the study: by choices and JAX, a digest of what the losses compute.
_LOSSES = "hypergrad:losses"


def describe_data(data: Splits) -> dict[str, dict[str, str]]:
    """Type, shape and checksum of each array of the splits."""
    splits = {"train": data.train, "valid": data.valid, "test": data.test}
    return {name: contents(split) for name, split in splits.items()}


def describe_refine(refine: Refine | None) -> dict[str, str] | None:
    """The fields of a recipe; of its outer optimiser, which is functions, a digest."""
    if refine is None:
        return None
    fields = {f.name: getattr(refine, f.name) for f in dataclasses.fields(refine)}
    outer = fields.pop("outer_optimizer")
    # Functions show their addresses.
    described = {name: re.sub(r" at 0x\w+", "", repr(v)) for name, v in fields.items()}
    if outer is None:
        return {**described, "outer_optimizer": "None"}
    like = {"a": jnp.zeros(2)}
    update = lambda grad, state: outer.update(grad, state, like)  # noqa: E731
    try:
        digest = digest_of(update, like, outer.init(like))
    except Exception:  # one that needs more than gradients
        digest = "unknown"
    return {**described, f"outer_optimizer under JAX {jax.__version__}": digest[:16]}


def check_losses(
    study: optuna.Study, choices: dict[str, Any], program: Program, hyper: Hyper
) -> None:
    """Warn where the losses compute something else than in the study's earlier trials.

    That may be what was meant, so it is no error. Cost: both losses are traced once more.
    """
    problem, data = program.problem, program.data
    shape = lambda x: jax.ShapeDtypeStruct((program.batch_size, *x.shape[1:]), x.dtype)  # noqa: E731
    key = jax.random.key(0)
    params = jax.eval_shape(lambda h, k: problem.init(h, k).params, hyper, key)
    train = digest_of(problem.train_loss, params, hyper, jax.tree.map(shape, data.train), key)
    valid = digest_of(problem.valid_loss, params, hyper, data.valid, key)
    name = f"{json.dumps(choices, sort_keys=True, default=str)} under JAX {jax.__version__}"
    known: dict[str, Any] = study.user_attrs.get(_LOSSES, {})
    digest = train[:12] + valid[:12]
    if known.get(name, digest) != digest:
        _log.warning(
            f"the losses of make_problem({choices}) compute something else than those of the "
            f"trials in the study {study.study_name!r}: their scores may be of another kind. Give "
            "another name or storage if so."
        )
    elif name not in known:
        study.set_user_attr(_LOSSES, {**known, name: digest})
