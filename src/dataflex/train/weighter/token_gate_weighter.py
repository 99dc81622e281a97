"""Token gates: each target token's loss is multiplied by a function of the probability p the model gives it. They cost one exponential.

DFT, gate p: Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", arXiv 2508.05629.
Focal, gate (1 - p)^gamma: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002.
When DFT fails: a token the model does not know yet gets almost no gradient, so new knowledge is hardly learnt; give it a `warmup_step`.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge

from dataflex.core.registry import register_weighter
from dataflex.functional.weights import token_gate
from dataflex.train.weighter.base_weighter import TokenWeighter


@register_weighter("dft")
class DftWeighter(TokenWeighter):
    """Token gate p^power (dynamic fine-tuning, arXiv 2508.05629)."""

    def __init__(self, power: Annotated[float, Ge(0)] = 1.0, **kwargs: Any):
        """
        Args:
            power: 1 is the paper's method, 0 ordinary training.
        """
        super().__init__(**kwargs)
        self.power = power

    def token_weights(self, token_losses: torch.Tensor) -> torch.Tensor:
        return token_gate(token_losses.detach(), "dft", self.power)


@register_weighter("focal")
class FocalWeighter(TokenWeighter):
    """Token gate (1 - p)^gamma (focal loss, arXiv 1708.02002)."""

    def __init__(self, gamma: Annotated[float, Ge(0)] = 2.0, detach_gate: bool = True, **kwargs: Any):
        """
        Args:
            gamma: how strongly tokens the model already predicts are weighted down; 0 is ordinary training.
            detach_gate: False also differentiates the gate, as in the paper.
        """
        super().__init__(**kwargs)
        self.gamma, self.detach_gate = gamma, detach_gate

    def token_weights(self, token_losses: torch.Tensor) -> torch.Tensor:
        return token_gate(token_losses.detach() if self.detach_gate else token_losses, "focal", self.gamma)
