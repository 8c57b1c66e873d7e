"""Scores of the leaderboard on numbers worked out by hand."""

import math

import numpy as np
import pytest

from benchmarks.leaderboard import scoring
from benchmarks.leaderboard.scoring import Rank

INF = math.inf


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([3.0, 1.0, 2.0], 2.0),
        ([1.0, 2.0, INF], 2.0),
        ([1.0, INF, INF], INF),
        ([4.0, 1.0, 2.0, INF], 3.0),
        # half of an even number is not enough
        ([1.0, 2.0, INF, INF], INF),
        ([1.0, INF], INF),
        ([INF, INF], INF),
        ([], INF),
    ],
)
def test_median_over_seeds_with_missed_targets(times, expected):
    assert scoring.median(times) == expected


def test_median_takes_the_axis_of_the_seeds():
    times = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, INF]])
    np.testing.assert_array_equal(scoring.median(times, axis=0), [2.0, 20.0])


@pytest.mark.parametrize("times", [[1.0, math.nan], [-1.0]])
def test_median_refuses_what_is_no_time(times):
    with pytest.raises(ValueError, match="0 or more"):
        scoring.median(times)


def test_time_to_target_counts_compilation_and_preparation():
    assert scoring.total_seconds(1.0, 0.5, 0.25) == 1.75
    assert scoring.total_seconds(None, 0.5, 0.25) == INF


def test_ratios_are_to_the_best_of_each_workload():
    times = [[1.0, 4.0, INF, 0.0], [2.0, 2.0, INF, 1.0], [INF, 8.0, INF, 0.0]]
    expected = [[1.0, 2.0, INF, 1.0], [2.0, 1.0, INF, INF], [INF, 4.0, INF, 1.0]]
    np.testing.assert_array_equal(scoring.ratios(times), expected)


def test_profile_is_the_share_of_workloads_within_tau():
    shares = scoring.profile([1.0, 2.0, INF], [1.0, 1.99, 2.0, 4.0])
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ([1.0, 1.0], 1.0),
        ([1.0, 2.0, INF], (1 + 2 / 3 + 0) / 3),
        ([4.0], 0.0),
        ([5.0, 2.5], 0.25),
        ([INF, INF], 0.0),
    ],
)
def test_score_by_hand(ratio, expected):
    assert scoring.score(ratio) == pytest.approx(expected, abs=1e-15)


def test_score_is_the_area_under_the_profile():
    ratio = np.append(1 + np.random.default_rng(0).exponential(1.5, 12), [1.0, INF])
    tau = np.linspace(1, scoring.R_MAX, 300_001)
    heights = scoring.profile(ratio, tau)
    area = np.mean((heights[1:] + heights[:-1]) / 2)
    assert scoring.score(ratio) == pytest.approx(area, abs=1e-5)


def test_score_at_another_limit():
    assert scoring.score([1.5], r_max=2.0) == pytest.approx(0.5)


def test_score_does_not_depend_on_the_unit_of_a_workload():
    times = np.random.default_rng(1).uniform(1, 5, (4, 3))
    scaled = times * [1.0, 1000.0, 1e-3]
    np.testing.assert_allclose(
        scoring.score(scoring.ratios(times)), scoring.score(scoring.ratios(scaled))
    )


@pytest.mark.parametrize("r_max", [1.0, 0.5, math.nan])
def test_score_refuses_a_limit_that_leaves_no_area(r_max):
    with pytest.raises(ValueError, match="r_max"):
        scoring.score([1.0], r_max=r_max)


def test_score_refuses_no_workloads():
    with pytest.raises(ValueError, match="at least one workload"):
        scoring.score(np.ones((2, 0)))


def test_bootstrap_of_one_seed_is_the_score():
    resampled = scoring.bootstrap([[[1.0], [4.0]], [[2.0], [2.0]]], replicates=5)
    np.testing.assert_allclose(resampled, np.tile([(1 + 2 / 3) / 2, (2 / 3 + 1) / 2], (5, 1)))


def test_bootstrap_has_the_law_of_resampled_medians():
    # medians of resamples of (1, 3): 1, 2, 3 with probabilities 1/4, 1/2, 1/4; against always 2
    resampled = scoring.bootstrap([[[1.0, 3.0]], [[2.0, 2.0]]], replicates=8000)
    first, second = resampled.T
    assert np.mean(second < 1) == pytest.approx(0.25, abs=0.03)
    assert np.mean(first < 1) == pytest.approx(0.25, abs=0.03)
    assert set(np.round(first, 6)) == {1.0, round(2.5 / 3, 6)}


def test_bootstrap_with_different_numbers_of_seeds_and_none():
    resampled = scoring.bootstrap([[[1.0, 2.0, 3.0]], [[1.0]], [[]], [[INF, INF]]], replicates=50)
    assert resampled.shape == (50, 4)
    assert np.all(resampled[:, 1] == 1)
    assert np.all(resampled[:, 2:] == 0)


