"""Weights from each sample's own loss.

f = strategy(position of the loss between the smallest and the largest), w = softmax(f / r), scaled to mean 1.
Paper: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733.
Cost: nothing beyond the training forward; scope `window` adds a forward pass without gradient when gradients are accumulated.
When it fails: losses that are high because an answer is wrong are weighted up like those that are high because it is hard.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn

from dataflex.core.registry import register_weighter
from dataflex.functional.weights import Anneal, Strategy, annealed, loss_strategy, loss_weights
from dataflex.train.weighter.base_weighter import PopulationWeighter


@register_weighter("loss")
class LossWeighter(PopulationWeighter):
    """Weights from the samples' own losses (arXiv 2502.06733)."""

    def __init__(
        self,
        strategy: Strategy = "linupper",
        delta: Annotated[float, Gt(0)] = 1.0,
        r: Annotated[float, Gt(0)] = 1.0,
        r_init: Annotated[float, Gt(0)] = 100.0,
        r_steps: Annotated[int, Ge(0)] = 0,
        anneal: Anneal = "step",
        scope: Literal["micro", "window", "ema"] = "micro",
        ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.9,
        **kwargs: Any,
    ):
        """
        Args:
            strategy: `linupper` weights low losses down and caps high ones; `quadratic` prefers the middle; `extremes` both ends;
                `uniform` gives every sample the same weight.
            delta: half the range of a loss's position.
            r: temperature; the largest weight is at most exp(1/r) times the smallest (linupper, delta 1).
            r_init: temperature at optimizer step 0, when `r_steps` > 0.
            r_steps: optimizer steps, counted from the start of training, until the temperature is `r`.
            anneal: how it gets there: `step`, `linear` or `exponential`.
            scope: which samples a loss is compared with: those of the micro-batch (`micro`) or of the optimizer step (`window`), on all
                ranks, or a running mean over earlier steps (`ema`).
            ema_decay: decay of that running mean.
        """
        super().__init__(scope="window" if scope == "window" else "micro", **kwargs)
        self.strategy, self.delta, self.r, self.r_init, self.r_steps, self.anneal = strategy, delta, r, r_init, r_steps, anneal
        self.ema: RunningScale | None = RunningScale(strategy, delta, ema_decay) if scope == "ema" else None
        if scope == "ema":
            self.mean_scope = None  # mean 1 in the long run only

    def temperature(self, step: int) -> float:
        return annealed(self.r, self.r_init, step, self.r_steps, self.anneal)

    def signal(self, losses: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        return losses

    def decide(self, signals: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        r = self.temperature(ctx.state.global_step)
        if self.ema is not None:
            return self.ema.weights(signals, r)
        return loss_weights(signals, strategy=self.strategy, delta=self.delta, r=r)

    def begin_step(self, ctx: Any, model: nn.Module) -> None:
        if self.ema is not None:
            self.ema.begin_step()
        super().begin_step(ctx, model)

    def end_step(self, ctx: Any) -> None:
        if self.ema is not None:
            self.ema.end_step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(state)


class RunningScale:
    """Running smallest and largest loss and mean of exp(f / r): how a loss is placed without seeing the whole optimizer step.

    Values change only between optimizer steps, so the weights do not depend on how a step is split. Until the first step has ended every
    weight is 1.
    """

    def __init__(self, strategy: Strategy, delta: float, decay: float):
        self.strategy, self.delta, self.decay = strategy, delta, decay
        self.values: torch.Tensor | None = None  # low, high, mean of exp(f / r)
        self._seen: list[torch.Tensor] = []
        self._r = 1.0

    def weights(self, losses: torch.Tensor, r: float) -> torch.Tensor:
        """Weights (m,) of the micro-batch's losses (m,), 0 where they are not finite."""
        self._seen.append(losses)
        self._r = r
        finite = torch.isfinite(losses)
        if self.values is None:
            return finite.float()
        return torch.where(finite, self._raw(losses, self.values) / self.values[2], torch.zeros_like(losses))

    def begin_step(self) -> None:
        self._seen = []

    def end_step(self) -> None:
        losses = torch.cat(self._seen)
        self._seen = []
        finite = torch.isfinite(losses)
        limits = torch.stack([losses.masked_fill(~finite, math.inf).min(), losses.masked_fill(~finite, -math.inf).max()])
        old = torch.cat([limits, limits.new_zeros(1)]) if self.values is None else self.values
        raw = torch.where(finite, self._raw(losses, old), 0.0).sum() / finite.sum().clamp(min=1)
        new = torch.cat([limits, raw[None]])
        mixed = new if self.values is None else self.decay * old + (1 - self.decay) * new
        unknown = limits.new_tensor([0.0, 1.0, 1.0]) if self.values is None else old
        self.values = torch.where(finite.any(), mixed, unknown)  # a step without a finite loss changes nothing

    def _raw(self, losses: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # f <= delta (1 for quadratic): subtracting that keeps the exponential below 1 at any temperature.
        top = max(1.0, self.delta)
        return torch.exp((loss_strategy(losses, values[0], values[1], self.strategy, self.delta) - top) / self._r).clamp(min=math.exp(-80))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.values is None else {"running_scale": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state.get("running_scale")
