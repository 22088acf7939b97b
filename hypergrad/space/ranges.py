"""Bounds, scales, steps, conditions and priors, each refused where it makes no sense."""

import math
from collections.abc import Mapping, Set
from typing import Any, Protocol


def conditions(kind: str, when: Mapping[str, Any] | None) -> dict[str, tuple[Any, ...]] | None:
    """`when` with a tuple of admissible values for each name."""
    if when is None:
        return None
    if not isinstance(when, Mapping) or not when:
        raise ValueError(f"{kind}(when={when!r}) names nothing: give a dict from name to value.")
    result = {}
    for name, values in when.items():
        several = isinstance(values, tuple | list | Set | range)
        result[name] = tuple(values) if several else (values,)
        if not result[name]:
            raise ValueError(f"{kind}(when={when!r}) can never be met: give {name!r} a value.")
    return result


def check_range(kind: str, low: float, high: float, scale: str) -> None:
    """Refuse bounds with nothing between them, or whose ends the scale has no logarithm of."""
    if low >= high:
        raise ValueError(
            f"{kind}(low={low!r}, high={high!r}) is empty: give low < high, or close over a "
            "constant."
        )
    if scale == "log" and low <= 0:
        least = "low >= 1" if kind == "Int" else "low > 0"
        raise ValueError(
            f"{kind}(low={low!r}, scale='log') has no logarithm: give {least}, or scale='linear' "
            "to reach zero."
        )
    if scale == "reverse_log" and high >= 1:
        raise ValueError(
            f"{kind}(high={high!r}, scale='reverse_log') takes the logarithm of one minus the "
            "value: give high < 1, or scale='linear' to reach one."
        )


def refuse_log(kind: str, given: Mapping[str, Any]) -> None:
    """Refuse the keyword that Optuna has where ours is `scale`."""
    if "log" in given:
        scale = "log" if given["log"] else "linear"
        raise ValueError(f"{kind}(log={given['log']!r}) is Optuna's: write scale={scale!r}.")


def check_step(kind: str, low: float, high: float, step: float, scale: str) -> None:
    """Refuse a step on another scale than the linear one, or one that misses the upper bound."""
    if scale != "linear":
        raise ValueError(
            f"{kind}(step={step!r}, scale={scale!r}) has equal steps on an unequal scale: leave "
            "one of both out, or list the values in a Categorical."
        )
    count = (high - low) / step
    if abs(count - round(count)) > 1e-6 or round(count) < 1:
        last = low + math.floor(count) * step
        give = f"high={last:.12g}" if last > low else "a smaller step"
        raise ValueError(
            f"{kind}(low={low!r}, high={high!r}, step={step!r}) does not end on a step: give "
            f"{give}."
        )


def check_prior(kind: str, low: float, high: float, prior: float | None) -> None:
    """Refuse a prior that lies outside the bounds."""
    if prior is not None and not low <= prior <= high:
        raise ValueError(
            f"{kind}(prior={prior!r}) lies outside [{low!r}, {high!r}]: give a value inside, or "
            "widen the range."
        )


class _Discrete(Protocol):
    @property
    def prior(self) -> Any: ...

    def admits(self, value: Any) -> bool: ...


def refuse_prior_of(dimension: _Discrete) -> None:
    """Refuse a prior that is none of a discrete hyperparameter's values."""
    if dimension.prior is not None and not dimension.admits(dimension.prior):
        raise ValueError(
            f"{type(dimension).__name__}(prior={dimension.prior!r}) is none of the values of "
            f"{dimension!r}: give one of them."
        )
