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

from dataflex.errors import ComponentError
from dataflex.utils.files import write_bytes_atomically

FORMAT = "dataflex-offline-1"

# What the array of each method is: rows in the order in which to take them, a probability or a score per row.
CONTENT = {"near": "order", "tsds": "probabilities", "rds": "order", "ifd": "scores"}


def save_result(path: str | Path, method: str, values: np.ndarray, *, fingerprint: str, num_rows: int, parameters: Mapping[str, Any]) -> None:
    """Write a result.

    Args:
        values: see `CONTENT`.
        fingerprint: of the data set it is about.
        num_rows: its rows.
        parameters: how it was made, for people.
    """
    metadata = {
        "format": FORMAT,
        "method": method,
        "fingerprint": fingerprint,
        "rows": str(num_rows),
        "parameters": json.dumps(dict(parameters), sort_keys=True),
    }
    write_bytes_atomically(path, save({CONTENT[method]: torch.from_numpy(np.ascontiguousarray(values))}, metadata))


def load_result(path: str | Path, method: str, *, fingerprint: str, num_rows: int) -> np.ndarray:
    """Read a result for a data set.

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
        raise ComponentError(f"file {path} was not written by `dataflex-cli offline`")
    if values is None:
        raise ComponentError(f"file {path} was made by `offline {metadata['method']}`, and {method} is wanted")
    if int(metadata["rows"]) != num_rows:
        raise ComponentError(f"file {path} was made for a data set of {metadata['rows']} rows; this one has {num_rows}. Make it again")
    if metadata["fingerprint"] != fingerprint:
        raise ComponentError(
            f"file {path} was made for another data set of {num_rows} rows, or another tokenizer, template or cutoff_len. Make it again"
        )
    return values
