"""A cached result is used only as it was written."""

import logging

import numpy as np
import pytest

from dataflex.signals.store import PartStore
from dataflex.utils.files import write_sealed_array

VALUES = np.arange(6, dtype=np.float64).reshape(3, 2)


def store(folder, shape=(3, 2), dtype=np.float64):
    return PartStore(folder, "losses", "key", 0, 1, shape, dtype)


def test_results_and_parts_come_back(tmp_path):
    made = store(tmp_path)
    made.add(np.array([2, 0]), VALUES[[2, 0]])
    made.flush()
    ((positions, values),) = store(tmp_path).parts()
    assert positions.tolist() == [2, 0] and np.array_equal(values, VALUES[[2, 0]])
    made.finish(VALUES)
    assert np.array_equal(store(tmp_path).whole(), VALUES)
    assert np.array_equal(np.load(tmp_path / "losses-key" / "values.npy"), VALUES)  # readable for everybody


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "plain", "folder"])
def test_damaged_files_are_dropped_with_a_line(tmp_path, caplog, damage):
    made = store(tmp_path)
    made.add(np.array([1]), VALUES[[1]])
    made.flush()
    (part,) = (tmp_path / "losses-key").glob("part-*")
    whole = tmp_path / "losses-key" / "values.npy"
    write_sealed_array(whole, VALUES)
    for path in (part, whole):
        data = path.read_bytes()
        new = {"cut": data[:-9], "empty": b"", "flipped": data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]}
        if damage == "plain":
            np.save(path, np.load(path))  # an array that nobody sealed
        elif damage == "folder":
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(new[damage])
    with caplog.at_level(logging.WARNING, "dataflex"):
        assert store(tmp_path).whole() is None and store(tmp_path).parts() == []
    assert caplog.text.count("it is computed anew") == 2


@pytest.mark.parametrize(("shape", "dtype"), [((4, 2), np.float64), ((3, 3), np.float64), ((3, 2), np.float32)])
def test_a_whole_file_of_another_shape_is_not_used(tmp_path, shape, dtype):
    write_sealed_array(tmp_path / "losses-key" / "values.npy", VALUES)
    assert store(tmp_path, shape, dtype).whole() is None


def test_parts_of_rows_that_are_not_there_are_not_used(tmp_path):
    write_sealed_array(tmp_path / "losses-key" / "part-0-1.npy", np.array([[5.0, 1.0, 2.0]]))
    write_sealed_array(tmp_path / "losses-key" / "part-0-2.npy", np.array([[1.0, 2.0]]))
    assert store(tmp_path).parts() == []
