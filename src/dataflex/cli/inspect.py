"""`dataflex-cli inspect`: what a run with `dynamic_select` or `dynamic_mix` trained on, read from `output_dir/dataflex/`.

Rows and domain names are the user's data and may hold anything: whatever is printed goes through `printable` first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataflex.configs.values import wording
from dataflex.errors import ConfigError, Problem
from dataflex.utils.printable import one_line, printable

if TYPE_CHECKING:
    import numpy as np

Count = Annotated[int, Ge(0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Selection(_Record):
    """One `selection` line of events.jsonl; `domains` counts the interval's rows and is empty when the data has none. Packed rows hold several
    `documents`, whose numbers the file of the selection lists."""

    step: Count
    kind: str
    component: str
    samples: Count
    distinct: Count
    pool: Count
    documents: Count | None = None
    overlap: float | None
    domains: dict[str, Count] = {}
    seconds: float


class Mixture(_Record):
    """One `mixture` line of events.jsonl."""

    step: Count
    component: str
    proportions: dict[str, Annotated[float, Ge(0)]]
    samples: Count
    seconds: float


class Row(_Record):
    row: Count
    source: str = ""
    times: Count
    domain: str | None
    text: str

    @property
    def label(self) -> str:
        """The row's number, and its place in its data set if there are several."""
        return f"{self.row} ({self.source})" if self.source not in ("", str(self.row)) else str(self.row)


class Rows(_Record):
    """selections/summary.json: the rows that may be chosen, those of the user's data in all, and those chosen most and least often.

    `numbering` says why row numbers are not the user's, if they are not.
    """

    rows: Annotated[int, Ge(1)]
    total: Annotated[int, Ge(1)] | None = None
    numbering: str = ""
    most: list[Row]
    least: list[Row]


@dataclass(frozen=True)
class History:
    """All decisions of a run.

    Attributes:
        seen: after each selection, the number of rows chosen at least once.
        size: rows of the data set; without a summary, the largest pool or row number known.
        summary: None when there are no selections, or the run has not written it yet.
    """

    selections: list[Selection]
    mixtures: list[Mixture]
    seen: list[int]
    size: int
    summary: Rows | None


@dataclass(frozen=True)
class Grid:
    """A table for the terminal and for the page. Cells are raw text; the columns in `left` hold words, the others numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: tuple[int, ...] = ()


def inspect(output_dir: str | Path, rows: int = 5, html: str | Path | None = None, png: str | Path | None = None) -> None:
    """Print the tables of a run and write its report.

    Args:
        output_dir: the run's `output_dir`; training may still be going on.
        rows: how many of the most and of the least chosen rows to show.
        html, png: where to write the report and its picture. With neither, both go to `output_dir/dataflex/selections/`.

    Raises:
        ConfigError: not the folder of such a run, nothing chosen yet, a damaged file, or a report that cannot be written.
    """
    from dataflex.cli.selection_report import write_report

    history = read_history(Path(output_dir))
    console = _console()
    for grid in decision_grids(history, domains=_domains_that_fit(history, console.width)):
        console.print(_table(grid, console))
    for line in facts(history):
        typer.echo(_one_line(line, console) + "\n")
    for grid in row_grids(history, rows):
        console.print(_table(grid, console))
    if html is None and png is None:
        folder = Path(output_dir) / "dataflex" / "selections"
        html, png = folder / "report.html", folder / "report.png"
    for note in write_report(history, str(output_dir), rows, _path(html), _path(png)):
        typer.echo(one_line(note))


def _console() -> Console:
    """As the other commands' (cli/tables.py), which cannot be imported without torch."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)


def read_history(output_dir: Path) -> History:
    """Read and check a run's records.

    Raises:
        ConfigError: see `inspect`.
    """
    _check_folder(output_dir)
    folder = output_dir / "dataflex"
    selections, mixtures = _read_events(folder / "events.jsonl")
    if not selections and not mixtures:
        raise _problem(
            output_dir,
            "this run has no selections and no mixtures yet. The first comes when warm-up starts or, without one, at the first update; "
            "runs with train_type static or dynamic_weight have none.",
        )
    files = [folder / "selections" / f"step_{selection.step}.npy" for selection in selections]
    chosen = [_read_rows(path, selection.documents or selection.samples) for path, selection in zip(files, selections, strict=True)]
    summary_path = folder / "selections" / "summary.json"
    summary = _parse(Rows, _json(_read(summary_path), str(summary_path)), str(summary_path)) if selections and summary_path.exists() else None
    known = [int(rows.max()) + 1 if rows.size else 0 for rows in chosen]
    total = None if summary is None else summary.total or summary.rows
    for path, number in zip(files, known, strict=True):
        if total is not None and number > total:
            raise _problem(path, f"holds row {number - 1}, but the data has {total} rows ({summary_path})")
    size = summary.rows if summary is not None else max([1, *known, *(selection.pool for selection in selections)])
    return History(selections, mixtures, _seen(chosen, max([size, *known])), size, summary)


