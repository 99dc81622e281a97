"""LLaMA-Factory as the backend: its own `train`, with DataFlex in front of its Trainer. All that depends on its version is in this file.

LLaMA-Factory's workflow runs as it is; only the Trainer class and the data function that it takes from its module's namespace are replaced
while it runs, and put back afterwards. In a static run the Trainer only keeps its checkpoints more carefully, and the data are LLaMA-Factory's.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex.backends import Sizes, for_scoring
from dataflex.configs.loading import RunFile
from dataflex.configs.secrets import protected
from dataflex.configs.values import MAXIMUM, number_problem
from dataflex.core.row_numbers import ROW_COLUMN, Source
from dataflex.core.row_table import HELD_OUT, RowTable, joined
from dataflex.core.state import checkpoint_folders, newest_complete_checkpoint
from dataflex.errors import ConfigError, Problem, TrainingError, listing, nearest
from dataflex.utils.distributed import is_main_process
from dataflex.utils.launching import planned_processes
from dataflex.utils.logging import logger

# Module of each stage's workflow, and the name under which it finds its Trainer.
TRAINERS = {
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "pt": ("llamafactory.train.pt.workflow", "CustomTrainer"),
}
_MOST_HINTS = 20  # unknown keys that are told the nearest valid name; looking for it takes milliseconds each
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
            hint = nearest(key, [*fields, *type(run.dataflex).model_fields]) if len(run.problems) < _MOST_HINTS else ""
            run.add(key, f"is not a key of LLaMA-Factory.{hint}")
        elif isinstance(keys[key], int | float) and (trouble := number_problem(keys[key], maximum=MAXIMUM.get(key))):
            run.add(key, trouble)
    for key in ("model_name_or_path", "output_dir", "dataset"):
        if key not in keys:
            run.add(key, "is required")
    _check_stage(keys, run)
    _check_steps(keys, run)
    _check_data(keys, run)
    _check_rows(keys, run)
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
        run.add("do_train", "is false, so there is nothing to train; set train_type: static")


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
    if not info.is_file():
        return run.add("dataset_dir", f"'{info}' does not exist{', or is no file' if info.exists() else ''}")
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return run.add("dataset_dir", f"'{info}' is not valid JSON: {error.msg} (line {error.lineno})")
    except (OSError, ValueError, RecursionError) as error:
        return run.add("dataset_dir", f"'{info}' cannot be read: {error}")
    if not isinstance(entries, dict):
        return run.add("dataset_dir", f"'{info}' must hold an object: data set names to their descriptions")
    for key in ("dataset", "eval_dataset"):
        for name in _names(keys.get(key)):
            _check_entry(name, key, entries, Path(folder), run)
    return None


def _check_rows(keys: dict[str, Any], run: RunFile) -> None:
    """DataFlex needs to know the rows, and for mixing which data set each came from."""
    kind = run.dataflex.train_type
    if kind != "static" and keys.get("streaming"):
        run.add("streaming", f"cannot be combined with train_type: {kind}: DataFlex needs to know the rows of the data")
    if kind == "dynamic_mix" and keys.get("mix_strategy", "concat") != "concat":
        run.add("mix_strategy", "cannot be combined with train_type: dynamic_mix, which mixes the data sets itself; leave it out")
    if kind == "dynamic_mix" and keys.get("tokenized_path"):
        run.add("tokenized_path", "cannot be combined with train_type: dynamic_mix: its rows do not tell which data set they are from")
    val_size = keys.get("val_size", 0)
    if kind != "static" and isinstance(val_size, (int, float)) and val_size > 1 and len(_names(keys.get("dataset"))) > 1:
        run.add("val_size", f"is a number of rows, and with train_type: {kind} each data set is split alone; give a share below 1")


def _check_entry(name: str, key: str, entries: dict[str, Any], folder: Path, run: RunFile) -> None:
    if name not in entries:
        return run.add(key, f"{folder / 'dataset_info.json'} has no data set '{name}'.{nearest(name, entries)}")
    entry = entries[name]
    if not isinstance(entry, dict):
        return run.add(key, f"{folder / 'dataset_info.json'}: '{name}' must be an object with file_name, formatting, columns, ...")
    path = folder / str(entry.get("file_name", name))
    if not any(remote in entry for remote in _REMOTE_KEYS) and not path.exists():
        run.add(key, f"'{name}': {path} does not exist")
    return None


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return list(map(str, value))
    return [name.strip() for name in str(value).split(",")]


def _check_values(keys: dict[str, Any], run: RunFile) -> None:
    """Let LLaMA-Factory's own classes read the values."""
    from llamafactory.hparams import parser

    alone = {key: value for key, value in keys.items() if key != "ddp_backend"}  # reading it needs the other processes
    try:
        parser._parse_train_args(alone)
    except Exception as error:  # its classes read files and models' names, and raise what that does
        text = str(error).strip().split("\n")[0] or type(error).__name__
        run.add(next((key for key in keys if key in text), ""), text)


