"""The command line on the file that its help shows: sweep, join, show, report, and refusals."""

import base64
import re
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

import hypergrad as hg
from hypergrad.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Path:
    """A folder with the file of the help's example."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    code = text[text.index("    # my_sweep.py") : text.index("Run it as often")]
    (tmp_path / "my_sweep.py").write_text(textwrap.dedent(code))
    (tmp_path / "help.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_version_is_said_everywhere() -> None:
    """By the command, by `python -m` and by the package: that of the installed distribution."""
    import subprocess
    import sys
    from importlib import metadata

    import hypergrad

    version = metadata.version("hypergrad-jax")
    command = [sys.executable, "-m", "hypergrad", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == f"hypergrad {version}\n" and hypergrad.__version__ == version


def test_the_commands_of_the_help_run(folder: Path, capsys: Any) -> None:
    commands = re.findall(r"^    hypergrad (.*)$", (folder / "help.txt").read_text(), re.M)
    assert len(commands) == 5
    assert main(commands[0].split()) == 0
    out = capsys.readouterr().out
    assert "12 trials: 12 complete" in out and "optimizer=" in out
    assert main(commands[1].split()) == 0
    assert capsys.readouterr().out == out
    assert main(commands[2].split()) == 0
    page = (folder / "sweep.html").read_text()
    assert "12 trials: 12 complete" in page and "learning" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    # what was confirmed stands in the storage, and its network in a folder
    assert main([*commands[3].split(), "--best", "2", "--seeds", "1"]) == 0
    assert "confirmed, its values frozen:\n#" in capsys.readouterr().out
    assert main(commands[4].split()) == 0
    told = tomllib.loads(capsys.readouterr().out)
    found = hg.load("best")
    assert told["hyper"] == found.hyper and told["score"] == pytest.approx(found.score)
    assert found.params.shape == (8,) and int(found.state.step) == 60
    assert main(["show", "sweep.journal"]) == 0
    assert "confirmed" in capsys.readouterr().out
    # the same command has nothing left to do; a larger number goes on
    assert main(commands[0].split()) == 0
    assert main([*commands[0].split()[:-1], "13", "--count", "1"]) == 0
    assert capsys.readouterr().out.count("\n#") == 10 + 1 + 2  # and what was confirmed


def test_failures_are_one_line_with_a_remedy_and_a_code(folder: Path, capsys: Any) -> None:
    def fails(arguments: str, code: int, text: str) -> None:
        assert main(arguments.split()) == code
        err = capsys.readouterr().err
        assert err.startswith("hypergrad: ") and err.count("\n") == 1
        assert text in err

    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("import hypergrad\nhypergrad.Float(2.0, 1.0)")
    (folder / "raises.py").write_text("def sweep(**options):\n    raise KeyError('rate')")
    (folder / "other.py").write_text("def sweep(**options):\n    return 3")
    (folder / "text.journal").write_text("")
    fails("sweep missing.py", 2, "missing.py is no file")
    fails("sweep empty.py", 2, "holds no function `sweep`")
    fails("sweep broken.py", 1, "broken.py: ")
    fails("sweep raises.py", 1, "raises.py: KeyError: 'rate'")
    fails("sweep other.py", 2, "returned 3: return what hypergrad.sweep returns")
    fails("sweep my_sweep.py --trials 0", 1, "num_trials=0")
    fails("sweep my_sweep.py --storage nowhere/a.journal", 2, "no folder: make it")
    fails("show missing.journal", 2, "missing.journal is no file")
    fails("show text.journal", 2, "it holds no study: give the --storage of a sweep")
    (folder / "text.db").write_text("text")
    fails("show sqlite:///text.db", 2, "cannot be opened: file is not a database")
    fails("confirm missing.journal", 2, "missing.journal is no file")
    fails("retrain my_sweep.py --storage missing.journal --out best", 2, "is no file")
    fails("sweep my_sweep.py --timeout 0", 1, "timeout=0.0 must be positive")
    fails("show sqlite:///none.db --name x", 2, "sqlite:///none.db is no file")


def test_only_the_folder_at_hand_is_searched_for_a_sweeps_file(folder: Path, capsys: Any) -> None:
    """A storage that others write to must not say what is run."""
    import optuna

    assert main(["sweep", "my_sweep.py", "--storage", "sqlite:///a.db"]) == 0
    study = optuna.load_study(study_name="hypergrad", storage="sqlite:///a.db")
    assert study.user_attrs["file"] == "my_sweep.py"
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "evil.py").write_text("raise SystemExit('run')")
    for name in ("elsewhere/evil.py", "../my_sweep.py", ""):
        study.set_user_attr("file", name)
        capsys.readouterr()
        assert main(["confirm", "sqlite:///a.db"]) == 2
        assert "give --file" in capsys.readouterr().err
    assert main(["confirm", "sqlite:///a.db", "--file", "my_sweep.py", "--best", "1"]) == 0


def test_failed_trials_stand_in_the_page(folder: Path, capsys: Any) -> None:
    code = (folder / "my_sweep.py").read_text()
    broken = code.replace("make = {", "assert choices['optimizer'] == '<no>', 'a <b> c'; make = {")
    (folder / "my_sweep.py").write_text(broken)
    assert main(["sweep", "my_sweep.py", "--storage", "f.journal", "--trials", "2"]) == 1
    assert "2 trials: 2 fail\nthe last error: AssertionError: a <b> c" in capsys.readouterr().out
    assert main(["report", "f.journal", "--out", "page.html"]) == 0
    page = (folder / "page.html").read_text()
    assert "AssertionError: a &lt;b&gt; c" in page and "Failed trials" in page
    assert main(["report", "f.journal", "--out", "nowhere/page.html"]) == 2


def test_what_a_sweep_was_configured_with_confirms_and_retrains_it(
    folder: Path, capsys: Any
) -> None:
    """The file alone describes another sweep; `--config` and `--set` make it the same one."""
    (folder / "s.toml").write_text(
        "[sweep]\nnum_steps = 20\n[space.optimizer]\nkind = 'Categorical'\nchoices = ['adam']\n"
        "[space.rate]\nkind = 'Float'\nlow = 0.01\nhigh = 0.1"
    )
    same = ["--config", "s.toml", "--set", "space.rate.high=0.2"]
    assert main(["sweep", "my_sweep.py", "--storage", "c.journal", "--trials", "2", *same]) == 0
    assert main(["confirm", "c.journal"]) == 1
    assert "made for another space" in capsys.readouterr().err
    assert main(["confirm", "c.journal", "--best", "1", "--seeds", "1", *same]) == 0
    assert "confirmed, its values frozen" in capsys.readouterr().out
    given = ["my_sweep.py", "--storage", "c.journal", "--out", "net", *same]
    assert main(["retrain", *given]) == 0
    assert hg.load("net").hyper["optimizer"] == "adam"
    # without a file the message names what was given, and what is missing
    assert main(["sweep", "my_sweep.py", "--set", "space.rate.high=0.2"]) == 2
    assert "--set space.rate.high=0.2: space.rate has no kind" in capsys.readouterr().err


def test_an_error_of_the_file_names_its_line(folder: Path, capsys: Any) -> None:
    (folder / "raises.py").write_text("def sweep(**options):\n\n    return options['rate']")
    assert main(["sweep", "raises.py"]) == 1
    assert capsys.readouterr().err == "hypergrad: raises.py: KeyError: 'rate' (line 3)\n"
    (folder / "elsewhere").mkdir()
    assert main(["sweep", "my_sweep.py", "--storage", "elsewhere/b.journal", "--trials", "1"]) == 0
    (folder / "my_sweep.py").rename(folder / "elsewhere/my_sweep.py")
    assert main(["confirm", "elsewhere/b.journal"]) == 2
    assert "which is not in this folder: give --file" in capsys.readouterr().err
