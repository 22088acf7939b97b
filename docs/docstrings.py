"""For mkdocstrings, which reads the sources without running them: examples and lazy names.

Google style knows examples only under a heading "Examples:"; ours stand at the end without one,
and Markdown would read `>>>` as three quotations. And it cannot see what `hypergrad.__getattr__`
loads on use.
"""

import ast
from typing import Any

import griffe


def fenced(text: str) -> str:
    """`text` with a fence around each doctest, which ends at an empty line."""
    lines: list[str] = []
    indent = None
    for line in text.splitlines():
        if indent is None and line.lstrip().startswith(">>> "):
            indent = line[: len(line) - len(line.lstrip())]
            lines += ["", f"{indent}```pycon"]
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line)
    return "\n".join(lines if indent is None else [*lines, f"{indent}```"])


class FenceExamples(griffe.Extension):
    """Puts a fence around every docstring's examples."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


class LazyNames(griffe.Extension):
    """Adds the names that hypergrad loads on use, as if it had imported them."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called once, when the whole package is read."""
        for name, module in ast.literal_eval(str(pkg["_LATER"].value)).items():
            pkg.set_member(name, griffe.Alias(name, f"hypergrad.{module}.{name}"))
        for name in ast.literal_eval(str(pkg["nn._EQUINOX"].value)):
            pkg["nn"].set_member(name, griffe.Alias(name, f"hypergrad.nn.equinox.{name}"))
