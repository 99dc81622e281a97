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

from dataflex.errors import TrainingError
from dataflex.train.data.sample_meta import BatchMeta

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
    with torch.autocast(hidden.device.type, enabled=False):  # it would make the product bf16
        return F.normalize(pool @ states, dim=1, eps=1e-12)
