"""A selector to start your own from: it prefers rows by the number of tokens that carry a label."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from dataflex.core.registry import register_selector
from dataflex.train.selector.base_selector import ScoringSelector


@register_selector("custom")
class CustomSelector(ScoringSelector):
    """An example to start your own from: rows with the most or the fewest target tokens."""

    def __init__(self, *args: Any, strategy: Literal["longest", "shortest"] = "longest", **kwargs: Any):
        """
        Args:
            strategy: prefer rows with many target tokens, or with few.
        """
        super().__init__(*args, **kwargs)
        self.strategy = strategy

    def scores(self, rows: np.ndarray, *, ctx: Any, **kwargs: Any) -> np.ndarray:
        lengths = np.array([sum(label != -100 for label in self.dataset[int(row)]["labels"]) for row in rows], dtype=np.float64)
        return lengths if self.strategy == "longest" else -lengths