def test_bootstrap_draws_the_same_seeds_for_all_contestants():
    times = [1.0, 5.0, 20.0]
    resampled = scoring.bootstrap([[times], [times]], replicates=200)
    np.testing.assert_array_equal(resampled, 1.0)


def test_bootstrap_repeats_with_its_seed_and_differs_without():
    times = [[[1.0, 2.0, 4.0]], [[1.5, 2.5, 2.0]]]
    first = scoring.bootstrap(times, seed=3, noise=0.05)
    np.testing.assert_array_equal(first, scoring.bootstrap(times, seed=3, noise=0.05))
    assert np.any(first != scoring.bootstrap(times, seed=4, noise=0.05))


def test_noise_of_the_clock_is_independent_between_contestants():
    resampled = scoring.bootstrap([[[1.0]], [[1.0]]], replicates=4000, noise=0.05)
    # ln of the ratio is normal with deviation 0.05 sqrt(2); a score falls by a third of ratio - 1
    loss = 1 - resampled.min(axis=1)
    expected = 0.05 * math.sqrt(2) * math.sqrt(2 / math.pi) / 3
    assert np.mean(loss) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("name", "value"), [("replicates", 0), ("noise", -0.1)])
def test_bootstrap_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        scoring.bootstrap([[[1.0]]], **{name: value})


def test_bootstrap_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        scoring.bootstrap([[[math.nan]]])


def test_interval_is_central():
    low, high = scoring.interval(np.arange(101.0), level=0.9)
    assert (low, high) == pytest.approx((5.0, 95.0))


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_interval_refuses_a_level_that_is_no_share(level):
    with pytest.raises(ValueError, match="level"):
        scoring.interval([1.0], level=level)


def test_ties_are_with_the_leader_of_the_group_not_with_the_neighbour():
    spread = np.linspace(-0.06, 0.06, 1001)
    zeros = np.zeros_like(spread)
    # second and third overlap, the third does not reach the first
    resampled = np.stack([0.80 + spread, 0.90 + zeros, 0.85 + spread, 0.10 + zeros], axis=1)
    ranks = scoring.rank([0.80, 0.90, 0.85, 0.10], resampled)
    assert ranks == [Rank(3, False), Rank(1, True), Rank(1, True), Rank(4, False)]
    assert [str(rank) for rank in ranks] == ["3", "1=", "1=", "4"]


def test_equal_scores_tie_and_the_next_place_is_left_free():
    resampled = np.tile([0.5, 0.0, 0.0, 0.0], (10, 1))
    ranks = scoring.rank([0.5, 0.0, 0.0, 0.0], resampled)
    assert [str(rank) for rank in ranks] == ["1", "2=", "2=", "2="]


def test_a_difference_within_the_noise_of_a_clock_is_a_tie():
    times = [[[1.0]], [[1.03]], [[1.5]]]
    scores = scoring.score(scoring.ratios(scoring.median(times)))
    quiet = scoring.rank(scores, scoring.bootstrap(times))
    noisy = scoring.rank(scores, scoring.bootstrap(times, noise=0.05))
    assert [str(rank) for rank in quiet] == ["1", "2", "3"]
    assert [str(rank) for rank in noisy] == ["1=", "1=", "3"]


def test_rank_refuses_resamples_of_other_contestants():
    with pytest.raises(ValueError, match="one column a contestant"):
        scoring.rank([0.5, 0.4], np.zeros((10, 3)))


def test_speed_up_is_the_geometric_mean_where_both_reach():
    assert scoring.speed_up([1.0, 2.0, INF], [4.0, 2.0, 1.0]) == (pytest.approx(2.0), 2)
    assert scoring.speed_up([INF], [1.0]) == (None, 0)


def test_two_rankings_contradict_each_other_only_where_both_are_sure():
    first = {"a": 1, "b": 2, "c": 3}
    assert scoring.contradictions(first, {"a": 1, "b": 1, "c": 3, "new": 4}) == []
    assert scoring.contradictions(first, {"a": 2, "b": 1, "c": 3}) == [("a", "b")]


def test_two_noisy_runs_of_the_same_contestants_do_not_contradict_each_other():
    world = np.random.default_rng(0)
    speeds = np.exp(world.uniform(0, 2, (20, 1)) + 0.3 * world.standard_normal((20, 5)))
    seeds = np.exp(0.1 * world.standard_normal((20, 5, 3)))
    runs = []
    for run in range(6):
        clock = np.random.default_rng(run)
        shared, own = (clock.standard_normal((20, 5, count)) for count in (1, 3))
        times = speeds[..., None] * seeds * np.exp(0.05 * shared + 0.02 * own)
        scores = scoring.score(scoring.ratios(scoring.median(times)))
        ranks = scoring.rank(scores, scoring.bootstrap(times.tolist(), noise=0.05))
        runs.append({str(name): rank.place for name, rank in enumerate(ranks)})
    # and yet they tell contestants apart
    assert all(len(set(run.values())) > 4 for run in runs)
    assert [scoring.contradictions(a, b) for a in runs for b in runs] == [[]] * 36
