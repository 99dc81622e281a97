"""The trainer of each `train_type`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_TRAINERS = {
    "static": ("dataflex.train.trainer.checkpointing", "CheckpointedTrainer"),
    "dynamic_weight": ("dataflex.train.trainer.weight_trainer", "WeightTrainer"),
    "dynamic_select": ("dataflex.train.trainer.select_trainer", "SelectTrainer"),
    "dynamic_mix": ("dataflex.train.trainer.mix_trainer", "MixTrainer"),
}
AVAILABLE = tuple(_TRAINERS)


def trainer_for(train_type: str) -> Any:
    """`WeightTrainer` or one of its siblings; without an algorithm, what keeps checkpoints."""
    module, name = _TRAINERS[train_type]
    return getattr(import_module(module), name)
