"""Everything DataFlex keeps on a Trainer, in one object: a host has attributes of its own (TRL's GRPOTrainer has a `_step`, too)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class RunState:
    """What a `DynamicTrainer` knows of its run. Nothing here is saved by itself; checkpoints take what they need.

    Attributes:
        config, component, component_settings: the algorithm.
        domains, domain_names: domain of every row (N,), and the domains' names.
        row_numbers, row_table: which rows of the user's data the training data is made of; whether that is written down (rows_written).
        metrics, events, selections: what is logged and recorded.
        schedule: when there are decisions.
        first_state, first_mixture: what a second `train` starts from.
        resume, resumed: the checkpoint to go on from, and its state.
        pending: what the host forgets on resume, given back when training begins.
        changed: settings that are others than in the checkpoint (old and new value), on purpose.
        callbacks: what stateful callbacks were made with.
        last_step: the step that was logged, saved or evaluated last, and whether that was at the end of its epoch.
        caught_up: whether an epoch was ended that the checkpoint was saved before.
        leave_when_finished: whether to raise `RunFinished` instead of training a run that has left all its files.
        stream, loader, batches: the order of rows, the loader over it, and the iterator under way.
        settings: what a resumed run must have alike.
        seconds, started: time spent on decisions, and when training began.
        said_repeated, said_mean: whether the user knows that rows come up several times, and that the weights' mean is far from 1.
        in_step: whether a training step is under way, so that a loss is the training loss.
        history, current: sums of domain losses (k, 4) of the steps since the last decision, and of the step under way.
        reweights, domain_weights: whether the mixer weights domains, and how (k,).
        step: the optimizer step under way.
        sigterm: what saves a checkpoint after SIGTERM.
        contract: what the component promises about its weights.
        active: the weighter whose training step is under way, and whether it weights.
        hidden, features: last hidden states of the micro-batch under way, and the samples' features.
    """

    config: Any = None
    component: Any = None
    component_settings: dict[str, Any] = field(default_factory=dict)
    domains: np.ndarray | None = None
    domain_names: list[str] = field(default_factory=list)
    row_numbers: Any = None
    row_table: Any = None
    rows_written: bool = False
    metrics: Any = None
    events: Any = None
    selections: Any = None
    schedule: Any = None
    first_state: dict[str, Any] = field(default_factory=dict)
    first_mixture: dict[str, Any] = field(default_factory=dict)
    resume: Path | None = None
    resumed: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, Any] | None = None
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    callbacks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    last_step: dict[str, Any] | None = None
    caught_up: bool = False
    leave_when_finished: bool = False
    stream: Any = None
    loader: Any = None
    batches: Iterator[Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    started: float | None = None
    said_repeated: bool = False
    said_mean: bool = False
    in_step: bool = False
    history: list[torch.Tensor] = field(default_factory=list)
    current: torch.Tensor | None = None
    reweights: bool = False
    domain_weights: torch.Tensor | None = None
    step: Any = None
    sigterm: Any = None
    contract: Any = None
    active: tuple[Any, bool] | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)
    features: torch.Tensor | None = None
