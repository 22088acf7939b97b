"""TPE after ten random trials, and after ten that are spread over the space, as "auto" has them.

Run: `python -m benchmarks.first_trials [--quick] [--out FILE]` (some five minutes on one core).

Trials cost nothing here: a bowl in four logarithmic Floats whose bottom depends on the first of
some choices, each of which has one best option, with noise. Spaces with choices of 2, 2 and 2
options, of 3 and 4, and of 5, 6 and 3. The lowest score after so many trials, mean (95% quantile)
over 60 seeds; and in how many sweeps ten first trials left out an option.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna

import hypergrad as hg
from benchmarks import command
from hypergrad.knowledge.design import spread_points
from hypergrad.study.study import open_study

OPTIONS = ((2, 2, 2), (3, 4), (5, 6, 3))
TRIALS, STARTUP, MARKS = 60, 10, (10, 20, 30, 60)
BOTTOM, SLOPES = np.array([0.7, 0.35, 0.6, 0.2]), np.array([1.0, 0.6, 0.3, 0.15])


def space_of(options: tuple[int, ...]) -> hg.Space:
    """Choices of so many options, and four Floats."""
    choices = {f"c{i}": hg.Categorical(list(range(k))) for i, k in enumerate(options)}
    return hg.Space(choices | {f"x{i}": hg.Float(1e-4, 1.0, scale="log") for i in range(4)})


def score(choices: dict[str, Any], floats: dict[str, float]) -> float:
    """The bowl, and a step for each choice but its best option."""
    places = np.array([np.log10(floats[f"x{i}"]) / 4 + 1 for i in range(4)])
    bottom = np.clip(BOTTOM - 0.05 * choices["c0"], 0, 1)
    steps = [0.12 * (value != 1) * (1 + 0.5 * int(name[1:])) for name, value in choices.items()]
    return float(SLOPES @ (places - bottom) ** 2) + sum(steps)


def swept(space: hg.Space, seed: int, spread: bool) -> tuple[np.ndarray, bool]:
    """The lowest score after each trial, and whether the first ten have left out an option."""
    rng, scores, seen = np.random.default_rng([seed, 3]), list[float](), list[dict[str, Any]]()
    with open_study(space, sampler="tpe", seed=seed, num_trials=TRIALS) as opened:
        for point in spread_points(space, STARTUP, seed) if spread else ():
            opened.enqueue(point)
        while proposal := opened.ask():
            found = score(proposal.choices, proposal.start) + 0.01 * rng.normal()
            scores.append(found)
            seen.append(proposal.choices)
            opened.finish(proposal, found)
    first = seen[:STARTUP]
    missed = any(len({c[n] for c in first}) < len(space[n].choices) for n in space.discrete)
    return np.minimum.accumulate(scores), missed


def main(quick: bool = False, out: str | None = None) -> list[dict[str, Any]]:
    """Print the table; return its rows."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds, rows = range(1000, 1004 if quick else 1060), []
    heads = " | ".join(f"{mark} trials" for mark in MARKS)
    print(f"| options | first ten | {heads} | sweeps that missed one |")
    print("|" + "---|" * (len(MARKS) + 3))
    for options in OPTIONS:
        for name, spread in (("random", False), ("spread", True)):
            found = [swept(space_of(options), seed, spread) for seed in seeds]
            best = np.array([curve for curve, _ in found])[:, np.array(MARKS) - 1]
            mean, high = best.mean(0), np.quantile(best, 0.95, axis=0)
            share = float(np.mean([missed for _, missed in found]))
            rows.append({"options": options, "first": name, "mean": mean.tolist(), "missed": share})
            cells = " | ".join(f"{m:.3f} ({h:.3f})" for m, h in zip(mean, high, strict=True))
            print(
                f"| {', '.join(map(str, options))} | {name} | {cells} | {share:.0%} |", flush=True
            )
    if out:
        Path(out).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    command.run(main, __doc__)
