"""What is wrong with a YAML file for the trl backend, found without loading the model. A key that cannot be honoured is an error."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from dataflex.backends import TOKENISED, Sizes
from dataflex.backends.datasets.cache import cache_folder
from dataflex.backends.datasets.find import find_datasets
from dataflex.backends.datasets.rows import load_rows
from dataflex.backends.datasets.spec import DOMAIN_ROLE, DatasetSpec
from dataflex.backends.options import NOT_HONOURED, WITHOUT_EFFECT, TrlOptions
from dataflex.backends.templates import resolve_template
from dataflex.configs.loading import RunFile, checked
from dataflex.configs.values import MAXIMUM, number_problem, wording
from dataflex.core.lock import any_record
from dataflex.core.state import checkpoint_flaws, checkpoint_folders, newest_complete_checkpoint
from dataflex.errors import ConfigError, listing, nearest
from dataflex.train.data.sample_meta import DOMAIN_COLUMN, column_values
from dataflex.utils.launching import planned_processes
from dataflex.utils.limited import limited

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

_MOST_HINTS = 20  # unknown keys that are told the nearest valid name; looking for it takes milliseconds each
_SECONDS_TO_RENDER = 3

_ABSENT = "(absent)"  # stands in for a required key, so that the other keys can still be checked

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
    rest = {key: value for key, value in rest.items() if key not in WITHOUT_EFFECT}
    trainer_keys = _check_trainer_keys(rest, run)
    options = checked(TrlOptions, own, run, stand_ins={"model_name_or_path": _ABSENT, "dataset": [_ABSENT]})
    if options is None:
        return None
    folder = _resolve(options.dataset_dir, run)
    train = _find(options.dataset if options.dataset != [_ABSENT] else [], folder, options, "dataset", run)
    evaluation = _find(options.eval_dataset, folder, options, "eval_dataset", run)
    if options.model_name_or_path != _ABSENT:
        found = [*train, *evaluation]
        _check_model(options, run, chat=not found or any(spec.needs_template for spec in found))
    _check_adapter(options, run)
    if run.dataflex.train_type == "dynamic_mix" and options.stage == "sft" and (options.packing or options.neat_packing):
        key = "packing" if options.packing else "neat_packing"
        run.add(key, "cannot be combined with train_type: dynamic_mix: SFTTrainer packs rows of several domains together; packed text is stage: pt")
    before = len(run.problems)
    _check_schedule(options, trainer_keys, run)
    if len(run.problems) == before and len(trainer_keys) == len(rest) and "output_dir" in rest:
        _check_construction(trainer_keys, run)
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
            hint = nearest(key, known) if len(run.problems) < _MOST_HINTS else ""
            run.add(key, f"is not a known key.{hint} `dataflex-cli reference` lists all keys")
        elif message := _value_problem(key, value, fields[key].type):
            run.add(key, message)
        else:
            accepted[key] = _converted(value, fields[key].type)
    if "output_dir" not in keys:
        run.add("output_dir", "is required")
    return accepted


def _value_problem(key: str, value: Any, annotation: Any) -> str:
    """What is wrong with a value of a TrainingArguments field, or an empty string."""
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return ""
    choices = _choices(annotation)
    if choices and isinstance(value, str | bool):
        text = "no" if value is False else str(value)  # YAML reads a bare `no` as false
        return "" if text in choices else f"{value!r} is not valid.{nearest(text, choices) or f' Allowed: {listing(choices)}'}"
    try:
        number = TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        return wording(error.errors(include_url=False)[0])
    return number_problem(number, _MINIMUM.get(key), MAXIMUM.get(key)) if isinstance(number, int | float) else ""


def _choices(annotation: Any) -> list[str]:
    """The values of a field that is an enumeration."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union else (annotation,)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    return [str(member.value) for member in enums[0]] if enums else []


def _converted(value: Any, annotation: Any) -> Any:
    """A number or truth value written as text (`"1e-4"`), as what the field holds."""
    return TypeAdapter(annotation).validate_python(value) if isinstance(value, str) and not _choices(annotation) else value


def _check_construction(keys: dict[str, Any], run: RunFile) -> None:
    """Let the Trainer's own configuration class check what its fields say together."""
    try:
        from dataflex.backends.trl import training_arguments

        training_arguments(keys, None, run)
    except Exception as error:  # fields such as fsdp_config read files, and raise what reading them does
        text = str(error) or type(error).__name__
        run.add(next((key for key in keys if key in text), ""), " ".join(text.removeprefix("--").split()))


