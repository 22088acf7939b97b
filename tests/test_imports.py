"""A file of hypergrad imports only files above it, and importing hypergrad stays cheap."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hypergrad"

# The house from the ground up. A room imports only rooms that stand before it, and inside a room a
# file only files that stand before it. `__init__` files only collect names and are exempt.
ROOMS = {
    "trees": "",
    "version": "",
    "checks": "",
    "files": "lock journal toml",
    "space": "ranges dimensions space description",
    "data": "keys contents batches splits streams prefetch",
    "optim": "transforms proximal schedules",
    "program": "",
    "problem": "eager rules inner_gradient cut skips mistakes optimizer problem noise structure"
    " mixed",
    "linear": "base series krylov direct preconditioned roots",
    "estimators": "memory walk recompute base unrolled ahead forward conditions implicit evolution"
    " difference auto hypergradient",
    "single_loop": "penalty saba self_tuning",
    "tuners": "base averaged compressed estimates trust refusals alternating restarting learned",
    "population": "refine held member placement exploit population",
    "training": "arguments history doubts length identity arrays checkpoints progress callbacks"
    " signals updates fit",
    "study": "optuna_private distributions signature workers storage slots sampler remarks"
    " ranking study",
    "plotting": "panels runs training_examples colors parallel sweeps tuned report",
    "knowledge": "positions priors warm local samplers lengths programs spending",
    "results": "layout saved kept standings goals programs result",
    "search": "curves schedulers arguments recipe stopping cohort telling endings"
    " limits sweep candidates tuned tune",
    "nn": "dropout masked linen nnx equinox",
    "analysis": "smoothness causes choose check attribution",
    "testing": "contract",
    "settings": "",
    "cli": "",
    "__main__": "",
}
ORDER = [
    f"{room}.{file}" if file else room
    for room, files in ROOMS.items()
    for file in files.split() or [""]
]
# An estimator sees a problem and its hyperparameters, never who asks for the hypergradient. What
# chooses and checks estimators may see a space.
ESTIMATORS = [
    f"estimators.{file}"
    for file in ("base", "unrolled", "forward", "conditions", "implicit", "evolution", "difference")
] + ["single_loop.penalty", "single_loop.saba", "single_loop.self_tuning"]
HIDDEN_FROM_ESTIMATORS = (
    "space.*",
    "tuners",
    "tuners.*",
    "search",
    "search.*",
    "study",
    "study.*",
)


def module_name(path: Path, package: Path) -> str:
    """Return the dotted name inside the package; that of a package for its `__init__`."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path, modules: set[str]) -> set[str]:
    """Return the modules of `package` that a file imports, anywhere in it."""
    # Relative imports start from the folder that the file lies in.
    folder = (package.name, *path.relative_to(package).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            source = ".".join((*start, *([node.module] if node.module else [])))
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, inside = name.partition(".")
            if root != package.name:
                continue
            # `from hypergrad.space import Float` is an import of hypergrad.space.
            while inside and inside not in modules:
                inside = inside.rpartition(".")[0]
            found.add(inside)
    return found


def rank(module: str) -> int | None:
    """Return the place of a file in ORDER; for a package's `__init__`, that of its last file."""
    places = [i for i, name in enumerate(ORDER) if name == module]
    places = places or [i for i, name in enumerate(ORDER) if name.startswith(f"{module}.")]
    return max(places, default=None)


def breaches(package: Path) -> list[str]:
    """Return one sentence for each way in which the package's imports break the order."""
    paths = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    found = []
    graph = {}
    for module, path in paths.items():
        if path.name == "__init__.py":
            continue
        if rank(module) is None:
            found.append(f"{module} is in no room: add it to ROOMS, after all that it imports")
            continue
        graph[module] = imports_of(path, package, set(paths))
        for target in sorted(graph[module]):
            if not target:
                found.append(
                    f"{module} imports the package itself: import the file that defines it"
                )
            elif rank(target) is None:
                continue  # Reported for the file itself.
            elif rank(target) > rank(module):
                found.append(f"{module} imports {target}, which stands above it")
            elif rank(target) == rank(module) and paths[target].name == "__init__.py":
                found.append(f"{module} imports its own package {target}: import the file instead")
            if module in ESTIMATORS and any(
                fnmatch(target, pattern) for pattern in HIDDEN_FROM_ESTIMATORS
            ):
                found.append(f"{module} imports {target}, which estimators must never see")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"circular import: {' <- '.join(error.args[1])}")
    return found


