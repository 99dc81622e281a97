"""Which rows share a forward pass when a data set is scored: rows of like length, so that hardly anything is padded."""

from __future__ import annotations

from typing import Any

import numpy as np


def row_lengths(dataset: Any) -> np.ndarray:
    """Tokens of each row (N,)."""
    columns = getattr(dataset, "column_names", None)
    if columns and "input_ids" in columns and hasattr(dataset, "with_format"):
        import pyarrow.compute as pc

        table = dataset.select_columns(["input_ids"]).with_format("arrow")
        parts = [pc.list_value_length(batch.column("input_ids")).to_numpy() for batch in table.iter(batch_size=10_000)]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
    own = getattr(dataset, "row_lengths", None)
    if own is not None:
        return own()
    return np.array([len(dataset[index]["input_ids"]) for index in range(len(dataset))], dtype=np.int64)


def target_counts(dataset: Any) -> np.ndarray:
    """Target tokens of each row (N,): labels other than -100, the first of which nothing predicts. Tokens where rows have no labels."""
    columns = getattr(dataset, "column_names", None)
    if columns and "labels" in columns and hasattr(dataset, "with_format"):
        import pyarrow.compute as pc

        parts = []
        for batch in dataset.select_columns(["labels"]).with_format("arrow").iter(batch_size=10_000):
            for chunk in batch.combine_chunks().column("labels").chunks:
                ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
                seen = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy(zero_copy_only=False) != -100)])
                starts = np.concatenate([[0], ends[:-1]])
                parts.append(seen[ends] - seen[np.minimum(starts + 1, ends)])
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
    if len(dataset) and "labels" in dataset[0]:
        return np.array([sum(int(label) != -100 for label in dataset[index]["labels"][1:]) for index in range(len(dataset))], dtype=np.int64)
    return row_lengths(dataset)


def length_buckets(lengths: np.ndarray, budget: int, max_rows: int = 256) -> list[np.ndarray]:
    """Positions of `lengths` (n,), in batches of at most `budget` tokens with padding (and at least one row), the longest rows first.

    The longest first: memory that does not suffice shows at once, and the time that remains is not underestimated.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    batches, start = [], 0
    while start < len(order):
        rows = max(1, min(max_rows, budget // max(int(lengths[order[start]]), 1)))
        batches.append(order[start : start + rows])
        start += rows
    return batches
