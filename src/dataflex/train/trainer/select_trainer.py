"""Dynamic sample selection: at boundaries a `Selector` chooses the rows that the next optimizer steps train on."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dataflex.core.schedule import Interval
from dataflex.core.selections import SelectionLog
from dataflex.errors import ComponentError, ConfigError, Problem, TrainingError
from dataflex.signals.signals import Signals
from dataflex.train.selector.base_selector import draw
from dataflex.train.trainer.metrics import BoundaryMetrics
from dataflex.train.trainer.planned_trainer import PlannedTrainer
from dataflex.utils.distributed import broadcast_array
from dataflex.utils.logging import logger
from dataflex.utils.seeding import derive_seed


class SelectTrainer(PlannedTrainer):
    """`SelectTrainer.over(AnyTrainer)(..., dataflex=DataflexConfig(component_name="less", warmup_step=20, update_step=50, update_times=4))`.

    The loss is the host's own. Selectors see the trainer as `ctx`.
    """

    train_type = "dynamic_select"

    @property
    def _sees_samples(self) -> bool:
        return bool(getattr(self.component, "needs_model", False))

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.component, "select", None)):
            raise ComponentError(f"{type(self.component).__name__} is no selector: derive it from dataflex.Selector or dataflex.ScoringSelector")
        if getattr(self.component, "needs_model", False) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            name = self.dataflex.component_name
            reason = f"{name} runs the model outside the training step, which FSDP and DeepSpeed shard; use DDP, or a selection made offline"
            raise ConfigError(Problem("", "component_name", reason))
        self._dataflex.selections = SelectionLog(str(self.args.output_dir), active=self.accelerator.is_main_process)

    @property
    def selections(self) -> SelectionLog:
        """`output_dir/dataflex/selections/`."""
        selections: SelectionLog = self._dataflex.selections
        return selections

    def _make_metrics(self) -> BoundaryMetrics:
        return BoundaryMetrics()

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        self.component.data_collator = self.data_collator
        return loader

    @cached_property
    def signals(self) -> Signals:
        """Losses, embeddings and gradient features of rows under the current model."""
        return Signals(self, getattr(self.component, "cache_dir", None))

    def _rewind(self, step: int) -> None:
        super()._rewind(step)
        self.selections.rewind(step)

    # ---------------------------------------------------------------- a boundary

    def _next_rows(self, interval: Interval, number: int) -> np.ndarray:
        step = self.state.global_step
        self.component.step_id = step
        pool = self._pool()
        if interval.is_warmup:
            warmup = getattr(self.component, "warmup", None)
            chosen = warmup(number, replacement=False) if warmup else draw(pool, number, self.args.seed, "warm-up", step)
        else:
            chosen = self._select(interval, number)
        own = self._checked(chosen, pool)[:number] if self.accelerator.is_main_process else np.zeros(0, dtype=np.int64)
        rows = broadcast_array(own, "the rows that were selected")
        if len(rows) < number and not self._dataflex.said_repeated:
            self._dataflex.said_repeated = True
            logger.warning(
                "step %d: %d samples are wanted and %d rows chosen, so rows come up %.1f times on average in an interval",
                step,
                number,
                len(rows),
                number / len(rows),
            )
        return self._in_order(rows, number)

    def _select(self, interval: Interval, number: int) -> Any:
        assert self.optimizer is not None and self.lr_scheduler is not None
        offered = {
            "optimizer_state": self.optimizer.state,
            "scheduler_state": self.lr_scheduler.state_dict(),
            "tokenizer": self.processing_class,
            "current_update_times": interval.update,
            "update_times": self.dataflex.update_times,
            "ctx": self,
        }
        parameters = inspect.signature(self.component.select).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            offered = {name: value for name, value in offered.items() if name in parameters}
        return self.component.select(self.model_wrapped, self.state.global_step, number, **offered)

    def _pool(self) -> np.ndarray:
        positions = getattr(self.component, "candidate_positions", None)
        return positions() if positions else np.arange(self._num_rows)

    @property
    def _num_rows(self) -> int:
        return len(self.train_dataset)  # type: ignore[arg-type]

    def _mask(self, rows: np.ndarray) -> np.ndarray:
        """Whether each row of the data set (N,) is among `rows`; no sorting, since N may be millions."""
        mask = np.zeros(self._num_rows, dtype=bool)
        mask[rows] = True
        return mask

    def _checked(self, chosen: Any, pool: np.ndarray) -> np.ndarray:
        """What a selector returned, as rows of the pool.

        Raises:
            ComponentError: it returned something else.
        """
        name = type(self.component).__name__
        rows = np.asarray(chosen)
        if rows.ndim != 1 or (len(rows) and not np.issubdtype(rows.dtype, np.integer)):
            raise ComponentError(
                f"{name}.select must return a list of row numbers, not {type(chosen).__name__} of {rows.dtype} with shape {rows.shape}"
            )
        rows = rows.astype(np.int64)
        inside = (rows >= 0) & (rows < self._num_rows)
        inside[inside] = self._mask(pool)[rows[inside]]
        stray = rows[~inside]
        if len(stray):
            raise ComponentError(f"{name} chose {len(stray)} rows that are not in the pool of {len(pool)} candidates, such as {stray[0]}")
        if not len(rows):
            raise TrainingError(f"{name} chose no row at step {self.state.global_step}: none has a finite score")
        return rows

    def _in_order(self, rows: np.ndarray, number: int) -> np.ndarray:
        """`number` rows: shuffled, since samples with like scores are alike, unless the selector means its order; cycled when too few."""
        if getattr(self.component, "keeps_order", False):
            return np.resize(rows, number)
        rng = np.random.default_rng(derive_seed(self.args.seed, "order", self.state.global_step))
        return np.concatenate([rng.permutation(rows) for _ in range(-(-number // len(rows)))])[:number]

    # ---------------------------------------------------------------- what is left of it

    def _record(self, interval: Interval, rows: np.ndarray, before: np.ndarray, seconds: float) -> None:
        chosen = self._mask(rows)
        distinct = int(chosen.sum())
        overlap = int((chosen & self._mask(before)).sum()) / distinct if len(before) else None
        details: dict[str, Any] = {
            "kind": "warm-up" if interval.is_warmup else "selection",
            "component": self.dataflex.component_name,
            "stage": interval.stage,
            "update": interval.update,
            "samples": len(rows),
            "distinct": distinct,
            "pool": len(self._pool()),
            "overlap": overlap,
            "seconds": round(seconds, 3),
        }
        assert isinstance(self.metrics, BoundaryMetrics)
        self.metrics.set(selection_distinct=distinct)
        if overlap is not None:
            self.metrics.set(selection_overlap=overlap)
        if self.domains is not None:
            counts = np.bincount(self.domains[rows], minlength=len(self.domain_names))
            details["domains"] = dict(zip(self.domain_names, counts.tolist(), strict=True))
            self.metrics.set(**{f"selection_share/{name}": count / len(rows) for name, count in details["domains"].items()})
        scores = getattr(self.component, "score_summary", None)
        if scores and not interval.is_warmup:
            details["scores"] = scores
        step = self.state.global_step
        numbers = self.row_numbers.of(rows)
        if self.row_numbers.packed:
            details["documents"] = len(numbers)
        self.selections.write(step, numbers)  # before the event, which tells readers that it is there
        self.selections.summarise(self.row_numbers, self.domains, self.domain_names, self._text)
        self.events.write(step, "selection", **details)

    def _text(self, row: int) -> str:
        """The beginning of a row, for people."""
        decode = getattr(self.processing_class, "decode", None)
        item: Any = self.train_dataset[row] if decode is not None else None  # type: ignore[index]
        tokens = item.get("input_ids") if hasattr(item, "get") else None
        if decode is None or tokens is None:
            return ""
        return str(decode([int(token) for token in torch.as_tensor(tokens)[:400]]))
