"""Rows by how much their loss has fallen since the first decision.

A window slides over the rows sorted by their fall in loss, from those that fell most at the beginning of training to those that fell least at
its end; rows inside it are drawn with weight 1, other rows with 0.025. The first decision takes the losses to compare with and draws at random.
No publication is known under this name; related: RHO-LOSS (arXiv 2206.07137), S2L (arXiv 2403.07384).
Cost: a forward pass over the candidates at every decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt, Lt

from dataflex.core.registry import register_selector
from dataflex.functional.ranking import delta_log_weights, gumbel_scores
from dataflex.train.selector.base_selector import Passes, ScoringSelector


@register_selector("delta_loss")
class DeltaLossSelector(ScoringSelector):
    """Rows by how much their loss fell: first those that fell most, in the end those that fell least."""

    needs_model = True

    def __init__(self, *args: Any, window: Annotated[float, Gt(0), Lt(1)] = 0.2, steepness: Annotated[float, Gt(0)] = 10.0, **kwargs: Any):
        """
        Args:
            window: share of the rows inside the window.
            steepness: how abruptly the window moves in the middle of training.
        """
        super().__init__(*args, **kwargs)
        self.window, self.steepness = window, steepness
        self.baseline: np.ndarray | None = None
        self.decisions = 0

    @classmethod
    def passes(cls, params: Mapping[str, Any]) -> Passes:
        return Passes(forward=1)

    def scores(self, rows: np.ndarray, *, ctx: Any, **kwargs: Any) -> np.ndarray:
        losses = ctx.signals.losses(ctx.train_dataset, rows)
        key = (self.seed, "delta loss", self.step_id)
        self.decisions += 1
        if self.baseline is None:
            self.baseline = losses
            return gumbel_scores(np.where(np.isfinite(losses), 0.0, -np.inf), key)
        later = ctx.schedule.decisions - 1  # decisions with something to compare
        progress = (self.decisions - 2) / (later - 1) if later > 1 else 0.0
        return gumbel_scores(delta_log_weights(self.baseline - losses, progress, self.window, self.steepness), key)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"decisions": self.decisions}
        return state if self.baseline is None else {**state, "baseline": torch.from_numpy(self.baseline)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decisions = state["decisions"]
        self.baseline = state["baseline"].numpy() if "baseline" in state else None
