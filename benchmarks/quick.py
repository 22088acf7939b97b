"""Run all benchmarks in quick mode and print their tables.

Run: `python -m benchmarks.quick`, or `make bench-quick` (under ten minutes on two cores). Every
benchmark also runs by itself, in full, as `python -m benchmarks.NAME`; its header says what its
columns are. Prints each table under its name, with the seconds it took.
"""

import importlib
import importlib.util
import time

import jax

NAMES = (
    "closed_forms",
    "speed",
    "memory",
    "compile_time",
    "dropout",
    "horizon",
    "implicit",
    "evolution",
    "choice",
    "optimizers",
    "data_cleaning",
    "study",
    "crash",
    "populations",
    "fit",
    "resume",
    "arena",
)


def main(quick: bool = True) -> dict[str, float]:
    """Run every benchmark; returns the seconds of each that exists."""
    seconds = {}
    for name in NAMES:
        print(f"\n== benchmarks.{name}", flush=True)
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            print("skipped: it does not exist in this checkout")
            continue
        begin = time.perf_counter()
        importlib.import_module(f"benchmarks.{name}").main(quick=quick)
        seconds[name] = time.perf_counter() - begin
        print(f"-- {seconds[name]:.0f} s", flush=True)
        jax.clear_caches()
    print(f"\n{sum(seconds.values()):.0f} s in total")
    return seconds


if __name__ == "__main__":
    main()
