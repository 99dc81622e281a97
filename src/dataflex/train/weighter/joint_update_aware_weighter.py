"""Weights that favour samples aligned with the evaluation data and disfavour samples that repeat each other.

w* = argmax over the simplex of s.w - beta/2 w'Sw + tau H(w), with s the similarity to the evaluation data and S the samples' Gram matrix;
weights n w*. No publication is known under this name; this objective is the definition (nearest: the interaction term of GREATS, NeurIPS 2024).
Cost: see `anchored_weighter.py`, plus n^2 D operations on the samples in scope.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt

from dataflex.core.registry import register_weighter
from dataflex.functional.weights import joint_update_weights
from dataflex.train.weighter.anchored_weighter import AnchoredWeighter


@register_weighter("joint_update_aware")
class JointUpdateAwareWeighter(AnchoredWeighter):
    """Weights from alignment with the evaluation data, less redundancy within the batch."""

    def __init__(self, beta: Annotated[float, Ge(0)] = 0.1, tau: Annotated[float, Gt(0)] = 0.05, **kwargs: Any):
        """
        Args:
            beta: how much redundancy between samples counts against them.
            tau: temperature; larger is closer to equal weights.
        """
        super().__init__(**kwargs)
        self.beta, self.tau = beta, tau

    def decide(self, signals: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        assert self.target is not None
        return joint_update_weights(signals, self.target, beta=self.beta, tau=self.tau)