def _check_model(options: TrlOptions, run: RunFile, *, chat: bool) -> None:
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = model_path(options.model_name_or_path, run)
    local = Path(name).is_dir()
    parent = Path(os.path.expanduser(name)).parent
    near = nearest(Path(name).name, [path.name for path in parent.iterdir() if path.is_dir()]) if parent.is_dir() and not local else ""
    if not local and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        return run.add("model_name_or_path", f"no folder '{name}'.{near}" if near else f"no folder '{name}'")
    if local and not (Path(name) / "config.json").is_file():
        return run.add("model_name_or_path", f"'{name}' holds no config.json; a model folder has one")
    source: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "revision": options.model_revision, "cache_dir": options.cache_dir}
    try:
        config = AutoConfig.from_pretrained(name, **source)
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        what = "holds no readable model configuration" if local else "is no folder, and no model of that name can be had from the hub"
        return run.add("model_name_or_path", f"'{name}' {what}: {_first_line(error).rstrip('.')}.{near}".removesuffix("."))
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not options.trust_remote_code:
        run.add("model_name_or_path", f"'{name}' is a {config.model_type} model, not a causal language model")
    else:
        _check_modules(options, config, run)
    if local and not options.train_from_scratch and not any(Path(name).glob("*.safetensors")) and not any(Path(name).glob("*.bin")):
        run.add("model_name_or_path", f"'{name}' holds no weights (*.safetensors or *.bin); set train_from_scratch: true to start from random ones")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except Exception as error:
        why = f": {_first_line(error).rstrip('.')}" if list(Path(name).glob("tokenizer*")) else ""
        return run.add("model_name_or_path", f"'{name}' holds no readable tokenizer{why}. Save it there with tokenizer.save_pretrained('{name}')")
    if options.stage == "sft" and (chat or options.template):
        _check_template(options, tokenizer, run)
    return None


def _check_template(options: TrlOptions, tokenizer: Any, run: RunFile) -> None:
    try:
        template = resolve_template(options.template, tokenizer.chat_template, run.folder)
    except ValueError as error:
        return run.add("template", str(error))
    trouble = limited(lambda: _template_trouble(template, tokenizer), _SECONDS_TO_RENDER)
    if trouble is None:
        run.add("template", f"does not come to an end within {_SECONDS_TO_RENDER} seconds for one short message, or takes too much memory")
    elif trouble:
        run.add("template", trouble)
    return None


def _template_trouble(template: str, tokenizer: Any) -> str:
    """What is wrong with a template, found by rendering one message; an empty string if nothing is."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        return f"is not a valid Jinja template (line {error.lineno}): {error.message}"
    except TemplateError:  # a template may refuse this conversation and take others; the rows will tell
        return ""
    except Exception as error:  # whatever its expressions raise
        loads = "; a template cannot load others (include, import, extends)" if "no loader" in str(error) else ""
        return f"cannot be rendered: {type(error).__name__}: {_first_line(error)}{loads}"
    return ""


def _check_adapter(options: TrlOptions, run: RunFile) -> None:
    name = options.adapter_name_or_path
    if name is None or (Path(name) / "adapter_config.json").is_file():
        return
    if Path(name).is_dir():
        run.add("adapter_name_or_path", f"'{name}' holds no adapter_config.json; a LoRA adapter's folder has one")
    elif name.count("/") != 1 or name.startswith(("/", ".", "~")):
        run.add("adapter_name_or_path", f"no folder '{name}'")


def _check_modules(options: TrlOptions, config: Any, run: RunFile) -> None:
    """The keys that name parts of the model, on a model without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    number = options.freeze_trainable_layers
    if options.finetuning_type == "freeze" and layers is not None and not 0 < abs(number) <= layers:
        run.add("freeze_trainable_layers", f"{number} is not valid: the model has {layers} layers. Allowed: 1 to {layers}, or -1 to -{layers}")
    wanted = {"lora_target": options.lora_target, "additional_target": options.additional_target} if options.finetuning_type == "lora" else {}
    wanted |= {"freeze_extra_modules": options.freeze_extra_modules} if options.finetuning_type == "freeze" else {}
    wanted = {key: names for key, names in wanted.items() if names and names != ["all"]}
    if not wanted or options.trust_remote_code:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    paths = [name for name, _ in model.named_modules()]
    parts = {part for path in paths for part in path.split(".") if part and not part.isdigit()}
    for key, names in wanted.items():
        for name in names:
            if name not in parts and not any(path == name or path.endswith(f".{name}") for path in paths):
                run.add(key, f"the model has no module '{name}'.{nearest(name, parts)} Its modules: {listing(parts)}")


