"""Trainers that need the loss of every sample: from the training forward itself, with one cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from dataflex.errors import TrainingError
from dataflex.train.data.sample_meta import META, BatchMeta
from dataflex.train.trainer import hosts
from dataflex.train.trainer.contract import WeightContract
from dataflex.train.trainer.dynamic_trainer import DynamicTrainer
from dataflex.train.trainer.token_losses import MicroStep, TokenLosses, losses_from_logits
from dataflex.utils.distributed import gather_rows


@dataclass
class OptimizerStep:
    """The micro-batches of one optimizer step, as known before its first forward pass.

    Attributes:
        batches: this rank's collated micro-batches.
        metas: their samples.
        samples, targets: samples and target tokens of every micro-batch on every rank, shape (micro-batches, ranks).
        position: number of micro-batches already trained on.
    """

    batches: list[dict[str, Any]]
    metas: list[BatchMeta]
    samples: np.ndarray
    targets: np.ndarray
    position: int = 0
    num_samples: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    num_targets: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def meta(self) -> BatchMeta:
        return self.metas[self.position]

    def own_part(self, rank: int, micro_step: int) -> slice:
        """Where this rank's samples of a micro-batch stand among all samples of that micro-batch."""
        start = int(self.samples[micro_step, :rank].sum())
        return slice(start, start + int(self.samples[micro_step, rank]))


class LossTrainer(DynamicTrainer):
    """Base of the trainers that see every sample's loss."""

    own_settings: ClassVar[tuple[str, ...]] = ("loss_normalization", "project_targets_only")
    _builds_loss = True

    def _unsupported(self) -> list[str]:
        return [*super()._unsupported(), *hosts.unsupported_loss(self)]

    def _describe(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        metas = [batch.pop(META) for batch in batches]
        counts = torch.tensor([[meta.num_samples, meta.num_targets] for meta in metas], dtype=torch.int64)
        gathered = gather_rows(counts, "the batches").numpy()  # (ranks, micro-batches, 2)
        samples, targets = gathered[..., 0].T, gathered[..., 1].T
        if targets.sum() == 0:
            raise TrainingError(
                f"no token of the {len(metas)} micro-batches at step {self.state.global_step} has a label: check cutoff_len and the prompt masking"
            )
        # `full` fills on the device; `tensor` would copy from the CPU and wait for the GPU to catch up.
        totals = [torch.full((), int(total), dtype=torch.int64, device=device) for total in (samples.sum(), targets.sum())]
        self._dataflex.step = OptimizerStep(batches, metas, samples, targets, num_samples=totals[0], num_targets=totals[1])

    # ---------------------------------------------------------------- what the component promises

    def _make_contract(self) -> WeightContract:
        """What is expected of the weights that the component gives."""
        raise NotImplementedError

    @property
    def contract(self) -> WeightContract:
        """What the component promises about its weights."""
        if self._dataflex.contract is None:
            self._dataflex.contract = self._make_contract()
        contract: WeightContract = self._dataflex.contract
        return contract

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.contract.verify(self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.contract.verify(self.state.global_step)  # no checkpoint of what went wrong
        super()._save_checkpoint(model, trial)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._dataflex.contract = None
        result = super().train(*args, **kwargs)
        self.contract.verify(self.state.global_step)
        return result

    # ---------------------------------------------------------------- the optimizer step under way

    @property
    def step(self) -> OptimizerStep:
        """The optimizer step under way."""
        if self._dataflex.step is None:
            raise TrainingError("there is no optimizer step under way")
        step: OptimizerStep = self._dataflex.step
        return step

    @property
    def sample_ids(self) -> torch.Tensor:
        """The user's number of the row of each sample of this rank's micro-batch (n,), CPU; see `row_numbers`."""
        meta, numbers = self.step.meta, self.row_numbers
        return torch.from_numpy(numbers.of_documents(meta.sample_ids.numpy(), meta.ordinals.numpy())) if numbers.changed else meta.sample_ids

    @property
    def domain_ids(self) -> torch.Tensor | None:
        """Domain of each sample of this rank's micro-batch (n,), CPU, or None."""
        return self.step.meta.domain_ids

    # ---------------------------------------------------------------- losses of a micro-batch

    def _token_losses(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> TokenLosses:
        if hosts.is_trl_sft(self) and self.label_smoother is None:
            return hosts.fused_head_losses(self, super().compute_loss, model, inputs, self.step.meta, num_items)
        return self._losses_from_logits(model, inputs, self.step.meta)

    def _losses_from_logits(self, model: nn.Module, inputs: dict[str, Any], meta: BatchMeta) -> TokenLosses:
        base = hosts.causal_lm(self)
        config = base.config.get_text_config()
        return losses_from_logits(
            model,
            inputs,
            meta,
            head=base.get_output_embeddings() if self.dataflex.project_targets_only else None,
            smoothing=self.args.label_smoothing_factor,
            router_coefficient=getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0,
        )

    def _micro_step(self, tokens: TokenLosses, meta: BatchMeta) -> MicroStep:
        step = self.step
        return MicroStep(
            tokens=tokens,
            meta=meta,
            num_tokens=step.num_targets,
            num_samples=step.num_samples,
            mean_tokens=float(step.targets.sum() / step.samples.sum()),
            world=self.accelerator.num_processes,
            num_micro_steps=len(step.batches),
            per_token=self.dataflex.loss_normalization == "token",
        )

    def _host_divisor(self, num_items: Any) -> int:
        """What the host's training step will divide the loss by; the step's scale is already right without it."""
        flag = getattr(self, "loss_is_scaled_for_ga", None)
        scaled = flag if flag is not None else self.model_accepts_loss_kwargs and num_items is not None
        return 1 if scaled else self.current_gradient_accumulation_steps
