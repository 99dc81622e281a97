"""Keys of the trl backend beside those of the Trainer: LLaMA-Factory's names, checked and typed. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _names(value: Any) -> Any:
    """`a, b` as LLaMA-Factory writes lists."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


_LARGEST = 10**12  # no number of rows, tokens or steps is larger

Names = Annotated[list[str], BeforeValidator(_names)]


class TrlOptions(BaseModel):
    """Model, fine-tuning method and data."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model_name_or_path: str = Field(description="Folder or hub id of the model.")
    adapter_name_or_path: str | None = Field(None, description="Folder or hub id of a LoRA adapter to go on training.")
    trust_remote_code: bool = Field(False, description="Allow the model's own code to run.")
    model_revision: str = Field("main", description="Branch, tag or commit on the hub.")
    cache_dir: str | None = Field(None, description="Where downloads are kept.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights. `auto`: bfloat16 for LoRA with `bf16: true`, else float32."
    )
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = Field(
        "auto", description="Attention implementation; `auto` is the model's default."
    )
    train_from_scratch: bool = Field(False, description="Random weights from the model's configuration.")

    stage: Literal["sft", "pt"] = Field("sft", description="`sft`: instructions, loss on the answers; `pt`: plain text.")
    finetuning_type: Literal["lora", "full", "freeze"] = Field("lora", description="What is trained.")
    lora_rank: int = Field(8, ge=1, le=_LARGEST, description="Rank of the LoRA matrices.")
    lora_alpha: int | None = Field(None, ge=1, le=_LARGEST, description="LoRA scale; twice the rank by default.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of LoRA.")
    lora_target: Names = Field(default_factory=lambda: ["all"], description="Modules that get LoRA, comma-separated; `all` linear ones.")
    additional_target: Names = Field(default_factory=list, description="Modules trained in full beside LoRA, e.g. `embed_tokens,lm_head`.")
    use_rslora: bool = Field(False, description="Rank-stabilised LoRA.")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA.")
    freeze_trainable_layers: int = Field(2, ge=-_LARGEST, le=_LARGEST, description="`freeze`: train the last n layers (negative: the first n).")
    freeze_extra_modules: Names = Field(default_factory=list, description="`freeze`: further modules to train, e.g. `norm`.")

    dataset: Names = Field(description="Data sets, comma-separated: names in `dataset_info.json`, or files.")
    domain_column: str | None = Field(
        None, description="Column of `dataset` whose values are the domains for metrics and mixing; left out, each data set is one."
    )
    dataset_dir: str = Field("data", description="Folder with `dataset_info.json`.")
    allow_outside_dataset_dir: bool = Field(
        False, description="Relative paths of data files may lead out of `dataset_dir`; absolute ones always may."
    )
    eval_dataset: Names = Field(default_factory=list, description="Data sets to evaluate on.")
    eval_on_each_dataset: bool = Field(False, description="Evaluate on each separately: `eval_<name>_loss`.")
    val_size: float = Field(0.0, ge=0, le=_LARGEST, description="Share (below 1) or number of rows taken from `dataset` for evaluation.")
    max_samples: int | None = Field(None, ge=1, le=_LARGEST, description="Rows to use of each data set, the first ones.")
    template: str | None = Field(None, description="Chat template: left out, the tokenizer's own; else a name (see docs) or a .jinja file.")
    cutoff_len: int = Field(2048, ge=2, le=_LARGEST, description="Longest row in tokens; longer ones lose their end.")
    train_on_prompt: bool = Field(False, description="Loss on the prompt too.")
    mask_history: bool = Field(False, description="Loss on the last answer of a conversation only.")
    default_system: str | None = Field(None, description="System message for rows without one.")
    packing: bool | None = Field(None, description="Several samples in a row. Default: off for sft, on for pt.")
    neat_packing: bool = Field(False, description="As `packing`; samples never attend to each other in either.")
    preprocessing_num_workers: int | None = Field(None, ge=1, le=_LARGEST, description="Processes that tokenise; left out, one for each core.")
    overwrite_cache: bool = Field(False, description="Tokenise again although the cache (`$DATAFLEX_CACHE`, else ~/.cache/dataflex) has the rows.")

    disable_gradient_checkpointing: bool = Field(False, description="Keep all activations: faster, needs more memory.")
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="Learning-rate warm-up as a share of training; not `warmup_step`.")
    early_stopping_steps: int | None = Field(None, ge=1, le=_LARGEST, description="Stop after so many evaluations without improvement.")
    plot_loss: bool = Field(False, description="Write training_loss.png.")
    overwrite_output_dir: bool = Field(False, description="Start anew in an `output_dir` that holds a run; its checkpoints are deleted.")

    @model_validator(mode="after")
    def _consistent(self) -> TrlOptions:
        problems = []
        if self.eval_dataset and self.val_size:
            problems.append("val_size: cannot be combined with eval_dataset; use one of them")
        if self.val_size > 1 and self.val_size != int(self.val_size):
            problems.append(f"val_size: {self.val_size} is not valid: write a share below 1 or a whole number of rows")
        if self.adapter_name_or_path and self.finetuning_type != "lora":
            problems.append(f"adapter_name_or_path: needs finetuning_type: lora, not {self.finetuning_type}")
        if not self.dataset:
            problems.append("dataset: names no data set")
        if problems:
            raise ValueError("\n".join(problems))
        return self


# Keys of LLaMA-Factory files that change nothing here: accepted, with a note.
WITHOUT_EFFECT = {
    "do_train": "train always trains",
    "preprocessing_batch_size": "tokenised row by row",
    "use_fast_tokenizer": "the fast tokenizer is used where there is one",
    "logging_dir": "the Trainer no longer has it",
    "print_param_status": "not implemented",
}

# Keys of LLaMA-Factory that this backend cannot honour; each is an error that says why.
NOT_HONOURED = {
    "quantization_bit": "quantised loading is not supported by the trl backend",
    "quantization_method": "quantised loading is not supported by the trl backend",
    "streaming": "DataFlex needs to know the rows of the data",
    "tokenized_path": "tokenised data is not read or written",
    "mix_strategy": "several data sets are concatenated",
    "interleave_probs": "several data sets are concatenated",
    "predict_with_generate": "prediction is not part of the trl backend",
    "compute_accuracy": "TRL logs mean_token_accuracy already",
    "use_unsloth": "unsloth is not supported by the trl backend",
    "use_galore": "set optim: galore_adamw instead",
    "use_badam": "BAdam is not supported by the trl backend",
    "use_dft_loss": "set train_type: dynamic_weight and component_name: dft instead",
    "pure_bf16": "set dtype: bfloat16 instead",
    "enable_liger_kernel": "set use_liger_kernel: true instead",
    "torch_dtype": "set dtype instead",
    "attn_implementation": "set flash_attn instead (auto, disabled, sdpa, fa2, fa3)",
}
