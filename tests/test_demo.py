"""The demo in a few steps: what it prints and writes, what it refuses, and its data."""

import shlex
import subprocess
import sys

import pytest
from PIL import Image

from dataflex.cli.plan import check_run
from dataflex.demo import __main__ as demo
from dataflex.demo.data import LETTERS, ROW_SHARES, Size, make_folder, make_rows
from dataflex.demo.report import what_to_look_at
from dataflex.demo.runs import METHODS, Outcome, Summary

SMALL = ["--steps", "4", "--rows", "40", "--held-out", "8", "--seeds", "1"]


@pytest.mark.slow
def test_demo_trains_prints_a_table_and_draws(tmp_path, capsys):
    folder = tmp_path / "demo folder"
    assert demo.main(["--output", str(folder), *SMALL]) == 0
    printed = capsys.readouterr().out
    for text in ("exact", "wrong rows", "seconds", "Look at the eval loss", *METHODS):
        assert text in printed
    with Image.open(folder / "demo.png") as image:
        image.verify()
        assert image.width > image.height > 300
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("dataflex-cli train")]
    assert len(commands) == len(METHODS)
    for words in commands:
        check_run(words[2], words[3:])  # the printed line is one that dataflex-cli accepts


@pytest.mark.slow
def test_module_runs_and_replaces_its_own_folder(tmp_path):
    make_folder(tmp_path / "demo_output", Size(rows=40, held_out=8))
    (tmp_path / "demo_output" / "mine.txt").write_text("kept")
    done = subprocess.run([sys.executable, "-m", "dataflex.demo", *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    assert (tmp_path / "demo_output" / "mine.txt").read_text() == "kept"


def test_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("precious")
    assert demo.main(["--output", str(tmp_path), *SMALL]) == 2
    assert "not the demo's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine.jsonl"]


def test_file_in_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert demo.main(["--output", str(tmp_path / "file"), *SMALL]) == 2
    assert "is a file" in capsys.readouterr().err


def test_interruption_is_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_method", interrupt)
    assert demo.main(["--output", str(tmp_path / "out"), *SMALL]) == 130
    assert "Stopped" in capsys.readouterr().out


@pytest.mark.parametrize("number", [40, 1500])
def test_rows_are_deterministic_and_of_the_stated_shares(number):
    rows = make_rows(number, 30)
    assert rows == make_rows(number, 30)
    assert rows != make_rows(number, 30, seed=1)
    assert {name: len(rows[name]) for name in ROW_SHARES} == {name: share * number for name, share in ROW_SHARES.items()}
    assert len(rows["held_out"]) == 30


def test_exactly_the_corrupted_rows_are_wrong():
    rows = make_rows(200, 30)
    wrong = {name: sum(not _is_right(row) for row in part) for name, part in rows.items()}
    assert wrong == {"easy": 0, "clean": 0, "corrupted": len(rows["corrupted"]), "held_out": 0}
    trained = {row["instruction"] for name in ROW_SHARES for row in rows[name]}
    assert not trained & {row["instruction"] for row in rows["held_out"]}


def _is_right(row):
    task, letters = row["instruction"].split()[0], row["instruction"].split()[-1]
    counted = (LETTERS * 2)[LETTERS.index(letters[0]) :][: len(row["output"])]
    return row["output"] == (counted if task == "Count" else "".join(sorted(letters)))


@pytest.mark.parametrize(
    ("static", "dft", "expected"),
    [
        ([0.30, 0.32], [0.10, 0.10], "dft, is 0.210 below static, more than the 0.020"),
        ([0.30, 0.50], [0.35, 0.35], "dft, is 0.050 below static, no more than the 0.200"),
        ([0.30, 0.30], [0.40, 0.42], "dft, is 0.110 above static, more than the 0.020 between their seeds, with"),
        ([0.30], [0.10], "with one seed"),
    ],
)
def test_sentence_says_what_the_numbers_say(static, dft, expected):
    def summary(method, losses):
        return Summary(method, [Outcome(method, seed, loss, 0.5, 1.0, []) for seed, loss in enumerate(losses)])

    assert expected in what_to_look_at([summary("static", static), summary("dft", dft)])
