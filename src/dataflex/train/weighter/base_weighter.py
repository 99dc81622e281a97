"""Base classes of the weighters.

Three ways to write one, from the least to the most control over the loss:

- `SampleWeighter`: return a weight per sample; the base builds the loss and logs the weights. Preferred.
- `TokenWeighter`: return a weight per target token.
- `Weighter`: return the weighted loss itself, as in the tutorial.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from dataflex.errors import ComponentError
from dataflex.train.trainer.contract import MeanScope
from dataflex.train.trainer.token_losses import MicroStep, per_sample_loss_from_logits, segment_means

Scope = Literal["micro", "window"]


class Weighter(ABC):
    """Decides how the samples' losses enter the backward pass.

    `ctx` is always the trainer: `ctx.state.global_step`, `ctx.sample_ids`, `ctx.domain_ids`, `ctx.gather_samples(...)`, ...
    Live objects of the run may be asked for by name in `__init__`; pass `**kwargs` on to this class.
    """

    needs_features: bool = False
    """Whether `ctx.features` must be there: the hidden states of the training forward are then kept until the weights are known."""

    needs_eval_dataset: bool = False
    """Whether the run must have evaluation data. Checked before training starts."""

    pooling: str = "weighted_mean"
    """How `ctx.features` pools hidden states: weighted_mean, mean or last."""

    mean_scope: MeanScope | None = None
    """Samples over which a sample's weights have mean 1: those of the `micro_batch` or of the optimizer `step`, on all ranks. What is promised
    here is checked; None promises nothing. That no weight is negative is always checked."""

    def __init__(
        self,
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
        self.dataset, self.eval_dataset, self.accelerator, self.data_collator = dataset, eval_dataset, accelerator, data_collator
        self.tokenizer, self.output_dir, self.cache_dir, self.seed = tokenizer, output_dir, cache_dir, seed
        if self.needs_eval_dataset and accelerator is not None and not eval_dataset:
            raise ComponentError(f"{type(self).__name__} compares samples with evaluation data, and there is none: set eval_dataset or val_size")

    @abstractmethod
    def get_weighted_loss(
        self, losses: torch.Tensor, *, ctx: Any = None, model: nn.Module | None = None, inputs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """The weighted loss of a micro-batch.

        Args:
            losses: mean token loss of each sample on this rank (n,), fp32, with graph. Samples without a target token are left out.
            ctx: the trainer.
            model: the model, as wrapped for distributed training.
            inputs: the micro-batch, on the device.

        Returns:
            A scalar, read as the mean over these n samples: equal weights give `losses.mean()`. Scaling to the whole optimizer step, over
            accumulation and ranks, is the trainer's.
        """

    def training_step(
        self, ctx: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, use_weighter: bool = False
    ) -> torch.Tensor:
        """Forward pass, losses, weighting and backward pass of one micro-batch; returns the detached loss.

        Args:
            use_weighter: False during warm-up: the same code with every weight 1.
        """
        return ctx.run_training_step(self, model, inputs, num_items_in_batch, use_weighter)

    def weighted_loss(self, micro: MicroStep, *, ctx: Any, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The micro-batch's share of the optimizer step's loss."""
        losses = micro.sample_losses
        if not micro.meta.num_samples:
            return micro.from_mean(losses)
        loss = self.get_weighted_loss(losses, ctx=ctx, model=model, inputs=inputs)
        if not torch.is_tensor(loss) or loss.dim() != 0:
            shape = tuple(loss.shape) if torch.is_tensor(loss) else type(loss).__name__
            raise ComponentError(f"{type(self).__name__}.get_weighted_loss must return a scalar tensor, not {shape}")
        ctx.record_weights(self._effective_weights(loss, losses), losses.detach())
        return micro.from_mean(loss)

    def _effective_weights(self, loss: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """The weights (n,) that `loss` gives the samples: its derivatives, times n."""
        (gradient,) = torch.autograd.grad(loss, losses, retain_graph=True, allow_unused=True) if loss.requires_grad else (None,)
        if gradient is None:
            raise ComponentError(f"{type(self).__name__}.get_weighted_loss returned a loss that does not depend on the samples' losses")
        return gradient * len(losses)

    def plain_loss(self, micro: MicroStep) -> torch.Tensor:
        """What `weighted_loss` gives when every weight is 1."""
        return micro.weight_samples(micro.tokens.values.new_ones(micro.meta.num_samples))

    def begin_step(self, ctx: Any, model: nn.Module) -> None:
        """Called before the first micro-batch of every weighted optimizer step, on all ranks."""

    def end_step(self, ctx: Any) -> None:
        """Called after the last micro-batch of every weighted optimizer step, on all ranks."""

    @classmethod
    def costs(cls, params: Mapping[str, Any]) -> list[str]:
        """What the method costs beyond ordinary training with these parameters, as `dataflex-cli validate` prints it."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What must survive in a checkpoint: tensors and JSON values, equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def _per_sample_loss_from_logits(self, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """Mean token loss (B,) of each row, from logits (B, L, V) and unshifted labels (B, L)."""
        return per_sample_loss_from_logits(logits, labels, ignore_index)


class SampleWeighter(Weighter):
    """Gives every sample a weight."""

    @abstractmethod
    def sample_weights(self, losses: torch.Tensor, *, ctx: Any, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Weights (n,) >= 0 of the micro-batch's samples on this rank, mean 1 over the method's scope.

        Args:
            losses: mean token loss of each sample (n,), fp32, detached; n may be 0 on a rank that has no rows left.
        """

    def get_weighted_loss(
        self, losses: torch.Tensor, *, ctx: Any = None, model: nn.Module | None = None, inputs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        assert model is not None and inputs is not None
        return (self.sample_weights(losses.detach(), ctx=ctx, model=model, inputs=inputs) * losses).mean()

    def weighted_loss(self, micro: MicroStep, *, ctx: Any, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        losses = micro.sample_losses.detach()
        weights = self.sample_weights(losses, ctx=ctx, model=model, inputs=inputs)
        if weights.shape != losses.shape:
            raise ComponentError(
                f"{type(self).__name__}.sample_weights must return one weight per sample {tuple(losses.shape)}, not {tuple(weights.shape)}"
            )
        weights = torch.where(torch.isfinite(losses), weights.detach().to(losses), torch.zeros_like(losses))
        ctx.record_weights(weights, losses)
        return micro.weight_samples(weights)


class PopulationWeighter(SampleWeighter):
    """A weight per sample that depends on the other samples in scope, over all ranks.

    Scope `micro` is one micro-batch over all ranks: free, but the result depends on how an optimizer step is split into micro-batches.
    `window` is the whole optimizer step: it does not, and costs a forward pass without gradient when there is more than one micro-batch.
    """

    def __init__(self, *, scope: Scope = "micro", **kwargs: Any):
        """
        Args:
            scope: samples that are compared with each other, over all ranks: those of a `micro`-batch, or of the optimizer step (`window`).
        """
        super().__init__(**kwargs)
        self.scope = scope
        self.mean_scope = "step" if scope == "window" else "micro_batch"
        self._window: torch.Tensor | None = None

    @classmethod
    def costs(cls, params: Mapping[str, Any]) -> list[str]:
        window = params.get("scope") == "window"
        return ["a forward pass without gradient over every optimizer step that has several micro-batches (scope: window)"] if window else []

    @abstractmethod
    def signal(self, losses: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        """What decides a sample's weight: rows (n, ...) for the micro-batch's samples."""

    @abstractmethod
    def decide(self, signals: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        """Weights (m,), mean 1, of all m samples in scope from their signals (m, ...)."""

    def begin_step(self, ctx: Any, model: nn.Module) -> None:
        self._window = None
        if self.scope == "window" and ctx.num_micro_steps > 1:
            self._window = self.decide(ctx.gather_step(model, lambda losses: self.signal(losses, ctx=ctx)), ctx=ctx)

    def sample_weights(self, losses: torch.Tensor, *, ctx: Any, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if self._window is not None:
            return ctx.own_part_of_step(self._window)
        return ctx.own_part(self.decide(ctx.gather_samples(self.signal(losses, ctx=ctx)), ctx=ctx))


class TokenWeighter(Weighter):
    """Gives every target token a weight. Every token counts equally in the mean, as in ordinary training."""

    @abstractmethod
    def token_weights(self, token_losses: torch.Tensor) -> torch.Tensor:
        """Weights (N,), none negative, of the target tokens from their cross-entropies -log p (N,), fp32 (without label smoothing)."""

    def get_weighted_loss(
        self, losses: torch.Tensor, *, ctx: Any = None, model: nn.Module | None = None, inputs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        raise ComponentError(f"{type(self).__name__} weights tokens, not samples")

    def weighted_loss(self, micro: MicroStep, *, ctx: Any, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        losses = micro.token_losses
        weights = self.token_weights(micro.token_cross_entropies)
        if weights.shape != losses.shape:
            shapes = f"{tuple(losses.shape)}, not {tuple(weights.shape)}"
            raise ComponentError(f"{type(self).__name__}.token_weights must return one weight per token {shapes}")
        weights = torch.where(torch.isfinite(losses), weights.to(losses), torch.zeros_like(losses))
        detached = weights.detach()
        if micro.meta.num_samples:
            per_sample = segment_means(detached, micro.counts)
            ctx.record_weights(per_sample, micro.sample_losses.detach(), token_weights=detached)
        return micro.weight_tokens(weights)

    def plain_loss(self, micro: MicroStep) -> torch.Tensor:
        return micro.weight_tokens(torch.ones_like(micro.token_losses).detach())
