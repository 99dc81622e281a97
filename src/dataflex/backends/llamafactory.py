"""LLaMA-Factory as the backend: its own `train`, with DataFlex in front of its Trainer. All that depends on its version is in this file.

A static run is `llamafactory-cli train` itself. For a dynamic one, LLaMA-Factory's workflow runs as it is, too; only the Trainer class it
takes from its module's namespace is replaced while it runs, and put back afterwards.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from dataflex.configs.loading import RunFile
from dataflex.core.state import newest_complete_checkpoint
from dataflex.errors import TrainingError, listing, nearest

# Module of each stage's workflow, and the name under which it finds its Trainer.
TRAINERS = {
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "pt": ("llamafactory.train.pt.workflow", "CustomTrainer"),
}
_REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclasses.dataclass
class Prepared:
    """Keys for LLaMA-Factory, and things worth telling that are no problem."""

    keys: dict[str, Any]
    notes: list[str]


def check(run: RunFile) -> Prepared | None:
    """Find what is wrong with LLaMA-Factory's keys without loading model or data; problems are noted in `run`."""
    keys = dict(run.backend)
    fields = _fields()
    for key in keys:
        if key not in fields:
            run.add(key, f"is not a key of LLaMA-Factory.{nearest(key, [*fields, *type(run.dataflex).model_fields])}")
    for key in ("model_name_or_path", "output_dir", "dataset"):
        if key not in keys:
            run.add(key, "is required")
    _check_stage(keys, run)
    _check_steps(keys, run)
    _check_data(keys, run)
    if not run.problems:
        _check_values(keys, run)
    return Prepared(keys, [])


def _fields() -> list[str]:
    from llamafactory.hparams import parser

    return [field.name for cls in parser._TRAIN_ARGS for field in dataclasses.fields(cls)]


def _check_stage(keys: dict[str, Any], run: RunFile) -> None:
    stage = keys.get("stage", "sft")
    if run.dataflex.train_type != "static" and stage not in TRAINERS:
        run.add("stage", f"{stage} cannot be combined with train_type: {run.dataflex.train_type}; allowed: {listing(TRAINERS)}")
    if run.dataflex.train_type != "static" and keys.get("do_train") is False:
        run.add("do_train", "is false, so there is nothing to weight; set train_type: static")


def _check_steps(keys: dict[str, Any], run: RunFile) -> None:
    steps, maximum = run.dataflex.train_step, keys.get("max_steps", -1)
    if steps and isinstance(maximum, int) and maximum > 0 and maximum != steps:
        run.add("train_step", f"is {steps} but max_steps is {maximum}; both set the total number of optimizer steps")


def _check_data(keys: dict[str, Any], run: RunFile) -> None:
    """Names in dataset_info.json and the files of local data sets; data sets on a hub are LLaMA-Factory's business."""
    folder = str(keys.get("dataset_dir", "data"))
    if folder == "ONLINE" or folder.startswith("REMOTE:") or "tokenized_path" in keys:
        return
    info = Path(folder) / "dataset_info.json"
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return run.add("dataset_dir", f"'{info}' does not exist")
    except json.JSONDecodeError as error:
        return run.add("dataset_dir", f"'{info}' is not valid JSON: {error.msg} (line {error.lineno})")
    for key in ("dataset", "eval_dataset"):
        for name in _names(keys.get(key)):
            _check_entry(name, key, entries, Path(folder), run)
    return None


def _check_entry(name: str, key: str, entries: dict[str, Any], folder: Path, run: RunFile) -> None:
    if name not in entries:
        return run.add(key, f"{folder / 'dataset_info.json'} has no data set '{name}'.{nearest(name, entries)}")
    entry = entries[name]
    path = folder / str(entry.get("file_name", name))
    if not any(remote in entry for remote in _REMOTE_KEYS) and not path.exists():
        run.add(key, f"'{name}': {path} does not exist")
    return None


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def _check_values(keys: dict[str, Any], run: RunFile) -> None:
    """Let LLaMA-Factory's own classes read the values."""
    from llamafactory.hparams import parser

    alone = {key: value for key, value in keys.items() if key != "ddp_backend"}  # reading it needs the other processes
    try:
        parser._parse_train_args(alone)
    except (ValueError, TypeError, ImportError) as error:
        text = str(error).strip().split("\n")[0]
        run.add(next((key for key in keys if key in text), ""), text)


def summary(run: RunFile, prepared: Prepared) -> tuple[list[tuple[str, str]], int | None]:
    """What LLaMA-Factory will do. The steps are known only when they are set, since rows are counted after tokenising."""
    keys = prepared.keys
    steps = run.dataflex.train_step or (keys["max_steps"] if keys.get("max_steps", -1) > 0 else None)
    lines = [
        ("backend", "llamafactory"),
        ("model", f"{keys['model_name_or_path']}, {keys.get('finetuning_type', 'lora')}, stage {keys.get('stage', 'sft')}"),
        ("data", ", ".join(_names(keys["dataset"]))),
        ("optimizer steps", str(steps) if steps else f"{keys.get('num_train_epochs', 3)} epochs"),
    ]
    return lines, steps


def train(run: RunFile, prepared: Prepared) -> None:
    """Run `llamafactory-cli train` with these keys, with DataFlex in front of its Trainer unless the training is static."""
    from llamafactory.train.tuner import run_exp

    from dataflex.backends.outputs import record_run

    keys = dict(prepared.keys)
    keys.setdefault("do_train", True)
    if run.dataflex.train_step:
        keys["max_steps"] = run.dataflex.train_step
    callbacks = [record_run(run, seed=keys.get("seed", 42), overwrite=False)]  # LLaMA-Factory deletes nothing
    if run.dataflex.train_type == "static":
        return run_exp(keys, callbacks)
    keys = _with_checkpoint(keys)
    with dynamic_trainer(keys.get("stage", "sft"), run) as made:
        run_exp(keys, callbacks)
    if not made:
        raise TrainingError("LLaMA-Factory trained without DataFlex; this version takes its Trainer from elsewhere")
    return None


def _with_checkpoint(keys: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory goes on from the last checkpoint in output_dir by itself; let it be the last complete one."""
    if keys.get("resume_from_checkpoint") or keys.get("overwrite_output_dir"):
        return keys
    found, _ = newest_complete_checkpoint(keys["output_dir"])
    return keys if found is None else {**keys, "resume_from_checkpoint": str(found)}


@contextmanager
def dynamic_trainer(stage: str, run: RunFile) -> Iterator[list[Any]]:
    """Within the block the workflow of `stage` makes its Trainer with DataFlex in front. Yields the trainers it has made."""
    from dataflex.train.trainer.weight_trainer import WeightTrainer

    module_name, name = TRAINERS[stage]
    module = import_module(module_name)
    original = getattr(module, name)
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        made.append(WeightTrainer.over(original)(*args, dataflex=run.dataflex, **kwargs))
        return made[-1]

    setattr(module, name, make)
    try:
        yield made
    finally:
        setattr(module, name, original)
