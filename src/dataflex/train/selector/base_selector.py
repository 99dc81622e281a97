"""Base classes of the selectors.

- `ScoringSelector`: return a score per candidate; the base takes the best. Preferred.
- `Selector`: return the chosen rows yourself.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Gt, Le
from pydantic import FilePath

from dataflex.core.row_numbers import RowNumbers
from dataflex.errors import ComponentError
from dataflex.functional.diversity import diverse
from dataflex.functional.ranking import top_n
from dataflex.utils.distributed import broadcast_array
from dataflex.utils.logging import logger
from dataflex.utils.seeding import derive_seed


class Passes(NamedTuple):
    """What a decision costs, in passes over rows."""

    forward: float = 0  # per candidate, without gradient
    backward: float = 0  # per candidate, forward and backward
    eval_forward: float = 0  # per evaluation row
    eval_backward: float = 0
    once: Passes | None = None  # at the first decision besides


def draw(pool: np.ndarray, number: int, *key: object) -> np.ndarray:
    """At most `number` rows of the pool, at random and without repetition; the same for the same key."""
    rng = np.random.default_rng(derive_seed(*key))
    return rng.permutation(pool)[:number]


class Selector(ABC):
    """Chooses the rows that the next interval trains on.

    `select` is called on every rank at each boundary, under random generators of its own, with the model as it stands. What rank 0 returns
    counts. `ctx` is the trainer; `ctx.signals` gives losses, embeddings and gradient features of rows.
    """

    needs_eval_dataset: bool = False
    """Whether the run must have evaluation data. Checked before training starts."""

    needs_model: bool = False
    """Whether the model is run at a boundary, which a model sharded by FSDP or DeepSpeed does not allow."""

    keeps_order: bool = False
    """Whether training follows the order of the rows returned; else they are shuffled."""

    step_id: int = 0
    """Optimizer step of the decision under way."""

    def __init__(
        self,
        dataset: Any = None,
        accelerator: Any = None,
        data_collator: Any = None,
        cache_dir: str | None = None,
        *,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        output_dir: str | None = None,
        seed: int = 42,
        row_numbers: Any = None,
        candidate_pool: FilePath | None = None,
    ):
        """
        Args:
            candidate_pool: file with the rows of your data that may be chosen, counted from 0 over the data sets as listed: `.npy` (row numbers,
                or true and false for every row) or a JSON list (row numbers, or texts such as "alpaca:17": a data set's name and its row).
        """
        self.dataset, self.eval_dataset, self.accelerator, self.data_collator = dataset, eval_dataset, accelerator, data_collator
        self.tokenizer, self.output_dir, self.cache_dir, self.seed = tokenizer, output_dir, cache_dir, seed
        self.row_numbers = row_numbers
        self._candidate_pool: Any = None  # numbers of the user's rows, or what he wrote for them until the data is known
        self._positions: np.ndarray | None = None  # of them in the training data
        if self.needs_eval_dataset and accelerator is not None and not eval_dataset:
            raise ComponentError(f"{type(self).__name__} compares rows with evaluation data, and there is none: set eval_dataset or val_size")
        if candidate_pool is not None:
            self.set_candidate_pool(read_pool(candidate_pool))

    def prepare(self) -> None:
        """Called when a ready-made selector has been given the run's data: look at what depends on it.

        Raises:
            ComponentError: something does not fit the data.
        """
        if self._candidate_pool is not None:
            self.set_candidate_pool(self._candidate_pool)

    @abstractmethod
    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        """The rows to train on next, best first, without repetition; `num_samples` of them, or fewer if there are no more.

        Args:
            model: the model, as wrapped for distributed training.
            step_id: number of optimizer steps done.
            kwargs: `ctx` (the trainer), `optimizer_state`, `scheduler_state`, `tokenizer`, `current_update_times` (from 1), `update_times`.
        """

    def warmup(self, num_samples: int, replacement: bool = False) -> list[int]:
        """The rows of the warm-up before the first decision of a stage: a random draw, another one in every stage."""
        pool, key = self.candidate_positions(), (self.seed, "warm-up", self.step_id)
        if replacement:
            return np.random.default_rng(derive_seed(*key)).choice(pool, num_samples).tolist()
        return draw(pool, num_samples, *key).tolist()

    # ---------------------------------------------------------------- the candidates

    def set_candidate_pool(self, rows: Sequence[int | str] | np.ndarray | None) -> None:
        """Restrict the choice to these rows of the user's data; None: all rows.

        Raises:
            ConfigError: a row that the data does not have.
            ComponentError: none that is trained on.
        """
        self._candidate_pool = self._positions = None
        if rows is None:
            return
        if self.dataset is None:  # a ready-made selector learns of the data when the run adopts it
            self._candidate_pool = rows
            return
        numbers = self._numbers()
        self._candidate_pool = numbers.read(rows, "candidate_pool")
        self._positions = numbers.positions(self._candidate_pool)
        left_out = len(self._candidate_pool) - len(np.intersect1d(self._candidate_pool, numbers.kept())) if numbers.changed else 0
        if not len(self._positions):
            why = ": all of its rows were left out of the training data, see rows.parquet" if left_out else ""
            raise ComponentError(f"the candidate pool is empty{why}")
        if left_out:
            logger.warning("%d of the %d rows of the candidate pool were left out of the training data", left_out, len(self._candidate_pool))

    def _numbers(self) -> RowNumbers:
        return self.row_numbers if self.row_numbers is not None else RowNumbers(None, len(self.dataset))

    def get_candidate_pool(self) -> list[int] | None:
        """The rows of the user's data that may be chosen, or None for all."""
        return None if self._candidate_pool is None else np.asarray(self._candidate_pool).tolist()

    def candidate_positions(self) -> np.ndarray:
        """Positions in the training data of the rows that may be chosen, ascending: what `select` chooses from."""
        return np.arange(len(self.dataset)) if self._positions is None else self._positions

    # ---------------------------------------------------------------- what the run wants to know

    @classmethod
    def uses_eval_dataset(cls, params: Mapping[str, Any]) -> bool:
        """Whether evaluation data must be there with these parameters."""
        return cls.needs_eval_dataset

    @classmethod
    def passes(cls, params: Mapping[str, Any]) -> Passes:
        """What a decision costs with these parameters, for `dataflex-cli validate`."""
        return Passes()

    def state_dict(self) -> dict[str, Any]:
        """What must survive in a checkpoint: tensors and JSON values, equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class ScoringSelector(Selector):
    """Gives every candidate a score; the rows with the highest ones are chosen, ties by row number, and never one without a finite score."""

    def __init__(self, *args: Any, diversity: Annotated[float, Gt(0), Le(1)] | None = None, **kwargs: Any):
        """
        Args:
            diversity: leave out a row whose embedding has a higher cosine similarity than this with a better row that was chosen (DEITA,
                arXiv 2312.15685; 0.9 there). Embeddings are those of the model being trained.
        """
        super().__init__(*args, **kwargs)
        if diversity is not None:
            self.needs_model = True
        self.diversity = diversity
        self.score_summary: dict[str, float] = {}

    @abstractmethod
    def scores(self, rows: np.ndarray, *, ctx: Any, **kwargs: Any) -> np.ndarray:
        """Score of each candidate (n,), higher is better; NaN: never choose it.

        Args:
            rows: the candidates (n,), ascending.
            ctx: the trainer.
            kwargs: `num_samples` and what else `Selector.select` gets.
        """

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        pool, ctx = self.candidate_positions(), kwargs.pop("ctx")
        scores = np.asarray(self.scores(pool, ctx=ctx, num_samples=num_samples, **kwargs), dtype=np.float64)
        if scores.shape != pool.shape:
            raise ComponentError(f"{type(self).__name__}.scores must return one score per candidate {pool.shape}, not {scores.shape}")
        self.score_summary = _summary(scores)
        return self.best(scores, pool, num_samples, ctx=ctx).tolist()

    def best(self, scores: np.ndarray, pool: np.ndarray, num_samples: int, *, ctx: Any) -> np.ndarray:
        """Rows of the best scores, with the diversity filter if it is on."""
        if self.diversity is None:
            return pool[top_n(scores, num_samples)]
        order = broadcast_array(pool[top_n(scores, len(scores))])  # ranks must agree on what they embed
        # Embeddings are computed for as many of the best rows as it takes, not for all.
        size = min(len(order), 2 * num_samples)
        while True:
            features = ctx.signals.embeddings(ctx.train_dataset, order[:size])
            kept = broadcast_array(diverse(np.arange(size), features, num_samples, threshold=self.diversity))
            if len(kept) == num_samples or size == len(order):
                return order[kept]
            size = min(len(order), 2 * size)


def _summary(scores: np.ndarray) -> dict[str, float]:
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return {}
    low, middle, high = np.quantile(finite, [0, 0.5, 1])
    return {"min": float(low), "p50": float(middle), "max": float(high)}


def read_pool(path: Path) -> Any:
    """Candidate rows from a file, as written there.

    Raises:
        ComponentError: it holds something else.
    """
    try:
        rows = np.load(path, allow_pickle=False) if path.suffix == ".npy" else json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, EOFError) as error:
        raise ComponentError(f"candidate_pool {path} cannot be read: {error}") from None
    if isinstance(rows, list) and all(isinstance(row, int | str) for row in rows):
        kinds = {bool if isinstance(row, bool) else int if isinstance(row, int) else str for row in rows}
        if bool not in kinds or kinds == {bool}:
            return rows
    if isinstance(rows, np.ndarray) and rows.ndim == 1 and (not rows.size or rows.dtype.kind in "biu"):
        return rows
    if isinstance(rows, np.ndarray):
        shape = f"{rows.dtype} of shape {rows.shape}"
    else:
        shape = f"a list that holds {', '.join(sorted({type(row).__name__ for row in rows}))}" if isinstance(rows, list) else type(rows).__name__
    raise ComponentError(f"candidate_pool {path} must be a list of row numbers (or 'name:row', or true and false for every row), not {shape}")
