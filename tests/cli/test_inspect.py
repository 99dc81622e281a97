"""`dataflex-cli inspect`: what it prints and draws of a run's records, and what it says of records that are not as they should be."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

import dataflex.cli.inspect as module
from dataflex.cli.inspect import decision_grids, inspect, printable, read_history, shares_by_domain
from dataflex.cli.selection_report import NO_MATPLOTLIB
from dataflex.errors import ConfigError

NASTY = [
    "[bold]no markup[/bold] [/] <script>alert(1)</script> & \"quotes\" 'too'",
    "two\nlines,\r\n\tthree \x1b[31mred \x00 \x9b \u202eevil \u2066 \ud800",
    "مرحبا بالعالم",
    "数据选择" * 200,
]
SIZE = 50


def selection(step: int, rows: list[int], /, **changes: Any) -> dict[str, Any]:
    event = {"step": step, "event": "selection", "kind": "selection", "component": "less", "update": 1, "stage": 0, "samples": len(rows)}
    event |= {"distinct": len(set(rows)), "pool": SIZE, "overlap": 0.125, "seconds": 12.34, "scores": {"min": 0, "p50": 1, "max": 2}}
    return {key: value for key, value in (event | changes).items() if value is not ...}


def mixture(step: int, **proportions: float) -> dict[str, Any]:
    event = {"step": step, "event": "mixture", "component": "odm", "update": 3}
    return {**event, "proportions": proportions, "samples": 2560, "seconds": 0.01}


def write_run(folder: Path, events: list[dict[str, Any]], rows: dict[int, list[int]] | None = None, summary: Any = None) -> Path:
    """An output_dir with these events, the rows chosen at each step, and the summary, if any."""
    (folder / "dataflex" / "selections").mkdir(parents=True)
    (folder / "dataflex" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for step, chosen in (rows or {}).items():
        np.save(folder / "dataflex" / "selections" / f"step_{step}.npy", np.array(chosen, dtype=np.int64))
    if summary is not None:
        (folder / "dataflex" / "selections" / "summary.json").write_text(json.dumps(summary))
    return folder


def summary_of(texts: list[str], domain: str | None = "math") -> dict[str, Any]:
    most = [{"row": 10 + number, "times": 9 - number, "domain": domain, "text": text} for number, text in enumerate(texts)]
    least = [{"row": 30 + number, "times": 0, "domain": domain, "text": text} for number, text in enumerate(texts)]
    return {"rows": SIZE, "domains": [domain] if domain else [], "most": most, "least": least}


ROWS = {0: [1, 2, 3, 4], 30: [4, 5, 5, 6]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Warm-up and one selection with domains, among events of other kinds."""
    first = selection(0, ROWS[0], kind="warm-up", overlap=None, domains={"math": 1, "code": 3})
    second = selection(30, ROWS[30], domains={"math": 2, "chat": 2})
    events = [{"step": 0, "event": "loaded", "samples": "many"}, first, second, {"step": 31, "event": "done"}]
    return write_run(tmp_path / "out", events, ROWS, summary_of(NASTY))


def lines_of(text: str) -> list[list[str]]:
    """The printed lines, cut into words."""
    return [line.split() for line in text.splitlines() if line.strip()]


class Page(HTMLParser):
    """Tags, table cells and pictures of a page; every tag that needs one must have its end."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.pictures: list[bytes] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            kind, content = (dict(attrs)["src"] or "").split(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(base64.b64decode(content, validate=True))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check_picture(content: bytes) -> tuple[int, int]:
    """The picture's size, if it is a PNG that shows something."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(image.width * image.height) or []) > 10
        return image.width, image.height


