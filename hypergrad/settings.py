"""What a TOML file says of a sweep: its space, its scheduler, and other keywords of `sweep`."""

import difflib
import functools
import inspect
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypergrad.search import schedulers
from hypergrad.search.sweep import sweep
from hypergrad.space.dimensions import Categorical, Dimension, Float, Int
from hypergrad.space.space import Space

_KINDS = {kind.__name__: kind for kind in (Float, Int, Categorical)}
# What no text can say.
_OBJECTS = {"make_problem", "data", "refine", "callbacks"}
_TABLES = ("sweep", "space", "scheduler")


def settings_of(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    r"""Keywords of `sweep` from a TOML file, and from `changes`, as "space.rate.high=0.5", in turn.

    The file has tables `[sweep]` (keywords of `hypergrad.sweep`), `[space.NAME]` and `[scheduler]`
    (`kind`, which is the name of a class, and its arguments).

    Raises:
      ValueError: a file that is no TOML, an unknown key (with the nearest one), a wrong value.
      OSError: the file cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "sweep.toml")
    >>> _ = file.write_text("[space.rate]\nkind = 'Float'\nlow = 0.1\nhigh = 1.0")
    >>> settings_of(file, ["sweep.num_trials=4", "space.rate.scale=log"])["space"]["rate"]
    Float(0.1, 1.0, scale='log')
    """
    try:
        given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error
    for change in changes:
        _change(given, change)
    _known("table", given, _TABLES)
    for name in _TABLES:
        if not isinstance(given.get(name, {}), dict):
            raise ValueError(f"{name!r} is {given[name]!r}: give a table, [{name}].")
    result = dict(given.get("sweep", {}))
    words = [n for n in inspect.signature(sweep).parameters if n not in {*_OBJECTS, *_TABLES}]
    _known("sweep", result, words)
    if "scheduler" in given:
        result["scheduler"] = _made("scheduler", given["scheduler"], _schedulers())
    if "space" in given:
        result["space"] = Space({n: _dimension(n, entry) for n, entry in given["space"].items()})
    return result


def with_settings(function: Callable[..., Any], settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of a sweep's file with these keywords, also in the place of a given space."""
    space = settings.get("space")
    rest = {name: value for name, value in settings.items() if name != "space"}
    if space is None:
        return functools.partial(function, **rest)
    if isinstance(function, functools.partial) and len(function.args) > 1:
        make_problem, _, *others = function.args
        words = {**function.keywords, **rest}
        return functools.partial(function.func, make_problem, space, *others, **words)
    return functools.partial(function, space=space, **rest)


def _change(given: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"{change!r} is no change: give KEY=VALUE, as sweep.num_trials=12.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a word, which a shell has left without quotes
    *path, last = key.strip().split(".")
    table = given
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"{change!r}: {part!r} is no table.")
    table[last] = value


def _dimension(name: str, entry: Any) -> Dimension:
    if not isinstance(entry, dict):
        raise ValueError(f"space.{name} is {entry!r}: give a table, [space.{name}], with its kind.")
    return _made(f"space.{name}", entry, _KINDS)


def _made(where: str, entry: Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
    """The object that a table describes: of the class `kind`, from the other keys."""
    if "kind" not in entry:
        raise ValueError(
            f"{where} has no kind: its table says all of it, so give {where}.kind, one of "
            f"{sorted(kinds)}, and its arguments in the same file."
        )
    if entry["kind"] not in kinds:
        raise ValueError(f"{where}.kind={entry['kind']!r}: give one of {sorted(kinds)}.")
    kind = kinds[entry["kind"]]
    arguments = {name: value for name, value in entry.items() if name != "kind"}
    _known(where, arguments, list(inspect.signature(kind.__init__).parameters)[1:])
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _schedulers() -> dict[str, Any]:
    return {
        name: kind
        for name, kind in vars(schedulers).items()
        if isinstance(kind, type) and name[0] != "_" and hasattr(kind, "__dataclass_fields__")
    }


def _known(where: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            end = f"did you mean {near[0]!r}?" if near else f"give one of {sorted(known)}."
            raise ValueError(f"{where}: the key {name!r} is unknown: {end}")
