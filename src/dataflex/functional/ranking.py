"""From scores or rankings to chosen positions, and the log weights of draws by loss.

Ties always go to the smaller position; what is not a finite number is never chosen. Draws without replacement are the top of log weight plus
Gumbel noise (Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them", arXiv 1903.06059), whose noise depends on a key alone.
Legend: N rows, Q queries, K ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from dataflex.utils.seeding import derive_seed

Band = Literal["low", "medium", "high"]

OUTSIDE = 0.025
"""Weight of a row outside the window of `delta_log_weights`; inside it is 1."""


def top_n(scores: np.ndarray, n: int) -> np.ndarray:
    """Positions of the n largest finite scores (N,), best first, ties by position; fewer if fewer are finite. Takes O(N + n log n)."""
    scores = np.asarray(scores, dtype=np.float64)
    valid = np.flatnonzero(np.isfinite(scores))
    n = min(n, len(valid))
    if n <= 0:
        return valid[:0]
    values = scores[valid]
    nth = torch.from_numpy(values).topk(n, sorted=False).values.min().item()  # np.partition takes 30 times as long where most values are equal
    above, equal = np.flatnonzero(values > nth), np.flatnonzero(values == nth)
    best = np.concatenate([above, equal[: n - len(above)]])
    return valid[best[np.argsort(-values[best], kind="stable")]]


def gumbel_scores(log_weights: np.ndarray, key: tuple[object, ...]) -> np.ndarray:
    """Scores (N,) whose n largest, for any n, are n draws without replacement, each with probability proportional to exp(log_weights)."""
    log_weights = np.asarray(log_weights, dtype=np.float64)
    return log_weights + np.random.default_rng(derive_seed(*key)).gumbel(size=log_weights.shape)


def gumbel_top_n(log_weights: np.ndarray, n: int, key: tuple[object, ...]) -> np.ndarray:
    """n positions in the order drawn, without replacement, with probability proportional to exp(log_weights); NaN and -inf are never drawn."""
    return top_n(gumbel_scores(log_weights, key), n)


def round_robin(rankings: np.ndarray | Sequence[np.ndarray], n: int, taken: np.ndarray | None = None) -> np.ndarray:
    """The first n distinct ids of: everyone's first, everyone's second, and so on; fewer if there are no more.

    Args:
        rankings: ids by rank, an array (Q, K) or Q arrays of any lengths. Ids below 0 are skipped.
        taken: whether each row (N,) is to be skipped.
    """
    depth = max(map(len, rankings), default=0)
    by_rank = np.full((depth, len(rankings)), -1, dtype=np.int64)
    for query, ranking in enumerate(rankings):
        by_rank[: len(ranking), query] = ranking
    stream = by_rank[by_rank >= 0]
    if taken is not None:
        stream = stream[~taken[stream]]
    first = np.sort(np.unique(stream, return_index=True)[1])
    return stream[first[:n]]


def band_log_weights(
    losses: np.ndarray, band: Band, quantiles: tuple[float, float] = (0.33, 0.66), focus_weight: float = 5.0, temperature: float = 1.0
) -> np.ndarray:
    """Log weights (N,) that favour a band of the losses (N,), which is cut at two quantiles of the finite ones.

    log(focus_weight) / temperature inside the band, 0 outside, -inf where the loss is not finite.
    """
    finite = np.isfinite(losses)
    if not finite.any():
        return np.full(len(losses), -np.inf)
    lower, upper = np.quantile(losses[finite], quantiles)
    inside = {"low": losses <= lower, "medium": (losses > lower) & (losses <= upper), "high": losses > upper}[band]
    return np.where(finite, np.where(inside, math.log(focus_weight) / temperature, 0.0), -np.inf)


def delta_window(deltas: np.ndarray, progress: float, width: float = 0.2, steepness: float = 10.0) -> np.ndarray:
    """Positions inside a window over the finite deltas, largest delta first, that slides from the largest to the smallest.

    Where the window lies follows a sigmoid of the progress, scaled to be 0 and 1 at its ends. Negative deltas are cut off; a window that holds
    no others moves back to the last deltas that are not negative. It is empty when all are.

    Args:
        deltas: falls in loss (N,); NaN: unknown.
        progress: from 0 to 1.
        width: share of the finite deltas inside the window.
        steepness: of the sigmoid, above 0.
    """
    order = top_n(deltas, len(deltas))
    # The sigmoid of k (x - 1/2), less its value at 0 and over its range, written so that both ends are exact.
    position = 0.5 + 0.5 * math.tanh(steepness * (progress - 0.5) / 2) / math.tanh(steepness / 4)
    size = max(1, round(width * len(order)))
    start = round(position * (1 - width) * len(order))
    end = int((deltas[order] >= 0).sum())
    if start >= end:
        start = max(0, end - size)
    return order[start : min(start + size, end)]


def delta_log_weights(deltas: np.ndarray, progress: float, width: float = 0.2, steepness: float = 10.0) -> np.ndarray:
    """Log weights (N,): 0 inside `delta_window`, log of `OUTSIDE` elsewhere, -inf where the delta is not finite."""
    log_weights = np.where(np.isfinite(deltas), math.log(OUTSIDE), -np.inf)
    log_weights[delta_window(deltas, progress, width, steepness)] = 0.0
    return log_weights
