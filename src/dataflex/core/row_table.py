"""`output_dir/dataflex/rows.parquet`: every row of the user's data, whether it is trained on, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.core.row_numbers import RowNumbers, Source
from dataflex.utils.files import write_bytes_atomically

if TYPE_CHECKING:
    import pyarrow

HELD_OUT = "held out for evaluation (val_size)"
BY_HOST = "left out by the host"


@dataclass
class RowTable:
    """What is known of the user's rows.

    Attributes:
        sources: his data sets, with all rows, in order.
        table: columns `row`, `dataset`, `file`, `file_row`, `id`, `domain`, `tokens`, `reason` (null: nothing speaks against it). Rows beyond
            `max_samples` are not listed.
        unknown: why it is not known which rows are trained on, or "".
    """

    sources: list[Source] = field(default_factory=list)
    table: pyarrow.Table | None = None
    unknown: str = ""

    def hold_out(self, rows: np.ndarray) -> None:
        """Note that these numbers were taken for evaluation."""
        import pyarrow as pa
        import pyarrow.compute as pc

        assert self.table is not None
        taken = pa.array(np.isin(self.table.column("row").to_numpy(), rows))
        reason = pc.if_else(taken, pa.scalar(HELD_OUT), self.table.column("reason"))
        self.table = self.table.set_column(self.table.column_names.index("reason"), "reason", reason)

    def write(self, output_dir: str | Path, numbers: RowNumbers) -> None:
        """Write the table with a column `kept`: rows that nothing speaks against and training has not either were left out by the host."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = self.table if self.table is not None else pa.table({"row": np.arange(numbers.total)})
        if not numbers.unknown and not self.unknown:
            seen = np.zeros(numbers.total, dtype=bool)
            seen[numbers.kept()] = True
            kept = pa.array(seen[table.column("row").to_numpy()])
            reason = table.column("reason") if "reason" in table.column_names else pa.nulls(len(table), pa.string())
            reason = pc.if_else(kept, pa.scalar(None, pa.string()), pc.coalesce(reason, pa.scalar(BY_HOST)))
            table = table.drop_columns([name for name in ("reason",) if name in table.column_names])
            table = table.append_column("kept", kept).append_column("reason", reason)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_bytes_atomically(Path(output_dir) / "dataflex" / "rows.parquet", sink.getvalue().to_pybytes())


def joined(tables: Sequence[RowTable]) -> RowTable:
    """Tables of data sets listed one after the other; `row` counts on."""
    import pyarrow as pa

    start, parts = 0, []
    for part in tables:
        if part.table is not None:
            row = pa.array(part.table.column("row").to_numpy() + start)
            parts.append(part.table.set_column(part.table.column_names.index("row"), "row", row))
        start += sum(source.rows for source in part.sources)
    unknown = next((part.unknown for part in tables if part.unknown), "")
    return RowTable([source for part in tables for source in part.sources], pa.concat_tables(parts) if parts else None, unknown)


def of_dataset(dataset: Any, numbers: RowNumbers) -> RowTable:
    """The table of a data set that was given as it is: its rows and, if there is a column `id`, the ids of those that are trained on."""
    import pyarrow as pa

    columns = {"row": pa.array(np.arange(numbers.total))}
    if "id" in (getattr(dataset, "column_names", None) or []) and not numbers.packed:
        ids = np.full(numbers.total, None, dtype=object)
        ids[numbers.of(np.arange(len(dataset)))] = [None if value is None else str(value) for value in dataset["id"]]
        columns["id"] = pa.array(ids, pa.string())
    return RowTable(table=pa.table(columns), unknown=numbers.unknown)
