"""Data sets as tokens. A row that lacks something is left out and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.backends.datasets.cells import text_of
from dataflex.backends.datasets.conversations import MALFORMED, encode_conversation, left_out
from dataflex.backends.datasets.rows import load_rows
from dataflex.backends.datasets.spec import DOMAIN_ROLE, DatasetSpec
from dataflex.errors import ConfigError, Problem

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TOO_SHORT = "fewer than 2 tokens"


@dataclass(frozen=True)
class Encoded:
    """Tokenised data sets, one after the other.

    Attributes:
        dataset: columns `input_ids` and `labels` (lists of equal length) and `domain_id` (an index into `names`).
        names: data set names.
        dropped: reason to number of rows left out.
    """

    dataset: datasets.Dataset
    names: list[str]
    dropped: dict[str, int]


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
) -> Encoded:
    """Conversations as tokens of the tokenizer's chat template; labels are the assistant's turns with the end that the template gives them.

    Args:
        cutoff_len: tokens kept from the start of a conversation.
        train_on_prompt: label every token.
        mask_history: label the last turn of the assistant only; of no effect with `train_on_prompt`.
        max_samples: rows per data set.

    Raises:
        ConfigError: a file that cannot be read, or a data set of which no row is left.
    """
    options: dict[str, Any] = {
        "cutoff_len": cutoff_len,
        "train_on_prompt": train_on_prompt,
        "mask_history": mask_history,
        "default_system": default_system,
    }
    return _encode(specs, partial(encode_conversation, tokenizer=tokenizer, **options), max_samples=max_samples, num_proc=num_proc)


def encode_text(
    specs: Sequence[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    pack: bool,
    max_samples: int | None = None,
    num_proc: int | None = None,
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
    encode_row = partial(_encode_document, tokenizer=tokenizer, cutoff_len=None if pack else cutoff_len)
    return _encode(specs, encode_row, block=cutoff_len if pack else None, max_samples=max_samples, num_proc=num_proc)


def _encode(
    specs: Sequence[DatasetSpec],
    encode_row: Callable[..., dict[str, Any]],
    *,
    block: int | None = None,
    max_samples: int | None,
    num_proc: int | None,
) -> Encoded:
    """Every data set through `encode_row`, joined in order. `block`: pack into rows of this many tokens."""
    from datasets import concatenate_datasets

    parts: list[datasets.Dataset] = []
    dropped: Counter[str] = Counter()
    problems = []
    domains = find_domains(specs, max_samples)
    for domain_id, (name, spec, raw) in enumerate(domains):
        rows = _map(raw, partial(encode_row, spec=spec, domain_id=domain_id), num_proc, f"Tokenising {name}")
        troubles = list(rows["trouble"])
        kept = [index for index, trouble in enumerate(troubles) if not trouble]
        reasons = Counter(trouble.partition(": ")[0] for trouble in troubles if trouble)
        part = (rows if len(kept) == len(rows) else rows.select(kept)).remove_columns("trouble")
        if block is not None and kept:
            part, reasons[TOO_SHORT] = _pack(part, block, domain_id), reasons[TOO_SHORT] + (_total(part) % block == 1)
        if len(part) == 0:
            problems.append(_nothing_left(spec, reasons, troubles))
        parts.append(part)
        dropped += reasons
    if problems:
        raise ConfigError(problems)
    return Encoded(concatenate_datasets(parts), [name for name, _, _ in domains], dict(dropped))


def find_domains(specs: Sequence[DatasetSpec], max_samples: int | None) -> list[tuple[str, DatasetSpec, datasets.Dataset]]:
    """Name, spec and raw rows of each domain: a data set, or the rows of a data set with one value in its column of the role `domain`.

    Raises:
        ConfigError: a row without a domain.
    """
    found = []
    for spec in specs:
        rows = load_rows(spec, max_samples)
        if DOMAIN_ROLE not in spec.columns:
            found.append((spec.name, spec, rows))
            continue
        values = np.array(rows[spec.columns[DOMAIN_ROLE]], dtype=object)
        absent = int(sum(value is None or value == "" for value in values))
        if absent:
            message = f"'{spec.columns[DOMAIN_ROLE]}' is empty in {absent} of {len(values)} rows of '{spec.name}'; every row needs a domain"
            raise ConfigError(Problem(str(spec.path), "domain_column", message))
        names = sorted(set(values.tolist()))
        prefix = f"{spec.name}/" if len(specs) > 1 else ""
        found += [(f"{prefix}{name}", spec, rows.select(np.flatnonzero(values == name))) for name in names]
    return found


def _map(rows: datasets.Dataset, encode_row: Callable[..., dict[str, Any]], num_proc: int | None, desc: str) -> datasets.Dataset:
    from datasets import Features, List, Value

    features = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "domain_id": Value("int64"), "trouble": Value("string")}
    return rows.map(
        encode_row,
        remove_columns=rows.column_names,
        features=Features(features),
        num_proc=min(num_proc, len(rows)) if num_proc and num_proc > 1 and len(rows) > 1 else None,
        load_from_cache_file=False,
        keep_in_memory=True,
        desc=desc,
    )


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


def _total(rows: datasets.Dataset) -> int:
    """Number of tokens."""
    import pyarrow.compute as pc

    return pc.sum(pc.list_value_length(rows.with_format("arrow")[:]["input_ids"])).as_py() or 0


def _pack(rows: datasets.Dataset, block: int, domain_id: int) -> datasets.Dataset:
    """All tokens in rows of `block`; the last row is shorter, and left out when it has a single token."""
    import pyarrow as pa
    from datasets import Dataset

    tokens = pa.concat_arrays([chunk.flatten() for chunk in rows.with_format("arrow")[:]["input_ids"].chunks])
    total = len(tokens) - (len(tokens) % block == 1)
    offsets = pa.array([*range(0, total, block), total], pa.int32())
    packed = pa.ListArray.from_arrays(offsets, tokens[:total])
    domains = pa.array([domain_id] * len(packed), pa.int64())
    return Dataset(pa.table({"input_ids": packed, "labels": packed, "domain_id": domains}), info=rows.info)
