"""Candidates in the order in which queries ask for them: NEAR and RDS+.

Legend: n candidates, Q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dataflex.functional.neighbours import nearest
from dataflex.functional.ranking import round_robin, top_n

Aggregation = Literal["round_robin", "max"]

_MAX_NEIGHBOURS = 20_000_000  # of all queries together; beyond it turns hardly matter, and memory does


def near_order(features: np.ndarray, queries: np.ndarray, number: int, taken: np.ndarray | None = None) -> np.ndarray:
    """The next `number` candidates, or fewer if no more are left: every query's nearest, then every query's second nearest, and so on.

    Of a large pool, candidates that are among no query's nearest come last, by their highest similarity to a query.

    Args:
        features: unit embeddings (n, D); rows with NaN are never taken.
        queries: unit embeddings (Q, D).
        taken: candidates (n,) not to take again.
    """
    usable = np.flatnonzero(np.isfinite(features).all(1))
    taken = np.zeros(len(features), dtype=bool) if taken is None else taken
    depth = max(1000, -(-2 * (number + int(taken.sum())) // len(queries)))
    deepest = max(1000, _MAX_NEIGHBOURS // len(queries))
    while True:
        depth = min(depth, deepest)
        ids, _ = nearest(queries, features[usable], min(depth, len(usable)))
        order = round_robin(np.where(ids >= 0, usable[ids], -1), number, taken)
        if len(order) == number or depth >= len(usable):
            return order
        if depth == deepest:
            return np.concatenate([order, _others(features, queries, number - len(order), taken, order)])
        depth *= 4


def _others(features: np.ndarray, queries: np.ndarray, number: int, taken: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Candidates that are near no query, by their highest similarity to one."""
    similarity = highest_similarity(features, queries).astype(np.float64)
    similarity[taken] = np.nan
    similarity[order] = np.nan
    return top_n(similarity, number)


def rds_order(features: np.ndarray, tasks: Sequence[np.ndarray], number: int, aggregation: Aggregation = "round_robin") -> np.ndarray:
    """The first `number` candidates by RDS+ (arXiv 2503.01807): queries of a single task, or several tasks, take turns with their best.

    Args:
        features: unit embeddings (n, D); rows with NaN are never taken.
        tasks: unit embeddings (Q, D) of each task's queries. Of several tasks, a candidate's score is its highest similarity to a query.
        aggregation: of a single task, queries take turns, or the highest similarity counts.
    """
    if len(tasks) == 1 and aggregation == "round_robin":
        return near_order(features, tasks[0], number)
    rankings = [top_n(highest_similarity(features, queries), number) for queries in tasks]
    return rankings[0] if len(rankings) == 1 else round_robin(rankings, number)


def highest_similarity(features: np.ndarray, queries: np.ndarray, block: int = 65536) -> np.ndarray:
    """Highest cosine similarity of each candidate to a query (n,); NaN where the features are."""
    return np.concatenate([(features[start : start + block] @ queries.T).max(1) for start in range(0, len(features), block)])
