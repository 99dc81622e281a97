"""Which sample each token of a batch belongs to. A sample is a document: a packed row holds several.

The meta object is built from the rows before collation, where document boundaries are still visible, and travels beside the batch; the
model never sees it. Legend: B rows, L tokens per row, n samples with at least one target, N target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from dataflex.core.row_numbers import ROW_COLUMN
from dataflex.errors import TrainingError
from dataflex.train.data.index_stream import Place
from dataflex.utils.seeding import isolated_rng

META = "dataflex_meta"
DOMAIN_COLUMN = "domain_id"
OWN_COLUMNS = (DOMAIN_COLUMN, ROW_COLUMN)
ROW_FIELDS = ("input_ids", "attention_mask", "position_ids", "seq_lengths")


@dataclass(frozen=True)
class BatchMeta:
    """The samples of one micro-batch on one rank, all tensors on the CPU, target tokens ordered sample by sample.

    Attributes:
        sample_ids: position in the training data of the row of each sample (n,).
        ordinals: the how-manieth document of its row each sample is (n,); 0 where rows are not packed.
        domain_ids: domain of each sample (n,), or None when the data set has none.
        counts: number of target tokens of each sample (n,).
        rows, positions: where the token before each target stands in the batch (N,): its output predicts the target.
        targets: the target token ids (N,).
        token_samples: sample of every token (B, L), -1 for padding and for samples without targets.
        num_without_targets: samples left out because no token of theirs has a label.
        width: L.
        num_rows: data set rows in the batch.
    """

    sample_ids: torch.Tensor
    ordinals: torch.Tensor
    domain_ids: torch.Tensor | None
    counts: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    token_samples: torch.Tensor
    num_without_targets: int
    width: int
    num_rows: int

    def pin_memory(self) -> BatchMeta:
        """What a DataLoader with pinned memory calls, so that copies to a GPU need not wait."""
        pinned: dict[str, Any] = {field.name: value.pin_memory() for field in fields(self) if torch.is_tensor(value := getattr(self, field.name))}
        return replace(self, **pinned)

    @property
    def num_samples(self) -> int:
        return len(self.counts)

    @property
    def num_targets(self) -> int:
        return len(self.targets)


def document_lengths(row: Mapping[str, Any]) -> list[int]:
    """Lengths of the documents in a data set row, in order; one entry for an unpacked row.

    Padding at the end of a packed row is no document. Reads TRL's `seq_lengths`, LLaMA-Factory's neat packing (`attention_mask`
    1 1 2 2 2 0) or resets of `position_ids`.
    """
    length = len(row["input_ids"])
    if row.get("seq_lengths") is not None:
        return [int(n) for n in row["seq_lengths"]]
    starts = np.zeros(1, dtype=np.int64)
    mask, position = row.get("attention_mask"), row.get("position_ids")
    if mask is not None and np.max(mask, initial=0) > 1:
        starts = np.flatnonzero(np.diff(np.asarray(mask), prepend=-1))
    elif position is not None and np.ndim(position) == 1:
        starts = np.flatnonzero(np.asarray(position) == 0)
        starts = starts if len(starts) and starts[0] == 0 else np.zeros(1, dtype=np.int64)
    if mask is not None and mask[-1] == 0 and len(starts) > 1:  # the last piece is padding
        length = int(starts[-1])
        starts = starts[:-1]
    return np.diff(np.append(starts, length)).tolist()


def build_meta(
    ids: Sequence[int], rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], domains: np.ndarray | None = None, count_rows: bool = True
) -> BatchMeta:
    """Describe a collated batch.

    Args:
        ids: data set index of each row.
        rows: the rows before collation.
        batch: what the collator made of them: right-padded, left-padded, or flattened into one row (padding-free).
        domains: domain id of every data set row.
        count_rows: False for a batch that only keeps a rank busy; it has no samples.

    Raises:
        TrainingError: the batch has no labels, or cannot be traced back to its rows.
    """
    for where, found in (("collator's batch", batch), *(("data set's row", row) for row in rows)):
        if "input_ids" not in found:
            raise TrainingError(f"the {where} has no input_ids, only {', '.join(found)}; DataFlex cannot see the tokens of its samples")
    documents, sources = _documents(rows, tuple(batch["input_ids"].shape[:2]))
    if "shift_labels" in batch:
        labels = batch["shift_labels"].cpu()
        owner = torch.cat([documents[:, 1:], documents[:, -1:]], 1)
    elif "labels" in batch:
        labels, owner = batch["labels"].cpu()[:, 1:], documents[:, 1:]
    else:
        raise TrainingError(f"the collator's batch has no labels, only {', '.join(batch)}; weighting needs the language-modelling labels")
    is_target = (labels != -100) & (owner >= 0) if count_rows else torch.zeros_like(labels, dtype=torch.bool)
    row_index, position = is_target.nonzero(as_tuple=True)
    document = owner[row_index, position]
    counts = torch.bincount(document, minlength=len(sources))
    kept = counts > 0
    number = torch.where(kept, kept.cumsum(0) - 1, -1)
    sample_ids = torch.tensor(ids, dtype=torch.int64)[sources][kept] if len(sources) else torch.zeros(0, dtype=torch.int64)
    first = torch.searchsorted(sources, sources)  # of each document's row
    token_samples = torch.where(documents >= 0, number[documents.clamp(min=0)], -1)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == token_samples.shape:
        token_samples = token_samples.masked_fill(mask.cpu() == 0, -1)
    return BatchMeta(
        sample_ids=sample_ids,
        ordinals=(torch.arange(len(sources)) - first)[kept],
        domain_ids=None if domains is None else torch.from_numpy(np.asarray(domains)[sample_ids.numpy()].astype(np.int64)),
        counts=counts[kept],
        rows=row_index,
        positions=position,
        targets=labels[row_index, position],
        token_samples=token_samples,
        num_without_targets=int((~kept).sum()) if count_rows else 0,
        width=documents.shape[1],
        num_rows=len(rows),
    )


def _documents(rows: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Document number of each token (B, L), -1 for none, and the row (index into `rows`) of each document."""
    flattened = shape[0] == 1 and len(rows) > 1
    if not flattened and shape[0] != len(rows):
        raise TrainingError(f"the collator made {shape[0]} rows out of {len(rows)}; DataFlex cannot tell which sample a token belongs to")
    documents = torch.full(shape, -1, dtype=torch.int64)
    sources: list[int] = []
    offset = 0
    for index, row in enumerate(rows):
        lengths = document_lengths(row)
        if not flattened and len(lengths) == 1:  # whichever side is padded: padding has no labels
            documents[index] = len(sources)
            sources.append(index)
            continue
        target, start = (0, offset) if flattened else (index, 0)
        for length in lengths:
            documents[target, start : start + length] = len(sources)
            sources.append(index)
            start += length
        offset = start
    return documents, torch.tensor(sources, dtype=torch.int64)


