"""Base class of the mixers.

Legend: k domains, S optimizer steps, N target tokens of a micro-batch on this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class DomainLosses(NamedTuple):
    """What training showed of each domain since the last decision, over all ranks; a row per optimizer step. Losses that are not finite are left out.

    Attributes:
        token_loss_sums, tokens: sum of the target tokens' losses, and their number (S, k).
        sample_loss_sums, samples: sum of the samples' mean losses, and their number (S, k).
    """

    token_loss_sums: np.ndarray
    tokens: np.ndarray
    sample_loss_sums: np.ndarray
    samples: np.ndarray


class Mixer(ABC):
    """Decides the proportions of the domains at each boundary.

    `mix` is called on every rank; what rank 0 returns counts. `mixture_manager` has `names`, `k`, `sizes` and the current `proportions`.
    """

    needs_eval_dataset: bool = False
    """Whether the run must have evaluation data. Checked before training starts."""

    step_id: int = 0
    """Optimizer step of the decision under way."""

    def __init__(
        self,
        mixture_manager: Any = None,
        *,
        dataset: Any = None,
        eval_dataset: Any = None,
        accelerator: Any = None,
        data_collator: Any = None,
        tokenizer: Any = None,
        output_dir: str | None = None,
        cache_dir: str | None = None,
        seed: int = 42,
    ):
        self.mixture_manager = mixture_manager
        self.dataset, self.eval_dataset, self.accelerator, self.data_collator = dataset, eval_dataset, accelerator, data_collator
        self.tokenizer, self.output_dir, self.cache_dir, self.seed = tokenizer, output_dir, cache_dir, seed

    @abstractmethod
    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        """Proportions (k,) of the next interval, none below 0; they are scaled to sum to 1.

        Args:
            model: the model, as wrapped for distributed training.
            step_id: number of optimizer steps done.
            kwargs: `ctx` (the trainer), `losses` (`DomainLosses`), `current_update_times` (from 1), `update_times`, `data_collator`, `dataset`.
        """

    def prepare(self) -> None:
        """Called when a ready-made mixer has been given the run's `mixture_manager`: size what depends on the domains."""

    def token_weights(self, ctx: Any) -> torch.Tensor | None:
        """Weight of each domain's tokens in the loss (k,), scaled to mean 1 over the optimizer step's tokens; None: all count equally.

        Asked once per optimizer step, before its first forward pass.
        """
        return None

    def observe(self, losses: torch.Tensor, domains: torch.Tensor, *, ctx: Any, inputs: dict[str, Any]) -> None:
        """See a micro-batch's token losses (N,), detached, and the domain of each (N,), before the backward pass."""

    def end_step(self, ctx: Any) -> None:
        """Called after the last micro-batch of every optimizer step, on all ranks."""

    @classmethod
    def costs(cls, params: Mapping[str, Any]) -> list[str]:
        """What the method costs beyond ordinary training, as `dataflex-cli validate` prints it."""
        return []

    def save_artifacts(self, folder: Path) -> None:
        """Write what the method has learned into `folder`; called on the main process with every checkpoint and at the end of training."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive in a checkpoint: tensors and JSON values, equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
