"""The command line: start or join a sweep in a user's own file, show, report, confirm, retrain.

Exit codes: 0 done; 1 the user's file raised, or no trial has trained in full; 2 an argument, a file
or a storage that cannot be used; 130 interrupted, with running trials back in the queue.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hypergrad.checks import printable, without_passwords
from hypergrad.version import __version__

DONE, NOTHING_FOUND, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
# The study's user attribute that names the file of its sweep.
_FILE = "file"

_EXAMPLE = """\
A sweep's file holds a function `sweep` that takes the keywords of hypergrad.sweep:

    # my_sweep.py
    import functools, jax, jax.numpy as jnp, optax, hypergrad as hg

    def loss(w, hyper, batch, key):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def make_problem(choices):
        make = {"sgd": optax.sgd, "adam": optax.adam}[choices["optimizer"]]
        return hg.bilevel(lambda key: jnp.zeros(8), loss, loss, lambda hyper: make(hyper["rate"]))

    space = hg.Space({
        "optimizer": hg.Categorical(["sgd", "adam"]), "rate": hg.Float(1e-3, 0.3, scale="log"),
    })
    x = jax.random.normal(jax.random.key(0), (96, 8))
    y = x @ jnp.arange(8.0)
    data = hg.Splits((x[:64], y[:64]), (x[64:80], y[64:80]), (x[80:], y[80:]))
    sweep = functools.partial(
        hg.sweep, make_problem, space, data, num_trials=6, num_steps=60, batch_size=16,
    )

Run it as often as there are workers, on any host that reaches the storage:

    hypergrad sweep my_sweep.py --storage sweep.journal --trials 12
    hypergrad show sweep.journal
    hypergrad report sweep.journal --out sweep.html
    hypergrad confirm sweep.journal
    hypergrad retrain my_sweep.py --storage sweep.journal --out best

`confirm` trains the best few again, and `retrain` saves the network of what was confirmed in a
folder, for hypergrad.load.

Exit codes: 0 done, 1 the file raised or no trial trained in full, 2 something that was given cannot
be used, 130 interrupted.
"""


class _Ended(Exception):
    """A command ends with a line for the person who gave it, and an exit code."""

    def __init__(self, message: str, code: int = UNUSABLE) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Errors are one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except _Ended as end:
        message, code = end, end.code
    except BrokenPipeError:  # `| head` has seen enough; Python's last flush would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        message, code = _Ended("interrupted: running trials are in the queue again."), INTERRUPTED
    print(f"hypergrad: {_told(str(message))}", file=sys.stderr)
    return code


def _told(text: str) -> str:
    """What a terminal may be shown, in one line: no escapes, no passwords."""
    return printable(without_passwords(" ".join(text.split())))


def _sweep(options: argparse.Namespace) -> int:
    result = _called(options, num_trials=options.trials, seed=options.seed, timeout=options.timeout)
    if getattr(result, "interrupted", False):
        raise KeyboardInterrupt
    if options.storage is not None:
        # By its name alone: a storage that others write to must not say what is run.
        result.study.set_user_attr(_FILE, Path(options.file).name)
    return _print_table(result.study, options.count)


def _called(options: argparse.Namespace, level: int = logging.INFO, **given: Any) -> Any:
    """What the file's `sweep` returns, with the options of the command that were given."""
    function = _load(options.file)
    given |= {"storage": options.storage, "name": options.name}
    if options.storage is not None:
        # Imported where it is used, here and below: `--help` and mistakes are answered at once.
        from hypergrad.study.storage import open_storage

        # For its error alone, which names the option; the sweep opens its own.
        try:
            open_storage(options.storage)
        except Exception as error:
            raise _Ended(f"--storage {options.storage}: {_short(error)}") from error
    # A file that has set up logging keeps its own: this then does nothing.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hypergrad").setLevel(level)
    _quiet_optuna()
    if getattr(options, "config", None) or getattr(options, "set", None):
        function = _configured(function, options)
    try:
        result = function(**{key: value for key, value in given.items() if value is not None})
    except Exception as error:
        raise _raised(options.file, error) from error
    if not hasattr(result, "study"):
        raise _Ended(
            f"sweep in {options.file} returned {result!r}: return what hypergrad.sweep returns."
        )
    return result


