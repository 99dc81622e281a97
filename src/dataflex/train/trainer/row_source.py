"""Keeping the user's row numbers through a host that makes rows of its own of the training data."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np

from dataflex.core.row_numbers import ROW_COLUMN, RowNumbers
from dataflex.core.row_table import RowTable


class Given(NamedTuple):
    """A host's arguments, and the training data among them as it was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dataset: Any


def number_rows(host: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Number the training data's rows in a hidden column if the host makes rows of its own of them, as TRL's trainers do.

    Args:
        host: the host's class.
    """
    names = [name for name, p in inspect.signature(host.__init__).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    place = names.index("train_dataset") if "train_dataset" in names else len(args)
    dataset: Any = args[place] if place < len(args) else kwargs.get("train_dataset")
    prepares = hasattr(host, "_prepare_dataset")
    skips = any((getattr(value, "dataset_kwargs", None) or {}).get("skip_prepare_dataset") for value in (*args, kwargs.get("args")))
    if not prepares or skips or not hasattr(dataset, "add_column") or ROW_COLUMN in dataset.column_names:
        return Given(args, kwargs, dataset)
    numbered = dataset.add_column(ROW_COLUMN, np.arange(len(dataset)))
    if place < len(args):
        return Given((*args[:place], numbered, *args[place + 1 :]), kwargs, numbered)
    return Given(args, {**kwargs, "train_dataset": numbered}, numbered)


def read_row_numbers(trainer: Any, given: Any, table: RowTable | None) -> RowNumbers:
    """Which of the rows that were given each row is that the host trains on."""
    dataset, sources = trainer.train_dataset, table.sources if table is not None else []
    if dataset is None or not hasattr(dataset, "__len__"):
        return RowNumbers(None, 0)
    if table is not None and table.unknown:
        return RowNumbers(None, len(dataset), unknown=table.unknown)
    if ROW_COLUMN in (getattr(dataset, "column_names", None) or []):
        total = None if given is None or table is not None else len(given)
        return RowNumbers.of_dataset(dataset, sources=sources, total=total)
    if dataset is given:
        return RowNumbers(None, len(dataset), sources=sources)
    return RowNumbers(None, len(dataset), unknown="the host makes other rows of it (packing)")
