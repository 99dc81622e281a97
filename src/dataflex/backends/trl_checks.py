"""What is wrong with a YAML file for the trl backend, found without loading the model. A key that cannot be honoured is an error."""

from __future__ import annotations

import dataclasses
import enum
import os
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dataflex.backends.data import DatasetSpec, find_datasets
from dataflex.backends.options import NOT_HONOURED, WITHOUT_EFFECT, TrlOptions
from dataflex.backends.templates import resolve_template
from dataflex.configs.loading import RunFile, checked
from dataflex.errors import ConfigError, listing, nearest

# SFTConfig fields that this backend sets itself from other keys.
_DERIVED = {
    "max_length": "cutoff_len",
    "dataset_num_proc": "preprocessing_num_workers",
    "completion_only_loss": "train_on_prompt",
    "assistant_only_loss": "train_on_prompt",
    "chat_template_path": "template",
    "dataset_text_field": "the columns of dataset_info.json",
    "dataset_kwargs": "the data keys",
    "model_init_kwargs": "dtype, flash_attn and model_revision",
    "eval_packing": "packing",
    "padding_free": "packing",
    "pad_token": "the tokenizer",
    "eos_token": "the tokenizer",
    "truncation_mode": "cutoff_len",
    "shuffle_dataset": "seed",
}

_MINIMUM = {
    "learning_rate": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": -1,
    "warmup_steps": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
    "save_total_limit": 1,
    "max_grad_norm": 0,
    "weight_decay": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
}


@dataclasses.dataclass
class Checked:
    """What `check` found out.

    Attributes:
        options: the backend's keys.
        trainer_keys: keys for SFTConfig, as given.
        train, evaluation: the data sets.
        notes: things worth telling that are no problem.
    """

    options: TrlOptions
    trainer_keys: dict[str, Any]
    train: list[DatasetSpec]
    evaluation: list[DatasetSpec]
    notes: list[str]


def check(run: RunFile) -> Checked | None:
    """Find what is wrong with the backend's keys; problems are noted in `run`. None if there is too little to go on."""
    own = {key: value for key, value in run.backend.items() if key in TrlOptions.model_fields}
    rest = {key: value for key, value in run.backend.items() if key not in own}
    notes = [f"{key} has no effect: {WITHOUT_EFFECT[key]}" for key in rest if key in WITHOUT_EFFECT]
    trainer_keys = _check_trainer_keys({key: value for key, value in rest.items() if key not in WITHOUT_EFFECT}, run)
    options = checked(TrlOptions, own, run)
    if options is None:
        return None
    folder = _resolve(options.dataset_dir, run)
    train = _find(options.dataset, folder, options, "dataset", run)
    evaluation = _find(options.eval_dataset, folder, options, "eval_dataset", run)
    if not run.problems:
        _check_construction(trainer_keys, run)
    _check_model(options, run)
    _check_schedule(options, trainer_keys, run)
    _check_output_dir(options, trainer_keys, run)
    return Checked(options, trainer_keys, train, evaluation, notes)


def _check_trainer_keys(keys: dict[str, Any], run: RunFile) -> dict[str, Any]:
    from trl import SFTConfig

    from dataflex.configs.schema import DataflexConfig

    fields = {field.name: field for field in dataclasses.fields(SFTConfig)}
    known = [name for name in fields if name not in _DERIVED] + [*TrlOptions.model_fields, *DataflexConfig.model_fields]
    accepted = {}
    for key, value in keys.items():
        if key in _DERIVED:
            run.add(key, f"is set from {_DERIVED[key]}; set that instead")
        elif key in NOT_HONOURED:
            run.add(key, f"cannot be honoured: {NOT_HONOURED[key]}")
        elif key not in fields:
            run.add(key, f"is not a known key.{nearest(key, known)} `dataflex-cli reference` lists all keys")
        elif message := _value_problem(key, value, fields[key].type):
            run.add(key, message)
        else:
            accepted[key] = value
    if "output_dir" not in keys:
        run.add("output_dir", "is required")
    return accepted


