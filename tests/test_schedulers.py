"""Brackets and rungs against the table of Hyperband's paper, and what the schedulers refuse."""

from itertools import pairwise

import pytest

from hypergrad.search.schedulers import (
    Hyperband,
    Rung,
    SuccessiveHalving,
    bracket_steps,
    brackets,
    in_whole_updates,
)


def test_brackets_are_those_of_the_paper():
    """Li et al. 2018, table 1: R = 81, eta = 3."""
    table = [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(34, 3), (11, 9), (3, 27), (1, 81)],
        [(15, 9), (5, 27), (1, 81)],
        [(8, 27), (2, 81)],
        [(5, 81)],
    ]
    found = brackets(Hyperband(min_steps=1, eta=3), num_steps=81, num_trials=81 + 34 + 15 + 8 + 5)
    assert [[tuple(rung) for rung in bracket] for bracket in found] == table


@pytest.mark.parametrize("exponent", range(1, 12))
def test_powers_of_eta_lose_no_rung(exponent):
    """floor(log(243) / log(3)) is 4 in floating point, and 242 steps must not make it 5."""
    for num_steps, rungs in ((3**exponent, exponent + 1), (3**exponent - 1, exponent)):
        (bracket, *_) = brackets(Hyperband(1), num_steps, num_trials=1)
        assert len(bracket) == rungs
        assert bracket[-1].steps == num_steps
        assert bracket[0].steps >= 1


def test_brackets_cycle_and_the_last_one_is_trimmed():
    found = brackets(Hyperband(1), num_steps=9, num_trials=9 + 5 + 3 + 4)
    assert [bracket[0].members for bracket in found] == [9, 5, 3, 4]
    assert found[-1] == (Rung(4, 1), Rung(1, 3), Rung(1, 9))


@pytest.mark.parametrize("scheduler", [None, Hyperband(7), SuccessiveHalving(7, eta=2)])
@pytest.mark.parametrize("num_trials", [1, 2, 10, 100])
def test_every_trial_starts_once_and_every_bracket_ends_in_a_full_run(scheduler, num_trials):
    found = brackets(scheduler, num_steps=1000, num_trials=num_trials)
    assert sum(bracket[0].members for bracket in found) == num_trials
    for bracket in found:
        assert bracket[-1].steps == 1000
        assert bracket[0].steps >= (7 if scheduler else 1000)
        for before, after in pairwise(bracket):
            assert after.steps > before.steps
            assert 1 <= after.members <= before.members


def test_successive_halving_repeats_the_most_exploring_bracket():
    found = brackets(SuccessiveHalving(100), num_steps=3000, num_trials=64)
    assert [bracket[0].members for bracket in found] == [27, 27, 10]
    assert found[0] == (Rung(27, 111), Rung(9, 333), Rung(3, 1000), Rung(1, 3000))


def test_steps_of_a_bracket_count_promotions_once():
    assert bracket_steps((Rung(81, 1), Rung(27, 3), Rung(9, 9))) == 81 + 27 * 2 + 9 * 6
    (alone,) = brackets(None, num_steps=300, num_trials=8)
    assert bracket_steps(alone) == 2400


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Hyperband(0), "min_steps=0 must be at least 1"),
        (lambda: SuccessiveHalving(1, eta=1), "eta=1 must be at least 2"),
        (
            lambda: brackets(Hyperband(400), num_steps=300, num_trials=1),
            "at least 400 steps, but num_steps=300: lower min_steps, or raise num_steps",
        ),
        (lambda: brackets(None, 300, 0), "num_trials=0 must be at least 1"),
        (lambda: brackets(None, 0, 3), "num_steps=0 must be at least 1"),
    ],
)
def test_wrong_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [1.5, True, "1"])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="is no integer: give an int"):
        Hyperband(value)
    with pytest.raises(TypeError, match=r"num_trials=.* is no integer"):
        brackets(None, 10, value)


@pytest.mark.parametrize("scheduler", [Hyperband, SuccessiveHalving])
@pytest.mark.parametrize("steps", [1, 5, 10, 25, 50])
@pytest.mark.parametrize("min_steps", [1, 3, 12, 40])
def test_rungs_of_whole_updates(scheduler, steps, min_steps):
    """Two rungs at one step halved twice there, and a rung could end below `min_steps`."""
    recipe = scheduler(min_steps, eta=2)
    for bracket in brackets(recipe, num_steps=100, num_trials=200):
        rungs = in_whole_updates(bracket, recipe, steps)
        stops = [rung.steps for rung in rungs]
        assert stops == sorted(set(stops)) and stops[-1] == 100
        assert all(stop % steps == 0 and stop >= min_steps for stop in stops)
        assert rungs[0].members == bracket[0].members
        pairs = pairwise(rung.members for rung in rungs)
        assert all(after == max(1, before // 2) for before, after in pairs)
        if steps == 1:
            assert rungs == bracket
