"""The file that `dataflex-cli offline` writes and selectors read: one array and what it was made from, as safetensors (no pickle)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dataflex.core.row_numbers import RowNumbers
from dataflex.errors import ComponentError
from dataflex.utils.files import write_bytes_atomically

FORMAT = "dataflex-offline-2"

# What the array of each method is: rows of the user's data in the order in which to take them, a probability or a score for each of them
# (NaN for those that are left out of training).
CONTENT = {"near": "order", "tsds": "probabilities", "rds": "order", "ifd": "scores"}


def save_result(path: str | Path, method: str, values: np.ndarray, *, fingerprint: str, numbers: RowNumbers, parameters: Mapping[str, Any]) -> None:
    """Write a result.

    Args:
        values: see `CONTENT`, of positions in the training data.
        fingerprint: of the data set it is about.
        numbers: which rows of the user's data these are. Packed rows, and rows of which that is not known, are numbered by position.
        parameters: how it was made, for people.
    """
    own = not numbers.packed and not numbers.unknown
    if own and CONTENT[method] == "order":
        values = numbers.of(values)
    elif own and numbers.changed:
        of_rows = np.full((numbers.total, *values.shape[1:]), np.nan, dtype=values.dtype)
        of_rows[numbers.of(np.arange(len(values)))] = values
        values = of_rows
    metadata = {
        "format": FORMAT,
        "method": method,
        "fingerprint": fingerprint,
        "rows": str(numbers.length),
        "numbering": "rows of the data" if own else "rows as trained on",
        "parameters": json.dumps(dict(parameters), sort_keys=True),
    }
    write_bytes_atomically(path, save({CONTENT[method]: torch.from_numpy(np.ascontiguousarray(values))}, metadata))


def load_result(path: str | Path, method: str, *, fingerprint: str, numbers: RowNumbers) -> np.ndarray:
    """Read a result for a data set, in positions of the training data.

    Raises:
        ComponentError: the file is no such result, or was made by another method or for another data set.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            values = file.get_tensor(CONTENT[method]).numpy() if metadata.get("method") == method else None
    except (SafetensorError, OSError) as error:
        raise ComponentError(f"file {path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        by = "written by another version of" if metadata.get("format", "").startswith("dataflex-offline-") else "not written by"
        raise ComponentError(f"file {path} was {by} `dataflex-cli offline`. Make it again")
    if values is None:
        raise ComponentError(f"file {path} was made by `offline {metadata['method']}`, and {method} is wanted")
    if int(metadata["rows"]) != numbers.length:
        raise ComponentError(f"file {path} was made for a data set of {metadata['rows']} rows; this one has {numbers.length}. Make it again")
    if metadata["fingerprint"] != fingerprint:
        raise ComponentError(
            f"file {path} was made for another data set of {numbers.length} rows, or another tokenizer, template or cutoff_len. Make it again"
        )
    if metadata["numbering"] != "rows of the data" or not numbers.changed:
        return values
    return numbers.in_order(values) if CONTENT[method] == "order" else values[numbers.of(np.arange(numbers.length))]
