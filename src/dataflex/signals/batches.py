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
