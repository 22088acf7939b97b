"""Measure what compiling costs: seconds per program, its size, and how often a tuner compiles.

Run: `python -m benchmarks.compile_time` (about two minutes on one core; `main(quick=True)` one).

Task: `benchmarks/momentum_task.py`, T = 500, batches from `Minibatches`, the whole estimate with
its `info`. Prints seconds to trace and lower, seconds XLA takes, their sum in processor time (which
other programs on the machine do not stretch), and the instructions and fusions of the result.
Targets: <= 3 s for `Unrolled()`, <= 6 s for `checkpoint="sqrt"`, judged by processor time. Every
program is compiled twice, the second time without XLA's fusion emitters
(`compiler_options={"xla_cpu_use_fusion_emitters": False}`), which makes it slower to run; the first
compilation of a process, which loads XLA, is not counted.
Transformer: seconds on the clock to trace and compile a hypergradient through 5 steps of a
six-layer transformer (`benchmarks/accelerator.py`'s, its layers scanned) under AdamW, over those of
naive reverse; target <= 1.2.
`tuner.update`: programs that a jitted `update` of `alternating` compiles over a run; target 1.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import hypergrad as hg
from benchmarks import accelerator
from benchmarks import momentum_task as task

NUM_STEPS = 500
PROGRAMS: dict[str, tuple[Callable[..., Any], float | None]] = {
    "plain training": (task.plain_training, None),
    "hand-derived adjoint": (task.adjoint, None),
    "Unrolled()": (task.through_hypergrad(hg.Unrolled(), "minibatches"), 3.0),
    'Unrolled(checkpoint="sqrt")': (
        task.through_hypergrad(hg.Unrolled(checkpoint="sqrt"), "minibatches"),
        6.0,
    ),
    "Forward()": (task.through_hypergrad(hg.Forward(), "minibatches"), None),
}
OPTIONS = {"on": {}}
if jax.__version_info__ < (0, 11):  # later ones have no such switch
    OPTIONS["off"] = {"xla_cpu_use_fusion_emitters": False}


class Compilation(NamedTuple):
    """What one compilation took and gave."""

    tracing: float
    compiling: float
    processor: float
    instructions: int
    fusions: int


def measure(function: Callable[..., Any], args: Any, options: dict[str, Any]) -> Compilation:
    """Traces and compiles `function` afresh."""
    jax.clear_caches()
    begin, processor = time.perf_counter(), time.process_time()
    lowered = jax.jit(function).lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    end, processor = time.perf_counter(), time.process_time() - processor
    text = compiled.as_text()
    return Compilation(
        middle - begin, end - middle, processor, text.count(" = "), text.count(" fusion(")
    )


def programs(quick: bool) -> list[tuple[Any, ...]]:
    """Rows (program, emitters on or off, then a `Compilation`)."""
    args = (task.HYPER, task.init(), task.indices(NUM_STEPS), *task.load())
    measure(lambda x: x + 1, (task.HYPER["learning_rate"],), {})
    print(
        f"{'program':28}{'emitters':>9}{'trace':>7}{'XLA':>6}{'cpu':>6} s"
        f"{'instr.':>8}{'fusions':>8}"
    )
    rows = []
    for name, (function, target) in PROGRAMS.items():
        if quick and target is None:
            continue
        for emitters, options in OPTIONS.items():
            row = (name, emitters, *measure(function, args, options))
            missed = "   MISSED" if target is not None and row[4] > target else ""
            target_text = "" if target is None else f"   target {target:.0f}"
            print("{:28}{:>9}{:7.1f}{:6.1f}{:6.1f}  {:8d}{:8d}".format(*row) + target_text + missed,
                  flush=True)  # fmt: skip
            rows.append(row)
    return rows


class _Compilations(logging.Handler):
    """Counts JAX's messages that it compiles a function of the given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name_of_function, self.count = name, 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += f"Compiling jit({self.name_of_function})" in record.getMessage()


def tuner_compilations(num_updates: int = 10) -> int:
    """Compilations of a jitted `update` over a run of `alternating`, as JAX logs them."""
    train, valid = task.load()
    space = hg.Space(
        {
            "learning_rate": hg.Float(1e-4, 1.0, scale="log"),
            "weight_decay": hg.Float(1e-6, 1e-1, scale="log"),
        }
    )
    tuner = hg.alternating(task.problem(), space)
    state = tuner.init(task.HYPER, jax.random.key(0))
    update = jax.jit(tuner.update)
    batches = hg.Minibatches(train, task.BATCH, 5)
    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), _Compilations("update")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        for _ in range(num_updates):
            state, _ = update(state, batches, valid)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
    missed = "" if handler.count == 1 else "   MISSED"
    print(
        f"tuner.update: {handler.count} compilation(s) in {num_updates} updates, target 1{missed}"
    )
    return handler.count


def transformer() -> float:
    """The ratio of a six-layer transformer's compile times."""
    model = accelerator.transformer(64, 6, 4, 32, 64)
    measures = {
        "naive reverse": lambda: accelerator.naive(model),
        "Unrolled()": lambda: accelerator.estimated(model, hg.Unrolled()),
    }
    seconds = {}
    for name, measure_one in measures.items():
        jax.clear_caches()
        figures = measure_one()
        seconds[name] = figures["trace"] + figures["compile"]
        print(f"transformer, {name:16}{figures['trace']:6.1f}{figures['compile']:6.1f} s")
    ratio = seconds["Unrolled()"] / seconds["naive reverse"]
    print(f"ratio {ratio:.2f}   target 1.2" + "   MISSED" * (ratio > 1.2))
    return ratio


def main(quick: bool = False) -> dict[str, Any]:
    """Print and return the tables; `quick`: only the programs with a target."""
    tables = {"programs": programs(quick), "tuner.update": tuner_compilations()}
    return tables if quick else tables | {"transformer": transformer()}


if __name__ == "__main__":
    main()
