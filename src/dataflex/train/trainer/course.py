"""Training arguments that decide the course of training, and how changed ones take effect in a resumed run.

Optimizer and scheduler come out of a checkpoint with the values they were saved with, so a new learning rate in the file would do nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

COURSE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
    "data_seed",
    "label_smoothing_factor",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "lr_scheduler_kwargs",
    "optim_args",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)

# What the optimizer and the scheduler hold; everything else is read from the arguments at every step.
_RATE = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "lr_scheduler_kwargs")
_HELD = (*_RATE, "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
_ONE_CLASS = ("adamw_torch", "adamw_torch_fused")
_BY_EVALUATION = ("plateau", "greedy")


class Hyperparameters(NamedTuple):
    """What this run's arguments make of optimizer and scheduler before a checkpoint is loaded into them."""

    groups: list[dict[str, Any]]
    rates: list[float] | None


def settings(args: Any) -> dict[str, str]:
    """The course as text."""
    return {name: str(getattr(args, name, None)) for name in COURSE}


def cannot_change(changed: dict[str, tuple[Any, Any]], *, sharded: bool) -> list[str]:
    """The names of `changed` (old and new value) whose old value would win.

    Args:
        sharded: whether DeepSpeed holds the optimizer.
    """
    names = [name for name in changed if sharded and name in _HELD]
    if "optim" in changed and not all(_plain(value) in _ONE_CLASS for value in changed["optim"]):
        names.append("optim")
    scheduler = changed.get("lr_scheduler_type", ())
    if any(word in _plain(value) for value in scheduler for word in _BY_EVALUATION):
        names.append("lr_scheduler_type")
    return names


def _plain(value: Any) -> str:
    """`adamw_torch` for `OptimizerNames.ADAMW_TORCH`."""
    return str(value).rsplit(".", 1)[-1].lower()


def hyperparameters(optimizer: Any, scheduler: Any) -> Hyperparameters:
    """Keep what `apply` will set."""
    groups = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in optimizer.param_groups]
    return Hyperparameters(groups, [float(rate) for rate in scheduler.base_lrs] if isinstance(scheduler, LambdaLR) else None)


@torch.no_grad()
def apply(optimizer: Any, scheduler: Any, fresh: Hyperparameters) -> None:
    """Set optimizer and scheduler to this run's values, at the step the checkpoint is of."""
    for group, values in zip(optimizer.param_groups, fresh.groups, strict=True):
        group.update(values)
    if fresh.rates is None:
        return
    scheduler.base_lrs = list(fresh.rates)
    rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(fresh.rates, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates
