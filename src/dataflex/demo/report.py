"""The demo's table, its one sentence and its picture, all from what was measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dataflex.demo.data import ROW_SHARES
from dataflex.demo.runs import Outcome, Summary


def result_table(results: list[Summary]) -> Table:
    seeds = len(results[0].runs)
    table = Table(box=SIMPLE_HEAD, title="Held-out rows with right answers" + (f", mean of {seeds} seeds" if seeds > 1 else ""))
    table.add_column("method", no_wrap=True)
    for name in ("eval\nloss", "spread", "exact\nanswers", "weights", "weight of\nwrong rows", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        (low, high), wrong = result.weight_range, result.relative_weight("corrupted").values()
        table.add_row(
            result.method,
            f"{result.eval_loss:.3f}",
            f"{result.spread:.3f}" if seeds > 1 else "-",
            f"{result.accuracy:.1%}",
            f"{low:.2f}-{high:.2f}",
            f"{statistics.fmean(wrong):.2f}" if wrong else "1.00",
            f"{result.seconds:.0f}",
        )
    return table


def what_to_look_at(results: list[Summary]) -> str:
    """One sentence: the best weighted method against static, and the seeds' spread; with it which methods were worse."""
    static = next(result for result in results if result.method == "static")
    weighted = [result for result in results if result is not static]
    best = min(weighted, key=lambda result: result.eval_loss)
    change = best.eval_loss - static.eval_loss
    worse = [result.method for result in weighted if result.eval_loss > static.eval_loss]
    return (
        f"Look at the eval loss: the best weighted method, {best.method}, is {abs(change):.3f} {'below' if change < 0 else 'above'} static, "
        f"{_against_spread(abs(change), max(best.spread, static.spread), len(static.runs))}, "
        f"with {best.accuracy:.1%} exact answers against {static.accuracy:.1%}; worse than static: {', '.join(worse) or 'none'}."
    )


def _against_spread(difference: float, spread: float, seeds: int) -> str:
    if seeds < 2:
        return "and with one seed nobody can say whether that is chance"
    return f"{'more' if difference > spread else 'no more'} than the {spread:.3f} between their seeds"


def draw(results: list[Summary], warmup: int, path: Path) -> None:
    """Training loss on the left, weights of right and wrong rows on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), sharex=True)
    for number, result in enumerate(results):
        color = f"C{number}"
        curve = result.curve(Outcome.sample_loss)
        left.plot(list(curve), list(curve.values()), color=color, label=result.method)
        for domain, style in (("clean", "--"), ("corrupted", "-")):
            weights = result.relative_weight(domain)
            if weights:
                right.plot(list(weights), list(weights.values()), color=color, linestyle=style, label=f"{result.method}: {domain}")
    right.axhline(1, color="C0", linewidth=1, label="static: every row")
    _finish(left, warmup, "Training loss, unweighted, wrong answers included", "mean loss of the samples")
    left.set_yscale("log")
    left.yaxis.set_minor_formatter("{x:.1f}")
    left.yaxis.set_major_formatter("{x:.1f}")
    _finish(right, warmup, f"Weights: {ROW_SHARES['corrupted']:.0%} of the rows are corrupted", "mean weight (1 = average row)")
    right.set_ylim(bottom=-0.1)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _finish(axes: Any, warmup: int, title: str, ylabel: str) -> None:
    axes.axvline(warmup, color="gray", linewidth=1, linestyle=":", label="weighting starts")
    axes.set(title=title, xlabel="optimizer step", ylabel=ylabel)
    many = len(axes.get_lines()) > 6
    axes.legend(fontsize=8, ncols=2 if many else 1, loc="lower left" if many else "upper right")
    axes.grid(alpha=0.3)
