"""Rows close to the evaluation data by the hidden states of the model being tuned (RDS+).

Embeddings are means of the last hidden states, later tokens weighing more. Of one evaluation data set, its rows take turns with their nearest
candidates; of several, the data sets take turns, a candidate's score being its highest similarity to one of their rows.
Paper: Ivison et al., "Practical Large-Scale Data Selection for Instruction Tuning", arXiv 2503.01807.
Cost at every decision: a forward pass over candidates and evaluation data, without the output layer; none with a `file` made offline.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.core.registry import register_selector
from dataflex.functional.retrieval import Aggregation, rds_order
from dataflex.train.selector.base_selector import ScoringSelector
from dataflex.train.selector.embedded import EmbeddedSelector


@register_selector("rds")
class RdsSelector(EmbeddedSelector, ScoringSelector):
    """Rows close to the evaluation data by the model's own hidden states (RDS+, arXiv 2503.01807)."""

    method = "rds"

    def __init__(self, *args: Any, aggregation: Aggregation = "round_robin", **kwargs: Any):
        """
        Args:
            aggregation: of a single evaluation data set, its rows take turns (`round_robin`), or the highest similarity counts (`max`).
        """
        super().__init__(*args, **kwargs)
        self.aggregation = aggregation

    def scores(self, rows: np.ndarray, *, ctx: Any, **kwargs: Any) -> np.ndarray:
        scores = np.full(len(rows), np.nan)
        if self.result is not None:
            place = np.full(len(ctx.train_dataset), np.nan)
            place[self.result] = -np.arange(len(self.result), dtype=np.float64)
            return place[rows]
        number = len(rows) if self.diversity else kwargs["num_samples"]
        order = rds_order(self.candidates(rows, ctx), self.queries(ctx), number, self.aggregation)
        scores[order] = -np.arange(len(order), dtype=np.float64)
        return scores
