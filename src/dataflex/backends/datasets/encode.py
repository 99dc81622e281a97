"""Data sets as training rows. A row that lacks something is left out, and the table of rows says why.

records of the files --> reduced row --> tokens and labels, in several processes --> Arrow file in the cache (tokens.py, cache.py)
                                                                                            |
training rows = that file mapped into memory, without the rows left out, with domain and the user's row number as columns
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.backends.datasets.cells import text_of
from dataflex.backends.datasets.conversations import MALFORMED, encode_conversation, left_out
from dataflex.backends.datasets.files import data_files, records
from dataflex.backends.datasets.packing import pack_text
from dataflex.backends.datasets.spec import DOMAIN_ROLE, DatasetSpec
from dataflex.backends.datasets.tokens import EncodeRow, Limits, tokens_of
from dataflex.core.row_numbers import ROW_COLUMN, Source
from dataflex.core.row_table import RowTable, joined
from dataflex.errors import ConfigError, Problem
from dataflex.train.data.sample_meta import DOMAIN_COLUMN

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TOO_SHORT = "fewer than 2 tokens"


@dataclass(frozen=True)
class Encoded:
    """Tokenised data sets, one after the other.

    Attributes:
        dataset: columns `input_ids` and `labels` (lists of equal length), `domain_id` (an index into `names`) and `dataflex_row`.
        names: data set names.
        dropped: reason to number of rows left out.
        table: every row that was read.
    """

    dataset: datasets.Dataset
    names: list[str]
    dropped: dict[str, int]
    table: RowTable


def encode_sft(
    specs: Sequence[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    default_system: str | None = None,
    max_samples: int | None = None,
    num_proc: int | None = None,
    renew: bool = False,
) -> Encoded:
    """Conversations as tokens of the tokenizer's chat template; labels are the assistant's turns with the end that the template gives them.

    Args:
        cutoff_len: tokens kept from the start of a conversation.
        train_on_prompt: label every token.
        mask_history: label the last turn of the assistant only; of no effect with `train_on_prompt`.
        max_samples: rows per data set.
        num_proc: processes; as many as there are cores by default.
        renew: tokenise again although the cache has the rows.

    Raises:
        ConfigError: a file that cannot be read, or a data set of which no row is left.
    """
    options: dict[str, Any] = {
        "cutoff_len": cutoff_len,
        "train_on_prompt": train_on_prompt,
        "mask_history": mask_history,
        "default_system": default_system,
    }
    return _encode(specs, EncodeRow(encode_conversation, tokenizer, options), limits=Limits(max_samples, num_proc, renew))


def encode_text(
    specs: Sequence[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    pack: bool,
    max_samples: int | None = None,
    num_proc: int | None = None,
    renew: bool = False,
) -> Encoded:
    """Documents as tokens, each with an end-of-text token; labels equal `input_ids`.

    Args:
        cutoff_len: tokens per row.
        pack: join the documents of a data set and cut them into rows of `cutoff_len` tokens, the last one shorter; otherwise one document per row.
        max_samples: documents per data set.

    Raises:
        ConfigError: a file that cannot be read, or a data set of which no row is left.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(Problem("", "stage", "pt needs a tokenizer with an end-of-text token, to put between documents; this one has none"))
    encode_row = EncodeRow(_encode_document, tokenizer, {"cutoff_len": None if pack else cutoff_len})
    return _encode(specs, encode_row, block=cutoff_len if pack else None, limits=Limits(max_samples, num_proc, renew))


def _encode(specs: Sequence[DatasetSpec], encode_row: EncodeRow, *, block: int | None = None, limits: Limits) -> Encoded:
    """Every data set through `encode_row`, joined in order. `block`: pack into rows of this many tokens."""
    from datasets import concatenate_datasets

    parts: list[datasets.Dataset] = []
    names: list[str] = []
    dropped: Counter[str] = Counter()
    tables: list[RowTable] = []
    problems: list[Problem] = []
    start = 0
    for spec in specs:
        tokens = tokens_of(spec, encode_row, limits)
        tables.append(_row_table(spec, tokens, limits))
        for name, rows in _domains(spec, tokens, limits, prefix=f"{spec.name}/" if len(specs) > 1 else ""):
            troubles = np.asarray(tokens.with_format("arrow")[:]["trouble"], dtype=object)[rows]
            kept = rows[troubles == ""]
            reasons = Counter(trouble.partition(": ")[0] for trouble in troubles[troubles != ""])
            part = _selected(tokens, kept, domain_id=len(names), start=start)
            if block is not None and len(kept):
                part, left = pack_text(part, block)
                reasons[TOO_SHORT] += left
            if len(part) == 0:
                problems.append(_nothing_left(spec, reasons, troubles.tolist()))
            parts.append(part)
            names.append(name)
            dropped += reasons
        start += tables[-1].sources[0].rows
    if problems:
        raise ConfigError(problems)
    return Encoded(concatenate_datasets(parts), names, dict(dropped), joined(tables))