def test_no_import_runs_upward():
    assert (PACKAGE / "trees.py").exists()
    assert not breaches(PACKAGE), "\n".join(breaches(PACKAGE))


GOOD = {
    "__init__.py": "from hypergrad.space.space import Space\nfrom hypergrad.tuners import Tuner",
    "trees.py": "import jax\nimport hypergradient_of_someone_else",
    "space/__init__.py": "from hypergrad.space.space import Space",
    "space/dimensions.py": "from hypergrad import trees",
    "space/space.py": "from hypergrad.space.dimensions import Float",
    "problem/problem.py": "from hypergrad.trees import Tree",
    "estimators/__init__.py": "from hypergrad.estimators.base import Estimator",
    "estimators/base.py": "from hypergrad.problem.problem import Problem",
    "estimators/forward.py": "from .base import Estimator\nfrom ..problem.problem import Problem",
    "tuners/__init__.py": "from hypergrad.tuners.alternating import alternating",
    "tuners/alternating.py": "from hypergrad.estimators import Estimator\nimport hypergrad.space",
}
BAD = {
    "upward": (
        {"problem/problem.py": "from hypergrad.tuners.alternating import alternating"},
        "problem.problem imports tuners.alternating",
    ),
    "upward inside a room": (
        {"space/dimensions.py": "from hypergrad.space.space import Space"},
        "space.dimensions imports space.space",
    ),
    "inside a function": (
        {"trees.py": "def f():\n    import hypergrad.space.space"},
        "trees imports space",
    ),
    "relative": ({"trees.py": "from .space.space import Space"}, "trees imports space"),
    "relative, a module": ({"trees.py": "from . import space"}, "trees imports space"),
    "relative, two levels": (
        {"estimators/base.py": "from ..tuners.alternating import alternating"},
        "estimators.base imports tuners.alternating, which stands above",
    ),
    "own package": (
        {"estimators/base.py": "from hypergrad.estimators import Forward"},
        "estimators.base imports estimators, which stands above",
    ),
    "through a package": (
        {"estimators/forward.py": "from hypergrad.tuners import alternating"},
        "estimators must never see",
    ),
    "whole package": ({"trees.py": "import hypergrad"}, "trees imports the package itself"),
    "public name": ({"trees.py": "from hypergrad import Problem"}, "imports the package itself"),
    "space in an estimator": (
        {"estimators/forward.py": "from hypergrad.space.space import Space"},
        "estimators.forward imports space.space, which estimators must never see",
    ),
    "circle": (
        {
            "space/dimensions.py": "from hypergrad.space.space import Space",
            "space/space.py": "import hypergrad.space.dimensions",
        },
        "circular import",
    ),
    "itself": ({"trees.py": "import hypergrad.trees"}, "circular import"),
    "unlisted": ({"helpers.py": ""}, "helpers is in no room: add it"),
}


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = folder / "hypergrad" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "hypergrad"


def test_the_check_accepts_downward_imports(tmp_path):
    assert breaches(write_package(tmp_path, GOOD)) == []


@pytest.mark.parametrize("case", BAD)
def test_the_check_finds(tmp_path, case):
    files, message = BAD[case]
    found = breaches(write_package(tmp_path, GOOD | files))
    assert any(message in breach for breach in found), found


def test_import_loads_neither_optuna_nor_matplotlib():
    program = (
        "import sys, hypergrad; hypergrad.Space; "
        "heavy = ('optuna', 'matplotlib', 'sklearn', 'orbax', 'rich', 'tensorboardX', 'mlflow'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
