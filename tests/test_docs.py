"""The documentation's Python blocks run, page by page, each page in one session and one folder.

A block that begins with ```python runs; one with ```py is only shown (another library's code, or a
script that has its own test). A block that includes a file (`--8<--`) shows one that CI runs.
"""

import contextlib
import io
import pydoc
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks_of(page: Path) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for block in blocks if not block.startswith("--8<--")]


# Its block starts a server and waits.
SHOWN_ONLY = {DOCS / "many_machines.md"}
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if blocks_of(page) and page not in SHOWN_ONLY]


def test_pages_are_found() -> None:
    names = {str(page.relative_to(DOCS)) for page in PAGES}
    assert {"index.md", "idea.md", "sweeps.md", "coming_from.md", "estimators/implicit.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for block in blocks_of(page):
            exec(compile(block, str(page), "exec"), namespace)


def test_every_public_name_has_an_entry() -> None:
    """The API pages name every public name of the package, those loaded on use too."""
    import hypergrad as hg

    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    entries = set(re.findall(r"^::: hypergrad\.([\w.]+)$", pages, flags=re.MULTILINE))
    names = {*hg.__all__, *hg._LATER, *hg._MODULES.values()}
    names |= {f"nn.{name}" for name in hg.nn.__all__}
    names |= {"plotting.runs", "plotting.sweeps", "testing.contract"}
    missing = {name for name in names - {"nn", "plotting", "testing"} if name not in entries}
    assert not missing, f"add to docs/api: {sorted(missing)}"
    gone = {name for name in entries if pydoc.locate(f"hypergrad.{name}") is None}
    assert not gone, f"take out of docs/api: {sorted(gone)}"
