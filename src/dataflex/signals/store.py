"""Results of long scoring passes on disk: whole ones are found again, interrupted ones are taken up where they stopped.

A result lies in a folder named after what it was computed from (model weights, data, parameters), never after the step alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dataflex.utils.files import DamagedFile, read_sealed_array, write_sealed_array
from dataflex.utils.logging import logger

_FLUSH_SECONDS = 30.0
_KEPT = 4


def content_key(**parts: Any) -> str:
    """A name for everything in `parts` (JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def array_digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


@torch.no_grad()
def model_digest(model: nn.Module) -> str:
    """Tells whether a model's weights are the same: trained ones by every bit, frozen ones by sum and a sample."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        if tensor.requires_grad:
            digest.update(_bits(flat))
        else:
            digest.update(_bits(flat[:: max(1, flat.numel() // 1024)]) + repr(float(flat.sum(dtype=torch.float64))).encode())
    return digest.hexdigest()[:32]


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + _bits(tensor.detach().flatten()))
    return digest.hexdigest()[:32]


def _bits(flat: torch.Tensor) -> bytes:
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


class PartStore:
    """Rows of one result: `values.npy` when whole, before that parts of this rank.

    Every file carries its digest. One that is damaged, or holds something else than rows of this result, is dropped and computed anew.

    Args:
        cache_dir: without a folder nothing is kept.
        shape, dtype: of the whole result.
    """

    def __init__(self, cache_dir: str | Path | None, signal: str, key: str, rank: int, world: int, shape: tuple[int, int], dtype: Any):
        self.folder = None if cache_dir is None else Path(cache_dir) / f"{signal}-{key}"
        self.signal, self.rank, self.world = signal, rank, world
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._flushed = time.monotonic()

    def whole(self) -> np.ndarray | None:
        """The complete result, or None."""
        path = None if self.folder is None else self.folder / "values.npy"
        return self._read(path, self.shape, self.dtype) if path is not None and path.exists() else None

    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(positions, values) that an interrupted pass left; every part is read by one rank."""
        if self.folder is None:
            return []
        found = []
        for path in sorted(self.folder.glob("part-*.npy"))[self.rank :: self.world]:
            block = self._read(path, (None, self.shape[1] + 1), np.dtype(np.float64))
            if block is not None and ((block[:, 0] >= 0) & (block[:, 0] < self.shape[0])).all():
                found.append((block[:, 0].astype(np.int64), block[:, 1:]))
        return found

    def _read(self, path: Path, shape: tuple[int | None, int], dtype: np.dtype[Any]) -> np.ndarray | None:
        """A file of this result, or None if it cannot be used."""
        try:
            array = read_sealed_array(path)
            if array.ndim != 2 or array.dtype != dtype or array.shape != (shape[0] or len(array), shape[1]):
                raise DamagedFile(f"it holds {array.dtype} of shape {array.shape} where {dtype} of {shape} is expected")
        except (DamagedFile, OSError) as error:
            logger.warning("%s cannot be used (%s); it is computed anew", path, error)
            return None
        return array

    def add(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Keep rows; they reach the disk within half a minute."""
        self._pending.append((positions, values))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.folder is not None and self._pending:
            # Positions are exact in fp64, so a part is one array.
            block = np.concatenate([np.concatenate([positions[:, None].astype(np.float64), values], 1) for positions, values in self._pending])
            write_sealed_array(self.folder / f"part-{self.rank}-{time.time_ns()}.npy", block)
        self._pending, self._flushed = [], time.monotonic()

    def finish(self, values: np.ndarray) -> None:
        """Keep the complete result, and of this signal's earlier ones only the newest. Call on one rank, after all have flushed."""
        if self.folder is None:
            return
        write_sealed_array(self.folder / "values.npy", values)
        for path in self.folder.glob("part-*.npy"):
            path.unlink()
        results = sorted(self.folder.parent.glob(f"{self.signal}-*/values.npy"), key=lambda path: -path.stat().st_mtime_ns)
        for old in results[_KEPT:]:
            shutil.rmtree(old.parent, ignore_errors=True)
