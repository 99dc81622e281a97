"""The report of `dataflex-cli inspect`: a picture, and a page that needs no other file."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dataflex.cli.inspect import Grid, History, decision_grids, facts, row_grids, shares_by_domain
from dataflex.errors import ConfigError, Problem
from dataflex.utils.files import write_bytes_atomically
from dataflex.utils.printable import html_text, printable

NO_MATPLOTLIB = "No picture was drawn: matplotlib is not installed (pip install 'dataflex[trl]')."

# Okabe and Ito's colours, told apart with any kind of colour vision; grey is for the sum of small domains.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_FEW = 60  # steps that are drawn one by one, with markers and edges
_CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")


def write_report(history: History, name: str, rows: int, html: Path | None, png: Path | None) -> list[str]:
    """Write the page and the picture, whichever is asked for; without matplotlib the page has no picture.

    Args:
        name: heading of the page.
        rows: how many of the most and of the least chosen rows the page lists.

    Returns:
        What to tell the user: where the files are.

    Raises:
        ConfigError: a file cannot be written.
    """
    image = picture(history)
    notes = [NO_MATPLOTLIB] if image is None else []
    if html is not None:
        _write(html, page(history, name, rows, image).encode("utf-8"))
        notes.append(f"Report: {html}")
    if png is not None and image is not None:
        _write(png, image)
        notes.append(f"Picture: {png}")
    return notes


def _write(path: Path, content: bytes) -> None:
    """Write a file that holds either its old content or all of the new one at any time."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        write_bytes_atomically(path, content)
    except OSError as error:
        raise ConfigError(Problem(str(path), "", f"cannot be written: {error.strerror}. Name another file with --html or --png.")) from None


