"""TSDS: probabilities of rows by transport from queries, which discount near-duplicates by their density.

    minimise  alpha/C sum_ij g_ij d_ij + (1 - alpha) Q max_ij rho_j |g_ij - 1/(Q rho_j S)|   with  sum_j g_ij = 1/Q, g >= 0;  p_j = sum_i g_ij

d are Euclidean distances, rho_j = sum over rows j' nearer than sigma of 1 - d_jj'^2/sigma^2 (itself included), S = sum_j 1/rho_j.
Paper: Liu, Karbasi and Rekatsinas, "TSDS: Data Selection for Task-Specific Model Finetuning", NeurIPS 2024, arXiv 2410.11303.

Solution: query i fills its rows, nearest first, up to 1/(Q s rho_j) each, the last one in part. So it is done with its nearest k rows when
s = c_i(k) = sum of 1/rho over them, and from there on a larger s moves mass on to row k+1, which costs c_i(k) (d_(k+1) - d_k) more than before.
Sorting all c_i(k) and adding up these rises gives the slope of the transport cost, and s is where it outweighs the penalty's: what the authors'
code finds with a heap.
Legend: Q queries, N rows, K neighbours, D dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from dataflex.functional.neighbours import fp32_tensor, nearest

FEWEST_NEIGHBOURS = 100
"""Neighbours of a query that are considered even if they are more than a tenth of all rows."""


class TsdsResult(NamedTuple):
    """What TSDS finds.

    Attributes:
        probabilities: of each row (N,), sum 1; all 0 if no query has a neighbour.
        s: the spread found, in units of rows that are not near-duplicates.
        exact: whether this is the minimum: s <= S/2 and no query ran out of neighbours. Smaller C or larger alpha make s smaller.
    """

    probabilities: np.ndarray
    s: float
    exact: bool


def task_probabilities(
    features: np.ndarray, queries: np.ndarray, *, alpha: float = 0.5, C: float = 5.0, sigma: float = 0.75, max_neighbours: int = 5000
) -> TsdsResult:
    """TSDS from embeddings. Densities are those among the rows that are some query's neighbour, as in the authors' code.

    Costs 2 Q N D operations for the search and U^2 D for the densities of the U different neighbours.

    Args:
        features: unit vectors (N, D); rows with NaN get probability 0.
        queries: unit vectors (Q, D).
        alpha: weight of closeness, from 0 to 1, against diversity.
        C: scale of distances.
        sigma: rows closer than this are near-duplicates; 0: none are.
        max_neighbours: rows that a query may give mass to; at most a tenth of all rows, or `FEWEST_NEIGHBOURS`.
    """
    usable = np.flatnonzero(np.isfinite(features).all(1))
    ids, similarities = nearest(queries, features[usable], min(max_neighbours, max(len(usable) // 10, FEWEST_NEIGHBOURS)))
    ids = np.where(ids >= 0, usable[ids], -1) if len(usable) else ids
    distances = np.sqrt(np.maximum(2 - 2 * similarities.astype(np.float64), 0))
    retrieved = np.unique(ids[ids >= 0])
    inverse_density = np.zeros(len(features))
    inverse_density[retrieved] = 1 / kernel_density(features[retrieved], sigma)
    return tsds_probabilities(ids, distances, inverse_density, alpha, C)


def tsds_probabilities(ids: np.ndarray, distances: np.ndarray, inverse_density: np.ndarray, alpha: float, C: float) -> TsdsResult:
    """TSDS from each query's neighbours.

    Args:
        ids: rows (Q, K), nearest first; -1 at the end of a query's list: no more were found.
        distances: of these rows (Q, K), ascending.
        inverse_density: 1/rho of each row (N,). Rows that are no query's neighbour may have 0: S is smaller then, and `exact` is sometimes false
            where it could be true.
        alpha, C: as in the objective.
    """
    answered = (ids >= 0).any(1)
    ids, distances = ids[answered], distances[answered]
    if not len(ids):
        return TsdsResult(np.zeros(len(inverse_density)), 0.0, False)
    num_queries, found = len(ids), ids >= 0
    reach = np.where(found, inverse_density[ids], 0.0).cumsum(1)  # c_i(k)
    s, stopped = _spread(reach, np.where(found, distances, 0.0), found, alpha, C)
    filled = np.minimum(reach, s) / s
    mass = np.diff(filled, axis=1, prepend=0.0)
    mass[np.arange(num_queries), found.sum(1) - 1] += 1 - filled[:, -1]  # a query that ran out of neighbours
    probabilities = np.bincount(ids[found], mass[found] / num_queries, minlength=len(inverse_density))
    exact = stopped and s <= inverse_density.sum() / 2 and s <= reach[:, -1].min()
    return TsdsResult(probabilities, s, bool(exact))


def _spread(reach: np.ndarray, distances: np.ndarray, found: np.ndarray, alpha: float, C: float) -> tuple[float, bool]:
    """The s of the solution, and whether it was found before the neighbours ran out."""
    has_next = found[:, 1:]
    points = reach[:, :-1][has_next]
    if not len(points):
        return float(reach[:, 0].min()), False
    rises = (reach[:, :-1] * np.diff(distances, axis=1))[has_next]
    order = np.argsort(points, kind="stable")
    stop = alpha / C * rises[order].cumsum() >= (1 - alpha) * len(reach)
    return float(points[order[stop.argmax() if stop.any() else -1]]), bool(stop.any())


def kernel_density(rows: np.ndarray, sigma: float, *, block_rows: int = 2048) -> np.ndarray:
    """rho (N,) fp64 of unit vectors (N, D): how many rows each one stands for, itself included, so at least 1. Exact, N^2 D operations.

    sigma is a Euclidean distance (0 to 2); 0 gives ones. fp32 products make the share of a duplicate uncertain by about 1e-7 / sigma^2.
    """
    density = torch.zeros(len(rows), dtype=torch.float64)
    if sigma == 0:
        return np.ones(len(rows))
    features = fp32_tensor(rows)
    scale = 2 / sigma**2
    for i in range(0, len(rows), block_rows):
        for j in range(i, len(rows), block_rows):  # the kernel is symmetric: each pair of blocks once
            one, other = slice(i, i + block_rows), slice(j, j + block_rows)
            kernel = (features[one] @ features[other].T).mul_(scale).add_(1 - scale).clamp_(0, 1)  # 1 - d^2/sigma^2 with d^2 = 2 - 2 cos
            density[one] += kernel.sum(1, dtype=torch.float64)
            if j > i:
                density[other] += kernel.sum(0, dtype=torch.float64)
    return density.clamp_(min=1).numpy()
