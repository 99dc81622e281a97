"""What the weighters share that compare samples with evaluation data: a target direction, refreshed as the model changes.

The target is the mean feature of the evaluation rows under the current model. The samples' features come from the training forward itself.
Cost: one forward pass over the evaluation rows every `refresh_steps` optimizer steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import nn

from dataflex.train.trainer.features import Pooling
from dataflex.train.weighter.base_weighter import PopulationWeighter, Scope


class AnchoredWeighter(PopulationWeighter):
    """Base of weighters with a target direction (D,) in `self.target`."""

    needs_features = True
    needs_eval_dataset = True

    def __init__(
        self,
        *,
        refresh_steps: Annotated[int, Ge(1)] = 50,
        max_anchors: Annotated[int, Ge(1)] | None = None,
        pooling: Pooling = "weighted_mean",
        scope: Scope = "micro",
        **kwargs: Any,
    ):
        """
        Args:
            refresh_steps: optimizer steps between two computations of the target.
            max_anchors: evaluation rows to use, the first ones; all by default.
            pooling: how hidden states become a feature: weighted_mean (by position), mean or last.
            scope: samples that are compared with each other, over all ranks: those of a `micro`-batch, or of the optimizer step (`window`).
        """
        super().__init__(scope=scope, **kwargs)
        self.refresh_steps, self.max_anchors, self.pooling = refresh_steps, max_anchors, pooling
        self.target: torch.Tensor | None = None
        self.refreshed_at = -1

    @classmethod
    def costs(cls, params: Mapping[str, Any]) -> list[str]:
        rows = params.get("max_anchors") or "all"
        return [f"a forward pass over {rows} evaluation rows every {params.get('refresh_steps', 50)} optimizer steps", *super().costs(params)]

    def begin_step(self, ctx: Any, model: nn.Module) -> None:
        step = ctx.state.global_step
        if self.target is None or not 0 <= step - self.refreshed_at < self.refresh_steps:
            start = time.perf_counter()
            self.target = ctx.encode(self.eval_dataset, self.pooling, self.max_anchors)
            self.refreshed_at = step
            ctx.events.write(step, "target refreshed", seconds=round(time.perf_counter() - start, 3))
        super().begin_step(ctx, model)

    def signal(self, losses: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        """Features (n, D), not finite for a sample whose loss is not."""
        return torch.where(torch.isfinite(losses)[:, None], ctx.features, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.target is None else {"target": self.target, "refreshed_at": self.refreshed_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target, self.refreshed_at = state.get("target"), state.get("refreshed_at", -1)
