"""The learning rates that studies try, from the theory of the sequence that they are drawn by."""

import math

import numpy as np
import pytest

from benchmarks.leaderboard import plan, studies
from benchmarks.leaderboard.contestant import find_contestant

SPACE = (0.001, 1.0)
GOLDEN = (1 + math.sqrt(5)) / 2


def places(study: int) -> list[float]:
    """Where the rates of a study are between the ends, in the logarithm."""
    return [math.log10(rate / SPACE[0]) / 3 for rate in studies.rates(SPACE, study)]


@pytest.mark.parametrize("study", range(studies.STUDIES))
def test_a_study_tries_five_rates_that_cover_the_logarithm(study: int) -> None:
    """Five points of the golden sequence cut a circle into arcs of GOLDEN^-3 and GOLDEN^-4."""
    found = places(study)
    assert found == sorted(found)
    assert 0 <= found[0] < found[-1] <= 1
    arcs = np.diff([*found, found[0] + 1])
    # of three digits: at most 0.5 % of a rate, 0.0007 of three decades
    expected = [GOLDEN**-4] * 2 + [GOLDEN**-3] * 3
    np.testing.assert_allclose(sorted(arcs), expected, atol=2e-3)


def test_studies_begin_where_their_seeds_say_and_share_no_rate() -> None:
    for study, found in enumerate(map(places, range(studies.STUDIES))):
        start = np.random.default_rng(1000 + study).random()
        for step in range(5):
            wanted = (start + step / GOLDEN) % 1
            assert min(abs(place - wanted) for place in found) < 1e-3
    every = [rate for study in range(3) for rate in studies.rates(SPACE, study)]
    assert len(set(every)) == 15


def test_rates_have_three_digits_and_stay_in_the_space() -> None:
    for space in ((0.012345, 0.023456), (0.99951, 0.99959), (3e-7, 1e6)):
        for study in range(3):
            for rate in studies.rates(space, study):
                assert space[0] <= rate <= space[1]
                assert rate in {*space, float(f"{rate:.3g}")}


def test_one_space_has_the_same_rates_on_all_workloads_and_for_all_contestants() -> None:
    tried = [
        [config["learning_rate"] for config in plan.study_configs(where, entry, 2, None)]
        for where, entry in (
            ("digits-mse", find_contestant("adam")),
            ("matrix-completion", find_contestant("adam")),
            ("digits-classes", find_contestant("adamw")),
        )
    ]
    assert tried[0] == tried[1] == tried[2] == list(studies.rates((0.001, 0.3), 2))


def test_no_evaluation_can_take_a_seed_of_tuning() -> None:
    plan.check_seeds(1000)
    assert not any(map(studies.is_tuning, range(1000)))
    assert all(studies.is_tuning(studies.tuning_seed(study)) for study in range(studies.STUDIES))
    with pytest.raises(ValueError, match="at most 1000"):
        plan.check_seeds(1001)
