"""The demo's folder: a small Llama from scratch, data sets of which one has wrong answers throughout, and a training file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from dataflex.errors import DataflexError
from dataflex.utils.files import write_text_atomically

Row = dict[str, str]

CORRUPTED_SHARE = 0.3  # of the training rows
EASY_SHARE = 0.2
LETTERS = "abcdefghijkl"
WIDTH = 6  # letters in every answer: with equal lengths, weighting by sample and by token agree
DOMAINS = ("easy", "clean", "corrupted")

_MARKER = ".dataflex-demo"
_OWN = ("data", "model", "runs", "logs", "train.yaml", "demo.png")


@dataclass(frozen=True)
class Size:
    """How much the demo trains. Every run has the same steps, of which weighted runs spend `warmup` with weights of 1."""

    steps: int = 600
    rows: int = 6000
    held_out: int = 500
    batch: int = 32
    hidden: int = 128
    layers: int = 3

    @property
    def logging(self) -> int:
        return max(1, self.steps // 30)

    @property
    def warmup(self) -> int:
        return self.logging * (self.steps // self.logging // 4)


def make_rows(number: int, held_out: int, seed: int = 0) -> dict[str, list[Row]]:
    """Training rows by data set, `number` in all, and `held_out` rows of the sorting task with right answers that are not among them."""
    rng = random.Random(seed)
    corrupted, easy = round(number * CORRUPTED_SHARE), round(number * EASY_SHARE)
    tasks = _sorting_tasks(rng)
    return {
        "easy": [_counting_row(rng) for _ in range(easy)],
        "clean": [_row(f"Sort {task}", "".join(sorted(task))) for task, _ in zip(tasks, range(number - easy - corrupted), strict=False)],
        "corrupted": [_row(f"Sort {task}", _wrong_answer(task, rng)) for task, _ in zip(tasks, range(corrupted), strict=False)],
        "held_out": [_row(f"Sort {task}", "".join(sorted(task))) for task, _ in zip(tasks, range(held_out), strict=False)],
    }