def _check_schedule(options: TrlOptions, keys: dict[str, Any], run: RunFile) -> None:
    steps, maximum = run.dataflex.train_step, keys.get("max_steps", -1)
    if steps and maximum > 0 and maximum != steps:
        run.add("train_step", f"is {steps} but max_steps is {maximum}; both set the total number of optimizer steps")
    saving, evaluating = (keys.get(key) or "no" for key in ("save_strategy", "eval_strategy"))
    saving = saving if "save_strategy" in keys else "steps"
    if keys.get("load_best_model_at_end") and saving != evaluating and saving != "best":
        run.add("load_best_model_at_end", f"needs eval_strategy and save_strategy to be equal, but they are {evaluating} and {saving}")
    if options.warmup_ratio is not None and "warmup_steps" in keys:
        run.add("warmup_ratio", "cannot be combined with warmup_steps; use one of them")
    wanted = keys.get("eval_strategy", "no")
    if options.early_stopping_steps and not (options.eval_dataset or options.val_size):
        run.add("early_stopping_steps", "needs evaluation data; set eval_dataset or val_size, and eval_strategy: steps or epoch")
    elif options.early_stopping_steps and wanted in ("no", False):
        run.add("early_stopping_steps", "needs evaluations during training; set eval_strategy: steps or epoch")
    if wanted not in ("no", False) and not (options.eval_dataset or options.val_size):
        run.add("eval_strategy", f"is {wanted!r} but there is nothing to evaluate on; set eval_dataset or val_size")


def _check_output_dir(options: TrlOptions, keys: dict[str, Any], run: RunFile) -> None:
    if "output_dir" not in keys:
        return
    if not keys["output_dir"]:
        return run.add("output_dir", "must name a folder")
    folder = Path(os.path.expanduser(keys["output_dir"]))
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return run.add(
            "output_dir", f"'{folder}' cannot be written: '{existing}' is {'write-protected' if existing.is_dir() else 'a file, not a folder'}"
        )
    resume = resume_value(keys.get("resume_from_checkpoint"))
    if holds_run(folder) and not resume and not options.overwrite_output_dir:
        found, _ = newest_complete_checkpoint(folder, with_state=run.dataflex.train_type != "static")
        ways = "Resume it with resume_from_checkpoint: true, start" if found else "It has no checkpoint that can be resumed: start"
        run.add("output_dir", f"'{folder}' already holds a run. {ways} anew with overwrite_output_dir: true, or use another folder")
    if resume and options.overwrite_output_dir:
        return run.add("overwrite_output_dir", "would delete the checkpoint to resume from; use one of them")
    return _check_checkpoint(resume, folder, run)


def holds_run(folder: Path) -> bool:
    """Whether a run has left something in the folder that a new one would write over."""
    return folder.is_dir() and (bool(checkpoint_folders(folder)) or any_record(folder) or (folder / "trainer_state.json").exists())


def resume_value(value: str | bool | None) -> str | bool | None:
    """The key `resume_from_checkpoint`: a folder, or whether to take the newest checkpoint; text on a command line may mean either."""
    return value.lower() == "true" if isinstance(value, str) and value.lower() in ("true", "false") else value


def _check_checkpoint(resume: str | bool | None, folder: Path, run: RunFile) -> None:
    """Whether there is a checkpoint to resume from, as far as names, sizes and DataFlex's state tell; training reads every byte of it."""
    dynamic = run.dataflex.train_type != "static"
    if resume is True:
        found, skipped = newest_complete_checkpoint(folder, with_state=dynamic)
        if found is None:
            why = "".join(f"; {reason}" for reason in skipped)
            more = " and set overwrite_output_dir: true, since the folder holds a run," if holds_run(folder) else ""
            none = f"is true, but '{folder}' holds no checkpoint that can be resumed{why}. Leave the key out{more} to start anew"
            run.add("resume_from_checkpoint", none)
    elif resume and not (Path(resume) / "trainer_state.json").is_file():
        run.add("resume_from_checkpoint", f"'{resume}' is not a complete checkpoint (no trainer_state.json)")
    elif resume:
        for flaw in checkpoint_flaws(Path(resume), with_state=dynamic, named=True):
            run.add("resume_from_checkpoint", flaw)


