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

from dataflex.errors import ComponentError
from dataflex.functional.diversity import diverse
from dataflex.functional.ranking import top_n
from dataflex.utils.distributed import broadcast_array
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
        candidate_pool: FilePath | None = None,
    ):
        """
        Args:
            candidate_pool: file with the rows that may be chosen: `.npy` (row numbers, or true and false for every row) or a JSON list.
        """
        self.dataset, self.eval_dataset, self.accelerator, self.data_collator = dataset, eval_dataset, accelerator, data_collator
        self.tokenizer, self.output_dir, self.cache_dir, self.seed = tokenizer, output_dir, cache_dir, seed
        self._candidate_pool: np.ndarray | None = None
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

    def set_candidate_pool(self, rows: Sequence[int] | np.ndarray | None) -> None:
        """Restrict the choice to these rows; None: all rows.

        Raises:
            ComponentError: a row that the data set does not have, or none at all.
        """
        if rows is None:
            self._candidate_pool = None
            return
        chosen = np.asarray(rows)
        if chosen.dtype == bool and self.dataset is not None and len(chosen) != len(self.dataset):
            raise ComponentError(f"the candidate pool says yes or no to {len(chosen)} rows, and the data set has {len(self.dataset)}")
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else np.unique(chosen.astype(np.int64))
        total = len(self.dataset) if self.dataset is not None else np.inf
        if not len(chosen) or chosen[0] < 0 or chosen[-1] >= total:
            what = "is empty" if not len(chosen) else f"has rows from {chosen[0]} to {chosen[-1]}, and the data set has {total}"
            raise ComponentError(f"the candidate pool {what}")
        self._candidate_pool = chosen

    def get_candidate_pool(self) -> list[int] | None:
        """The rows that may be chosen, or None for all."""
        return None if self._candidate_pool is None else self._candidate_pool.tolist()

    def candidate_positions(self) -> np.ndarray:
        """The rows that may be chosen, ascending."""
        return np.arange(len(self.dataset)) if self._candidate_pool is None else self._candidate_pool

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


def read_pool(path: Path) -> np.ndarray:
    """Candidate rows from a file.

    Raises:
        ComponentError: it holds something else.
    """
    try:
        rows = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.asarray(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ComponentError(f"candidate_pool {path} cannot be read: {error}") from None
    if rows.ndim != 1 or (rows.size and not (rows.dtype == bool or np.issubdtype(rows.dtype, np.integer))):
        raise ComponentError(f"candidate_pool {path} must be a list of row numbers, not {rows.dtype} of shape {rows.shape}")
    return rows
