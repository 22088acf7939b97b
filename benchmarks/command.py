"""The command line that most benchmarks share."""

import argparse
from collections.abc import Callable
from typing import Any


def run(main: Callable[[bool, str | None], Any], doc: str | None) -> None:
    """`main(quick, out)` by `--quick` and `--out FILE`."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small form, as the tests run")
    parser.add_argument("--out", help="a file for the rows, as JSON")
    options = parser.parse_args()
    main(options.quick, options.out)
