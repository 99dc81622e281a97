"""The few collectives DataFlex needs. Each is the identity in a single process; every rank must call it."""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dataflex.errors import DataflexError, TrainingError

_FROM_AFAR = re.compile(r"gloo|nccl|timed? ?out|connection (closed|reset)|pair closure", re.IGNORECASE)  # how libraries word it
_timeout = timedelta(seconds=1800)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def accelerator_present() -> bool:
    """Whether this machine has a device that is no CPU."""
    return torch.accelerator.is_available()


def unconnected(processes: int) -> str:
    """What is wrong when a launcher started several processes and a Trainer knows of `processes`; empty when all is well."""
    started = os.environ.get("WORLD_SIZE", "1")
    if processes > 1 or not started.isdigit() or int(started) <= 1:
        return ""
    return (
        f"WORLD_SIZE={started}, while this Trainer runs in one process: they would train unconnected copies into one folder. "
        "Without a GPU set use_cpu to true; with one, start the processes with torchrun or accelerate launch"
    )


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


def set_timeout(seconds: float) -> None:
    """How long a rank waits for the others: the host's `ddp_timeout`, which transformers does not hand on where there is no GPU."""
    global _timeout
    _timeout = timedelta(seconds=seconds)
    if world_size() > 1 and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(_timeout, dist.group.WORLD)


@lru_cache(maxsize=1)
def _cpu_group() -> Any:
    """A gloo group: counts and metrics travel between CPUs, so that no GPU stream has to be waited for."""
    return dist.new_group(backend="gloo", timeout=_timeout) if dist.get_backend() != "gloo" else dist.group.WORLD


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say who waited for what when the others do not come; errors of another kind pass.

    Raises:
        TrainingError: another rank is late, or has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or isinstance(error, DataflexError) or not _FROM_AFAR.search(str(error)):
            raise
        text = str(error).strip().splitlines()[0]
        late = "timed out" in text.lower() or "timeout" in text.lower()
        why = f"did not come within ddp_timeout ({_timeout.total_seconds():g} s)" if late else "ended, or failed"
        raise TrainingError(f"rank {rank()} waited for {what} of the other ranks, and one of them {why}: {text}") from error


def gather_rows(row: torch.Tensor, what: str = "the values") -> torch.Tensor:
    """Stack one equally shaped CPU tensor per rank: shape (world, *row.shape), in rank order.

    Args:
        what: what is waited for, as an error says it.
    """
    if world_size() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world_size())]
    with waiting(what):
        dist.all_gather(rows, row.contiguous(), group=_cpu_group())
    return torch.stack(rows)


def gather_ragged(part: torch.Tensor, lengths: list[int], what: str = "the values of the samples") -> torch.Tensor:
    """Concatenate the ranks' parts along dimension 0, in rank order.

    Args:
        part: this rank's rows, shape (lengths[rank], ...).
        lengths: number of rows on every rank, known beforehand, so nothing has to be synchronised.
        what: what is waited for, as an error says it.
    """
    if world_size() == 1:
        return part
    padded = part.new_zeros((max(lengths), *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in lengths]
    with waiting(what):
        dist.all_gather(parts, padded, group=_cpu_group() if part.device.type == "cpu" else None)
    return torch.cat([rows[:length] for rows, length in zip(parts, lengths, strict=True)])


def broadcast_array(values: np.ndarray, what: str = "the decision") -> np.ndarray:
    """Rank 0's array (n,), on every rank; all have the same type, but maybe not the same length.

    Args:
        what: what is waited for, as an error says it.
    """
    if world_size() == 1:
        return values
    length = torch.tensor([len(values)])
    own = torch.from_numpy(np.ascontiguousarray(values))
    with waiting(what):
        dist.broadcast(length, src=0, group=_cpu_group())
        received = own if rank() == 0 else own.new_empty(int(length))
        dist.broadcast(received, src=0, group=_cpu_group())
    return received.numpy()


def sum_over_ranks(value: torch.Tensor, what: str = "the sums") -> torch.Tensor:
    """The sum of `value` over all ranks, in rank order and therefore the same bits everywhere.

    Args:
        what: what is waited for, as an error says it.
    """
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    with waiting(what):
        dist.all_gather(parts, value.contiguous())
    return torch.stack(parts).sum(0)


def gather_objects(value: Any) -> list[Any]:
    """One small object per rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values