def column_values(dataset: Any, name: str) -> np.ndarray:
    """A column of numbers (N,), without a Python object for each."""
    if not hasattr(dataset, "with_format"):
        return np.asarray(dataset[name])
    # Not the format "numpy": that of LLaMA-Factory's `datasets` fails beside a current torchvision.
    blocks = [batch.column(name).to_numpy() for batch in dataset.select_columns([name]).with_format("arrow").iter(batch_size=100_000)]
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)


def without_own(row: Any) -> Any:
    """Collators that keep every column would hand ours to the model."""
    if not isinstance(row, dict) or not any(name in row for name in OWN_COLUMNS):
        return row
    return {name: value for name, value in row.items() if name not in OWN_COLUMNS}


class KeyedCollator:
    """The host's collator, run under a generator derived from the epoch and the rows' ids."""

    def __init__(self, collate: Callable[[list[Any]], Any], seed: int):
        self.collate, self.seed = collate, seed

    def __call__(self, items: list[tuple[Place, Any]]) -> Any:
        rows = [without_own(row) for _, row in items]
        with isolated_rng(self.seed, "collate", *(place for place, _ in items)):
            return self.collate(rows)


class MetaCollator(KeyedCollator):
    """As `KeyedCollator`, with the batch's meta object attached."""

    def __init__(self, collate: Callable[[list[Any]], Any], domains: np.ndarray | None, seed: int):
        super().__init__(collate, seed)
        self.domains = domains

    def __call__(self, items: list[tuple[Place, Any]]) -> Any:
        count_rows = all(place.counts for place, _ in items)
        described = [{field: row[field] for field in ROW_FIELDS if field in row} for _, row in items]  # collators may empty the rows
        batch = super().__call__(items)
        batch[META] = build_meta([place.row for place, _ in items], described, batch, self.domains, count_rows)
        if not count_rows:
            for key in ("labels", "shift_labels"):
                if key in batch:
                    batch[key] = torch.full_like(batch[key], -100)
        return batch