def summary(run: RunFile, prepared: Prepared) -> tuple[list[tuple[str, str]], Sizes]:
    """What LLaMA-Factory will do. Rows are counted only after tokenising."""
    keys = prepared.keys
    fixed = run.dataflex.train_step or (keys["max_steps"] if keys.get("max_steps", -1) > 0 else 0)
    world = planned_processes()
    batch = int(keys.get("per_device_train_batch_size", 8)) * int(keys.get("gradient_accumulation_steps", 1)) * world
    lines = [
        ("backend", "llamafactory"),
        ("model", f"{keys['model_name_or_path']}, {keys.get('finetuning_type', 'lora')}, stage {keys.get('stage', 'sft')}"),
        ("data", ", ".join(_names(keys["dataset"]))),
        ("samples per step", f"{batch} ({world} process{'es' if world > 1 else ''})"),
    ]
    return lines, Sizes(None, None, batch, keys.get("num_train_epochs", 3), fixed, fixed or None)


def train(run: RunFile, prepared: Prepared) -> None:
    """Run `llamafactory-cli train` with these keys, with DataFlex in front of its Trainer; in a static training it only keeps the checkpoints."""
    from llamafactory.train.tuner import run_exp

    from dataflex.backends.outputs import record_run
    from dataflex.core.lock import run_lock
    from dataflex.train.trainer.finished import RunFinished, for_command, write_finished

    keys = _on_a_device(protected(prepared.keys))  # transformers pickles the arguments
    keys.setdefault("do_train", True)
    if run.dataflex.train_step:
        keys["max_steps"] = run.dataflex.train_step
    callbacks = [record_run(run, seed=keys.get("seed", 42), overwrite=False)]  # LLaMA-Factory deletes nothing
    static, stage = run.dataflex.train_type == "static", keys.get("stage", "sft")
    with run_lock(keys["output_dir"], active=is_main_process()):
        keys = _with_checkpoint(keys, static=static)
        if stage not in TRAINERS or not keys["do_train"]:
            return run_exp(keys, callbacks)
        with dynamic_trainer(stage, run, prepare=lambda trainer: for_command(trainer, keys)) as made:
            try:
                run_exp(keys, callbacks)
            except RunFinished as finished:
                return logger.warning("%s", finished)
        if not made:
            raise TrainingError("LLaMA-Factory trained without DataFlex; this version takes its Trainer from elsewhere")
        write_finished(made[-1])
    return None


def scoring_trainer(run: RunFile, prepared: Prepared, cache_dir: Path) -> Any:
    """The trainer that LLaMA-Factory's workflow makes, for its signals; the workflow is left before it trains."""
    from llamafactory.train.tuner import run_exp

    run.dataflex = for_scoring(run.dataflex, cache_dir)
    with dynamic_trainer(prepared.keys.get("stage", "sft"), run, leave=True) as made:
        try:
            run_exp({**_on_a_device(prepared.keys), "do_train": True, "output_dir": str(cache_dir)}, [])  # the Trainer makes that folder
        except _Made:
            return made[0]
    raise TrainingError("LLaMA-Factory ran without DataFlex; this version takes its Trainer from elsewhere")


