"""Damaged records of a run are left out with a line and never stop it."""

import json
import logging

import numpy as np
import pytest

from dataflex.core.events import EventLog
from dataflex.core.selections import SelectionLog

NESTED = '{"step": 2, "event": "selection", "domains": {"a": 1}, "seconds": 1}'


@pytest.mark.parametrize(
    "damaged",
    [b"\xff\xfe", b"[]", b"null", b"7", b'{"step": 1}', b'{"step": "1", "event": "x"}', b'{"event": "x"}', NESTED[:58].encode(), b"[" * 100_000],
    ids=range(9),
)
def test_damaged_events_are_left_out_with_a_line(tmp_path, caplog, damaged):
    log = EventLog(tmp_path, active=True)
    log.write(0, "selection", domains={"a": 1})
    with open(log.path, "ab") as file:
        file.write(damaged + b"\n" + NESTED.encode() + b"\n")
    log.write(4, "selection")
    with caplog.at_level(logging.WARNING, "dataflex"):
        log.rewind(4)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 2]
    assert "events.jsonl: damaged lines are left out: 2" in caplog.text


def test_an_event_cut_after_an_inner_brace_is_not_complete(tmp_path):
    log = EventLog(tmp_path, active=True)
    log.write(0, "selection")
    with open(log.path, "a") as file:
        file.write(NESTED[: NESTED.index("}") + 1])  # ends with }
    log.rewind(3)
    log.write(3, "selection")
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 3]


@pytest.mark.parametrize("content", [b"", b"garbage", None, "strings", "outside", "table"])
def test_damaged_selections_do_not_stop_a_run(tmp_path, caplog, content):
    log = SelectionLog(tmp_path, active=True)
    log.write(0, np.array([1, 1, 2]))
    log.write(2, np.array([3]))
    path = log.folder / "step_2.npy"
    arrays = {"strings": np.array(["a"]), "outside": np.array([4, -1]), "table": np.ones((2, 2), dtype=np.int64)}
    if content is None:
        path.write_bytes(path.read_bytes()[:-4])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, arrays[content])
    (log.folder / "step_x.npy").touch()
    again = SelectionLog(tmp_path, active=True)
    with caplog.at_level(logging.WARNING, "dataflex"):
        assert again.counts(4).tolist() == [0, 2, 1, 0]
    assert "step_2.npy is damaged" in caplog.text
    again.rewind(2)
    assert again.steps() == [0]
