"""The most similar rows of each query: exact by blocked products, approximate with faiss where exact would take hours.

An index pays only when it is searched often: building one costs more than the exact answer to a few hundred queries, and its answer misses rows.
Legend: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import torch

EXACT_LIMIT = 1e14
"""Floating-point operations (2 Q N D) up to which `nearest` is exact in any case: about an hour on a small CPU."""

QUERY_BLOCK = 1024
"""Queries in one product: bounds the memory whatever their number."""


def nearest(queries: np.ndarray, rows: np.ndarray, k: int, *, block_rows: int = 65536) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of highest similarity to each query, best first, ties by row: ids (Q, K) int64 and similarities (Q, K) fp32, K = min(k, N).

    Exact, unless 2 Q N D exceeds `EXACT_LIMIT` and faiss is installed. Where fewer rows are found, or the others have no similarity (NaN), a
    query's list ends in ids -1 with similarity -inf. Needs memory for min(Q, `QUERY_BLOCK`) * (block_rows + 2 k) similarities and one block.

    Args:
        queries: unit vectors (Q, D).
        rows: unit vectors (N, D) of any float type; may be mapped from a file, as it is read block by block.
    """
    costly = 2 * len(queries) * rows.size > EXACT_LIMIT
    if costly and importlib.util.find_spec("faiss") is not None:
        return nearest_with_faiss(queries, rows, k, block_rows=block_rows)
    k = min(k, len(rows))
    ids, similarities = np.empty((len(queries), k), dtype=np.int64), np.empty((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        ids[part], similarities[part] = _nearest_exact(fp32_tensor(queries[part]), rows, k, block_rows)
    return ids, similarities


def _nearest_exact(queries: torch.Tensor, rows: np.ndarray, k: int, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    values = torch.empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(rows), block_rows):
        new_values, new_ids = _ordered_top(queries @ fp32_tensor(rows[start : start + block_rows]).T, k)
        # Earlier rows come first, so that a stable sort leaves equal similarities in the order of the rows.
        values, order = torch.cat([values, new_values], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, new_ids + start], 1).gather(1, order)[:, :k]
        values = values[:, :k]
    return ids.masked_fill(values == -math.inf, -1).numpy(), values.numpy()


def _ordered_top(similarity: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each line (Q, n) and their columns, ties by column, NaN as -inf."""
    # One more than wanted: where it equals the last wanted one, topk may have taken any of the equal ones.
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    if values[:, :1].isnan().any():  # topk sorts NaN first
        return _ordered_top(similarity.masked_fill(similarity.isnan(), -math.inf), k)
    columns, order = columns[:, :k].sort(dim=1)
    values_by_column = values[:, :k].gather(1, order)
    best, order = values_by_column.sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if 0 < k < values.shape[1]:
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        columns[tied] = similarity[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return best, columns


def nearest_with_faiss(queries: np.ndarray, rows: np.ndarray, k: int, *, block_rows: int = 65536) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` by an inverted-file index, which misses some rows. Holds all rows in memory once more, as fp32.

    Searches a sixteenth of its lists, but no fewer than 64 nor fewer than hold twenty times the rows wanted on average.
    """
    import faiss

    k, dimensions = min(k, len(rows)), rows.shape[1]
    if k == 0 or not len(queries):
        return np.empty((len(queries), k), dtype=np.int64), np.empty((len(queries), k), dtype=np.float32)
    lists = max(1, math.isqrt(len(rows)) // 2)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(_array(rows[:: max(1, len(rows) // (256 * lists))]))
    for start in range(0, len(rows), block_rows):
        index.add(_array(rows[start : start + block_rows]))
    index.nprobe = min(lists, max(64, lists // 16, math.ceil(20 * k * lists / len(rows))))
    similarities, ids = index.search(_array(queries), k)
    similarities = np.where(ids >= 0, similarities, -np.inf).astype(np.float32)
    order = np.lexsort((ids, -similarities), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(similarities, order, 1)


def _array(block: np.ndarray) -> np.ndarray:
    return np.require(block, np.float32, ["C", "W"])  # torch warns about arrays that are read-only, as mapped files are


def fp32_tensor(block: np.ndarray) -> torch.Tensor:
    """The array in fp32, sharing its memory where it can."""
    return torch.from_numpy(_array(block))
