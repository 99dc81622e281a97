"""Weights from the similarity to evaluation data under the current model (ADAPT).

s = <feature, mean evaluation feature>, w = sigmoid(s / tau), scaled to mean 1.
Paper: Zhao et al., "Rethinking Data Curation in LLM Training: Online Reweighting Offers Better Generalization than Offline Methods",
ICLR 2026, arXiv 2605.05227. The paper's exact score and link could not be retrieved; this is the form described in DataFlex's documents.
Cost: see `anchored_weighter.py`; no second forward pass over the training samples.
When it fails: last-layer features are anisotropic, so without `standardize` (or `center`) the weights hardly differ.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt

from dataflex.core.registry import register_weighter
from dataflex.functional.weights import mean_one, similarity_weights
from dataflex.train.weighter.anchored_weighter import AnchoredWeighter


@register_weighter("adapt")
class AdaptWeighter(AnchoredWeighter):
    """Weights from the similarity to the evaluation data (ADAPT, arXiv 2605.05227)."""

    def __init__(
        self,
        tau: Annotated[float, Gt(0)] = 1.0,
        clip: Annotated[float, Gt(0)] | None = None,
        center: bool = False,
        standardize: bool = True,
        normalize: Literal["mean", "none"] = "mean",
        **kwargs: Any,
    ):
        """
        Args:
            tau: temperature of the sigmoid.
            clip: largest weight before normalisation.
            center: subtract the mean similarity in scope.
            standardize: also divide by its standard deviation.
            normalize: `mean` divides the weights by their mean, so that the learning rate keeps its meaning; `none` leaves them.
        """
        super().__init__(**kwargs)
        self.tau, self.clip, self.center, self.standardize, self.normalize = tau, clip, center, standardize, normalize
        if normalize == "none":
            self.mean_scope = None

    def decide(self, signals: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        assert self.target is not None
        weights = similarity_weights(signals @ self.target, tau=self.tau, clip=self.clip, center=self.center, standardize=self.standardize)
        return mean_one(weights) if self.normalize == "mean" else weights
