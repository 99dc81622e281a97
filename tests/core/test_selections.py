"""The record of what was selected: counts kept in memory are those of the files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.core.row_numbers import RowNumbers
from dataflex.core.selections import SHOWN, SelectionLog

SIZE = 45


def rows_of(step):
    return np.random.default_rng(step).integers(0, SIZE, 12)


def brute(steps):
    return np.bincount(np.concatenate([rows_of(step) for step in steps]), minlength=SIZE) if steps else np.zeros(SIZE, dtype=int)


@given(st.lists(st.one_of(st.just("count"), st.just("restart"), st.integers(0, 6)), max_size=12))
def test_counts_follow_writing_going_back_and_restarts(tmp_path_factory, actions):
    """A number goes back to that many decisions; then, as after anything else, one more is made."""
    folder = tmp_path_factory.mktemp("run")
    log, steps = SelectionLog(folder, active=True), []
    for action in actions:
        if action == "count":
            assert log.counts(SIZE).tolist() == brute(steps).tolist()
        elif action == "restart":
            log = SelectionLog(folder, active=True)
        elif action < len(steps):
            log.rewind(steps[action])
            steps = steps[:action]
        steps.append(steps[-1] + 3 if steps else 0)
        log.write(steps[-1], rows_of(steps[-1]))
    assert log.steps() == steps and log.counts(SIZE).tolist() == brute(steps).tolist()


def test_most_and_least_ties_by_row(tmp_path):
    log = SelectionLog(tmp_path, active=True)
    for step in range(3):
        log.write(step, rows_of(step))
        log.summarise(RowNumbers(None, SIZE), np.arange(SIZE) % 2, ["even", "odd"], lambda row: f"row {row}")
    times = brute([0, 1, 2])
    summary = json.loads((tmp_path / "dataflex/selections/summary.json").read_text())
    for key, order in (("most", np.argsort(-times, kind="stable")), ("least", np.argsort(times, kind="stable"))):
        shown = order[:SHOWN].tolist()
        expected = [{"row": row, "source": str(row), "times": times[row], "domain": ["even", "odd"][row % 2], "text": f"row {row}"} for row in shown]
        assert summary[key] == expected
    assert len(summary["most"]) == SHOWN < SIZE and (summary["rows"], summary["domains"]) == (SIZE, ["even", "odd"])


@pytest.mark.parametrize("size", [0, 1, SHOWN])
def test_fewer_rows_than_are_shown(tmp_path, size):
    log = SelectionLog(tmp_path, active=True)
    log.write(0, np.arange(size))
    log.summarise(RowNumbers(None, size), None, [], str)
    summary = json.loads((tmp_path / "dataflex/selections/summary.json").read_text())
    assert [row["row"] for row in summary["most"]] == [row["row"] for row in summary["least"]] == list(range(size))


def test_other_ranks_write_nothing(tmp_path):
    log = SelectionLog(tmp_path, active=False)
    log.write(0, rows_of(0)), log.summarise(RowNumbers(None, SIZE), None, [], str), log.rewind(0)
    assert not list(tmp_path.iterdir())
