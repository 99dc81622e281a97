"""`output_dir/dataflex/selections/`: the rows of every interval, and the rows chosen most and least often with their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dataflex.core.row_numbers import RowNumbers
from dataflex.functional.ranking import top_n
from dataflex.utils.files import write_array_atomically, write_json_atomically
from dataflex.utils.logging import logger

SHOWN = 20


class SelectionLog:
    """Writes what was selected. Only the main process does; the others' log is inactive."""

    def __init__(self, output_dir: str | Path, active: bool):
        self.folder = Path(output_dir) / "dataflex" / "selections"
        self.active = active
        self._counts: np.ndarray | None = None

    def write(self, step: int, rows: np.ndarray) -> None:
        """Keep the rows (int64) that training goes through from `step` on."""
        if self.active:
            write_array_atomically(self.folder / f"step_{step}.npy", rows.astype(np.int64))
            if self._counts is not None:
                np.add.at(self._counts, rows, 1)

    def steps(self) -> list[int]:
        """Steps at which there was a decision, in order."""
        names = (path.stem.removeprefix("step_") for path in self.folder.glob("step_*.npy"))
        return sorted(int(name) for name in names if name.isdecimal())

    def rewind(self, step: int) -> None:
        """Drop the decisions of `step` and later: training goes on from there and writes them again."""
        if self.active:
            self._counts = None
            for later in self.steps():
                if later >= step:
                    (self.folder / f"step_{later}.npy").unlink()

    def counts(self, num_rows: int) -> np.ndarray:
        """How often each row was chosen so far (num_rows,), from the files at first and then kept up to date."""
        if self._counts is None:
            self._counts = np.zeros(num_rows, dtype=np.int64)
            for step in self.steps():
                np.add.at(self._counts, self._rows(step, num_rows), 1)
        return self._counts

    def _rows(self, step: int, num_rows: int) -> np.ndarray:
        """The rows of an earlier decision; none of a damaged file, which no run should fail for."""
        path = self.folder / f"step_{step}.npy"
        try:
            rows = np.load(path, allow_pickle=False)
            if rows.ndim != 1 or rows.dtype != np.int64 or not ((rows >= 0) & (rows < num_rows)).all():
                raise ValueError(f"it does not hold rows of a data set of {num_rows}")
        except (ValueError, OSError, EOFError) as error:
            logger.warning("%s is damaged (%s), so its rows are missing in summary.json", path, error)
            return np.zeros(0, dtype=np.int64)
        return rows

    def summarise(self, numbers: RowNumbers, domains: np.ndarray | None, names: Sequence[str], text: Callable[[int], str]) -> None:
        """Write summary.json: the rows of the user's data chosen most often and least often, ties by row.

        Args:
            numbers: which rows these are.
            domains: domain of each position in the training data.
            text: the beginning of the row at a position.
        """
        if not self.active:
            return
        kept = numbers.kept()
        counts = self.counts(numbers.total)[kept]

        def described(places: np.ndarray) -> list[dict[str, object]]:
            positions = numbers.first_positions(kept[places]).tolist()
            return [
                {
                    "row": int(kept[place]),
                    "source": numbers.label(kept[place]),
                    "times": int(counts[place]),
                    "domain": None if domains is None else names[int(domains[position])],
                    "text": text(position),
                }
                for place, position in zip(places.tolist(), positions, strict=True)
            ]

        content = {
            "rows": len(kept),
            "total": numbers.total,
            "numbering": numbers.unknown,
            "domains": list(names) if domains is not None else [],
            "most": described(top_n(counts, SHOWN)),
            "least": described(top_n(-counts, SHOWN)),
        }
        write_json_atomically(self.folder / "summary.json", content)