def _on_a_device(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys, with `use_cpu` where there is no GPU: several processes would not know of each other otherwise.

    Raises:
        ConfigError: the file forbids the CPU, and there is nothing else.
    """
    from dataflex.utils.distributed import accelerator_present, unconnected

    if accelerator_present():
        return dict(keys)
    apart = "" if keys.get("use_cpu", True) else unconnected(1)
    if apart:
        raise ConfigError(Problem("", "use_cpu", apart))
    return {"use_cpu": True, **keys}


class _Made(Exception):
    """The trainer is there, and that is all that was wanted."""


def _with_checkpoint(keys: dict[str, Any], *, static: bool) -> dict[str, Any]:
    """LLaMA-Factory goes on from the last checkpoint in output_dir by itself; let it be the last complete one, or none if none is."""
    folder = Path(keys["output_dir"]).expanduser()
    if keys.get("resume_from_checkpoint") is not None or keys.get("overwrite_output_dir") or not checkpoint_folders(folder):
        return keys
    found, skipped = newest_complete_checkpoint(folder, with_state=not static)
    for reason in skipped:
        logger.warning("not resuming: %s", reason)
    if found is None:
        logger.warning("%s holds no checkpoint that can be resumed, so training starts anew", folder)
    guarded = keys.get("stage", "sft") in TRAINERS  # then DataFlex looks at every byte and takes the newest that is whole
    return {**keys, "resume_from_checkpoint": found is not None if guarded or found is None else str(found)}


@contextmanager
def dynamic_trainer(stage: str, run: RunFile, leave: bool = False, prepare: Callable[[Any], Any] = lambda trainer: None) -> Iterator[list[Any]]:
    """Within the block the workflow of `stage` makes its Trainer with DataFlex in front. Yields the trainers it has made.

    Args:
        leave: leave the workflow as soon as there is one.
        prepare: what to do with a trainer that was made.
    """
    from dataflex.train.trainer.by_type import trainer_for

    module_name, name = TRAINERS[stage]
    module = import_module(module_name)
    original, get_dataset = getattr(module, name), module.get_dataset
    static = run.dataflex.train_type == "static"
    made: list[Any] = []
    domains: list[str] = []
    tables: list[RowTable] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        rows = {"domain_names": domains or None, "row_table": joined(tables) if tables else None}
        ours = {} if static else {"dataflex": run.dataflex, **rows}
        made.append(trainer_for(run.dataflex.train_type).over(original)(*args, **ours, **kwargs))
        prepare(made[-1])
        if leave:
            raise _Made
        return made[-1]

    def get(template: Any, model_args: Any, data_args: Any, training_args: Any, stage: str, *args: Any, **kwargs: Any) -> Any:
        names = data_args.dataset or []
        if static:
            return get_dataset(template, model_args, data_args, training_args, stage, *args, **kwargs)
        if not names or data_args.streaming or data_args.tokenized_path or data_args.mix_strategy != "concat":
            tables[:] = [RowTable(unknown="LLaMA-Factory reads them from tokenized_path, or mixes them")]
            return get_dataset(template, model_args, data_args, training_args, stage, *args, **kwargs)
        parts = []
        for one in _one_by_one(data_args):
            part = read(template, model_args, one, training_args, stage, *args, **kwargs)
            start = sum(source.rows for table in tables for source in table.sources)
            part["train_dataset"], table = _numbered(part["train_dataset"], start, model_args, one, training_args, stage)
            tables.append(table)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        domains[:] = names
        return _joined(parts)

    def read(template: Any, model_args: Any, data_args: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return get_dataset(template, model_args, data_args, *args, **kwargs)
        except RuntimeError as error:  # such as too few tokens for a packed row
            raise TrainingError(f"data set '{data_args.dataset[0]}': {error}") from error

    setattr(module, name, make)
    module.get_dataset = get  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        setattr(module, name, original)
        module.get_dataset = get_dataset  # type: ignore[attr-defined]


def _one_by_one(data_args: Any) -> Iterator[Any]:
    """Arguments for each data set alone, since LLaMA-Factory forgets which one a row came from when it joins them."""
    for number, name in enumerate(data_args.dataset):
        one = copy.copy(data_args)
        one.dataset, one.eval_dataset = [name], data_args.eval_dataset if number == 0 else None
        yield one


def _numbered(rows: Any, start: int, model_args: Any, data_args: Any, training_args: Any, stage: str) -> tuple[Any, RowTable]:
    """Tokenised rows with the user's numbers, and the table of his rows.

    LLaMA-Factory forgets which rows it leaves out. They are told by going its way again up to tokenising: its reader (cached by `datasets`), its
    split, and its rule of what a conversation is.
    """
    from llamafactory.data.data_utils import split_dataset

    name = data_args.dataset[0]
    if data_args.packing:
        return rows, RowTable(unknown="LLaMA-Factory packs them; set packing: false")
    read = _aligned_rows(data_args, model_args, training_args, stage)
    if read is None:
        return rows, RowTable(unknown=f"LLaMA-Factory draws them at random (num_samples of '{name}')")
    before, total = read
    numbered = before.add_column(ROW_COLUMN, np.arange(len(before)))
    split, _ = split_dataset(numbered, None, data_args, training_args.seed)
    reasons = np.full(len(before), HELD_OUT, dtype=object)
    given = np.asarray(split["train"][ROW_COLUMN])
    valid = np.array([stage == "pt" or _is_conversation(row) for row in split["train"].select_columns(["_prompt", "_response"])], dtype=bool)
    reasons[given] = [None if usable else "not a conversation of user and assistant turns" for usable in valid]
    numbers = given[valid]
    if len(numbers) != len(rows):
        return rows, RowTable(unknown="LLaMA-Factory left out other rows than expected")
    table = pa.table(
        {
            "row": np.arange(len(before)),
            "dataset": pa.array([name] * len(before), pa.string()).dictionary_encode(),
            "reason": pa.array(reasons, pa.string()),
        }
    )
    return rows.add_column(ROW_COLUMN, numbers + start), RowTable([Source(name, total)], table)


def _is_conversation(row: dict[str, Any]) -> bool:
    """LLaMA-Factory's rule: it drops the others."""
    return len(row["_prompt"]) % 2 == 1 and len(row["_response"]) == 1


def _aligned_rows(data_args: Any, model_args: Any, training_args: Any, stage: str) -> tuple[Any, int] | None:
    """A data set as LLaMA-Factory reads it, and how many rows it has without `max_samples`; None if rows are drawn at random."""
    from llamafactory.data import loader
    from llamafactory.data.parser import get_dataset_list

    if any(entry.num_samples is not None for entry in get_dataset_list(data_args.dataset, data_args.dataset_dir)):
        return None

    def read(args: Any) -> Any:
        with training_args.main_process_first(desc="number rows", local=not args.data_shared_file_system):
            return loader._get_merged_dataset(args.dataset, model_args, args, training_args, stage)

    rows = read(data_args)
    if data_args.max_samples is None or len(rows) < data_args.max_samples:
        return rows, len(rows)
    whole = copy.copy(data_args)
    whole.max_samples = None
    return rows, len(read(whole))


def _joined(modules: list[dict[str, Any]]) -> dict[str, Any]:
    """Data sets one after the other, with their number as domain."""
    from datasets import concatenate_datasets

    from dataflex.train.data.sample_meta import DOMAIN_COLUMN

    parts = [part["train_dataset"].add_column(DOMAIN_COLUMN, [number] * len(part["train_dataset"])) for number, part in enumerate(modules)]
    evaluation = [part["eval_dataset"] for part in modules if part.get("eval_dataset") is not None]
    joined = {**modules[0], "train_dataset": concatenate_datasets(_aligned(parts))}
    return {**joined, "eval_dataset": concatenate_datasets(_aligned(evaluation))} if len(evaluation) > 1 else joined


def _aligned(parts: list[Any]) -> list[Any]:
    """Data sets whose lists of integers are equally wide: LLaMA-Factory's `neat_packing` changes the width for the rest of the process, and
    rows tokenised before and kept by `datasets` have the other one."""
    for name in parts[0].column_names:
        kinds = {getattr(getattr(part.features[name], "feature", None), "dtype", ""): part.features[name] for part in parts}
        if len(kinds) > 1 and all(kind.startswith("int") for kind in kinds):
            widest = kinds[max(kinds, key=lambda kind: int(kind.removeprefix("int")))]
            parts = [part if part.features[name] == widest else part.cast_column(name, widest) for part in parts]
    return parts
