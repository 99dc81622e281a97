"""The tutorial's example: a starting point for a weighter of your own."""

from typing import Any, Union

import torch
from torch import nn

from dataflex.core.registry import register_weighter
from dataflex.utils.logging import logger

from .base_weighter import Weighter


@register_weighter("custom")
class CustomWeighter(Weighter):
    """The tutorial's example: equal weights, written as a loss."""

    def __init__(self, strategy: str = "uniform", **kwargs):
        """
        Args:
            strategy: name of the strategy; the example knows equal weights only.
            **kwargs: passed on to the base class.
        """
        super().__init__(**kwargs)
        self.strategy = strategy
        logger.info(f"CustomWeighter initialized with strategy: {strategy}")

    def get_weighted_loss(
        self,
        losses: torch.Tensor,
        *,
        ctx: Any = None,
        model: nn.Module | None = None,
        inputs: dict[str, Union[torch.Tensor, Any]] | None = None,
    ) -> torch.Tensor:
        """The weighted loss (a scalar) from this rank's per-sample losses (B,)."""
        if not torch.is_tensor(losses) or losses.dim() == 0:
            return losses
        weights = torch.ones_like(losses) / losses.numel()
        return torch.sum(weights * losses)
