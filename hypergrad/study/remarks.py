"""What a table says beside scores: values at a bound, and audits on the test split."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from hypergrad.checks import printable
from hypergrad.space.dimensions import Categorical, Float
from hypergrad.space.space import Space

# The study's user attribute that keeps audits, and how many.
_AUDITS, _KEPT = "audits", 5
# A value this close to a bound, in parts of its range, stands at it.
_CLOSE = 1e-3
# Beside values at a bound, and what it says.
AT_BOUND = "|"
BOUND_NOTE = f"{AT_BOUND} at a bound of its range: the best may lie beyond, so widen the range"


def at_bounds(space: Space, hyper: Mapping[str, Any]) -> list[str]:
    """The names of the values that stand at a bound of their range.

    >>> from hypergrad.space.dimensions import Int
    >>> space = Space({"rate": Float(1e-4, 1.0, scale="log"), "width": Int(1, 8)})
    >>> at_bounds(space, {"rate": 0.9999, "width": 4}), at_bounds(space, {"rate": 0.1, "width": 8})
    (['rate'], ['width'])
    """
    return [name for name, value in hyper.items() if _is_at_bound(space.get(name), value)]


def _is_at_bound(dimension: Any, value: Any) -> bool:
    if dimension is None or isinstance(dimension, Categorical) or dimension.low is None:
        return False
    if not isinstance(dimension, Float):
        # Of two values both are bounds.
        return dimension.high - dimension.low > 1 and value in (dimension.low, dimension.high)
    unit = float(dimension.to_unit(float(value)))
    return min(unit, 1 - unit) < _CLOSE


def keep_audit(
    study: optuna.Study,
    hyper: Mapping[str, Any],
    losses: Sequence[float],
    std_error: float,
    metrics: Mapping[str, tuple[float, float]],
) -> None:
    """Write an audit into the study, in the place of an earlier one of the same values."""
    row = {"hyper": dict(hyper), "seeds": len(losses), "mean": sum(losses) / len(losses)}
    row |= {"std_error": std_error, "metrics": {n: list(pair) for n, pair in metrics.items()}}
    others = [one for one in audits(study) if one["hyper"] != row["hyper"]]
    study.set_user_attr(_AUDITS, [*others, row][-_KEPT:])


def audits(study: optuna.Study) -> list[dict[str, Any]]:
    """The audits of a study, the newest last: hyper, seeds, mean, std_error, metrics."""
    return list(study.user_attrs.get(_AUDITS, []))


def audit_line(row: Mapping[str, Any]) -> str:
    """One audit as text, without its values."""
    named = {"loss": (row["mean"], row["std_error"]), **row["metrics"]}
    shown = "  ".join(f"{printable(n)} {mean:.4g} ± {se:.2g}" for n, (mean, se) in named.items())
    return f"test {shown}  ({row['seeds']} seeds)"
