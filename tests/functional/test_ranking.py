"""Ranking and draws against sorting in plain Python, hand-computed windows and bands (ALGORITHMS B4-B6) and the frequencies of draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.functional.ranking import OUTSIDE, band_log_weights, delta_log_weights, delta_window, gumbel_scores, gumbel_top_n, round_robin, top_n

NAN, INF = math.nan, math.inf
# Few different values, so that most lists have ties.
scores = st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0, NAN, INF, -INF]) | st.floats(-5, 5), max_size=30).map(np.array)


@given(scores, st.integers(0, 35))
def test_top_n_is_a_stable_sort_of_the_finite_scores(values, n):
    expected = sorted((i for i in range(len(values)) if math.isfinite(values[i])), key=lambda i: (-values[i], i))[:n]
    assert top_n(values, n).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, bool])
def test_top_n_of_other_types(dtype):
    assert top_n(np.array([0, 1, 0, 1], dtype=dtype), 3).tolist() == [1, 3, 0]


def test_gumbel_draws_depend_on_the_whole_key_and_on_nothing_else():
    weights = np.zeros(50)
    first = gumbel_top_n(weights, 10, (1, "a", 0))
    np.random.seed(0)
    assert first.tolist() == gumbel_top_n(weights, 10, (1, "a", 0)).tolist()
    for other in [(2, "a", 0), (1, "b", 0), (1, "a", 1)]:
        assert first.tolist() != gumbel_top_n(weights, 10, other).tolist()


def test_gumbel_never_draws_weight_zero_or_nan():
    weights = np.array([0.0, -INF, NAN, -800.0])
    assert sorted(gumbel_top_n(weights, 4, (0,)).tolist()) == [0, 3]


def test_fewer_gumbel_draws_are_the_first_of_more():
    weights = np.linspace(-2, 2, 20)
    assert gumbel_top_n(weights, 20, (0,))[:5].tolist() == gumbel_top_n(weights, 5, (0,)).tolist()


def test_gumbel_frequencies_are_those_of_drawing_one_after_the_other():
    p = np.array([0.2, 0.3, 0.5])
    draws, repeats = 30_000, np.repeat(np.log(p)[None], 30_000, 0)
    order = np.argsort(-gumbel_scores(repeats, (3,)), axis=1)
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            expected = p[first] * p[second] / (1 - p[first])
            share = ((order[:, 0] == first) & (order[:, 1] == second)).mean()
            assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_round_robin_takes_ranks_in_turn():
    rankings = np.array([[4, 2, 7], [4, 1, 2], [3, -1, 0]])
    assert round_robin(rankings, 10).tolist() == [4, 3, 2, 1, 7, 0]
    taken = np.isin(np.arange(8), [3, 2])
    assert round_robin(rankings, 3, taken).tolist() == [4, 1, 7]


def test_the_second_of_two_equal_queries_contributes_its_next_neighbours():
    # Both rank rows by the angles 0, 10, 20, 30, 40 degrees: the pair yields its common ranking.
    assert round_robin(np.array([[0, 1, 2, 3, 4]] * 2), 4).tolist() == [0, 1, 2, 3]


@given(st.lists(st.lists(st.integers(-1, 12), max_size=8), max_size=5), st.integers(0, 14), st.sets(st.integers(0, 12)))
def test_round_robin_equals_a_loop_for_rankings_of_any_lengths(rankings, n, skipped):
    expected: list[int] = []
    for rank in range(8):
        for ranking in rankings:
            if rank < len(ranking) and ranking[rank] >= 0 and ranking[rank] not in skipped and ranking[rank] not in expected:
                expected.append(ranking[rank])
    taken = np.isin(np.arange(13), list(skipped))
    assert round_robin([np.array(ranking, dtype=np.int64) for ranking in rankings], n, taken).tolist() == expected[:n]


@pytest.mark.parametrize(("band", "inside"), [("low", [0, 1, 2]), ("medium", [3, 4, 5]), ("high", [6, 7, 8])])
def test_band_oracle(band, inside):
    losses = np.append(np.arange(1, 10) / 10, NAN)  # quantiles .364 and .628
    weights = np.exp(band_log_weights(losses, band))
    assert weights == pytest.approx([5.0 if i in inside else 1.0 for i in range(9)] + [0.0])
    assert weights[inside[0]] / weights.sum() == pytest.approx(5 / 21)


def test_band_temperature_and_focus_weight():
    losses = np.arange(9.0)
    assert band_log_weights(losses, "low", focus_weight=8.0, temperature=3.0)[0] == pytest.approx(math.log(2))
    assert np.ptp(band_log_weights(losses, "low", temperature=1e12)) == pytest.approx(0, abs=1e-9)
    assert band_log_weights(losses, "low", quantiles=(0.0, 0.5)).tolist() == [math.log(5), *[0.0] * 8]


def test_band_draw_frequencies():
    weights = band_log_weights(np.append(np.arange(1, 10) / 10, INF), "medium")
    first = np.argmax(gumbel_scores(np.repeat(weights[None], 20_000, 0), (5,)), axis=1)
    shares = np.bincount(first, minlength=10) / 20_000
    expected = np.array([1, 1, 1, 5, 5, 5, 1, 1, 1, 0]) / 21
    assert (np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000)).all()


def test_no_finite_loss_leaves_nothing_to_draw():
    assert band_log_weights(np.array([NAN, INF]), "high").tolist() == [-INF, -INF]
    assert band_log_weights(np.array([]), "high").tolist() == []


@pytest.mark.parametrize(("progress", "start"), [(0.0, 0), (0.25, 56), (0.5, 400), (0.75, 744), (1.0, 800)])
def test_delta_window_oracle(progress, start):
    # By hand: the sigmoid of 10 (x - 1/2) is .0067, .0759, .5, .9241, .9933; less .0067, over .9866: 0, .0701, .5, .9299, 1; times 800.
    deltas = np.arange(1000, 0, -1.0)
    assert delta_window(deltas, progress).tolist() == list(range(start, start + 200))


def test_delta_window_follows_the_order_of_the_deltas():
    assert delta_window(np.array([1.0, NAN, 5.0, 3.0, 5.0, INF]), 0.0, width=0.75).tolist() == [2, 4, 3]
    assert delta_window(np.zeros(10), 1.0).tolist() == [8, 9]


def test_delta_window_ends_before_negative_deltas():
    deltas = np.array([6.0, 5.0, 4.0, 3.0, 2.0, -1.0, -2.0, -3.0, -4.0, -5.0])
    assert delta_window(deltas, 0.5, width=0.4).tolist() == [3, 4]  # 3 to 7, cut off at 5
    assert delta_window(deltas, 1.0, width=0.4).tolist() == [1, 2, 3, 4]  # 6 to 10 has none: back to the last that have
    assert delta_window(-np.ones(10), 0.5).tolist() == []
    assert delta_window(np.array([NAN, NAN]), 0.5).tolist() == []


@given(scores, st.floats(0, 1), st.floats(0.05, 0.95), st.floats(0.1, 50))
def test_delta_window_is_never_empty_while_some_delta_is_not_negative(deltas, progress, width, steepness):
    window = delta_window(deltas, progress, width, steepness)
    eligible = [i for i in top_n(deltas, len(deltas)).tolist() if deltas[i] >= 0]
    assert bool(len(window)) == bool(eligible)
    if eligible:
        first = eligible.index(window[0])
        assert window.tolist() == eligible[first : first + len(window)]
        assert len(window) <= max(1, round(width * np.isfinite(deltas).sum()))


def test_delta_log_weights():
    weights = np.exp(delta_log_weights(np.array([1.0, 4.0, NAN, 3.0, 2.0]), 0.0, width=0.5))
    assert weights == pytest.approx([OUTSIDE, 1.0, 0.0, 1.0, OUTSIDE])
    assert OUTSIDE == 0.025
