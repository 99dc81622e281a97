"""Sentence features from the model being trained: pooled last-layer hidden states.

Legend: B rows, L tokens, D hidden size, n samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from dataflex.errors import TrainingError
from dataflex.train.data.sample_meta import BatchMeta, build_meta
from dataflex.utils.distributed import sum_over_ranks
from dataflex.utils.seeding import isolated_rng

Pooling = Literal["weighted_mean", "mean", "last"]


@contextmanager
def captured_hidden_states(causal_lm: Any, into: list[torch.Tensor]) -> Iterator[None]:
    """Append the last hidden states (B, L, D), detached, of every forward pass within the block to `into`."""

    def capture(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output["last_hidden_state"] if isinstance(output, dict) else output[0]
        into.append(hidden.detach())

    handle = causal_lm.base_model.register_forward_hook(capture)
    try:
        yield
    finally:
        handle.remove()


def pooled_features(hidden: torch.Tensor, meta: BatchMeta, pooling: str = "weighted_mean") -> torch.Tensor:
    """Unit feature (n, D), fp32, of each sample.

    Positions count a sample's own tokens from 1, so padding and its side, and what else is in a packed row, do not matter.

    Args:
        hidden: (B, L, D).
        pooling: `weighted_mean` weights tokens by their position, `mean` equally, `last` takes the last one.
    """
    owner = meta.token_samples.flatten()
    tokens = (owner >= 0).nonzero()[:, 0]
    owner = owner[tokens]  # token order within a sample is kept, and samples are contiguous
    if hidden.shape[1] != meta.width:
        raise TrainingError("features of a model with virtual tokens (prompt tuning) are not supported; use LoRA or full fine-tuning")
    pool = torch.zeros(meta.num_samples, len(tokens), dtype=torch.float32)
    lengths = torch.bincount(owner, minlength=meta.num_samples)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    position = torch.arange(len(tokens)) - first[owner] + 1
    share = {"weighted_mean": position.float(), "mean": torch.ones(len(tokens)), "last": (position == lengths[owner]).float()}[pooling]
    pool[owner, torch.arange(len(tokens))] = share
    pool = (pool / pool.sum(1, keepdim=True).clamp(min=1)).to(hidden.device, non_blocking=True)
    states = hidden.flatten(0, 1).index_select(0, tokens.to(hidden.device, non_blocking=True)).float()
    return F.normalize(pool @ states, dim=1, eps=1e-12)


@torch.no_grad()
def encode_rows(trainer: Any, causal_lm: Any, dataset: Any, pooling: str, max_rows: int | None) -> torch.Tensor:
    """Mean unit feature (D,) of `dataset`'s first `max_rows` rows (all by default). All ranks must call.

    Batches are fixed by the data alone and dealt out to the ranks, so the result does not depend on how many there are. Runs the bare
    backbone without its output layer, in evaluation mode, under a generator of its own.
    """
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    places = [(part, i) for part in parts for i in range(len(part))][:max_rows]
    size = trainer.args.per_device_eval_batch_size
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    total = torch.zeros(causal_lm.config.get_text_config().hidden_size + 1, dtype=torch.float64, device=trainer.args.device)
    was_training = causal_lm.training
    causal_lm.eval()
    hidden_progress = trainer.args.disable_tqdm or rank > 0
    try:
        for batch_places in tqdm(batches[rank::world], desc="Encoding evaluation data", leave=False, disable=hidden_progress):
            batch_rows = [part[i] for part, i in batch_places]
            described = [dict(row) for row in batch_rows]
            with isolated_rng(trainer.args.seed, "encode"):
                batch = trainer.data_collator(_accepted(batch_rows, trainer))
            meta = build_meta(list(range(len(described))), described, batch)
            inputs = {k: v for k, v in trainer._prepare_inputs(dict(batch)).items() if k not in ("labels", "shift_labels")}
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                hidden = causal_lm.base_model(**inputs).last_hidden_state
            features = pooled_features(hidden, meta, pooling).double()
            total += torch.cat([features.sum(0), torch.tensor([float(len(features))], dtype=torch.float64, device=total.device)])
    finally:
        causal_lm.train(was_training)
    total = sum_over_ranks(total)
    if not total[-1]:
        raise TrainingError("no row of the evaluation data has a target token, so there is nothing to compare the samples with")
    return (total[:-1] / total[-1]).float()


def _accepted(rows: list[Any], trainer: Any) -> list[Any]:
    """Rows without the columns that the host's loaders would drop (names, domains, texts)."""
    if not trainer.args.remove_unused_columns:
        return rows
    trainer._set_signature_columns_if_needed()
    names = [*(trainer._signature_columns or []), *trainer.label_names, "seq_lengths"]
    return [{name: row[name] for name in row if name in names} for row in rows]
