"""Nearest neighbours of the evaluation data in embedding space.

Every query takes its nearest candidate, then its second nearest, and so on; a candidate is taken once. Decisions continue where the last one
stopped, and start anew when all candidates have been taken.
Cost at every decision: a forward pass over candidates and evaluation data, without the output layer; none with a `file` made offline.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dataflex.core.registry import register_selector
from dataflex.functional.retrieval import near_order
from dataflex.train.selector.embedded import EmbeddedSelector


@register_selector("near")
class NearSelector(EmbeddedSelector):
    """Nearest neighbours of the evaluation data in embedding space, each taken once."""

    method = "near"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.taken: np.ndarray | None = None

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        pool, ctx = self.candidate_positions(), kwargs["ctx"]
        if self.taken is None:
            self.taken = np.zeros(len(ctx.train_dataset), dtype=bool)
        chosen = self._next(pool, num_samples, ctx)
        if len(chosen) < num_samples and self.taken.any():  # the others were taken before, or cannot be taken at all: start anew
            self.taken[:] = False
            self.taken[chosen] = True
            again = self._next(pool, num_samples - len(chosen), ctx)
            self.taken[:] = False
            chosen = np.concatenate([chosen, again])
        self.taken[chosen] = True
        return chosen.tolist()

    def _next(self, pool: np.ndarray, number: int, ctx: Any) -> np.ndarray:
        assert self.taken is not None
        if self.result is not None:
            allowed = np.zeros(len(self.taken), dtype=bool)
            allowed[pool] = True
            return self.result[allowed[self.result] & ~self.taken[self.result]][:number]
        return pool[near_order(self.candidates(pool, ctx), np.concatenate(self.queries(ctx)), number, self.taken[pool])]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.taken is None else {"taken": torch.from_numpy(self.taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"].numpy().copy() if "taken" in state else None
