"""The light backend: TRL's SFTTrainer from LLaMA-Factory's keys. `trl_checks.py` finds problems beforehand; `train` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.backends import for_scoring
from dataflex.backends.datasets.encode import Encoded, encode_sft, encode_text
from dataflex.backends.datasets.packing import pack_conversations
from dataflex.backends.datasets.rendering import chat_format
from dataflex.backends.datasets.spec import DatasetSpec
from dataflex.backends.options import TrlOptions
from dataflex.backends.templates import fit_tokenizer, resolve_template
from dataflex.backends.trl_checks import Checked, check, model_path, resume_value, summary
from dataflex.configs.loading import RunFile
from dataflex.configs.secrets import protected
from dataflex.core.row_numbers import ROW_COLUMN, RowNumbers
from dataflex.errors import ConfigError, Problem
from dataflex.utils.distributed import is_main_process
from dataflex.utils.logging import logger, warn_once

__all__ = ["check", "scoring_trainer", "summary", "train"]

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig


def training_arguments(keys: dict[str, Any], options: TrlOptions | None, run: RunFile) -> SFTConfig:
    """SFTConfig from the user's keys. Fields the user left out have the defaults of `TrainingArguments`, not TRL's."""
    import torch
    from transformers import TrainingArguments
    from trl import SFTConfig

    from dataflex.utils.distributed import accelerator_present

    ours = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    trl_defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    values = {name: default for name, default in ours.items() if default != trl_defaults[name] and default is not dataclasses.MISSING}
    values |= {key: "no" if value is False and key.endswith("_strategy") else value for key, value in keys.items()}
    if not accelerator_present():
        values.setdefault("use_cpu", True)  # otherwise several processes would not know of each other
    if "dataloader_pin_memory" not in keys:
        values["dataloader_pin_memory"] = torch.cuda.is_available()  # otherwise torch warns that there is nothing to pin for
    values |= _checkpointing(keys, enabled=options is not None and not options.disable_gradient_checkpointing, names=ours)
    if options is None:
        return SFTConfig(**values)
    values |= protected({key: value for key, value in values.items() if isinstance(value, str)})  # transformers pickles the arguments
    if options.warmup_ratio is not None:
        values["warmup_steps"] = options.warmup_ratio  # transformers 5 reads a value below 1 as a ratio
    if options.early_stopping_steps:
        values.setdefault("metric_for_best_model", "loss")
    if run.dataflex.train_step:
        values["max_steps"] = run.dataflex.train_step
    packing = packs_conversations(options)
    return SFTConfig(**values, max_length=options.cutoff_len, packing=packing, dataset_kwargs={"skip_prepare_dataset": True})


def _checkpointing(keys: dict[str, Any], *, enabled: bool, names: Container[str]) -> dict[str, Any]:
    """Activation checkpointing under the name that this transformers has for it; the other one warns.

    Args:
        keys: the user's; either name counts.
        enabled: what to do if the user's keys do not say.
        names: fields of `TrainingArguments`.
    """
    values: dict[str, Any] = {}
    for suffix, default in (("", enabled), ("_kwargs", None)):
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        values[old] = keys.get(new, keys.get(old, default))
        if new in names:
            values |= {new: values[old], old: None}
    return values


def train(run: RunFile, prepared: Checked) -> None:
    """Train, evaluate and write everything into `output_dir`."""
    from dataflex.backends.outputs import finish, record_rows, record_run
    from dataflex.core.lock import run_lock
    from dataflex.train.trainer.finished import RunFinished, for_command, write_finished

    options = prepared.options
    own = Path(prepared.trainer_keys["output_dir"]) / "dataflex"
    if options.overwrite_output_dir and own.is_symlink():
        own.unlink()  # before the lock, which would be taken where it leads to
    with run_lock(prepared.trainer_keys["output_dir"], active=is_main_process()):
        args = training_arguments(prepared.trainer_keys, options, run)
        trainer, data = _assembled(run, prepared, args)
        for_command(trainer, prepared.trainer_keys)
        trainer.add_callback(record_run(run, seed=args.seed, overwrite=options.overwrite_output_dir))
        if run.dataflex.train_type == "static":
            trainer.add_callback(record_rows(data.table, RowNumbers.of_dataset(data.dataset, sources=data.table.sources)))
        try:
            result = trainer.train(resume_from_checkpoint=resume_value(args.resume_from_checkpoint))
        except RunFinished as finished:
            return logger.warning("%s", finished)
        finish(trainer, result, plot=options.plot_loss)
        write_finished(trainer)
    return None


def scoring_trainer(run: RunFile, prepared: Checked, cache_dir: Path) -> Any:
    """A trainer that is asked for signals and does not train."""
    args = training_arguments(prepared.trainer_keys, prepared.options, run)
    args.output_dir = str(cache_dir)  # the Trainer makes that folder
    run.dataflex = for_scoring(run.dataflex, cache_dir)
    return _assembled(run, prepared, args)[0]


def _assembled(run: RunFile, prepared: Checked, args: SFTConfig) -> tuple[Any, Encoded]:
    """The trainer with its data and model, and the data."""
    from transformers import set_seed

    tokenizer = load_tokenizer(prepared.options, run)
    with run.locating():
        train_data, eval_data = load_data(prepared, tokenizer)
        set_seed(args.seed)
        return make_trainer(run, prepared.options, args, tokenizer, train_data, eval_data), train_data


def make_trainer(run: RunFile, options: TrlOptions, args: SFTConfig, tokenizer: Any, train_data: Encoded, eval_data: Any) -> Any:
    """TRL's SFTTrainer with DataFlex in front, which in a static training only keeps the checkpoints."""
    from transformers import EarlyStoppingCallback
    from trl import SFTTrainer

    from dataflex.train.trainer.by_type import trainer_for

    peft_config = _lora_config(options) if options.finetuning_type == "lora" and not options.adapter_name_or_path else None
    common: dict[str, Any] = {
        "model": load_model(options, args, run, tokenizer),
        "args": args,
        "train_dataset": train_data.dataset,
        "eval_dataset": eval_data,
        "processing_class": tokenizer,
        "peft_config": peft_config,
        "callbacks": [EarlyStoppingCallback(options.early_stopping_steps)] if options.early_stopping_steps else None,
    }
    trainer = trainer_for(run.dataflex.train_type).over(SFTTrainer)
    if run.dataflex.train_type == "static":
        return trainer(**common)
    return trainer(**common, dataflex=run.dataflex, domain_names=train_data.names, row_table=train_data.table)


