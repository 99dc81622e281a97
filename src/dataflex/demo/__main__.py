"""`python -m dataflex.demo`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dataflex.demo.data import ROW_SHARES, Size, make_folder
from dataflex.demo.report import draw, result_table, what_to_look_at
from dataflex.demo.runs import METHODS, Outcome, command, quiet, run_method, summaries
from dataflex.errors import DataflexError


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    size = Size()
    parser = argparse.ArgumentParser(prog="python -m dataflex.demo", description="What sample weighting does on data with wrong answers.")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for everything that is written (default: %(default)s)")
    parser.add_argument("--steps", type=_at_least(4), default=size.steps, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--rows", type=_at_least(20), default=size.rows, help="training rows (default: %(default)s)")
    parser.add_argument("--held-out", type=_at_least(1), default=size.held_out, help="evaluation rows (default: %(default)s)")
    parser.add_argument("--seeds", type=_at_least(1), default=2, help="runs of each method (default: %(default)s)")
    return parser.parse_args(argv)


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is not valid: must be a whole number of at least {minimum}")
        return int(text)

    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = arguments(argv)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    try:
        demonstrate(options, console)
    except DataflexError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"demo: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print(f"Stopped. What was written so far is in {options.output}; the next demo replaces it.")
        return 130
    return 0


def demonstrate(options: argparse.Namespace, console: Console) -> None:
    """Make the folder, train all methods, show what came out."""
    size, start = Size(steps=options.steps, rows=options.rows, held_out=options.held_out), time.monotonic()
    # The model is so small that more threads gain little, and lose a lot where other programs use the cores.
    torch.set_num_threads(1)
    with quiet():
        config = make_folder(options.output, size)
    console.print(
        f"A small Llama learns to sort letters from {size.rows} rows, {ROW_SHARES['corrupted']:.0%} of which have wrong answers.\n"
        f"Every method trains {size.steps} steps on the same rows in the same order; weights are 1 for the first {size.warmup}.\n"
    )
    results = summaries(_train_all(config, range(1, options.seeds + 1), console))
    console.print(result_table(results))
    console.print(what_to_look_at(results), style="bold")
    draw(results, size.warmup, options.output / "demo.png")
    console.print(f"Picture: {options.output / 'demo.png'}. Settings: {config}. Took {time.monotonic() - start:.0f} s.")


def _train_all(config: Path, seeds: range, console: Console) -> list[Outcome]:
    """All methods, seed after seed, each with the command line that repeats it."""
    todo = [(method, seed) for seed in seeds for method in METHODS]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    outcomes = []
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("", total=len(todo))
        for number, (method, seed) in enumerate(todo, start=1):
            console.print(command(config, method, seed), markup=False)
            progress.update(task, description=f"run {number} of {len(todo)}: {method}, seed {seed}")
            outcomes.append(run_method(config, method, seed))
            progress.advance(task)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