def test_table_of_selections(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(run)
    printed = lines_of(capsys.readouterr().out)
    assert ["step", "kind", "samples", "distinct", "previous", "math", "code", "chat", "seconds"] in printed
    assert ["0", "warm-up", "4", "4", "-", "25.0%", "75.0%", "0.0%", "12.3"] in printed
    assert ["30", "selection", "4", "3", "12.5%", "50.0%", "0.0%", "50.0%", "12.3"] in printed
    assert ["Selections", "(less)"] in printed


def test_coverage_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(run)
    expected = "Coverage so far: 6 of 50 rows chosen at least once (12.0%); 8 rows drawn, which is 0.16 effective passes over the data set."
    assert expected in capsys.readouterr().out.splitlines()


def test_coverage_agrees_with_sets(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = {step: draw.choices(range(SIZE), k=draw.randrange(1, 30)) for step in range(0, 60, 10)}
    history = read_history(write_run(tmp_path / "out", [selection(step, chosen) for step, chosen in rows.items()], rows, summary_of([])))
    seen: set[int] = set()
    assert history.seen == [len(seen := seen | set(chosen)) for chosen in rows.values()]
    assert history.size == SIZE


def test_rows_are_listed_with_their_text_made_harmless(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(run, rows=4)
    printed = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", printed)
    assert [line.split()[:3] for line in printed.splitlines() if " math  " in line and "%" not in line][-8:] == [
        *([str(9 - number), str(10 + number), "math"] for number in range(4)),
        *(["0", str(30 + number), "math"] for number in range(4)),
    ]
    assert printed.count(NASTY[0]) == 2
    assert printed.count(r"two lines, three \x1b[31mred \x00 \x9b \u202eevil \u2066 \ud800") == 2
    assert printed.count(NASTY[2]) == 2
    shortened = [line for line in printed.splitlines() if "数据" in line]
    assert len(shortened) == 2 and all(line.rstrip().endswith("...") and cell_len(line) <= 200 for line in shortened)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_number_of_rows(run: Path, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(run, rows=rows)
    printed = capsys.readouterr().out
    assert [printed.count(text) for text in ("no markup", "two lines", "مرحبا")] == [2 * (rows > number) for number in range(3)]
    assert ("Rows chosen most often" in printed) == (rows > 0)
    page = page_of(run / "dataflex/selections/report.html")
    assert sum("no markup" in cell for row in page.rows for cell in row) == 2 * (rows > 0)


def test_data_without_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [selection(step, rows, domains=...) for step, rows in ROWS.items()]
    inspect(write_run(tmp_path / "out", events, ROWS, summary_of(["text"], domain=None)))
    printed = lines_of(capsys.readouterr().out)
    assert ["step", "kind", "samples", "distinct", "previous", "seconds"] in printed
    assert ["times", "row", "text"] in printed and ["9", "10", "text"] in printed
    check_picture((tmp_path / "out/dataflex/selections/report.png").read_bytes())


def test_mixtures_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "out", [mixture(0, wiki=0.25, web=0.75), mixture(100, wiki=0.4, web=0.6)])
    (run / "dataflex/selections").rmdir()
    inspect(run)
    printed = capsys.readouterr().out
    assert "Mixtures (odm)" in printed and "Coverage" not in printed and "Rows chosen" not in printed
    assert ["step", "samples", "wiki", "web", "seconds"] in lines_of(printed)
    assert ["100", "2,560", "40.0%", "60.0%", "0.01"] in lines_of(printed)
    page = page_of(run / "dataflex/selections/report.html")
    assert ["100", "2,560", "40.0%", "60.0%", "0.01"] in page.rows
    check_picture(page.pictures[0])


def test_page_has_everything_escaped(run: Path) -> None:
    inspect(run, rows=4)
    path = run / "dataflex/selections/report.html"
    page = page_of(path)
    assert set(page.tags) <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "img", "div"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert ["30", "selection", "4", "3", "12.5%", "50.0%", "0.0%", "50.0%", "12.3"] in page.rows
    texts = [NASTY[0], "two\nlines,\n\tthree \\x1b[31mred \\x00 \\x9b \\u202eevil \\u2066 \\ud800", *NASTY[2:]]
    assert [row[-1] for row in page.rows if row[1].startswith(("1", "3")) and row[2] == "math"] == texts * 2
    assert "://" not in path.read_text(encoding="utf-8").replace("https://matplotlib.org", "")  # nothing from elsewhere
    assert check_picture(page.pictures[0]) == check_picture((run / "dataflex/selections/report.png").read_bytes())


def test_names_of_domains_and_folders_are_escaped_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    names = ["_hidden", "$x^$ _{", "<img src=x>", "[red]", "代码", "x\x1b[1m", "long " * 40]
    events = [selection(0, ROWS[0], component="<b>&[i]$x^$", domains=dict.fromkeys(names, 1)), mixture(5, **dict.fromkeys(names, 0.125))]
    run = write_run(tmp_path / "<i>out</i>", events, ROWS, summary_of(["text"], domain="<u>&"))
    inspect(run)
    printed = capsys.readouterr().out
    assert "Selections (<b>&" in printed and "\x1b" not in printed
    for name in ("_hidden", "$x^$ _{", "<img src=x>", "[red]", "代码", "x\\x1b[1m", "long long lon..."):
        assert printed.count(f" {name} ") == 2, name
    page = page_of(run / "dataflex/selections/report.html")
    assert page.tags.count("img") == 1 and not {"i", "b", "u"} & set(page.tags)
    assert page.rows[0][5:-1] == [printable(name) for name in names]
    assert [str(warning.message) for warning in recwarn] == []


def test_steps_make_panels(run: Path, tmp_path: Path) -> None:
    inspect(run, png=tmp_path / "two.png")
    events = run / "dataflex/events.jsonl"
    events.write_text(events.read_text() + json.dumps(mixture(40, a=1.0)) + "\n")
    inspect(run, png=tmp_path / "three.png")
    heights = [check_picture((tmp_path / name).read_bytes())[1] for name in ("two.png", "three.png")]
    assert heights[1] > 1.3 * heights[0]


def test_selections_and_mixtures_share_their_steps(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Nothing is drawn outside of the picture when one kind of record has other steps than the other."""
    events = [*(selection(step, rows, overlap=None) for step, rows in ROWS.items()), mixture(1000, a=1.0), mixture(1000, a=0.5, b=0.5)]
    inspect(write_run(tmp_path / "out", events, ROWS, summary_of([])))
    assert [str(warning.message) for warning in recwarn] == []


def test_options_name_the_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(run, html=str(tmp_path / "new" / "r.html"))
    assert page_of(tmp_path / "new/r.html").pictures
    inspect(run, png=str(tmp_path / "new" / "r.png"))
    check_picture((tmp_path / "new/r.png").read_bytes())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.html", "r.png"]
    assert not list((run / "dataflex/selections").glob("report*"))
    assert f"Picture: {tmp_path / 'new' / 'r.png'}" in capsys.readouterr().out.splitlines()


def test_defaults_are_written_and_replaced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "dataflex/selections"
    for _ in range(2):
        inspect(run)
        assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.png", "step_0.npy", "step_30.npy", "summary.json"]
    assert f"Report: {folder / 'report.html'}" in capsys.readouterr().out.splitlines()


def test_a_failed_write_leaves_the_old_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect(run)
    path = run / "dataflex/selections/report.html"
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match=r"report\.html: cannot be written: No space left on device"):
        inspect(run, rows=1)
    assert path.read_bytes() == before


def test_without_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    inspect(run)
    assert capsys.readouterr().out.splitlines().count(NO_MATPLOTLIB) == 1
    page = page_of(run / "dataflex/selections/report.html")
    assert page.pictures == [] and page.rows
    assert not (run / "dataflex/selections/report.png").exists()


def test_a_long_table_is_cut_in_a_terminal_only(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "out", [mixture(step, a=0.5, b=0.5) for step in range(100)])
    inspect(run)
    assert sum("2,560" in line for line in capsys.readouterr().out.splitlines()) == 100
    monkeypatch.setattr(module, "_console", lambda: Console(force_terminal=True, color_system=None, width=80))
    inspect(run)
    printed = capsys.readouterr().out
    steps = [int(line.split()[0]) for line in printed.splitlines() if "2,560" in line]
    assert steps == [*range(10), *range(70, 100)]
    assert "60 lines are left out here; the report has them all." in " ".join(printed.split())
    assert sum(row[1] == "2,560" for row in page_of(run / "dataflex/selections/report.html").rows) == 100


def test_many_domains_fit_a_narrow_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"domain-{number}" for number in range(40)]
    domains = {name: 60 if name in names[7:9] else 1 for name in names}
    run = write_run(tmp_path / "out", [selection(1000, ROWS[0], domains=domains)], {1000: ROWS[0]}, summary_of(NASTY))
    monkeypatch.setattr(module, "_console", lambda: Console(width=80))
    inspect(run)
    table = capsys.readouterr().out.split("Coverage")[0]
    assert "\u2026" not in table and max(map(cell_len, table.splitlines())) <= 80
    assert "others" in table
    row = page_of(run / "dataflex/selections/report.html").rows[1]
    assert row[5:-1] == [f"{domains[name] / 158:.1%}" for name in names]  # the page has them all


def test_a_terminal_without_those_letters(run: Path) -> None:
    script = "import sys; from dataflex.cli.inspect import inspect; inspect(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(run)], env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"\u6570\u636e" in done.stdout and done.stdout.isascii()


def test_import_is_light() -> None:
    script = "import sys, dataflex.cli.inspect; print({'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_half_a_line_at_the_end_is_left_out(run: Path) -> None:
    events = run / "dataflex/events.jsonl"
    whole = read_history(run)
    complete = json.dumps(selection(60, [1], domains={"math": 1}))
    for end in (complete[:40], complete[:-1], "\0" * 20, "{"):
        events.write_text("".join(f"{line}\n" for line in events.read_text().splitlines()[:4]) + end)
        assert read_history(run) == whole


def test_summary_is_not_there_yet(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "dataflex/selections/summary.json").unlink()
    inspect(run)
    printed = capsys.readouterr().out
    assert "6 of 50 rows" in printed and "no selections/summary.json yet" in printed


def refusal(folder: Path, **options: Any) -> str:
    """What `inspect` says of a folder that it refuses; no report is written."""
    with pytest.raises(ConfigError) as caught:
        inspect(folder, **options)
    assert not list(folder.rglob("report.*"))
    return str(caught.value)


def test_folder_does_not_exist(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: does not exist. Give the output_dir of a run."


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "file: is a file" in refusal(tmp_path / "file")


def test_not_a_run(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("is not the output_dir of a DataFlex run: it has no folder named dataflex.")


@pytest.mark.parametrize("inner", ["dataflex", "dataflex/selections", "checkpoint-30"])
def test_folder_inside_a_run(run: Path, inner: str) -> None:
    (run / inner).mkdir(exist_ok=True)
    assert refusal(run / inner).endswith(f"Did you mean {run}?")


@pytest.mark.parametrize("content", [None, "", '{"step": 3, "event": "other"}\n', '{"step": 3, "event": "sel'])
def test_nothing_chosen_yet(run: Path, content: str | None) -> None:
    events = run / "dataflex/events.jsonl"
    events.unlink()
    if content is not None:
        events.write_text(content)
    assert "has no selections and no mixtures yet" in refusal(run)


@pytest.mark.parametrize("line", ['{"step": 3', "5", "", "\udcff", '{"a": 1}{"b": 2}'])
def test_damaged_line_in_the_middle(run: Path, line: str) -> None:
    events = run / "dataflex/events.jsonl"
    first, *others = events.read_text().splitlines()
    events.write_text("\n".join([first, line, *others]), encoding="utf-8", errors="surrogateescape")
    assert refusal(run) == f"{events}:2: is damaged: a JSON object is expected"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": ...}, "samples: is missing: the file is damaged"),
        ({"distinct": "x"}, "distinct: 'x' is not valid: must be a valid integer"),
        ({"step": -3}, "step: -3 is not valid: must be greater than or equal to 0"),
        ({"domains": {"math": -1}}, "domains.math: -1 is not valid"),
    ],
)
def test_selection_that_is_not_one(run: Path, changes: dict[str, Any], message: str) -> None:
    events = run / "dataflex/events.jsonl"
    events.write_text(json.dumps(selection(0, ROWS[0], **changes)) + "\n" + events.read_text())
    assert refusal(run).startswith(f"{events}:1: {message}")


def test_mixture_that_is_not_one(run: Path) -> None:
    events = run / "dataflex/events.jsonl"
    events.write_text(events.read_text() + json.dumps(mixture(40, wiki=float("nan"))) + "\n")
    assert refusal(run).startswith(f"{events}:5: proportions.wiki: nan is not valid")


def test_missing_rows_are_named(run: Path) -> None:
    (run / "dataflex/selections/step_30.npy").unlink()
    assert "selections/step_30.npy: is missing, although events.jsonl has that selection" in refusal(run)


@pytest.mark.parametrize("kept", [0, 5, 70, -8])
def test_truncated_rows(run: Path, kept: int) -> None:
    path = run / "dataflex/selections/step_30.npy"
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(run).startswith(f"{path}: is damaged: ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros(4), "is damaged: a list of row numbers is expected, not float64 of shape (4,)"),
        (np.zeros((2, 2), dtype=np.int64), "is damaged: a list of row numbers is expected, not int64 of shape (2, 2)"),
        (np.array([0, -1, 2, 3]), "is damaged: a list of row numbers is expected"),
        (np.arange(3), "holds 3 rows, but events.jsonl says 4"),
        (np.array([0, 1, 2, SIZE]), f"holds row {SIZE}, but the data has {SIZE} rows"),
        (np.array([None] * 4), "is damaged: Object arrays cannot be loaded"),
    ],
)
def test_rows_that_are_none(run: Path, rows: np.ndarray, message: str) -> None:
    path = run / "dataflex/selections/step_30.npy"
    np.save(path, rows, allow_pickle=True)
    assert refusal(run).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: a JSON object is expected"),
        ('{"rows": 50, "most": []}', "least: is missing: the file is damaged"),
        ('{"rows": 0, "most": [], "least": []}', "rows: 0 is not valid"),
        (
            '{"rows": 50, "most": [{"row": 1, "times": 2, "domain": null, "text": 3}], "least": []}',
            "most.0.text: 3 is not valid: must be a valid string",
        ),
    ],
)
def test_damaged_summary(run: Path, content: str, message: str) -> None:
    path = run / "dataflex/selections/summary.json"
    path.write_text(content)
    assert refusal(run).startswith(f"{path}: {message}")


def test_unreadable_file(run: Path) -> None:
    path = run / "dataflex/selections/summary.json"
    path.unlink()
    path.mkdir()
    assert refusal(run) == f"{path}: cannot be read: Is a directory"


def test_report_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file" / "report"):
        for option in ("html", "png"):
            message = refusal(run, **{option: place})
            assert message.startswith(f"{place}: cannot be written: ") and message.endswith("Name another file with --html or --png.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


PARTS = st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9), min_size=1), min_size=1, max_size=5)


@given(parts=PARTS, limit=st.integers(2, 9))
def test_shares_add_up_with_and_without_others(parts: list[dict[str, int]], limit: int) -> None:
    every, few = dict(shares_by_domain(parts)), shares_by_domain(parts, limit)
    for number, part in enumerate(parts):
        assert {name: share[number] for name, share in every.items() if share[number]} == {name: n / sum(part.values()) for name, n in part.items()}
        assert sum(share[number] for _, share in few) == pytest.approx(1)
    assert len(few) == min(limit, len(every))
    if len(every) > limit:
        name, others = few.pop()
        assert name == f"{len(every) - limit + 1} others"
        assert max(sum(share) for key, share in every.items() if key not in dict(few)) <= min(sum(share) for _, share in few)
        assert len(others) == len(parts)
    assert all(every[name] == share for name, share in few)


@given(st.text(alphabet=st.characters()))
def test_printable_text_is_harmless(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert printable(shown) == shown


@given(st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs", "Cf", "Cn"))))
def test_plain_text_stays(text: str) -> None:
    assert printable(text) == text


def test_right_to_left_words_and_joined_emoji_stay() -> None:
    text = "مرحبا \u200f\N{FAMILY} \N{WOMAN}\u200d\N{PERSONAL COMPUTER}"
    assert printable(text) == text


def test_grids_of_a_selection_without_domains_among_others(tmp_path: Path) -> None:
    events = [selection(0, ROWS[0], domains={"a": 4}), selection(30, ROWS[30], domains=...)]
    [grid] = decision_grids(read_history(write_run(tmp_path / "out", events, ROWS, summary_of([]))))
    assert [row[-2] for row in grid.rows] == ["100.0%", "0.0%"]
