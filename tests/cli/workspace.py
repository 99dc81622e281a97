"""A folder as a user has it: a small model, a small data set and a training file. Test helpers; the model is built once per process."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from dataflex.cli.app import app
from dataflex.configs.schema import EFFECTIVE_WITH
from dataflex.testing.tiny import tiny_model, tiny_tokenizer

# In this order, one key a line: `model_name_or_path` stands in line 1 and `train_step` in line 14; what a test adds begins in line 15.
SETTINGS: dict[str, Any] = {
    "model_name_or_path": "model",
    "stage": "sft",
    "finetuning_type": "full",
    "dataset": "rows",
    "dataset_dir": "data",
    "cutoff_len": 200,
    "output_dir": "out",
    "use_cpu": True,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 4,
    "train_type": "dynamic_weight",
    "component_name": "loss",
    "warmup_step": 1,
    "train_step": 3,
}
ROWS = [{"instruction": f"Say {number}", "input": "", "output": "ab" * (number + 1)} for number in range(12)]


@cache
def saved_model() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dataflex-model-"))
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_workspace(folder: Path) -> Path:
    """Model, data (`rows` for training, `held_out` for evaluation) and `config.yaml` in `folder`."""
    shutil.copytree(saved_model(), folder / "model")
    (folder / "data").mkdir()
    write_rows(folder / "data/rows.jsonl", ROWS)
    write_rows(folder / "data/held_out.jsonl", ROWS[:3])
    entries = {name: {"file_name": f"{name}.jsonl"} for name in ("rows", "held_out")}
    (folder / "data/dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    write_config(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_config(folder: Path, name: str = "config.yaml", **changes: Any) -> Path:
    """A training file: `SETTINGS` with changes; a key set to `...` is left out, and those of a component with `train_type: static`."""
    usual = {key: value for key, value in SETTINGS.items() if changes.get("train_type") != "static" or key not in EFFECTIVE_WITH}
    settings = {key: value for key, value in {**usual, **changes}.items() if value is not ...}
    path = folder / name
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def run_cli(*arguments: str) -> Result:
    """`dataflex-cli` in this process."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder` with its size and time of change."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}
