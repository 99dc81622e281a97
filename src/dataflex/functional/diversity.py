"""The diversity filter of DEITA: walk through rows from the best on and leave out what is too similar to a row already accepted.

Paper: Liu et al., "What Makes Good Data for Alignment?", ICLR 2024, arXiv 2312.15685. Its code compares a row also with rows before it in the
same batch that were themselves left out; here only accepted rows count, whatever the block size.
"""

from __future__ import annotations

import numpy as np


def diverse(order: np.ndarray, features: np.ndarray, n: int, threshold: float = 0.9, *, block: int = 1024) -> np.ndarray:
    """The first n rows of `order` whose cosine similarity with every one accepted before is at most `threshold`; fewer if there are no more.

    Takes at most len(order) * n products of rows, and memory for 8 * block^2 of them.

    Args:
        order: positions in `features`, best first, without repetition.
        features: unit vectors (N, D); rows with NaN are left out.
    """
    accepted = np.empty(0, dtype=np.int64)
    for start in range(0, len(order), block):
        if len(accepted) >= n:
            break
        rows = np.asarray(order[start : start + block], dtype=np.int64)
        rows = rows[np.isfinite(features[rows]).all(1)]
        for tile in range(0, len(accepted), 8 * block):
            rows = rows[(features[rows] @ features[accepted[tile : tile + 8 * block]].T <= threshold).all(1)]
        accepted = np.concatenate([accepted, rows[_accepted_in_turn(features[rows] @ features[rows].T > threshold)]])
    return accepted[:n]


def _accepted_in_turn(close: np.ndarray) -> np.ndarray:
    """Whether each row (b,) is close to none before it that is itself accepted, from whether each two are close (b, b)."""
    accepted = np.ones(len(close), dtype=bool)
    for row in range(len(close)):
        if accepted[row]:
            accepted[row + 1 :] &= ~close[row, row + 1 :]
    return accepted
