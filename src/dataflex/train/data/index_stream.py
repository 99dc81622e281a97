"""The order in which data set rows are trained on: decided here, the same for every number of ranks, resumable from two integers.

Unit: a global micro-batch of `ranks * batch` rows. At the end of an epoch it holds what is left, shared out evenly, so that no row is
repeated or dropped and every (ranks, batch, accumulation) with the same product sees the same rows in the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class IndexStream:
    """Global micro-batches of row indices, epoch after epoch, from a position that `advance` moves."""

    def __init__(self, epoch_order: Callable[[int], np.ndarray], micro_batch_size: int, drop_last: bool = False):
        """
        Args:
            epoch_order: the row indices of an epoch, in order.
            micro_batch_size: rows of a global micro-batch.
            drop_last: leave out an epoch's last micro-batch when it is not full.
        """
        self._epoch_order, self.micro_batch_size, self._drop_last = epoch_order, micro_batch_size, drop_last
        self.epoch = 0
        self.micro_batch = 0
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            order = np.asarray(self._epoch_order(epoch), dtype=np.int64)
            if self._drop_last:
                order = order[: len(order) // self.micro_batch_size * self.micro_batch_size]
            self._order = (epoch, order)
        return self._order[1]

    def micro_batches_per_epoch(self) -> int:
        return -(-len(self.order(self.epoch)) // self.micro_batch_size)

    def upcoming(self) -> Iterator[np.ndarray]:
        """Micro-batches from the current position on, without end. Reading ahead does not move the position."""
        epoch, micro_batch = self.epoch, self.micro_batch
        while True:
            order = self.order(epoch)
            start = micro_batch * self.micro_batch_size
            if start < len(order):
                yield order[start : start + self.micro_batch_size]
                micro_batch += 1
            else:
                epoch, micro_batch = epoch + 1, 0

    def advance(self) -> None:
        """Move the position past one micro-batch."""
        self.micro_batch += 1
        if self.micro_batch * self.micro_batch_size >= len(self.order(self.epoch)):
            self.epoch, self.micro_batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "micro_batch": self.micro_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.micro_batch = state["epoch"], state["micro_batch"]


class RankBatches:
    """Batch sampler of one rank: its share of every upcoming micro-batch.

    A rank whose share is empty (fewer rows left than ranks) gets one row under the index `-row - 1`: it must run a forward pass like the
    others, but the row has no labels and counts as no sample.
    """

    def __init__(self, stream: IndexStream, rank: int, world: int):
        self.stream, self.rank, self.world = stream, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for ids in self.stream.upcoming():
            share = ids[len(ids) * self.rank // self.world : len(ids) * (self.rank + 1) // self.world]
            yield share.tolist() if len(share) else [-int(ids[0]) - 1]


class IndexedRows(Dataset[tuple[int, Any]]):
    """A data set whose items carry their index."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.rows[index if index >= 0 else -index - 1]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        fetch = getattr(self.rows, "__getitems__", None)  # `datasets` reads a batch of rows at once
        if fetch is None:
            return [self[index] for index in indices]
        return list(zip(indices, fetch([index if index >= 0 else -index - 1 for index in indices]), strict=True))
