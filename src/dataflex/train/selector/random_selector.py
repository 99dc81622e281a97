"""Random rows: the baseline every comparison needs.

One permutation of the candidates is walked through across decisions, so that every candidate comes up once before any comes up again.
Cost: none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dataflex.core.registry import register_selector
from dataflex.train.selector.base_selector import Selector
from dataflex.utils.seeding import derive_seed


@register_selector("random")
class RandomSelector(Selector):
    """Random rows, the baseline: every candidate once before any comes up again."""

    def __init__(self, *args: Any, replacement: bool = False, **kwargs: Any):
        """
        Args:
            replacement: draw every row independently of the others instead.
        """
        super().__init__(*args, **kwargs)
        self.replacement = replacement
        self.passes_done, self.cursor = 0, 0

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        pool = self.candidate_positions()
        if self.replacement:
            return np.random.default_rng(derive_seed(self.seed, "random selection", step_id)).choice(pool, num_samples).tolist()
        parts, missing = [], num_samples
        while missing:
            order = np.random.default_rng(derive_seed(self.seed, "random selection", self.passes_done)).permutation(pool)
            part = order[self.cursor : self.cursor + missing]
            parts.append(part)
            missing -= len(part)
            self.cursor += len(part)
            if self.cursor >= len(pool):
                self.passes_done, self.cursor = self.passes_done + 1, 0
        return np.concatenate(parts).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"passes_done": self.passes_done, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes_done, self.cursor = state["passes_done"], state["cursor"]
