"""The house's rules that a reader would otherwise have to check by hand; see CONTRIBUTING.md."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from test_imports import ROOMS

PACKAGE = Path(__file__).resolve().parent.parent / "hypergrad"
SOURCES = {path.relative_to(PACKAGE): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def parameters() -> Iterator[tuple[str, str]]:
    """Each parameter of each function with its annotation."""
    for path, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for a in every:
                if a.arg not in ("self", "cls"):
                    kind = "" if a.annotation is None else ast.unparse(a.annotation)
                    yield f"{path}: {node.name}({a.arg})", kind


def test_files_and_folders_are_small() -> None:
    assert len(SOURCES) > 50
    long = {str(path): len(source.splitlines()) for path, source in SOURCES.items()}
    assert not {path: lines for path, lines in long.items() if lines > 400}
    rooms: dict[str, int] = defaultdict(int)
    for path, lines in long.items():
        rooms[path.split("/")[0]] += lines
    assert not {room: lines for room, lines in rooms.items() if lines > 2300}


def test_one_word_per_thing() -> None:
    """No public class or function name stands twice in the package."""
    named = defaultdict(list)
    for path, source in SOURCES.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                named[node.name].append(str(path))
    assert len(named) > 200
    assert not {name: paths for name, paths in named.items() if len(paths) > 1}


def test_signatures_name_their_trees() -> None:
    """A tenth of the parameters may be anything; the others say what they are (`trees.py`)."""
    found = list(parameters())
    anything = [where for where, kind in found if kind == "Any"]
    assert len(found) > 1000
    assert len(anything) <= 0.1 * len(found), "\n".join(anything)


def test_no_re_export_of_a_re_export() -> None:
    """An `__init__` imports names from the files that define them; nobody else imports from one."""
    for path, source in SOURCES.items():
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "hypergr"
            ):
                continue
            file = PACKAGE.parent / (node.module or "").replace(".", "/")
            for alias in node.names:
                is_module = (file / alias.name).is_dir() or (file / f"{alias.name}.py").exists()
                assert file.with_suffix(".py").exists() or is_module, (str(path), node.module)


def test_nothing_is_printed_but_what_is_asked_for() -> None:
    """What a command or a check was called for is printed; all else goes through logging."""
    asked = {"cli.py", "analysis/check.py", "analysis/choose.py", "training/progress.py"}
    printing = {
        str(path)
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert printing <= asked


def test_the_page_on_the_house_lists_its_rooms() -> None:
    page = (PACKAGE.parent / "docs" / "how_it_is_built.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)` \|[^|]+\| ?(.*) ?\|$", page, flags=re.MULTILINE)
    listed = {
        room.rstrip("/").replace("/", "."): " ".join(re.findall(r"`(\w+)`", files))
        for room, files in rows
    }
    assert listed == ROOMS and list(listed) == list(ROOMS)
    # What the walks through it name is there.
    for path in re.findall(r"`((?:tests|\w+)/[\w/]*\.py)`", page):
        assert (PACKAGE / path).exists() or (PACKAGE.parent / path).exists(), path
