"""Random programs: each hypergradient against plain jax.grad and against float64 differences.

15 programs at 14 positions each, bounds included: 210 examples. `python -m benchmarks.programs`
runs 5,000 and lists every disagreement.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.programs import (
    ACTIVATIONS,
    PARTS,
    RULES,
    TOLERANCE,
    WRAPPERS,
    Program,
    judge,
    random_positions,
    rounding,
)

# one rule in two is none, as most losses are
PROGRAMS = st.builds(
    Program,
    st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4).map(tuple),
    st.sampled_from(sorted(WRAPPERS)),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.one_of(st.just("none"), st.sampled_from(sorted(RULES))),
    st.sampled_from(["none", "step", "sqrt", "log"]),
    st.integers(0, 999),
)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    # The fixture only enables 64-bit types; what fails is shown as drawn, as each costs seconds.
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(PROGRAMS)
def test_hypergradients_of_random_programs(program: Program) -> None:
    for outcome in judge(program, random_positions(program.seed, 14), forward=False):
        assert "UNEXPLAINED" not in outcome.cause, outcome
        assert (outcome.plain or 0) < 1e-10 or outcome.plain < 4 * rounding(
            program, outcome.values
        ), outcome
        assert (outcome.differences or 0) < TOLERANCE or outcome.cause == "kink", outcome