def _value_problem(key: str, value: Any, annotation: Any) -> str:
    """What is wrong with a value of a TrainingArguments field, or an empty string."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union else (annotation,)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    if enums and isinstance(value, str | bool):
        choices = [str(member.value) for member in enums[0]]
        text = "no" if value is False else str(value)  # YAML reads a bare `no` as false
        return "" if text in choices else f"{value!r} is not valid.{nearest(text, choices)} Allowed: {listing(choices)}"
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        return f"{value!r} is not valid: {error.errors(include_url=False)[0]['msg']}"
    minimum = _MINIMUM.get(key)
    if minimum is not None and isinstance(value, int | float) and value < minimum:
        return f"{value} is not valid: must be at least {minimum}"
    return ""


def _check_construction(keys: dict[str, Any], run: RunFile) -> None:
    """Let the Trainer's own configuration class check what its fields say together."""
    try:
        from dataflex.backends.trl import training_arguments

        training_arguments(keys, None, run)
    except (ValueError, TypeError, ImportError) as error:
        run.add(next((key for key in keys if key in str(error)), ""), str(error).split("\n")[0])


def _check_model(options: TrlOptions, run: RunFile) -> None:
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = model_path(options.model_name_or_path, run)
    local = Path(name).is_dir()
    if not local and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        return run.add("model_name_or_path", f"no folder '{name}'")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code, revision=options.model_revision)
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        return run.add("model_name_or_path", f"'{name}' holds no readable model configuration: {_first_line(error)}")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not options.trust_remote_code:
        run.add("model_name_or_path", f"'{name}' is a {config.model_type} model, not a causal language model")
    if local and not options.train_from_scratch and not any(Path(name).glob("*.safetensors")) and not any(Path(name).glob("*.bin")):
        run.add("model_name_or_path", f"'{name}' holds no weights (*.safetensors or *.bin); set train_from_scratch: true to start from random ones")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code, revision=options.model_revision)
    except Exception as error:
        return run.add("model_name_or_path", f"'{name}' holds no readable tokenizer: {_first_line(error)}")
    if options.stage == "sft":
        try:
            resolve_template(options.template, tokenizer.chat_template, run.folder)
        except ValueError as error:
            run.add("template", str(error))
    return None


def _check_schedule(options: TrlOptions, keys: dict[str, Any], run: RunFile) -> None:
    steps, maximum = run.dataflex.train_step, keys.get("max_steps", -1)
    if steps and maximum > 0 and maximum != steps:
        run.add("train_step", f"is {steps} but max_steps is {maximum}; both set the total number of optimizer steps")
    if options.warmup_ratio is not None and "warmup_steps" in keys:
        run.add("warmup_ratio", "cannot be combined with warmup_steps; use one of them")
    if options.early_stopping_steps and not (options.eval_dataset or options.val_size):
        run.add("early_stopping_steps", "needs eval_dataset or val_size")
    wanted = keys.get("eval_strategy", "no")
    if wanted not in ("no", False) and not (options.eval_dataset or options.val_size):
        run.add("eval_strategy", f"is {wanted!r} but there is nothing to evaluate on; set eval_dataset or val_size")


def _check_output_dir(options: TrlOptions, keys: dict[str, Any], run: RunFile) -> None:
    if "output_dir" not in keys:
        return
    folder = Path(keys["output_dir"])
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return run.add("output_dir", f"'{folder}' cannot be written: {existing} is {'not writable' if existing.is_dir() else 'a file'}")
    resume = keys.get("resume_from_checkpoint")
    holds_run = folder.is_dir() and (any(folder.glob("checkpoint-*")) or (folder / "dataflex").exists() or (folder / "trainer_state.json").exists())
    if holds_run and not resume and not options.overwrite_output_dir:
        run.add(
            "output_dir",
            f"'{folder}' already holds a run. Resume it with resume_from_checkpoint: true, start anew with overwrite_output_dir: true, or use another",
        )
    if isinstance(resume, str) and resume.lower() not in ("true", "false") and not (Path(resume) / "trainer_state.json").is_file():
        run.add("resume_from_checkpoint", f"'{resume}' is not a complete checkpoint (no trainer_state.json)")
    if resume and options.overwrite_output_dir:
        run.add("overwrite_output_dir", "would delete the checkpoint to resume from; use one of them")
    return None


def _find(names: list[str], folder: Path, options: TrlOptions, key: str, run: RunFile) -> list[DatasetSpec]:
    try:
        return find_datasets(names, folder, stage=options.stage, key=key) if names else []
    except ConfigError as error:
        run.add_all(error.problems)
        return []


def _resolve(path: str, run: RunFile) -> Path:
    """A path as given, or relative to the YAML file when that exists."""
    given = Path(path).expanduser()
    return given if given.exists() or not (run.folder / given).exists() else run.folder / given


def model_path(name: str, run: RunFile) -> str:
    resolved = _resolve(name, run)
    return str(resolved) if resolved.is_dir() else name


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