def load_tokenizer(options: TrlOptions, run: RunFile) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = model_path(options.model_name_or_path, run)
    tokenizer = AutoTokenizer.from_pretrained(
        name, trust_remote_code=options.trust_remote_code, revision=options.model_revision, cache_dir=options.cache_dir
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options.stage == "sft" and (tokenizer.chat_template or options.template):  # plain prompt and completion need none, and that was checked
        tokenizer.chat_template = resolve_template(options.template, tokenizer.chat_template, run.folder)
        _fit(tokenizer, options)
    return tokenizer


def _fit(tokenizer: Any, options: TrlOptions) -> None:
    """Let the tokenizer know the tokens of a built-in template, and say what that changes."""
    before = tokenizer.eos_token
    new = fit_tokenizer(options.template, tokenizer)
    if problem := chat_format(tokenizer).end_problem:
        warn_once(problem)
    if tokenizer.eos_token != before:
        logger.info("template %s: the eos token is now %s, which ends its answers; it was %s", options.template, tokenizer.eos_token, before)
    if not new:
        return
    logger.info("template %s: new special tokens %s; the embeddings are resized", options.template, ", ".join(new))
    trained = {"lora": options.additional_target, "freeze": options.freeze_extra_modules}.get(options.finetuning_type, True)
    if not trained:
        key = "additional_target" if options.finetuning_type == "lora" else "freeze_extra_modules"
        logger.warning(
            "the embeddings of new tokens are random and finetuning_type: %s does not train them; name them in %s, e.g. embed_tokens,lm_head",
            options.finetuning_type,
            key,
        )


def load_model(options: TrlOptions, args: SFTConfig, run: RunFile, tokenizer: Any) -> Any:
    """The model, with an adapter or with frozen layers as `finetuning_type` says; LoRA itself is added by the trainer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = model_path(options.model_name_or_path, run)
    half = options.finetuning_type == "lora" and args.bf16
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else torch.bfloat16 if half else torch.float32
    attention = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}[options.flash_attn]
    source = {"trust_remote_code": options.trust_remote_code, "revision": options.model_revision, "cache_dir": options.cache_dir}
    extra = {} if attention is None else {"attn_implementation": attention}
    if options.train_from_scratch:
        config = AutoConfig.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code, **extra)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **source, **extra)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    if options.stage == "sft" and tokenizer.chat_template:
        _stop_where_answers_end(model, tokenizer)
    if options.adapter_name_or_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.adapter_name_or_path, is_trainable=True)
    if options.finetuning_type == "freeze":
        _freeze(model, options)
    return model


def _stop_where_answers_end(model: Any, tokenizer: Any) -> None:
    """Let generation with the saved model stop at every token that answers are trained to end with."""
    known = model.generation_config.eos_token_id
    known = [known] if isinstance(known, int) else list(known or [])
    missing = [token for token in chat_format(tokenizer).stop_ids if token not in known]
    if missing:
        model.generation_config.eos_token_id = [*missing, *known]
        logger.info("generation_config: generation also stops at %s", ", ".join(tokenizer.convert_ids_to_tokens(missing)))


def _lora_config(options: TrlOptions) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if options.lora_target == ["all"] else options.lora_target,
        modules_to_save=options.additional_target or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )


def _freeze(model: Any, options: TrlOptions) -> None:
    """Train the last (or first) layers and the named modules only."""
    number, total = options.freeze_trainable_layers, model.config.get_text_config().num_hidden_layers
    if number == 0 or abs(number) > total:
        raise ConfigError(Problem("", "freeze_trainable_layers", f"{number} is not valid: the model has {total} layers"))
    chosen = range(total - number, total) if number > 0 else range(-number)
    wanted = [f".layers.{layer}." for layer in chosen] + [f".h.{layer}." for layer in chosen]
    for name, parameter in model.named_parameters():
        extra = any(module in name.split(".") for module in options.freeze_extra_modules)
        parameter.requires_grad_(extra or any(part in f".{name}" for part in wanted))


def load_data(prepared: Checked, tokenizer: Any) -> tuple[Encoded, Any]:
    """Tokenised training data, and evaluation data: one data set, one per name, or None."""
    options = prepared.options
    data, evaluation = _encode(prepared.train, options, tokenizer), None
    if options.val_size:
        data, evaluation = _split(data, options.val_size, int(prepared.trainer_keys.get("seed", 42)))
    elif prepared.evaluation and options.eval_on_each_dataset:
        evaluation = {spec.name: _encode([spec], options, tokenizer).dataset for spec in prepared.evaluation}
    elif prepared.evaluation:
        evaluation = _encode(prepared.evaluation, options, tokenizer).dataset
    return dataclasses.replace(data, dataset=_packed(data.dataset, prepared)), _for_evaluation(evaluation, prepared)


def _for_evaluation(data: Any, prepared: Checked) -> Any:
    """Rows to evaluate on; nobody asks for their numbers."""
    if isinstance(data, dict):
        return {name: _for_evaluation(part, prepared) for name, part in data.items()}
    return None if data is None else _packed(data, prepared).remove_columns(ROW_COLUMN)


def packs_conversations(options: TrlOptions) -> bool:
    """Whether several conversations share a row, as SFTTrainer packs them."""
    return options.stage == "sft" and bool(options.packing or options.neat_packing)


def _packed(rows: Dataset, prepared: Checked) -> Dataset:
    """Rows as SFTTrainer would pack them, which forgets whose they are."""
    from trl import SFTConfig

    if not packs_conversations(prepared.options):
        return rows
    default = next(field.default for field in dataclasses.fields(SFTConfig) if field.name == "packing_strategy")
    return pack_conversations(rows, prepared.options.cutoff_len, prepared.trainer_keys.get("packing_strategy", default))


def _encode(specs: list[DatasetSpec], options: TrlOptions, tokenizer: Any) -> Encoded:
    common: dict[str, Any] = {
        "cutoff_len": options.cutoff_len,
        "max_samples": options.max_samples,
        "num_proc": options.preprocessing_num_workers,
        "renew": options.overwrite_cache,
    }
    if options.stage == "pt":
        encoded = encode_text(specs, tokenizer, pack=options.packing is not False, **common)
    else:
        masking: dict[str, Any] = {
            "train_on_prompt": options.train_on_prompt,
            "mask_history": options.mask_history,
            "default_system": options.default_system,
        }
        encoded = encode_sft(specs, tokenizer, **masking, **common)
    for reason, number in encoded.dropped.items():
        logger.warning("%d rows of %s left out: %s", number, ", ".join(encoded.names), reason)
    return encoded


def _split(data: Encoded, val_size: float, seed: int) -> tuple[Encoded, Dataset]:
    rows = len(data.dataset)
    parts = data.dataset.train_test_split(test_size=held_out_rows(rows, val_size), seed=seed)
    data.table.hold_out(RowNumbers.of_dataset(parts["test"]).of(np.arange(len(parts["test"]))))
    return dataclasses.replace(data, dataset=parts["train"]), parts["test"]


def held_out_rows(rows: int, val_size: float) -> int:
    """How many of `rows` the key `val_size` takes for evaluation.

    Raises:
        ConfigError: all of them, or none although there should be some.
    """
    number = int(val_size) if val_size >= 1 else round(rows * val_size)
    if val_size and not 0 < number < rows:
        raise ConfigError(Problem("", "val_size", f"{val_size:g} takes {number} of {rows} rows; at least one must remain on either side"))
    return number
