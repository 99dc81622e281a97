"""The few collectives DataFlex needs. Each is the identity in a single process; every rank must call it."""

from __future__ import annotations

import atexit
import os
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether a launcher started this process as the first one of its run; known before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """End a distributed program in order; call it last. In a single process it does nothing.

    Ranks wait for each other, since one that exits while another still writes makes torchrun kill the other. They then leave after Python's
    exit handlers (trackers finish their uploads there) but before the libraries' own shutdown: in about one of 30 runs on CPU a thread of
    theirs aborted in it ("terminate called without an active exception"), which torchrun reports as a failed job.
    """
    if world_size() == 1:
        return None
    dist.barrier()
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@lru_cache(maxsize=1)
def _cpu_group() -> Any:
    """A gloo group: counts and metrics travel between CPUs, so that no GPU stream has to be waited for."""
    return dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else dist.group.WORLD


def gather_rows(row: torch.Tensor) -> torch.Tensor:
    """Stack one equally shaped CPU tensor per rank: shape (world, *row.shape), in rank order."""
    if world_size() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row.contiguous(), group=_cpu_group())
    return torch.stack(rows)


def gather_ragged(part: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Concatenate the ranks' parts along dimension 0, in rank order.

    Args:
        part: this rank's rows, shape (lengths[rank], ...).
        lengths: number of rows on every rank, known beforehand, so nothing has to be synchronised.
    """
    if world_size() == 1:
        return part
    padded = part.new_zeros((max(lengths), *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=_cpu_group() if part.device.type == "cpu" else None)
    return torch.cat([rows[:length] for rows, length in zip(parts, lengths, strict=True)])


def broadcast_array(values: np.ndarray) -> np.ndarray:
    """Rank 0's array (n,), on every rank; all have the same type, but maybe not the same length."""
    if world_size() == 1:
        return values
    length = torch.tensor([len(values)])
    dist.broadcast(length, src=0, group=_cpu_group())
    own = torch.from_numpy(np.ascontiguousarray(values))
    received = own if rank() == 0 else own.new_empty(int(length))
    dist.broadcast(received, src=0, group=_cpu_group())
    return received.numpy()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all ranks, in rank order and therefore the same bits everywhere."""
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.stack(parts).sum(0)


def gather_objects(value: Any) -> list[Any]:
    """One small object per rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values
