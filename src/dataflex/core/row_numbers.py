"""Which row of the user's data each row of the training data is.

Rows are left out (no target within `cutoff_len`, malformed), held out (`val_size`), repeated (`num_samples`), ordered by domain or packed
before training sees them. Whatever a user reads or writes speaks of his own rows all the same: a *number* is a position in the data sets as
listed, counted from 0 before any of that; `name:row` says it within one data set. Training itself counts *positions* in what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.errors import ConfigError, Problem, listing, nearest

ROW_COLUMN = "dataflex_row"  # hidden column of a data set: the number of each row, or a list of them for a packed one


@dataclass(frozen=True)
class Source:
    """A data set as the user listed it, with all of its rows."""

    name: str
    rows: int


class RowNumbers:
    """Positions in the training data to numbers in the user's data, and back.

    Attributes:
        total: rows of the user's data.
        sources: his data sets, in order; empty when there is only one without a name.
        unknown: why numbers are not known, or "". Numbers are then positions.
    """

    def __init__(
        self, numbers: np.ndarray | None, length: int, *, offsets: np.ndarray | None = None, sources: Sequence[Source] = (), unknown: str = ""
    ):
        """
        Args:
            numbers: of each position (N,), or of each document of each packed row, one after the other (D,). None: the same as the positions.
            length: N.
            offsets: where the documents of each packed row begin, and their end (N + 1,).
        """
        self._numbers, self._offsets, self.length = numbers, offsets, length
        self.sources, self.unknown = list(sources), unknown
        highest = length - 1 if numbers is None else int(numbers.max(initial=-1))
        self.total = sum(source.rows for source in sources) if sources else highest + 1

    @classmethod
    def of_dataset(cls, dataset: Any, *, sources: Sequence[Source] = (), total: int | None = None) -> RowNumbers:
        """From the hidden column of a data set: one number per row, or a list of them for a packed one."""
        import pyarrow as pa

        length, offsets, parts, ends = len(dataset), None, [], []
        for batch in dataset.select_columns([ROW_COLUMN]).with_format("arrow").iter(batch_size=100_000):
            for chunk in batch.combine_chunks().column(ROW_COLUMN).chunks:
                if pa.types.is_list(chunk.type):
                    ends.append(chunk.value_lengths().to_numpy(zero_copy_only=False))
                    chunk = chunk.flatten()
                parts.append(chunk.to_numpy(zero_copy_only=False))
        numbers = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
        if ends:
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(ends))]).astype(np.int64)
        found = cls(numbers, length, offsets=offsets, sources=sources)
        found.total = max(found.total, total or 0)
        if offsets is None and found.total == length and (numbers == np.arange(length)).all():
            found._numbers = None
        return found

    @property
    def packed(self) -> bool:
        """Whether a row of the training data may hold several of the user's."""
        return self._offsets is not None

    @property
    def changed(self) -> bool:
        """Whether numbers differ from positions."""
        return self._numbers is not None

    def of(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the rows at `positions`, in their order; of a packed row all its documents' (D',), else one each (n,)."""
        if self._numbers is None:
            return positions.astype(np.int64, copy=False)
        if self._offsets is None:
            return self._numbers[positions]
        starts, counts = self._offsets[positions], self._offsets[positions + 1] - self._offsets[positions]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._numbers[np.repeat(starts, counts) + within]

    def of_documents(self, positions: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Number of document `ordinals[i]` of the row at `positions[i]` (n,)."""
        if self._offsets is None or self._numbers is None:
            return self.of(positions)
        last = self._offsets[positions + 1] - 1  # a block of running text may show fewer documents than it holds
        return self._numbers[np.minimum(self._offsets[positions] + ordinals, last)]

    def kept(self) -> np.ndarray:
        """Numbers that training may see, ascending."""
        return np.arange(self.length) if self._numbers is None else np.unique(self._numbers)

    def first_positions(self, numbers: np.ndarray) -> np.ndarray:
        """The first position that holds each of `numbers` (n,), which are `kept`."""
        if self._numbers is None:
            return numbers
        values, first = np.unique(self._numbers, return_index=True)
        found = first[np.searchsorted(values, numbers)]
        return found if self._offsets is None else np.searchsorted(self._offsets, found, side="right") - 1

    def in_order(self, numbers: np.ndarray) -> np.ndarray:
        """Positions of the rows of these numbers, in their order; a row that training holds several times comes as often."""
        if self._numbers is None:
            return numbers
        rank = np.full(self.total, len(numbers))
        rank[numbers[::-1]] = np.arange(len(numbers))[::-1]  # the first place of a number that comes up twice
        ranks = rank[self._numbers]
        return np.argsort(ranks, kind="stable")[: int((ranks < len(numbers)).sum())]

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Positions, ascending, of the rows of these numbers; of packed rows those that hold nothing else. Rows left out have none."""
        if self._numbers is None:
            return np.unique(numbers)
        wanted = np.zeros(self.total, dtype=bool)
        wanted[numbers] = True
        hit = wanted[self._numbers]
        return np.flatnonzero(hit if self._offsets is None else np.logical_and.reduceat(hit, self._offsets[:-1]))

    def per_row(self, values: np.ndarray, what: str) -> np.ndarray:
        """Values of the user's rows (total, ...) as values of positions (N, ...).

        Raises:
            ConfigError: rows are packed, so that a position is no row of his.
        """
        self.refuse_unknown(what)
        if self.packed:
            raise ConfigError(Problem("", what, "speaks of single rows, and rows are packed; set packing: false"))
        return values if self._numbers is None else values[self._numbers]

    def refuse_unknown(self, what: str) -> None:
        """
        Raises:
            ConfigError: what depends on numbers is asked for, and they are not known.
        """
        if self.unknown:
            raise ConfigError(Problem("", what, f"speaks of the rows of your data, and which of them training sees is not known: {self.unknown}"))

    def read(self, rows: Any, what: str) -> np.ndarray:
        """What a user wrote as rows: numbers, `name:row`, or true and false for every row; as numbers (n,), ascending.

        Raises:
            ConfigError: rows that he does not have.
        """
        self.refuse_unknown(what)
        values = np.asarray(rows)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "biuUO"):
            raise ConfigError(Problem("", what, f"must be a list of row numbers or 'name:row', not {values.dtype} of shape {values.shape}"))
        if values.dtype == bool:
            if len(values) != self.total:
                raise ConfigError(Problem("", what, f"says yes or no to {len(values)} rows, and there are {self.total}{self._left_out()}"))
            return np.flatnonzero(values)
        if values.dtype.kind in "UO":
            values = np.array([self._number(value, what) for value in (rows if isinstance(rows, list) else values.tolist())], dtype=np.int64)
        numbers = np.unique(values.astype(np.int64))
        if len(numbers) and (numbers[0] < 0 or numbers[-1] >= self.total):
            message = f"has rows from {numbers[0]} to {numbers[-1]}, and there are {self.total}, numbered from 0{self._left_out()}"
            raise ConfigError(Problem("", what, message))
        return numbers

    def _left_out(self) -> str:
        return f" (of which {len(self.kept())} are trained on)" if self.changed else ""

    def _number(self, value: Any, what: str) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if str(value).isdigit():
            return int(value)
        name, _, row = str(value).rpartition(":")
        start = 0
        for source in self.sources:
            if source.name == name and row.isdigit():
                if int(row) >= source.rows:
                    raise ConfigError(Problem("", what, f"names row {row} of '{name}', which has {source.rows} rows, numbered from 0"))
                return start + int(row)
            start += source.rows
        names = [source.name for source in self.sources]
        known = f"{nearest(name, names)} Data sets: {listing(names)}" if names else " The data has no named data sets; write plain numbers"
        raise ConfigError(Problem("", what, f"'{value}' is not a row: write its number, or 'name:row' with the name of a data set.{known}"))

    def label(self, number: int) -> str:
        """`name:row` of a number, or the number alone where there are not several data sets."""
        left = int(number)
        if len(self.sources) < 2:
            return str(left)
        for source in self.sources:
            if left < source.rows:
                return f"{source.name}:{left}"
            left -= source.rows
        return str(number)
