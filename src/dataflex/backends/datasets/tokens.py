"""The tokens of one data set: from the cache, or made by several processes, a batch at a time, and written there."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from dataflex.backends.datasets import cache
from dataflex.backends.datasets.conversations import NOTES
from dataflex.backends.datasets.files import data_files, records
from dataflex.backends.datasets.rows import reduced_row
from dataflex.backends.datasets.spec import DOMAIN_ROLE, DatasetSpec
from dataflex.utils.files import file_digest
from dataflex.utils.logging import warn_once

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from transformers import PreTrainedTokenizerBase

_BATCH = 500  # rows that a process gets at a time
_FEW = 2000  # rows for which other processes are not worth starting


class EncodeRow(NamedTuple):
    """What turns a reduced row into tokens: `function(row, spec=..., domain_id=..., tokenizer=..., **options)`; options are JSON values."""

    function: Callable[..., dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]


class Limits(NamedTuple):
    """How many rows of a data set are read (`max_samples`), by how many processes, and whether although the cache has them (`renew`)."""

    max_samples: int | None = None
    num_proc: int | None = None
    renew: bool = False

    def rows_of(self, spec: DatasetSpec) -> int | None:
        """Rows to take of a data set, None: all."""
        return min((number for number in (spec.num_samples, self.max_samples) if number is not None), default=None)


def tokens_of(spec: DatasetSpec, encode_row: EncodeRow, limits: Limits) -> datasets.Dataset:
    """Columns `input_ids`, `labels`, `trouble` (empty, or `reason` or `reason: detail`), `file` (its place among the files), `file_row`, `id`
    and `domain` of every row that is read, in order, mapped into memory."""
    from datasets import Dataset

    files = data_files(spec.path)
    key = cache.digest(
        [(file.name, file_digest(file)) for file in files],
        [spec.formatting, spec.columns, spec.tags, limits.rows_of(spec)],
        [encode_row.function.__name__, encode_row.options, cache.tokenizer_digest(encode_row.tokenizer)],
        cache.code_digest(),
    )
    renew = limits.renew and os.environ.get("LOCAL_RANK", "0") == "0"
    path, notes = cache.cached(key, lambda partial: _write(partial, spec, encode_row, limits), renew=renew)
    for note in notes:
        warn_once(note)
    return Dataset.from_file(str(path), info=None)


def _write(path: Path, spec: DatasetSpec, encode_row: EncodeRow, limits: Limits) -> list[str]:
    """Tokenise every row that is read, a batch at a time; what there is to say about them."""
    import pyarrow as pa

    rows = islice(_read(spec), limits.rows_of(spec))
    batches = iter(lambda: list(islice(rows, _BATCH)), [])
    function = partial(encode_row.function, spec=spec, domain_id=0, tokenizer=encode_row.tokenizer, **encode_row.options)
    progress = tqdm(desc=f"Tokenising {spec.name}", unit="row", disable=None, leave=False)
    notes: dict[str, None] = {}
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _schema()) as writer, progress:
        for batch, said in _in_processes(partial(_encode_batch, function), batches, limits.num_proc):
            writer.write_batch(batch)
            notes |= dict.fromkeys(said)
            progress.update(len(batch))
    return list(notes)


class _Row(NamedTuple):
    """A row as read: its file's place, its own place there, its `id`, and the columns that the spec names."""

    file: int
    file_row: int
    id: str | None
    columns: dict[str, Any]


def _read(spec: DatasetSpec) -> Iterator[_Row]:
    wanted = [*spec.columns.values(), "id"]
    for number, file in enumerate(data_files(spec.path)):
        for file_row, (place, record) in enumerate(records(file, spec.key, wanted)):
            own = record.get("id") if isinstance(record, dict) else None
            yield _Row(number, file_row, None if own is None else str(own), reduced_row(place, record, spec))


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    tokens, text = pa.list_(pa.int32()), pa.string()
    columns = {"input_ids": tokens, "labels": tokens, "trouble": text, "file": pa.int32(), "file_row": pa.int64(), "id": text, "domain": text}
    return pa.schema(columns.items())


def _encode_batch(function: Callable[..., dict[str, Any]], rows: list[_Row]) -> tuple[pyarrow.RecordBatch, list[str]]:
    import pyarrow as pa

    NOTES.clear()
    encoded = [function(row.columns) for row in rows]
    spec: DatasetSpec = function.keywords["spec"]  # type: ignore[attr-defined]
    domain = spec.columns.get(DOMAIN_ROLE)
    columns = [
        cache.list_array([row["input_ids"] for row in encoded]),
        cache.list_array([row["labels"] for row in encoded]),
        pa.array([row["trouble"] for row in encoded], pa.string()),
        pa.array([row.file for row in rows], pa.int32()),
        pa.array([row.file_row for row in rows], pa.int64()),
        pa.array([row.id for row in rows], pa.string()),
        pa.array([row.columns[domain] if domain else None for row in rows], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_schema()), list(NOTES)


def _in_processes(function: Callable[[Any], Any], items: Iterator[Any], processes: int | None) -> Iterator[Any]:
    """`function` of every item, in order; in other processes once there are many items. Few items are in memory at a time."""
    wanted = processes or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    yield from map(function, islice(items, _FEW // _BATCH if wanted > 1 else None))
    if wanted <= 1:
        return
    waiting: deque[Future[Any]] = deque()
    # Forked, so that the tokenizer need not be sent; torch does nothing in these processes.
    with ProcessPoolExecutor(wanted, multiprocessing.get_context("fork"), _start_process, (function,)) as pool:
        for item in items:
            waiting.append(pool.submit(_run, item))
            if len(waiting) > 2 * wanted:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_FUNCTION: list[Callable[[Any], Any]] = []  # of a process of the pool


def _start_process(function: Callable[[Any], Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _FUNCTION[:] = [function]


def _run(item: Any) -> Any:
    return _FUNCTION[0](item)
