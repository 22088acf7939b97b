"""The benchmark for accelerators: its rows are right, and none of them takes others with it."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import accelerator

# A child that ends, hangs or fails where the name of a row says so.
CHILD = """
import json, os, sys, time
journal, names = open(sys.argv[1], "a"), json.loads(sys.argv[2])
def note(**line):
    journal.write(json.dumps(line) + "\\n"); journal.flush()
note(device={"kind": "pretended"})
for name in names:
    note(begins=name)
    if name == "dies": print("out of luck", file=sys.stderr, flush=True); os._exit(3)
    if name == "hangs": time.sleep(60)
    note(row={"name": name, "ms": 2.0, "base": "good"})
"""


def pretended(left: Sequence[str], journal: Path) -> list[str]:
    return [sys.executable, "-c", CHILD, str(journal), json.dumps(list(left))]


def test_a_row_that_dies_or_hangs_loses_no_other() -> None:
    reports: list[int] = []
    found: list[dict] = []

    def report(rows: list[dict], about: dict) -> None:
        reports.append(len(rows))
        found[:] = rows

    names = ["good", "dies", "better", "hangs", "best"]
    until = time.monotonic() + 60
    about = accelerator.supervise(names, pretended, until, report, row_seconds=2.0)
    assert about == {"kind": "pretended"}
    assert [row["name"] for row in found] == names and reports[:5] == [1, 2, 3, 4, 5]
    assert [row.get("ms") for row in found] == [2.0, None, 2.0, None, 2.0]
    assert "ended with 3: out of luck" in found[1]["error"] and "not done" in found[3]["error"]
    printed = accelerator.table(found)
    assert "| better | 2 | 1.00 |" in printed and "out of luck" in printed


def test_rows_are_skipped_when_the_time_is_over() -> None:
    found: list[dict] = []
    report = lambda rows, about: found.__setitem__(slice(None), rows)  # noqa: E731
    accelerator.supervise(["good", "hangs", "best"], pretended, time.monotonic() + 2, report)
    assert found[0]["ms"] == 2.0 and all("time was over" in row["skipped"] for row in found[1:])


def test_small_rows_are_right(tmp_path: Path) -> None:
    names = ["plain training", "naive reverse", 'Unrolled(checkpoint="none")', "no such row"]
    rows = accelerator.rows(quick=True)
    assert len({row.name for row in rows}) == len(rows) > 50
    assert all(row.base in ("", *(r.name for r in rows)) for row in rows)
    accelerator.work([f"MLP: {name}" for name in names[:3]], True, tmp_path / "journal")
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert lines[0]["device"]["platform"] == "cpu"
    plain, naive, mixed = (line["row"] for line in lines if "row" in line)
    assert plain["ms"] > 0 and plain["copies"] > 3 and mixed["base"] == plain["name"]
    assert abs(naive["grad"]["learning_rate"]) > 1e-3
    assert mixed["grad"] == pytest.approx(naive["grad"], rel=1e-4)
    assert mixed["copies"] < naive["copies"]