def picture(history: History) -> bytes | None:
    """A PNG with a panel for each kind of record there is; None without matplotlib. No other figure or setting of the process is touched."""
    try:
        import matplotlib.style
    except ImportError:
        return None
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    panels = []
    if any(selection.domains for selection in history.selections):
        panels.append(_draw_selected)
    if history.selections:
        panels.append(_draw_coverage)
    if history.mixtures:
        panels.append(_draw_mixtures)
    fonts = ["DejaVu Sans", *sorted(set(_CHINESE_FONTS) & set(get_font_names()))]
    content = io.BytesIO()
    with matplotlib.style.context(["default", {"font.family": fonts}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that no installed font has are drawn as boxes
        figure = Figure(figsize=(10, 0.6 + 2.9 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for draw, axis in zip(panels, axes, strict=True):
            draw(axis, history)
        axes[-1].set_xlim(_span(history))  # of all panels
        axes[-1].set_xlabel("optimizer step")
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _draw_selected(axes: Any, history: History) -> None:
    _stack(axes, [selection.step for selection in history.selections], [selection.domains for selection in history.selections], _span(history)[1])
    _mark_warmup_end(axes, history)
    _finish(axes, f"What was selected ({_label(history.selections[-1].component)})", "share of the selected rows")


def _draw_mixtures(axes: Any, history: History) -> None:
    _stack(axes, [mixture.step for mixture in history.mixtures], [mixture.proportions for mixture in history.mixtures], _span(history)[1])
    _finish(axes, f"Mixture ({_label(history.mixtures[-1].component)})", "proportion")


def _draw_coverage(axes: Any, history: History) -> None:
    steps = [selection.step for selection in history.selections]
    coverage = [seen / history.size for seen in history.seen]
    overlap = [float("nan") if selection.overlap is None else selection.overlap for selection in history.selections]
    dots, squares = ("o", "s") if len(steps) <= _FEW else ("", "")
    axes.plot(steps, coverage, f"{dots}-", color=_COLOURS[0], clip_on=False, label="rows of the data set\nchosen at least once")
    axes.plot(steps, overlap, f"{squares}--", color=_COLOURS[5], clip_on=False, label="overlap with the\nprevious selection")
    _mark_warmup_end(axes, history)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.grid(alpha=0.3)
    _finish(axes, "Coverage and overlap", "share of rows", top=max(1.1 * share for share in [*coverage, *overlap] if share == share))


def _stack(axes: Any, steps: list[int], parts: Sequence[dict[str, Any]], end: int) -> None:
    """Shares in stacked areas, each lasting until the next step, the last until `end`; the legend is in the order of the areas."""
    series = shares_by_domain(parts, limit=len(_COLOURS))
    areas = axes.stackplot(
        [*steps, end],
        [[*shares, shares[-1]] for _, shares in series],
        step="post",
        colors=_COLOURS[: len(series)],
        edgecolor="white",
        linewidth=0.6 if len(steps) <= _FEW else 0,
    )
    names = [_label(name) for name, _ in series]
    legend = axes.legend(areas[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign is one


def _span(history: History) -> tuple[int, int]:
    """The first step, and where the last interval is drawn to: as far as the one before it lasted."""
    steps = sorted({event.step for events in (history.selections, history.mixtures) for event in events})
    return steps[0], steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)


def _label(name: str) -> str:
    name = " ".join(printable(name).split())
    return name if len(name) <= 24 else name[:21] + "..."


def _mark_warmup_end(axes: Any, history: History) -> None:
    """A line where the component took over, if that was later than the first selection."""
    chosen = [selection.step for selection in history.selections if selection.kind != "warm-up"]
    if chosen and chosen[0] > history.selections[0].step:
        axes.axvline(chosen[0], color="black", linewidth=1.2, linestyle=":", label="warm-up ends")


def _finish(axes: Any, title: str, ylabel: str, top: float = 1) -> None:
    axes.set_title(title, loc="left", fontweight="bold").set_parse_math(False)
    axes.set_ylabel(ylabel)
    axes.set_ylim(0, min(max(top, 0.05), 1))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.yaxis.get_major_locator().set_params(nbins=6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


# No script and nothing from elsewhere: even a hole in the escaping could not run what a row of the data says.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
img {{ max-width: 100%; height: auto; }}
.scroll {{ overflow: auto; max-height: 40rem; border: 1px solid #ccc; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3rem 0.7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }}
th {{ position: sticky; top: 0; background: #f3f3f3; vertical-align: bottom; white-space: pre; }}
th.words, td.words {{ text-align: left; }}
td.text {{ text-align: start; white-space: pre-wrap; overflow-wrap: anywhere; width: 100%; }}
td.text div {{ max-height: 12rem; overflow: auto; }}
</style>
</head>
<body>
"""


def page(history: History, name: str, rows: int, image: bytes | None) -> str:
    """The HTML report; everything that comes from the data is escaped."""
    title = f"Data chosen in {printable(name)}"
    parts = [_HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>\n"]
    parts += [f"<p>{escape(line)}</p>\n" for line in facts(history)]
    if image is None:
        parts.append(f"<p>{escape(NO_MATPLOTLIB)}</p>\n")
    else:
        source = base64.b64encode(image).decode("ascii")
        parts.append('<p><img alt="Plots over the optimizer steps of what the tables below list." ')
        parts.append(f'src="data:image/png;base64,{source}"></p>\n')
    parts += [_html_table(grid) for grid in [*decision_grids(history), *row_grids(history, rows)]]
    return "".join([*parts, "</body>\n</html>\n"])


def _html_table(grid: Grid) -> str:
    kinds = ["words" if number in grid.left else "number" for number in range(len(grid.columns))]
    head = "".join(f'<th scope="col" class="{kind}">{html_text(column)}</th>' for kind, column in zip(kinds, grid.columns, strict=True))
    if kinds[-1] == "words":
        kinds[-1] = "text"
    lines = ["".join(_html_cell(kind, cell) for kind, cell in zip(kinds, row, strict=True)) for row in grid.rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<h2>{html_text(grid.title)}</h2>\n<div class="scroll">\n{table}\n</div>\n'


def _html_cell(kind: str, cell: str) -> str:
    if kind == "text":  # dir: right-to-left text is read from the right, whatever its neighbours are
        return f'<td class="text" dir="auto"><div dir="auto">{html_text(cell)}</div></td>'
    return f'<td class="{kind}">{html_text(cell)}</td>'
