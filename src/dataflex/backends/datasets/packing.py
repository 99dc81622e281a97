"""Several documents in a row, each row knowing the user's rows that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.core.row_numbers import ROW_COLUMN
from dataflex.train.data.sample_meta import DOMAIN_COLUMN

if TYPE_CHECKING:
    import datasets


def pack_text(rows: datasets.Dataset, block: int) -> tuple[datasets.Dataset, int]:
    """All tokens of one domain in rows of `block`; the last row is shorter, and left out when it has a single token (the number returned).

    A row's `dataflex_row` lists the documents that it holds a part of.
    """
    import pyarrow as pa
    from datasets import Dataset

    table = rows.with_format("arrow")[:]
    tokens = pa.concat_arrays([chunk.flatten() for chunk in table["input_ids"].chunks])
    ends = np.cumsum(np.concatenate([chunk.value_lengths().to_numpy() for chunk in table["input_ids"].chunks]))
    left = int(len(tokens) % block == 1)
    edges = np.array([*range(0, len(tokens) - left, block), len(tokens) - left])
    packed = pa.ListArray.from_arrays(pa.array(edges, pa.int32()), tokens[: edges[-1]])
    first, last = np.searchsorted(ends, edges[:-1], side="right"), np.searchsorted(ends, edges[1:] - 1, side="right")
    counts = last - first + 1
    documents = np.repeat(first, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    numbers = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), pa.array(table[ROW_COLUMN].to_numpy()[documents], pa.int64())
    )
    domains = pa.array(np.full(len(packed), table[DOMAIN_COLUMN][0].as_py()), pa.int64())
    return Dataset(pa.table({"input_ids": packed, "labels": packed, DOMAIN_COLUMN: domains, ROW_COLUMN: numbers})), left


def pack_conversations(rows: datasets.Dataset, length: int, strategy: str) -> datasets.Dataset:
    """TRL's packing, with the documents of each row in `dataflex_row`: they go through it token by token."""
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    table = rows.with_format("arrow")[:]
    lists = [pa.concat_arrays(table[name].chunks) for name in ("input_ids", "labels")]
    owners = np.repeat(table[ROW_COLUMN].to_numpy(), lists[0].value_lengths().to_numpy())
    owner = pa.ListArray.from_arrays(lists[0].offsets, pa.array(owners, pa.int64()))
    packed = pack_dataset(Dataset(pa.table({"input_ids": lists[0], "labels": lists[1], ROW_COLUMN: owner})), length, strategy)
    return packed.map(_documents_of, desc="Numbering packed rows")


def _documents_of(row: dict[str, Any]) -> dict[str, Any]:
    """One number for each document of a packed row, instead of one for each token."""
    owners = row[ROW_COLUMN]
    if row.get("seq_lengths"):
        starts = np.cumsum([0, *row["seq_lengths"][:-1]])
        return {ROW_COLUMN: [owners[start] for start in starts]}
    return {ROW_COLUMN: [owner for place, owner in enumerate(owners) if place == 0 or owner != owners[place - 1]]}