def _selected(tokens: datasets.Dataset, rows: np.ndarray, *, domain_id: int, start: int) -> datasets.Dataset:
    """Training rows: those of `tokens`, without what only the table of rows needs. No token is copied.

    Args:
        start: number of the data set's first row.
    """
    columns = tokens.select_columns(["input_ids", "labels"])
    columns = columns.add_column(DOMAIN_COLUMN, np.full(len(tokens), domain_id)).add_column(ROW_COLUMN, np.arange(len(tokens)) + start)
    return columns if np.array_equal(rows, np.arange(len(tokens))) else columns.select(rows)


def _domains(spec: DatasetSpec, tokens: datasets.Dataset, limits: Limits, prefix: str) -> list[tuple[str, np.ndarray]]:
    """Name and rows of each domain: the data set, or the rows of it with one value in its column of the role `domain`.

    Raises:
        ConfigError: a row without a domain.
    """
    rows = np.arange(len(tokens))
    wanted = limits.rows_of(spec)
    if spec.num_samples is not None and wanted is not None and 0 < len(rows) < wanted:
        rows = np.arange(wanted) % len(rows)
    if DOMAIN_ROLE not in spec.columns:
        return [(spec.name, rows)]
    values = np.array(tokens.with_format("arrow")[:]["domain"], dtype=object)[rows]
    absent = int(sum(value is None or value == "" for value in values))
    if absent:
        message = f"'{spec.columns[DOMAIN_ROLE]}' is empty in {absent} of {len(values)} rows of '{spec.name}'; every row needs a domain"
        raise ConfigError(Problem(str(spec.path), "domain_column", message))
    return [(f"{prefix}{name}", rows[values == name]) for name in sorted(set(values.tolist()))]


def _row_table(spec: DatasetSpec, tokens: datasets.Dataset, limits: Limits) -> RowTable:
    """Every row of a data set that was read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = tokens.with_format("arrow")[:]
    files = [str(file) for file in data_files(spec.path)]
    lengths = pc.list_value_length(found["input_ids"])
    table = pa.table(
        {
            "row": np.arange(len(tokens)),
            "dataset": pa.array([spec.name] * len(tokens), pa.string()).dictionary_encode(),
            "file": pa.chunked_array([pa.DictionaryArray.from_arrays(chunk, pa.array(files, pa.string())) for chunk in found["file"].chunks]),
            "file_row": found["file_row"],
            "id": found["id"],
            "domain": found["domain"],
            "tokens": lengths,
            "reason": pc.if_else(pc.equal(found["trouble"], ""), pa.scalar(None, pa.string()), found["trouble"]),
        }
    ).unify_dictionaries()
    return RowTable([Source(spec.name, _all_rows(spec, len(tokens), limits))], table)


def _all_rows(spec: DatasetSpec, read: int, limits: Limits) -> int:
    """Rows of the data set's files, those beyond `max_samples` too: they count where rows are numbered."""
    limit = limits.rows_of(spec)
    return read if limit is None or read < limit else sum(_number_of_rows(file, spec.key) for file in data_files(spec.path))


def _number_of_rows(path: Path, key: str) -> int:
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    if path.suffix in (".jsonl", ".json", ".txt"):
        with path.open("rb") as file:
            lines = (line for line in file if line.strip())
            first = next(lines, b"")
            if path.suffix == ".txt" or not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return bool(first) + sum(1 for _ in lines)
    return sum(1 for _ in records(path, key))


def _nothing_left(spec: DatasetSpec, reasons: Counter[str], troubles: Sequence[str]) -> Problem:
    counts = ", ".join(f"{number} x {reason}" for reason, number in reasons.most_common() if number) or "it has no rows"
    example = next((trouble for trouble in troubles if ": " in trouble), "")
    return Problem(str(spec.path), spec.key, f"no row of '{spec.name}' can be trained on: {counts}{f' (for example: {example})' if example else ''}")


def _encode_document(
    row: Mapping[str, Any], *, spec: DatasetSpec, domain_id: int, tokenizer: PreTrainedTokenizerBase, cutoff_len: int | None
) -> dict[str, Any]:
    """One document of `encode_text`; `trouble` as in `encode_conversation`."""
    column = spec.columns["prompt"]
    try:
        text = text_of(row[column], f"column '{column}'")
    except ValueError as error:
        return left_out(domain_id, f"{MALFORMED}: {error}")
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:cutoff_len]
    if len(tokens) < 2:
        return left_out(domain_id, TOO_SHORT)
    return {"input_ids": tokens, "labels": tokens, "domain_id": domain_id, "trouble": ""}
