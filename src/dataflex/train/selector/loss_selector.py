"""Rows from a band of the current loss: easy, medium or hard ones.

Row i is drawn without replacement with weight `focus_weight^(1/temperature)` inside the band and 1 outside; bands are cut at quantiles of the
losses. Basis: Marion et al., "When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale", arXiv 2309.04564.
Cost: a forward pass over the candidates at every decision.
When it fails: the mean token loss depends on the length of the answer; on noisy data the high band is the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt

from dataflex.core.registry import register_selector
from dataflex.errors import ComponentError
from dataflex.functional.ranking import band_log_weights, gumbel_scores
from dataflex.train.selector.base_selector import Passes, ScoringSelector


@register_selector("loss")
class LossSelector(ScoringSelector):
    """Rows from a band of the current loss: low, medium or high (arXiv 2309.04564)."""

    needs_model = True

    def __init__(
        self,
        *args: Any,
        focus: Literal["low", "medium", "high"] = "medium",
        focus_weight: Annotated[float, Ge(1)] = 5.0,
        temperature: Annotated[float, Gt(0)] = 1.0,
        lower_quantile: Annotated[float, Gt(0), Lt(1)] = 0.33,
        upper_quantile: Annotated[float, Gt(0), Lt(1)] = 0.66,
        **kwargs: Any,
    ):
        """
        Args:
            focus: the band that is favoured.
            focus_weight: how many times likelier a row of it is drawn.
            temperature: larger is closer to a uniform draw.
            lower_quantile: share of the rows in the low band.
            upper_quantile: share of the rows in the low and medium bands.
        """
        super().__init__(*args, **kwargs)
        if lower_quantile >= upper_quantile:
            raise ComponentError(f"lower_quantile {lower_quantile} must be below upper_quantile {upper_quantile}")
        self.focus, self.focus_weight, self.temperature = focus, focus_weight, temperature
        self.quantiles = (lower_quantile, upper_quantile)

    @classmethod
    def passes(cls, params: Mapping[str, Any]) -> Passes:
        return Passes(forward=1)

    def scores(self, rows: np.ndarray, *, ctx: Any, **kwargs: Any) -> np.ndarray:
        losses = ctx.signals.losses(ctx.train_dataset, rows)
        weights = band_log_weights(losses, self.focus, self.quantiles, self.focus_weight, self.temperature)
        return gumbel_scores(weights, (self.seed, "loss", self.step_id))
