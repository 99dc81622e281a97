"""Rows drawn from a distribution that is close to the evaluation data and avoids near-duplicates (TSDS).

The probabilities minimise the cost of transport from the evaluation data to the candidates plus a penalty for mass on near-duplicates.
Paper: Liu, Karbasi and Rekatsinas, "TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303.
Cost at every decision: a forward pass over candidates and evaluation data, without the output layer, and a nearest-neighbour search; none with
a `file` made offline.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le

from dataflex.core.registry import register_selector
from dataflex.functional.ranking import gumbel_top_n
from dataflex.functional.transport import task_probabilities
from dataflex.train.selector.embedded import EmbeddedSelector
from dataflex.utils.logging import logger
from dataflex.utils.seeding import derive_seed


@register_selector("tsds")
class TsdsSelector(EmbeddedSelector):
    """Rows drawn close to the evaluation data, near-duplicates counted once (TSDS, arXiv 2410.11303)."""

    method = "tsds"

    def __init__(
        self,
        *args: Any,
        alpha: Annotated[float, Ge(0), Le(1)] = 0.5,
        C: Annotated[float, Gt(0)] = 5.0,
        sigma: Annotated[float, Ge(0)] = 0.75,
        max_neighbours: Annotated[int, Ge(1)] = 5000,
        replacement: bool = True,
        **kwargs: Any,
    ):
        """
        Args:
            alpha: weight of closeness against diversity.
            C: scale of distances.
            sigma: rows closer than this count as near-duplicates; 0: none do.
            max_neighbours: candidates that a query may give mass to, at most a tenth of all, or 100.
            replacement: draw independently, as the authors do; `false`: every row at most once.
        """
        super().__init__(*args, **kwargs)
        self.alpha, self.C, self.sigma, self.max_neighbours, self.replacement = alpha, C, sigma, max_neighbours, replacement

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        pool, ctx = self.candidate_positions(), kwargs["ctx"]
        if self.result is not None:
            probabilities = self.result[pool]
        else:
            found = task_probabilities(
                self.candidates(pool, ctx),
                np.concatenate(self.queries(ctx)),
                alpha=self.alpha,
                C=self.C,
                sigma=self.sigma,
                max_neighbours=self.max_neighbours,
            )
            probabilities = found.probabilities
            if not found.exact:
                logger.warning("tsds: alpha and C are outside the range in which its solution is optimal; a smaller C or a larger alpha is inside")
        total = probabilities.sum()
        if not total > 0:
            return []
        if self.replacement:
            rng = np.random.default_rng(derive_seed(self.seed, "tsds", self.step_id))
            return pool[rng.choice(len(pool), num_samples, p=probabilities / total)].tolist()
        with np.errstate(divide="ignore"):
            return pool[gumbel_top_n(np.log(probabilities), num_samples, (self.seed, "tsds", self.step_id))].tolist()
