"""The demo's folder: a small Llama, data sets of which one has wrong answers throughout, and a training file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from dataflex.errors import DataflexError
from dataflex.testing.tiny import tiny_model, tiny_tokenizer
from dataflex.utils.files import write_text_atomically

Row = dict[str, str]

ROW_SHARES = {"easy": 0.2, "clean": 0.5, "corrupted": 0.3}  # data sets that are trained on
LETTERS = "abcdefghijklmnop"
WIDTH = 8  # letters in every answer: with equal lengths, weighting by sample and by token agree

# Short, since every character is a token and costs time.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
_MARKER = ".made-by-dataflex-demo"
_OWN = ("data", "model", "runs", "train.yaml", "demo.png", "demo.log")


@dataclass(frozen=True)
class Size:
    """How much is trained, the same in every run; `warmup` of the steps have weight 1 in the weighted runs too."""

    steps: int = 400
    rows: int = 1500
    held_out: int = 400
    batch: int = 32
    hidden: int = 96
    layers: int = 2

    @property
    def logging(self) -> int:
        """Steps between log lines. `warmup` is a multiple, so that no log line mixes both phases."""
        return max(1, self.steps // 20)

    @property
    def warmup(self) -> int:
        return self.logging * (self.steps // self.logging // 4)


def make_rows(number: int, held_out: int, seed: int = 0) -> dict[str, list[Row]]:
    """Training rows by data set, `number` in all, and `held_out` sorting tasks with right answers that are not among them."""
    rng = random.Random(seed)
    easy, corrupted = round(number * ROW_SHARES["easy"]), round(number * ROW_SHARES["corrupted"])
    tasks = _sorting_tasks(rng)
    return {
        "easy": [_counting_row(rng) for _ in range(easy)],
        "clean": [_row(f"Sort {task}", _sorted(task)) for task in islice(tasks, number - easy - corrupted)],
        "corrupted": [_row(f"Sort {task}", _wrong_answer(task, rng)) for task in list(islice(tasks, corrupted))],
        "held_out": [_row(f"Sort {task}", _sorted(task)) for task in islice(tasks, held_out)],
    }


def _row(instruction: str, output: str) -> Row:
    return {"instruction": instruction, "input": "", "output": output}


def _sorted(letters: str) -> str:
    return "".join(sorted(letters))


def _counting_row(rng: random.Random) -> Row:
    start = rng.randrange(len(LETTERS))
    return _row(f"Count from {LETTERS[start]}", "".join(LETTERS[(start + k) % len(LETTERS)] for k in range(WIDTH)))


def _sorting_tasks(rng: random.Random) -> Iterator[str]:
    """Different letters in random order; no task comes twice."""
    seen: set[str] = set()
    while True:
        task = "".join(rng.sample(LETTERS, WIDTH))
        if task not in seen:
            seen.add(task)
            yield task


def _wrong_answer(task: str, rng: random.Random) -> str:
    """The right answer to another task: it looks like an answer, and is none to this one."""
    while (answer := _sorted("".join(rng.sample(LETTERS, WIDTH)))) == _sorted(task):
        pass
    return answer


# ---- The folder -------------------------------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, size: Size) -> Path:
    """Fill `folder` with model, data and training file; returns the latter. An earlier demo's files are replaced.

    Raises:
        DataflexError: the folder holds something else.
    """
    claim(folder)
    tiny_tokenizer(_CHAT_TEMPLATE).save_pretrained(folder / "model")
    tiny_model(hidden_size=size.hidden, intermediate_size=4 * size.hidden, num_hidden_layers=size.layers).save_pretrained(folder / "model")
    rows = make_rows(size.rows, size.held_out)
    for name, part in rows.items():
        write_text_atomically(folder / "data" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    write_text_atomically(folder / "data" / "dataset_info.json", json.dumps({name: {"file_name": f"{name}.jsonl"} for name in rows}, indent=2))
    write_text_atomically(
        folder / "train.yaml", _HEADER + yaml.safe_dump({**settings(size), "output_dir": str(folder / "runs" / "own")}, sort_keys=False)
    )
    return folder / "train.yaml"


def claim(folder: Path) -> None:
    """Make `folder` the demo's own, without an earlier demo's files."""
    if folder.exists() and not folder.is_dir():
        raise DataflexError(f"'{folder}' is a file; name a folder with --output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARKER).is_file():
        raise DataflexError(f"'{folder}' holds files that are not the demo's; name another folder with --output")
    for path in (folder / name for name in _OWN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_text_atomically(folder / _MARKER, "The next demo replaces its files in this folder.\n")


_HEADER = "# Written by `python -m dataflex.demo`, which trains it several times with the overrides that it prints.\n"


def settings(size: Size) -> dict[str, object]:
    """The training file: static training. Every method is this file with other values of its last keys."""
    return {
        "model_name_or_path": "model",
        "train_from_scratch": True,
        "stage": "sft",
        "finetuning_type": "full",
        "dataset_dir": "data",
        "dataset": ",".join(ROW_SHARES),
        "eval_dataset": "held_out",
        "cutoff_len": 64,
        "per_device_train_batch_size": size.batch,
        "per_device_eval_batch_size": 128,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": size.steps // 20,
        "max_steps": size.steps,
        "logging_steps": size.logging,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "train_type": "static",
        "warmup_step": size.warmup,
    }
