"""Run all benchmarks and print their tables.

Run: `make bench` (hours on two cores), or `make bench-quick`, shortened: `python -m
benchmarks.every [--quick]`. Every benchmark also runs by itself as `python -m benchmarks.NAME`; its
header says what its columns are. Prints each table under its name, with the seconds it took.
"""

import argparse
import importlib
import time

import jax

NAMES = (
    "closed_forms",
    "speed",
    "updates",
    "memory",
    "compile_time",
    "dropout",
    "horizon",
    "solvers",
    "implicit",
    "ranking",
    "bilevel",
    "self_tuning",
    "evolution",
    "choice",
    "optimizers",
    "data_cleaning",
    "attribution",
    "metasmoothness",
    "study",
    "crash",
    "populations",
    "fit",
    "resume",
    "mixed_sweep",
    "knowledge",
    "gauntlet",
    "arena",
)


def main(quick: bool) -> dict[str, float]:
    """Run every benchmark; returns the seconds of each."""
    seconds = {}
    for name in NAMES:
        print(f"\n== benchmarks.{name}", flush=True)
        begin = time.perf_counter()
        importlib.import_module(f"benchmarks.{name}").main(quick=quick)
        seconds[name] = time.perf_counter() - begin
        print(f"-- {seconds[name]:.0f} s", flush=True)
        jax.clear_caches()
    print(f"\n{sum(seconds.values()):.0f} s in total")
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
