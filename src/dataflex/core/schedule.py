"""At which optimizer steps a selector or mixer decides anew.

A stage is `warmup_step` steps of ordinary training followed by `update_times` intervals of `update_step` steps, each of which trains on what
was decided at its start. Stages repeat until training ends; with `update_times: -1` there is one, without end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

WITHOUT_END = -1


@dataclass(frozen=True)
class Interval:
    """Optimizer steps that train on rows decided together.

    Attributes:
        number: how many intervals come before it.
        start: its first optimizer step.
        steps: how many it has; the last one may be cut short by the end of training.
        stage: how many stages come before its own.
        update: 0 for the warm-up, else the how-manieth decision of the stage it follows, from 1.
    """

    number: int
    start: int
    steps: int
    stage: int
    update: int

    @property
    def is_warmup(self) -> bool:
        return self.update == 0


@dataclass(frozen=True)
class Schedule:
    """The intervals of a run."""

    warmup_step: int
    update_step: int
    update_times: int
    total_steps: int

    @property
    def stage_steps(self) -> int | None:
        """Optimizer steps of a stage; None without end."""
        return None if self.update_times == WITHOUT_END else self.warmup_step + self.update_step * self.update_times

    def intervals(self) -> Iterator[Interval]:
        """All intervals, in order."""
        start = number = 0
        while start < self.total_steps:
            stage, update = self._place(start)
            steps = min(self.update_step if update else self.warmup_step, self.total_steps - start)
            yield Interval(number, start, steps, stage, update)
            start, number = start + steps, number + 1

    @property
    def stages(self) -> int:
        """How many stages there are, the last of which may be cut short."""
        return 1 if self.stage_steps is None else max(1, -(-self.total_steps // self.stage_steps))

    @property
    def warmup_total(self) -> int:
        """Optimizer steps of all warm-ups together."""
        whole, rest = self._whole_stages()
        return whole * self.warmup_step + min(self.warmup_step, rest)

    @property
    def decisions(self) -> int:
        """How many decisions there are; counted, since a long run has millions."""
        whole, rest = self._whole_stages()
        return whole * self.update_times + self._decisions_within(rest)

    @property
    def longest(self) -> int:
        """Optimizer steps of the longest interval."""
        return max(min(self.warmup_step, self.total_steps), min(self.update_step, self.total_steps - self.warmup_step))

    def decision_step(self, number: int) -> int:
        """The optimizer step of a decision, counted from 0."""
        stage, within = (0, number) if self.stage_steps is None else divmod(number, self.update_times)
        return stage * (self.stage_steps or 0) + self.warmup_step + within * self.update_step

    def _whole_stages(self) -> tuple[int, int]:
        """Stages that are not cut short, and the steps that remain."""
        return (0, self.total_steps) if self.stage_steps is None else divmod(self.total_steps, self.stage_steps)

    def _decisions_within(self, steps: int) -> int:
        return -(-max(0, steps - self.warmup_step) // self.update_step)

    def interval_at(self, step: int) -> Interval:
        """The interval that `step` belongs to."""
        stage, update = self._place(step)
        offset = 0 if self.stage_steps is None else stage * self.stage_steps
        start = offset + (self.warmup_step + (update - 1) * self.update_step if update else 0)
        per_stage = (self.update_times if self.stage_steps is not None else 0) + bool(self.warmup_step)
        number = stage * per_stage + update - (0 if self.warmup_step else 1)
        return Interval(number, start, min(self.update_step if update else self.warmup_step, self.total_steps - start), stage, update)

    def _place(self, step: int) -> tuple[int, int]:
        stage, within = (0, step) if self.stage_steps is None else divmod(step, self.stage_steps)
        return stage, 0 if within < self.warmup_step else (within - self.warmup_step) // self.update_step + 1


def stage_length(warmup_step: int, update_step: int, update_times: int, steps_per_pass: int) -> int:
    """Optimizer steps of one of the run's `num_train_epochs`: a stage, or a pass over the data when stages have no end."""
    return steps_per_pass if update_times == WITHOUT_END else warmup_step + update_step * update_times


def total_steps(num_train_epochs: float, stage: int, fixed: int = 0) -> int:
    """Optimizer steps of a run: `fixed` (`train_step`) when above 0, else as many as `num_train_epochs` repetitions of `stage` have."""
    return fixed or math.ceil(num_train_epochs * stage)
