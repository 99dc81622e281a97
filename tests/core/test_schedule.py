"""Intervals of a run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.core.schedule import WITHOUT_END, Interval, Schedule, stage_length, total_steps


def test_stages_repeat():
    schedule = Schedule(warmup_step=2, update_step=3, update_times=2, total_steps=16)
    assert list(schedule.intervals()) == [
        Interval(0, 0, 2, 0, 0),
        Interval(1, 2, 3, 0, 1),
        Interval(2, 5, 3, 0, 2),
        Interval(3, 8, 2, 1, 0),
        Interval(4, 10, 3, 1, 1),
        Interval(5, 13, 3, 1, 2),
    ]


def test_training_may_end_inside_an_interval():
    assert list(Schedule(2, 3, 2, total_steps=4).intervals()) == [Interval(0, 0, 2, 0, 0), Interval(1, 2, 2, 0, 1)]


def test_without_end_there_is_one_stage():
    intervals = list(Schedule(1, 2, WITHOUT_END, total_steps=6).intervals())
    assert [(i.start, i.steps, i.stage, i.update) for i in intervals] == [(0, 1, 0, 0), (1, 2, 0, 1), (3, 2, 0, 2), (5, 1, 0, 3)]


def test_without_warm_up_the_first_step_is_a_boundary():
    assert [i.update for i in Schedule(0, 2, 2, total_steps=8).intervals()] == [1, 2, 1, 2]


@pytest.mark.parametrize(("epochs", "fixed", "expected"), [(1, 0, 8), (2, 0, 16), (1.5, 0, 12), (3, 5, 5)])
def test_total_steps(epochs, fixed, expected):
    assert total_steps(epochs, stage_length(2, 3, 2, steps_per_pass=100), fixed) == expected


def test_epochs_count_passes_over_the_data_when_stages_have_no_end():
    assert total_steps(2, stage_length(2, 3, WITHOUT_END, steps_per_pass=7)) == 14


@given(warmup=st.integers(0, 5), update=st.integers(1, 5), times=st.one_of(st.just(WITHOUT_END), st.integers(1, 4)), total=st.integers(1, 60))
def test_intervals_cover_all_steps_once_and_are_found_from_any_of_them(warmup, update, times, total):
    schedule = Schedule(warmup, update, times, total)
    intervals = list(schedule.intervals())
    assert [step for i in intervals for step in range(i.start, i.start + i.steps)] == list(range(total))
    assert [i.number for i in intervals] == list(range(len(intervals)))
    for interval in intervals:
        for step in range(interval.start, interval.start + interval.steps):
            assert schedule.interval_at(step) == interval
    stage = schedule.stage_steps
    assert max(i.stage for i in intervals) == (0 if stage is None else math.ceil(total / stage) - 1)


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4) | st.just(WITHOUT_END), st.integers(1, 60))
def test_what_is_counted_is_what_there_is(warmup_step, update_step, update_times, total):
    """The closed forms against the intervals one by one."""
    schedule = Schedule(warmup_step, update_step, update_times, total)
    intervals = list(schedule.intervals())
    decisions = [interval for interval in intervals if not interval.is_warmup]
    assert schedule.decisions == len(decisions)
    assert [schedule.decision_step(k) for k in range(len(decisions))] == [interval.start for interval in decisions]
    assert schedule.warmup_total == sum(interval.steps for interval in intervals if interval.is_warmup)
    assert schedule.longest == max(interval.steps for interval in intervals)
    assert schedule.stages == intervals[-1].stage + 1


def test_counting_takes_no_time():
    schedule = Schedule(10, 1, 3, 10**12)
    assert schedule.decisions == 3 * (10**12 // 13) and schedule.decision_step(10**11) < 10**12
