"""Trainers that decide at boundaries which rows the next optimizer steps train on."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from dataflex.core.schedule import Interval, Schedule, stage_length, total_steps
from dataflex.errors import ResumeError
from dataflex.train.data.index_stream import PlanStream
from dataflex.train.data.sample_meta import KeyedCollator
from dataflex.train.trainer.dynamic_trainer import DynamicTrainer
from dataflex.train.trainer.metrics import BoundaryMetrics
from dataflex.utils.seeding import isolated_rng


class _Paces(Sampler[list[int]]):
    """A batch sampler that only has a length."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        return iter(())


class PlannedTrainer(DynamicTrainer):
    """Base of `SelectTrainer` and `MixTrainer`.

    One of the host's epochs is a stage (`core/schedule.py`), so `num_train_epochs` repeats stages, and a stage is a whole number of
    optimizer steps, so no step is shorter than the others.
    """

    own_settings: ClassVar[tuple[str, ...]] = ("update_step", "update_times")
    _orders_rows = True

    def _adopt(self, component: Any) -> tuple[Any, dict[str, Any]]:
        for name, value in self._runtime().items():
            if getattr(component, name, value) is None:
                setattr(component, name, value)
        if hasattr(component, "prepare"):
            component.prepare()
        return super()._adopt(component)

    @property
    def schedule(self) -> Schedule:
        """When there are decisions; known once training starts."""
        schedule: Schedule = self._dataflex.schedule
        return schedule

    @property
    def samples_per_step(self) -> int:
        """Rows of an optimizer step, over all ranks."""
        return self.micro_batch_size * int(self.args.gradient_accumulation_steps)

    def _make_stream(self, loader: DataLoader[Any]) -> PlanStream:
        return PlanStream(self.micro_batch_size)

    def _restore(self, checkpoint: Path) -> None:
        super()._restore(checkpoint)
        self._dataflex.stream.cut(self.samples_per_step)  # with allow_changed_resume a step may hold another number of rows than before

    def _refuse_changed(self, checkpoint: Path, before: dict[str, Any]) -> None:
        changed = [name for name in ("dataset rows", "dataset content") if before.get(name) != self._dataflex.settings[name]]
        if changed and self.dataflex.allow_changed_resume:
            raise ResumeError(
                f"{checkpoint} holds a plan of rows of another data set ({', '.join(changed)} changed); it cannot be resumed with this one"
            )
        super()._refuse_changed(checkpoint, before)

    def _make_collator(self, loader: DataLoader[Any]) -> KeyedCollator:
        return KeyedCollator(loader.collate_fn, self.args.seed)

    def _pacing_loader(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        rows = len(loader.dataset)  # type: ignore[arg-type]
        steps_per_pass = -(-rows // self.samples_per_step)
        periods = self._periods(steps_per_pass)
        stage = stage_length(*periods, steps_per_pass)
        self._dataflex.schedule = Schedule(*periods, total_steps(self.args.num_train_epochs, stage, max(self.args.max_steps, 0)))
        return DataLoader(
            loader.dataset,
            batch_sampler=_Paces(stage * int(self.args.gradient_accumulation_steps)),
            generator=torch.Generator(),  # otherwise iterating draws from the global one
        )

    def _periods(self, steps_per_pass: int) -> tuple[int, int, int]:
        """`warmup_step`, `update_step` and `update_times`."""
        return self.dataflex.warmup_step, self.dataflex.update_step, self.dataflex.update_times

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._dataflex.seconds, self._dataflex.started = 0.0, time.perf_counter()
        return super().train(*args, **kwargs)

    def _next_batches(self, number: int) -> Iterator[Any]:
        if self._dataflex.stream.exhausted:
            self._decide()
        yield from super()._next_batches(number)

    def _decide(self) -> None:
        """At a boundary: have the component decide, and start the plan of the next interval."""
        step, begun = self.state.global_step, time.perf_counter()
        interval = self.schedule.interval_at(step)
        number = (interval.start + interval.steps - step) * self.samples_per_step
        with isolated_rng(self.args.seed, "decision", step), self._undisturbed():
            rows = self._next_rows(interval, number)
        before = self._dataflex.stream.plan
        self._dataflex.stream.set_plan(interval.number, rows)
        self._dataflex.batches = None  # an iterator over the new plan
        seconds = time.perf_counter() - begun
        self._dataflex.seconds += seconds
        assert isinstance(self.metrics, BoundaryMetrics) and self._dataflex.started is not None
        self.metrics.set(decision_seconds=seconds, decision_share_of_time=self._dataflex.seconds / (time.perf_counter() - self._dataflex.started))
        self._record(interval, rows, before, seconds)

    @abstractmethod
    def _next_rows(self, interval: Interval, number: int) -> np.ndarray:
        """The `number` rows of an interval, in the order of training: the same on all ranks."""

    @abstractmethod
    def _record(self, interval: Interval, rows: np.ndarray, before: np.ndarray, seconds: float) -> None:
        """Leave a trace of a decision; `before` are the rows of the previous interval."""

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Components may switch modes and leave gradients; training goes on as if they had not."""
        model: Any = self.model
        modes = [(module, module.training) for module in model.modules()]
        needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, needed in needs:
                parameter.requires_grad_(needed)
                parameter.grad = None
