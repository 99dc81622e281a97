"""Telling whether a data set is the one a checkpoint, a cached result or an offline selection was made on."""

from __future__ import annotations

import hashlib
from typing import Any


def has_content(dataset: Any) -> bool:
    """Whether `dataset_fingerprint` reads the rows, and not just their number: `datasets.Dataset` and lists."""
    return isinstance(dataset, list) or "input_ids" in (getattr(dataset, "column_names", None) or [])


def dataset_fingerprint(dataset: Any) -> str:
    """A digest of the number of rows and, for `datasets.Dataset` and lists, of the tokens and labels of every row.

    Rows of other data sets are not read, since reading them may be slow or random; there only the number counts.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    columns = [name for name in ("input_ids", "labels") if name in (getattr(dataset, "column_names", None) or [])]
    if columns:
        _add_columns(digest, dataset.select_columns(columns).with_format("arrow"))
    elif isinstance(dataset, list):
        for row in dataset:
            digest.update(repr([row.get(name) for name in ("input_ids", "labels")] if isinstance(row, dict) else row).encode())
    return digest.hexdigest()[:32]


def _add_columns(digest: Any, table: Any) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in table.iter(batch_size=10_000):
        batch = batch.combine_chunks()  # of selected rows each is a chunk of its own, and how rows are chunked is no content
        for name in batch.column_names:
            for chunk in batch.column(name).chunks:
                digest.update(pc.list_value_length(chunk).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
                digest.update(chunk.flatten().cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
