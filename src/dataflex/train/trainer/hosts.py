"""Everything that depends on which Trainer DataFlex sits in front of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dataflex.core.row_numbers import ROW_COLUMN, RowNumbers
from dataflex.core.row_table import RowTable
from dataflex.errors import TrainingError
from dataflex.train.data.sample_meta import BatchMeta
from dataflex.train.trainer.token_losses import TokenLosses

# Packages whose `compute_loss` is the plain language-modelling loss that the weighted one takes the place of.
_KNOWN = ("dataflex.", "transformers.", "trl.", "llamafactory.")


def is_trl_sft(trainer: Any) -> bool:
    """Whether the host is TRL's SFTTrainer, which scores labels in a fused output layer of its own."""
    return any(cls.__name__ == "SFTTrainer" and cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def unsupported_order(trainer: Any) -> list[str]:
    """Settings of the host under which the order of samples would be wrong; empty when all is well."""
    args, reasons = trainer.args, []
    if args.n_gpu > 1:
        reasons.append(
            "several GPUs in one process (nn.DataParallel): start with torchrun or FORCE_TORCHRUN=1, or show one GPU with CUDA_VISIBLE_DEVICES"
        )
    if args.accelerator_config.split_batches:
        reasons.append("accelerator_config.split_batches: DataFlex shares the rows out itself; set it to false")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_enabled", "cp_enabled", "sp_enabled"):
        if getattr(parallelism, name, False):
            reasons.append(
                f"{name.removesuffix('_enabled')} parallelism: it splits a sample over ranks, which is not supported yet; use data parallelism"
            )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        reasons.append("train_sampling_strategy: batch_rebalance orders rows by rank; use random or sequential")
    return reasons


def unsupported_loss(trainer: Any) -> list[str]:
    """Settings of the host under which per-sample losses would be wrong; empty when all is well."""
    reasons = []
    if trainer.compute_loss_func is not None:
        reasons.append(
            "compute_loss_func: it returns one number for the batch, and weighting needs a loss per sample; use a token-gate component such as dft"
        )
    if getattr(trainer.args, "loss_type", "nll") == "dft":
        reasons.append("loss_type: dft replaces the loss that is weighted; set loss_type: nll, or use component_name: dft")
    own = next((cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls) and not cls.__module__.startswith(_KNOWN)), None)
    if own is not None:
        reasons.append(f"the compute_loss of {own.__name__}: the weighted loss would take its place; express it as a component")
    return reasons


def causal_lm(trainer: Any) -> Any:
    """The bare model: without DDP's wrapper and without PEFT's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def fused_head_losses(trainer: Any, host_compute_loss: Any, model: nn.Module, inputs: dict[str, Any], meta: BatchMeta, num_items: Any) -> TokenLosses:
    """Token losses of TRL's SFTTrainer, from the forward pass and the output layer it runs anyway; it keeps its own metrics.

    Args:
        host_compute_loss: the `compute_loss` that SFTTrainer defines.

    Raises:
        TrainingError: its output has no per-token log-probabilities (another TRL version).
    """
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        host_compute_loss(model, inputs, num_items_in_batch=num_items)
    finally:
        handle.remove()
    log_probs = getattr(outputs[0], "log_probs", None) if outputs else None
    if log_probs is None:
        raise TrainingError("this version of TRL's SFTTrainer gives no per-token log-probabilities; DataFlex needs trl >= 1.16")
    width = log_probs.shape[1]
    # Labels start at the second token, so row positions reach meta.width - 1; prompt tuning puts virtual tokens in front.
    extra = width - (meta.width if "shift_labels" in inputs else meta.width - 1)
    device = log_probs.device
    index = meta.rows.to(device, non_blocking=True) * width + meta.positions.to(device, non_blocking=True) + extra
    auxiliary = trainer.router_aux_loss_coef * outputs[0].aux_loss if trainer.aux_loss_enabled else None
    return TokenLosses(-log_probs, index, auxiliary=auxiliary)


def host_state(trainer: Any) -> dict[str, Any]:
    """Counters the host keeps in memory only. TRL forgets its token count and pending averages on resume."""
    state: dict[str, Any] = {}
    if is_trl_sft(trainer):
        state["num_tokens"] = trainer._total_train_tokens
        state["metrics"] = {name: list(values) for name, values in trainer._metrics["train"].items()}
    return state


def restore_host_state(trainer: Any, state: dict[str, Any]) -> None:
    if is_trl_sft(trainer) and state:
        trainer._total_train_tokens = state["num_tokens"]
        trainer._metrics["train"].update(state["metrics"])


def logging_state(trainer: Any) -> dict[str, Any]:
    """This rank's loss since the last log line, which the Trainer forgets on resume, and the step of that line."""
    return {"loss": float(trainer._tr_loss), "last_logged": trainer._globalstep_last_logged}


def restore_logging_state(trainer: Any, losses: list[float], last_logged: int) -> None:
    """Give each rank its own pending loss back, or their mean when the number of ranks has changed."""
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    loss = losses[rank] if len(losses) == world else sum(losses) / len(losses)
    trainer._tr_loss = torch.full_like(trainer._tr_loss, loss)
    trainer._total_loss_scalar -= sum(losses) / len(losses)  # it belongs to steps before the checkpoint, which train_loss leaves out
    trainer._globalstep_last_logged = last_logged


class Given(NamedTuple):
    """A host's arguments, and the training data among them as it was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dataset: Any


def number_rows(init: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Number the training data's rows in a hidden column if the host makes rows of its own of them, as TRL's trainers do.

    Args:
        init: the host's `__init__`, bound.
    """
    names = [name for name, p in inspect.signature(init).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    place = names.index("train_dataset") if "train_dataset" in names else len(args)
    dataset = args[place] if place < len(args) else kwargs.get("train_dataset")
    prepares = hasattr(type(init.__self__), "_prepare_dataset")  # type: ignore[attr-defined]
    skips = any((getattr(value, "dataset_kwargs", None) or {}).get("skip_prepare_dataset") for value in (*args, kwargs.get("args")))
    if not prepares or skips or not hasattr(dataset, "add_column") or ROW_COLUMN in dataset.column_names:
        return Given(args, kwargs, dataset)
    numbered = dataset.add_column(ROW_COLUMN, np.arange(len(dataset)))
    if place < len(args):
        return Given((*args[:place], numbered, *args[place + 1 :]), kwargs, numbered)
    return Given(args, {**kwargs, "train_dataset": numbered}, numbered)


def read_row_numbers(trainer: Any, given: Any, table: RowTable | None) -> RowNumbers:
    """Which of the rows that were given each row is that the host trains on."""
    dataset, sources = trainer.train_dataset, table.sources if table is not None else []
    if dataset is None or not hasattr(dataset, "__len__"):
        return RowNumbers(None, 0)
    if table is not None and table.unknown:
        return RowNumbers(None, len(dataset), unknown=table.unknown)
    if ROW_COLUMN in (getattr(dataset, "column_names", None) or []):
        total = None if given is None or table is not None else len(given)
        return RowNumbers.of_dataset(dataset, sources=sources, total=total)
    if dataset is given:
        return RowNumbers(None, len(dataset), sources=sources)
    return RowNumbers(None, len(dataset), unknown="the host makes other rows of it (packing)")
