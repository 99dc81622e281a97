"""Files are written whole, under names nobody else uses, and what was changed afterwards is noticed."""

import os

import numpy as np
import pytest

from dataflex.utils import files
from dataflex.utils.files import DamagedFile, read_sealed_array, read_sealed_json, write_bytes_atomically, write_sealed_array, write_sealed_json


def test_two_writers_use_two_names_and_leave_none(tmp_path, monkeypatch):
    names, replace = [], os.replace

    def watched(source, target):
        names.append(source.name)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", watched)
    for _ in range(2):
        write_bytes_atomically(tmp_path / "x.json", b"{}")
    assert len(set(names)) == 2 and [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_bytes_atomically(tmp_path / "x", b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes_atomically(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


@pytest.mark.parametrize("value", [{"a": 1}, {"a": {"b": [1.5, None, "\ud800 é"]}, "zeros": "0" * 64}, {"a": float("inf")}])
def test_every_byte_of_a_sealed_file_counts(tmp_path, value):
    path = tmp_path / "x.json"
    write_sealed_json(path, value)
    found = read_sealed_json(path)
    assert len(found.pop("seal")) == 64 and found == value
    whole = path.read_bytes()
    for place in range(12, len(whole)):  # before that it has no seal, which those who read it ask for
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedFile):
            read_sealed_json(path)
    for change in (whole + b"\n", whole[:-1], b""):
        path.write_bytes(change)
        with pytest.raises(DamagedFile):
            read_sealed_json(path)


def test_sealed_arrays(tmp_path):
    path = tmp_path / "x.npy"
    write_sealed_array(path, np.arange(5))
    assert read_sealed_array(path).tolist() == np.load(path).tolist() == [0, 1, 2, 3, 4]
    for change in (path.read_bytes()[:-1], path.read_bytes() + b"x", b"short"):
        path.write_bytes(change)
        with pytest.raises(DamagedFile):
            read_sealed_array(path)