def _find(names: list[str], folder: Path, options: TrlOptions, key: str, run: RunFile) -> list[DatasetSpec]:
    try:
        specs = find_datasets(names, folder, stage=options.stage, key=key, allow_outside=options.allow_outside_dataset_dir) if names else []
    except ConfigError as error:
        run.add_all(error.problems)
        return []
    return [_with_domains(spec, options.domain_column, run) for spec in specs] if options.domain_column and key == "dataset" else specs


def _with_domains(spec: DatasetSpec, column: str, run: RunFile) -> DatasetSpec:
    """The spec with its domain column, if the first row has one."""
    with_column = dataclasses.replace(spec, columns={**spec.columns, DOMAIN_ROLE: column})
    first = load_rows(dataclasses.replace(with_column, num_samples=None), 1)
    if len(first) and first[0][column] is None:
        run.add("domain_column", f"'{spec.path}' has no column '{column}' in its first row")
        return spec
    return with_column


def _resolve(path: str, run: RunFile) -> Path:
    """A path as given, or relative to the YAML file when that exists."""
    given = Path(os.path.expanduser(path))
    return given if given.exists() or not (run.folder / given).exists() else run.folder / given


def model_path(name: str, run: RunFile) -> str:
    resolved = _resolve(name, run)
    return str(resolved) if resolved.is_dir() else name


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _steps(rows: int, batch: int, keys: dict[str, Any]) -> int:
    """Optimizer steps as the Trainer counts them from epochs."""
    accumulation = keys.get("gradient_accumulation_steps", 1)
    rounded = math.floor if keys.get("dataloader_drop_last") else math.ceil
    micro_batches = rounded(rows / (batch // accumulation))
    return math.ceil(max(math.ceil(micro_batches / accumulation), 1) * keys.get("num_train_epochs", 3))


def summary(run: RunFile, checked: Checked) -> tuple[list[tuple[str, str]], Sizes]:
    """What the run will do, and its sizes."""
    from dataflex.backends.trl import load_data, load_tokenizer

    config, keys, options = run.dataflex, checked.trainer_keys, checked.options
    with run.locating():
        data, evaluation = load_data(checked, load_tokenizer(options, run))
    rows, eval_rows = len(data.dataset), _number_of_rows(evaluation)
    world = planned_processes()
    batch = keys.get("per_device_train_batch_size", 8) * keys.get("gradient_accumulation_steps", 1) * world
    fixed = config.train_step or (keys["max_steps"] if keys.get("max_steps", -1) > 0 else 0)
    read = sum(source.rows for source in data.table.sources)
    packed = " packed" if options.packing or options.neat_packing or (options.stage == "pt" and options.packing is not False) else ""
    left_out = [("left out", f"{number} rows: {reason}") for reason, number in data.dropped.items()]
    counts: Any = np.bincount(column_values(data.dataset, DOMAIN_COLUMN), minlength=len(data.names)) if options.domain_column else []
    held_out = f"{eval_rows}{packed} rows of the above, held out" if options.val_size else "none"
    named = f"{', '.join(spec.shown for spec in checked.evaluation)}: {eval_rows}{packed} rows"
    warmup = f"{options.warmup_ratio:.0%} of the steps" if options.warmup_ratio else keys.get("warmup_steps", 0)
    lines = [
        ("model", f"{options.model_name_or_path}, {options.finetuning_type}, stage {options.stage}"),
        ("data", f"{', '.join(spec.shown for spec in checked.train)}: {rows}{packed} rows{f' to train on, of {read}' if read != rows else ''}"),
        *left_out,
        *([("domains", ", ".join(f"{name} {count} rows" for name, count in zip(data.names, counts, strict=True)))] if options.domain_column else []),
        ("evaluation data", named if options.eval_dataset else held_out),
        ("samples per step", f"{batch} ({world} process{'es' if world > 1 else ''})"),
        ("warmup_steps", f"{warmup} (learning rate; not the same as warmup_step)"),
        (TOKENISED, f"kept for training in {cache_folder()}"),
    ]
    return lines, Sizes(
        rows=rows,
        eval_rows=eval_rows,
        batch=batch,
        epochs=keys.get("num_train_epochs", 3),
        fixed=fixed,
        steps=_steps(rows, batch, keys),
        domains=data.names,
    )


def _number_of_rows(evaluation: Any) -> int:
    if evaluation is None:
        return 0
    return sum(map(len, evaluation.values())) if isinstance(evaluation, dict) else len(evaluation)
