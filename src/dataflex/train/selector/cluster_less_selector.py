"""LESS at a fraction of its cost: gradients of a few representatives stand for clusters of like rows.

The candidates' embeddings are clustered once. At every decision the representatives of each cluster are drawn anew and scored as LESS does; a
cluster's score is their mean. Clusters are taken in the order of their scores; rows of one cluster in the order of their embeddings' similarity
to the evaluation data, so that the cluster which does not fit in whole gives its best rows.
Related: ClusterUCB (Findings of EMNLP 2025, arXiv 2506.10288), which spends the gradients adaptively.
Cost: a forward pass over the candidates once, then `representatives / cluster_size` of what `less` costs.
When it fails: rows that look alike but teach different things share a score; the spread within clusters is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge

from dataflex.core.registry import register_selector
from dataflex.functional.clustering import cluster, draw_representatives
from dataflex.train.selector.base_selector import Passes
from dataflex.train.selector.less_selector import LessSelector
from dataflex.train.selector.targets import tasks
from dataflex.utils.distributed import broadcast_array


@register_selector("cluster_less")
class ClusterLessSelector(LessSelector):
    """LESS on a few representatives of each cluster of like rows."""

    def __init__(self, *args: Any, cluster_size: Annotated[int, Ge(1)] = 64, representatives: Annotated[int, Ge(1)] = 4, **kwargs: Any):
        """
        Args:
            cluster_size: rows in a cluster on average.
            representatives: rows of each cluster whose gradients are taken.
        """
        super().__init__(*args, **kwargs)
        self.cluster_size, self.representatives = cluster_size, representatives
        self.labels: np.ndarray | None = None
        self.similarity: np.ndarray | None = None

    @classmethod
    def passes(cls, params: Mapping[str, Any]) -> Passes:
        share = min(1.0, params.get("representatives", 4) / params.get("cluster_size", 64))
        return LessSelector.passes(params)._replace(backward=share, once=Passes(forward=1, eval_forward=1))

    def influence(self, rows: np.ndarray, ctx: Any) -> np.ndarray:
        if self.labels is None or self.similarity is None:
            self._cluster(rows, ctx)
        assert self.labels is not None and self.similarity is not None
        drawn = draw_representatives(self.labels, self.representatives, (self.seed, "representatives", self.step_id))
        chosen = np.sort(np.concatenate(drawn))
        scores = super().influence(rows[chosen], ctx)
        valid = np.isfinite(scores)
        size = int(self.labels.max()) + 1
        owner = self.labels[chosen][valid]
        number = np.bincount(owner, minlength=size)
        with np.errstate(invalid="ignore"):
            means = np.bincount(owner, scores[valid], minlength=size) / number
            spread = np.bincount(owner, (scores[valid] - means[owner]) ** 2, minlength=size) / number
        ctx.metrics.set(cluster_score_std=float(np.sqrt(np.nanmean(spread))))
        return _ordered(means[self.labels], self.similarity)

    def _cluster(self, rows: np.ndarray, ctx: Any) -> None:
        features = ctx.signals.embeddings(ctx.train_dataset, rows)
        usable = np.isfinite(features).all(1)
        labels = np.full(len(rows), -1)
        labels[usable] = cluster(features[usable], -(-int(usable.sum()) // self.cluster_size), (self.seed, "clusters"))
        # Rows that cannot be embedded have no target either: a cluster of their own, whose representatives get no finite score.
        self.labels = broadcast_array(np.where(usable, labels, labels.max() + 1))  # ranks must agree on what they score
        queries = np.concatenate([ctx.signals.embeddings(task.dataset, task.rows) for task in tasks(self.eval_dataset)])
        self.similarity = broadcast_array(features @ queries[np.isfinite(queries).all(1)].mean(0))

    def state_dict(self) -> dict[str, Any]:
        own = {} if self.labels is None else {"labels": torch.from_numpy(self.labels), "similarity": torch.from_numpy(self.similarity)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.labels = state["labels"].numpy() if "labels" in state else None
        self.similarity = state["similarity"].numpy() if "similarity" in state else None


def _ordered(scores: np.ndarray, tie_breaker: np.ndarray) -> np.ndarray:
    """Scores that sort like `scores` and, where these are equal, like `tie_breaker`; NaN stays NaN."""
    valid = np.flatnonzero(np.isfinite(scores))
    order = valid[np.lexsort((-tie_breaker[valid], -scores[valid]))]
    result = np.full(len(scores), np.nan)
    result[order] = -np.arange(len(order), dtype=np.float64)
    return result