def _check_folder(output_dir: Path) -> None:
    if not output_dir.exists():
        raise _problem(output_dir, "does not exist. Give the output_dir of a run.")
    if not output_dir.is_dir():
        raise _problem(output_dir, "is a file. Give the folder that is the output_dir of a run.")
    if not (output_dir / "dataflex").is_dir():
        parents = output_dir.resolve().parents[:2]  # of a checkpoint, of dataflex/ or of dataflex/selections/
        near = next((f" Did you mean {parent}?" for parent in parents if (parent / "dataflex" / "events.jsonl").is_file()), "")
        raise _problem(output_dir, f"is not the output_dir of a DataFlex run: it has no folder named dataflex.{near}")


def _read_events(path: Path) -> tuple[list[Selection], list[Mixture]]:
    selections: list[Selection] = []
    mixtures: list[Mixture] = []
    lines = _read(path).splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            event = _json(line, where)
        except ConfigError:
            if number == len(lines):  # training is writing it, or was killed while it did
                break
            raise
        if event.get("event") == "selection":
            selections.append(_parse(Selection, event, where))
        elif event.get("event") == "mixture":
            mixtures.append(_parse(Mixture, event, where))
    return selections, mixtures


def _read_rows(path: Path, samples: int) -> np.ndarray:
    """The rows of one interval, in the order of training."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            rows: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise _problem(path, "is missing, although events.jsonl has that selection. Copy the folder dataflex/selections whole.") from None
    except OSError as error:
        raise _problem(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _problem(path, f"is damaged: {str(error).splitlines()[0]}") from None
    if rows.dtype.kind not in "iu" or rows.ndim != 1 or (rows.size and rows.min() < 0):
        raise _problem(path, f"is damaged: a list of row numbers is expected, not {rows.dtype} of shape {rows.shape}")
    if rows.size != samples:
        raise _problem(path, f"holds {rows.size} rows, but events.jsonl says {samples}: the two are not of the same run, or one is damaged")
    return rows


def _seen(chosen: list[np.ndarray], size: int) -> list[int]:
    import numpy as np

    mask, new = np.zeros(size, dtype=bool), []
    for rows in chosen:
        new.append(np.unique(rows[~mask[rows]]).size)
        mask[rows] = True
    return list(itertools.accumulate(new))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _problem(path, f"cannot be read: {error.strerror}") from None


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:  # no JSON, or no UTF-8
        value = None
    if not isinstance(value, dict):
        raise _problem(where, "is damaged: a JSON object is expected")
    return value


R = TypeVar("R", bound=_Record)


def _parse(kind: type[R], value: dict[str, Any], where: str) -> R:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = [(".".join(map(str, detail["loc"])), detail) for detail in error.errors()]
        raise ConfigError(
            [Problem(where, key, "is missing: the file is damaged" if d["type"] == "missing" else wording(d)) for key, d in problems]
        ) from None


def _problem(where: str | Path, message: str) -> ConfigError:
    return ConfigError(Problem(str(where), "", message))


def decision_grids(history: History, domains: int | None = None) -> list[Grid]:
    """The tables over time: selections and mixtures, whichever there are, with at most `domains` columns of shares."""
    grids = []
    if history.selections:
        head = ["step", "kind", "samples", "distinct", "overlap\nwith the\nprevious", "seconds"]
        cells = [
            [f"{s.step:,}", s.kind, f"{s.samples:,}", f"{s.distinct:,}", "-" if s.overlap is None else f"{s.overlap:.1%}", f"{s.seconds:,.1f}"]
            for s in history.selections
        ]
        shares = shares_by_domain([s.domains for s in history.selections], domains)
        grids.append(_with_shares(f"Selections ({history.selections[-1].component})", head, cells, shares, left=(1,)))
    if history.mixtures:
        cells = [[f"{m.step:,}", f"{m.samples:,}", f"{m.seconds:,.2f}"] for m in history.mixtures]
        shares = shares_by_domain([m.proportions for m in history.mixtures], domains)
        grids.append(_with_shares(f"Mixtures ({history.mixtures[-1].component})", ["step", "samples", "seconds"], cells, shares))
    return grids


def _with_shares(title: str, head: list[str], cells: list[list[str]], shares: list[tuple[str, list[float]]], left: tuple[int, ...] = ()) -> Grid:
    """A grid with a column for each domain before the last one, which is that of the seconds."""
    rows = [[*row[:-1], *(f"{share[number]:.1%}" for _, share in shares), row[-1]] for number, row in enumerate(cells)]
    return Grid(title, [*head[:-1], *(name for name, _ in shares), head[-1]], rows, left)


def shares_by_domain(parts: Sequence[dict[str, Any]], limit: int | None = None) -> list[tuple[str, list[float]]]:
    """Each domain's share of each part, in the order in which domains first appear.

    With more than `limit` domains the largest `limit - 1` are kept and the others summed as the last.
    """
    totals = [sum(part.values()) or 1 for part in parts]
    names = list(dict.fromkeys(name for part in parts for name in part))
    shares = {name: [part.get(name, 0) / total for part, total in zip(parts, totals, strict=True)] for name in names}
    if limit is None or len(names) <= limit:
        return list(shares.items())
    kept = set(sorted(names, key=lambda name: -sum(shares[name]))[: limit - 1])
    others = [shares[name] for name in names if name not in kept]
    return [*((name, shares[name]) for name in names if name in kept), (f"{len(others)} others", [sum(part) for part in zip(*others, strict=True)])]


def facts(history: History) -> list[str]:
    """Coverage of the data set in words, and what a user should know about the records."""
    if not history.selections:
        return []
    drawn, seen = sum(selection.samples for selection in history.selections), history.seen[-1]
    lines = [
        f"Coverage so far: {seen:,} of {history.size:,} rows chosen at least once ({seen / history.size:.1%}); "
        f"{drawn:,} rows drawn, which is {drawn / history.size:.2f} effective passes over the data set."
    ]
    if history.summary is not None and history.summary.numbering:
        lines.append(f"Row numbers are positions in the data as trained on, not rows of your files: {history.summary.numbering}.")
    elif history.summary is not None:
        lines.append("Row numbers count the rows of the data sets as listed, from 0; dataflex/rows.parquet tells which were left out, and why.")
    if history.summary is None:
        lines.append("There is no selections/summary.json yet: rows are not listed, and the data set may be larger than the pool counted here.")
    return lines


def row_grids(history: History, rows: int) -> list[Grid]:
    """The most and the least chosen rows, `rows` of each."""
    if history.summary is None or rows < 1:
        return []
    lists = {"Rows chosen most often": history.summary.most[:rows], "Rows chosen least often": history.summary.least[:rows]}
    return [_row_grid(title, listed) for title, listed in lists.items() if listed]


def _row_grid(title: str, listed: list[Row]) -> Grid:
    if all(row.domain is None for row in listed):
        return Grid(title, ["times", "row", "text"], [[f"{row.times:,}", row.label, row.text] for row in listed], left=(2,))
    cells = [[f"{row.times:,}", row.label, row.domain or "-", row.text] for row in listed]
    return Grid(title, ["times", "row", "domain", "text"], cells, left=(2, 3))


_NAME_WIDTH = 16  # names longer than this are shortened in the terminal
_OTHER_COLUMNS = 57  # width of the selections' columns that are no shares
_MOST_LINES = 40


def _domains_that_fit(history: History, width: int) -> int:
    """How many columns of shares a table on the terminal may have, 2 at least."""
    parts: list[dict[str, Any]] = [*(selection.domains for selection in history.selections), *(mixture.proportions for mixture in history.mixtures)]
    names = {name for part in parts for name in part}
    for limit in range(min(len(names), width // 7), 2, -1):
        shown = [max(5, min(cell_len(name), _head_width(width))) for name, _ in shares_by_domain(parts, limit)]
        if _OTHER_COLUMNS + sum(shown) + 2 * len(shown) <= width:
            return limit
    return 2


def _head_width(width: int) -> int:
    """In a narrow terminal a long name takes several lines of a table's head."""
    return _NAME_WIDTH if width >= 120 else _NAME_WIDTH // 2