def _configured(function: Any, options: argparse.Namespace) -> Any:
    from hypergrad.settings import settings_of, with_settings

    try:
        return with_settings(function, settings_of(options.config or os.devnull, options.set))
    except (ValueError, OSError) as error:
        given = f"--config {options.config}" if options.config else f"--set {options.set[-1]}"
        raise _Ended(f"{given}: {_short(error)}") from error


class _NothingMore:
    """A callback of a sweep that is to be looked at, and trains no trial."""

    def open(self, study: Any) -> None:
        from hypergrad.training.callbacks import Stop

        raise Stop("its trials stand as they are")

    def __call__(self, study: Any, trial: Any) -> None:
        """Never called."""


def _as_it_stands(options: argparse.Namespace) -> Any:
    """The result of a storage's sweep, with problem and data of the file."""
    study = _study(options)
    if options.file is None:
        options.file = study.user_attrs.get(_FILE, "")
        # No path: see `_sweep`.
        if not options.file or Path(options.file).name != options.file:
            raise _Ended(f"{options.storage} does not say whose sweep it is: give --file.")
        if not Path(options.file).is_file():
            raise _Ended(
                f"the sweep of {options.storage} stands in {options.file}, which is not in this "
                "folder: give --file."
            )
    options.name = study.study_name
    return _called(options, logging.WARNING, callbacks=[_NothingMore()], progress=False)


def _confirm(options: argparse.Namespace) -> int:
    result = _as_it_stands(options)
    try:
        result.confirm(options.best, options.seeds)
    except ValueError as error:
        raise _Ended(_short(error), NOTHING_FOUND) from error
    return _print_table(result.study, options.count)


def _retrain(options: argparse.Namespace) -> int:
    result = _as_it_stands(options)
    try:
        folder = result.save(options.out, seed=options.seed)
    except (ValueError, OSError, FloatingPointError) as error:
        raise _Ended(f"--out {options.out}: {_short(error)}", NOTHING_FOUND) from error
    print((folder / "hyper.toml").read_text(), end="")
    return DONE


def _show(options: argparse.Namespace) -> int:
    return _print_table(_study(options), options.count)


def _report(options: argparse.Namespace) -> int:
    study = _study(options)
    try:
        from hypergrad.plotting.report import write_report
    except ImportError as error:
        raise _Ended(f"{error}: pip install 'hypergrad-jax[plots]'.") from error
    if not Path(options.out).absolute().parent.is_dir():
        raise _Ended(f"--out {options.out} lies in a folder that does not exist: make it.")
    try:
        with _well_formed(study):
            print(write_report(study, options.out))
    except OSError as error:
        raise _Ended(f"--out {options.out}: {_short(error)}") from error
    return DONE


def _print_table(study: Any, count: int) -> int:
    from hypergrad.study.ranking import ranked, table

    if count < 0:
        raise _Ended(f"--count {count} must be 0 or more.")
    with _well_formed(study):
        text, found = table(study, count), ranked(study)
    print(text)
    return DONE if found else NOTHING_FOUND


@contextlib.contextmanager
def _well_formed(study: Any) -> Iterator[None]:
    """What a study of somebody else's makes may raise is one line."""
    try:
        yield
    except (_Ended, OSError):
        raise
    except Exception as error:
        raise _Ended(f"the study {study.study_name!r} cannot be read: {_short(error)}") from error


def _load(file: str) -> Any:
    """The function `sweep` of a Python file, which may import from its folder, as a script may."""
    path = Path(file)
    if not path.is_file():
        raise _Ended(f"{file} is no file: give the Python file that holds `sweep`.")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise _Ended(f"{file} is no Python file: end its name in .py.")
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(path.resolve().parent))
    # As an import does: pickle and dataclasses look a class's module up there.
    sys.modules[path.stem] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise _raised(file, error) from error
    function = getattr(module, "sweep", None)
    if not callable(function):
        raise _Ended(
            f"{file} holds no function `sweep`: write sweep = functools.partial(hypergrad.sweep, "
            "make_problem, space, data, num_trials=..., num_steps=..., batch_size=...)."
        )
    return function


