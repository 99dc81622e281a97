"""The order in which data set rows are trained on: decided here, the same for every number of ranks, resumable from two integers.

Unit: a global micro-batch of `ranks * batch` rows. At the end of an epoch it holds what is left, shared out evenly, so that no row is
repeated or dropped and every (ranks, batch, accumulation) with the same product sees the same rows in the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dataflex.utils.seeding import isolated_rng


class Place(NamedTuple):
    """A row as it comes up in an epoch, or in a plan. `counts` is False for one that only keeps a rank busy."""

    epoch: int
    row: int
    counts: bool = True


class IndexStream:
    """Global micro-batches of row indices, epoch after epoch, from a position that `advance` moves."""

    def __init__(self, epoch_order: Callable[[int], np.ndarray], micro_batch_size: int, drop_last: bool = False):
        """
        Args:
            epoch_order: the row indices of an epoch, in order; always the same ones for the same epoch.
            micro_batch_size: rows of a global micro-batch.
            drop_last: leave out an epoch's last micro-batch when it is not full.
        """
        self._epoch_order, self.micro_batch_size, self._drop_last = epoch_order, micro_batch_size, drop_last
        self.epoch = 0
        self.row = 0
        self._orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.asarray(self._epoch_order(epoch), dtype=np.int64)
            if self._drop_last:
                order = order[: len(order) // self.micro_batch_size * self.micro_batch_size]
            # Reading ahead crosses the end of an epoch while the position is still before it: two are needed at a time.
            self._orders = {kept: value for kept, value in self._orders.items() if kept in (epoch - 1, epoch + 1)} | {epoch: order}
        return self._orders[epoch]

    def micro_batches_per_epoch(self) -> int:
        return -(-len(self.order(self.epoch)) // self.micro_batch_size)

    def upcoming(self) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, rows) of the micro-batches from the current position on, without end. Reading ahead does not move the position."""
        epoch, row = self.epoch, self.row
        while True:
            order = self.order(epoch)
            if row < len(order):
                yield epoch, order[row : row + self.micro_batch_size]
                row += self.micro_batch_size
            else:
                epoch, row = epoch + 1, 0

    def advance(self) -> None:
        """Move the position past one micro-batch."""
        self.row += self.micro_batch_size
        if self.row >= len(self.order(self.epoch)):
            self.epoch, self.row = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.row = state["epoch"], state["row"]


class PlanStream:
    """Global micro-batches of rows that were decided beforehand: one plan after the other, each set at a boundary.

    Nothing is read beyond the plan at hand, so nothing of the next one is known before it is decided.
    """

    def __init__(self, micro_batch_size: int):
        self.micro_batch_size = micro_batch_size
        self.number = -1
        self.row = 0
        self.plan = np.zeros(0, dtype=np.int64)

    def set_plan(self, number: int, rows: np.ndarray) -> None:
        """Start plan `number`; its length is a multiple of the micro-batch size."""
        assert len(rows) % self.micro_batch_size == 0
        self.number, self.row, self.plan = number, 0, rows.astype(np.int64, copy=False)

    @property
    def exhausted(self) -> bool:
        return self.row >= len(self.plan)

    def upcoming(self) -> Iterator[tuple[int, np.ndarray]]:
        """(plan, rows) of the micro-batches from the current position to the end of the plan."""
        for start in range(self.row, len(self.plan), self.micro_batch_size):
            yield self.number, self.plan[start : start + self.micro_batch_size]

    def advance(self) -> None:
        self.row += self.micro_batch_size

    def cut(self, multiple: int) -> None:
        """Leave out what remains of the plan beyond a multiple of so many rows."""
        self.plan = self.plan[: self.row + (len(self.plan) - self.row) // multiple * multiple]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "row": self.row, "plan": torch.from_numpy(self.plan.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.row, self.plan = state["number"], state["row"], state["plan"].numpy()


class RankBatches:
    """Batch sampler of one rank: its share of every upcoming micro-batch.

    A rank whose share is empty (fewer rows left than ranks) gets one row that does not count: it must run a forward pass like the others,
    but the row's labels are taken away and it is no sample.
    """

    def __init__(self, stream: IndexStream | PlanStream, rank: int, world: int):
        self.stream, self.rank, self.world = stream, rank, world

    def __iter__(self) -> Iterator[list[Place]]:
        for epoch, rows in self.stream.upcoming():
            share = rows[len(rows) * self.rank // self.world : len(rows) * (self.rank + 1) // self.world].tolist()
            yield [Place(epoch, row) for row in share] or [Place(epoch, int(rows[0]), counts=False)]


class IndexedRows(Dataset[tuple[Place, Any]]):
    """A data set whose items carry their place. Rows are read under a generator derived from it, in case reading draws random numbers."""

    def __init__(self, rows: Any, seed: int):
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> tuple[Place, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[Place]) -> list[tuple[Place, Any]]:
        fetch = getattr(self.rows, "__getitems__", None)  # `datasets` reads a batch of rows at once
        indices = [place.row for place in places]
        with isolated_rng(self.seed, "rows", *places):
            rows = fetch(indices) if fetch is not None else [self.rows[index] for index in indices]
        return list(zip(places, rows, strict=True))