def _wrapped(name: str, console: Console) -> list[str]:
    return [line.plain.rstrip() for line in Text(name).wrap(console, _head_width(console.width))] or [""]


def _table(grid: Grid, console: Console) -> Table:
    """`grid` for the terminal. A pipe gets every line; a terminal the first and the last ones of a long table."""
    names = [[_fit(part, console) for part in column.split("\n")] for column in grid.columns]
    head = [[line for part in parts for line in _wrapped(part, console)] for parts in names]
    cells = [[_fit(cell, console) for cell in row[:-1]] for row in grid.rows]
    widths = [max(map(cell_len, [*lines, *column])) for lines, column in zip(head, zip(*cells, strict=True), strict=False)]
    room = max(console.width - sum(widths) - 2 * len(head), _NAME_WIDTH)
    rows = [[*row, _fit(whole[-1], console, room)] for row, whole in zip(cells, grid.rows, strict=True)]
    table = Table(
        title=Text(_fit(grid.title, console, console.width), "bold"),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, lines in enumerate(head):
        table.add_column(Text("\n".join(lines)), justify="left" if number in grid.left else "right", vertical="bottom")
    left_out = len(rows) - _MOST_LINES if console.is_terminal else 0
    if left_out > 0:
        first = _MOST_LINES // 4
        rows = [*rows[:first], ["..."] * len(head), *rows[first + left_out :]]
        table.caption = f"{left_out:,} lines are left out here; the report has them all.\n"
    for row in rows:
        table.add_row(*map(Text, row))  # Text: square brackets are no markup here
    return table


def _fit(text: str, console: Console, width: int = _NAME_WIDTH) -> str:
    """`text` on one line of at most `width` columns, in letters that the terminal has; a Chinese character takes two columns."""
    line = _one_line(text, console)
    return line if cell_len(line) <= width else set_cell_size(line, width - 3).rstrip() + "..."


def _one_line(text: str, console: Console) -> str:
    return " ".join(printable(text).split()).encode(console.encoding, "backslashreplace").decode(console.encoding)