def _study(options: argparse.Namespace) -> Any:
    """The study of a storage that is there; the only one, or the one that is named."""
    import optuna

    from hypergrad.study.signature import stored_space
    from hypergrad.study.storage import open_storage

    _quiet_optuna()
    # Opening a file that is not there would make it.
    path = options.storage.removeprefix("sqlite:///")
    if "://" not in path and not Path(path).is_file():
        raise _Ended(f"{options.storage} is no file: give the --storage of a sweep.")
    try:
        # To show changes nothing: no lock, no file beside it, no line cut off.
        storage = open_storage(options.storage, read_only=True)
        names = optuna.get_all_study_names(storage)
    except Exception as error:
        raise _Ended(f"{options.storage}: {_short(error)}") from error
    if not names:
        raise _Ended(f"{options.storage}: it holds no study: give the --storage of a sweep.")
    name = options.name or (names[0] if len(names) == 1 else None)
    if name not in names:
        asked = "it holds several studies" if options.name is None else f"it holds no {name!r}"
        raise _Ended(f"{options.storage}: {asked}; give --name, one of {names}.")
    study = optuna.load_study(study_name=name, storage=storage)
    try:
        stored_space(study)
    except ValueError as error:
        raise _Ended(str(error)) from error
    return study


def _quiet_optuna() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _raised(file: str, error: Exception) -> _Ended:
    """What a person's file raised, and in which of its lines, where it is one of them."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if Path(f.filename).resolve() == Path(file).resolve()]
    line = f" (line {own[-1]})" if own else ""
    return _Ended(f"{file}: {_short(error)}{line}", NOTHING_FOUND)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


class _Parser(argparse.ArgumentParser):
    """Its errors repeat what was given, which may be a URL with a password."""

    def error(self, message: str) -> NoReturn:
        super().error(_told(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hypergrad",
        description="Sweeps of hypergrad: start or join one, show it, report it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hypergrad {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sweep = commands.add_parser("sweep", help="start or join the sweep of a Python file")
    sweep.set_defaults(run=_sweep)
    sweep.add_argument("file", help="a Python file that holds a function `sweep`")
    sweep.add_argument("--storage", help="a path such as sweep.journal, or a database's URL")
    sweep.add_argument("--trials", type=int, help="in all, over all workers")
    sweep.add_argument("--name", help="of the study")
    sweep.add_argument("--seed", type=int, help="of the sampler and of training")
    sweep.add_argument("--timeout", type=float, help="seconds, after which nothing more begins")
    show = commands.add_parser("show", help="print a sweep's table")
    show.set_defaults(run=_show)
    report = commands.add_parser("report", help="write a sweep's tables and pictures as HTML")
    report.set_defaults(run=_report)
    confirm = commands.add_parser("confirm", help="train the best trials again, values frozen")
    confirm.set_defaults(run=_confirm)
    confirm.add_argument("--file", help="the sweep's Python file, where it lies elsewhere")
    confirm.add_argument("--best", type=int, default=3, help="how many trials")
    confirm.add_argument("--seeds", type=int, default=2, help="fresh seeds of each")
    retrain = commands.add_parser("retrain", help="save the network of the best values")
    retrain.set_defaults(run=_retrain)
    retrain.add_argument("file", help="a Python file that holds a function `sweep`")
    retrain.add_argument("--storage", required=True, help="the --storage of its sweep")
    retrain.add_argument("--name", help="of the study, where there are several")
    retrain.add_argument("--out", required=True, help="a folder, for hypergrad.load")
    retrain.add_argument("--seed", type=int, default=0, help="of the run")
    for runner in (sweep, confirm, retrain):
        runner.add_argument("--config", help="a TOML file: tables sweep, space.NAME, scheduler")
        change = "a value of it, such as space.rate.high=0.5; as often as needed"
        runner.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=change)
    for reader in (show, report, confirm):
        reader.add_argument("storage", help="the --storage of a sweep")
        reader.add_argument("--name", help="of the study, where there are several")
    for printer in (sweep, show, confirm):
        printer.add_argument("--count", type=int, default=10, help="rows of the table")
    report.add_argument("--out", default="sweep.html", help="the page's path")
    return parser
