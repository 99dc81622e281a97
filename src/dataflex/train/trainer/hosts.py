"""Everything that depends on which Trainer DataFlex sits in front of."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CellType, CodeType
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from dataflex.errors import ConfigError, Problem, TrainingError
from dataflex.train.data.sample_meta import BatchMeta
from dataflex.train.trainer.token_losses import TokenLosses

_SFT = "trl.trainer.sft_trainer.SFTTrainer"

# The hosts whose every method is known. These very classes: what a package adds beside them is not.
_KNOWN = {
    "transformers.trainer.Trainer",
    "transformers.trainer_seq2seq.Seq2SeqTrainer",
    "trl.trainer.base_trainer._BaseTrainer",
    _SFT,
    "llamafactory.train.pt.trainer.CustomTrainer",
    "llamafactory.train.sft.trainer.CustomSeq2SeqTrainer",
}
_OURS = {
    f"dataflex.train.trainer.{module}.{name}"
    for module, name in (
        ("checkpointing", "CheckpointedTrainer"),
        ("dynamic_trainer", "DynamicTrainer"),
        ("planned_trainer", "PlannedTrainer"),
        ("loss_trainer", "LossTrainer"),
        ("weight_trainer", "WeightTrainer"),
        ("select_trainer", "SelectTrainer"),
        ("mix_trainer", "MixTrainer"),
    )
}

# Methods through which rows reach the model, and, of the training loop, those that are harmless where they hand on to the one they override.
SAMPLER = ("_get_train_sampler",)
BATCHES = ("get_train_dataloader", "_get_dataloader", "get_batch_samples", "_prepare_inputs", "_prepare_input")
_LOOP = (
    "train",
    "_inner_training_loop",
    "_init_training_state",
    "_prepare_for_training",
    "_run_epoch",
    "_maybe_log_save_evaluate",
    "_finalize_training",
)
LOSS = ("compute_loss", "training_step")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def overrides(host: type[Trainer], names: Iterable[str]) -> dict[str, list[str]]:
    """Which of the methods `names` a class and its ancestors define beyond the hosts that are known, by the name of the class that does.

    A known class counts as another one where its method was exchanged for one that does not hand on to it. A class in front of DataFlex may add to
    what DataFlex does, by handing on to it.
    """
    found: dict[str, list[str]] = {}
    for cls in host.__mro__:
        known, in_front = _name(cls) in _KNOWN, any(_name(ancestor) in _OURS for ancestor in cls.__mro__)
        for name in names if _name(cls) not in _OURS else ():
            method = vars(cls).get(name)
            if method is None or (known and name in _LOOP):
                continue
            if (name in _LOOP or (in_front and name != "compute_loss")) and _hands_on(method, name):
                continue
            if not known:
                found.setdefault(f"{cls.__name__} ({cls.__module__})", []).append(name)
            elif _exchanged(method, cls, name):
                found.setdefault(f"{cls.__name__}, put there by {method.__module__}", []).append(name)
    return found


def _set_on_object(trainer: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """Methods assigned to the trainer itself, apart from wrappers that hold on to the trainer's own."""
    found = [name for name in names if name in vars(trainer) and not _wraps(vars(trainer)[name], trainer, name)]
    return {"this trainer, assigned to the object": found} if found else {}


def _wraps(function: Any, trainer: Any, name: str) -> bool:
    """Whether a function holds on to the trainer's own method."""
    return any(getattr(method, "__self__", None) is trainer and getattr(method, "__name__", "") == name for method in _held(function))


def _held(function: Any) -> Iterator[Any]:
    """What a function keeps of others: what it wraps, what is bound to it, and its closure."""
    yield from (getattr(function, "__wrapped__", None), getattr(function, "func", None), *getattr(function, "args", ()))
    yield from (cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != CellType())


def _exchanged(method: Any, cls: type, name: str) -> bool:
    """Whether a class's method is one of another module that does not hold on to the class's own."""
    held = (method, *_held(method))
    return not any(getattr(part, "__module__", "") == cls.__module__ and getattr(part, "__name__", "") == name for part in held)


def _hands_on(method: Any, name: str) -> bool:
    """Whether a method calls the one it overrides."""
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    return code is not None and any({"super", name} <= set(part.co_names) for part in _codes(code))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def host_of(cls: type) -> Any:
    """The class that DataFlex stands in front of."""
    return cls.__mro__[max(place for place, ancestor in enumerate(cls.__mro__) if _name(ancestor) in _OURS) + 1]


def nearest_known(host: type) -> str:
    """The first class of a host's ancestry, itself included, whose methods are known."""
    return next((cls.__name__ for cls in host.__mro__ if _name(cls) in _KNOWN), "Trainer")


def unsupported_methods(host: type[Trainer], trainer: Any = None, *, sampler: bool, loss: bool) -> list[str]:
    """Methods of a host that would make the rows, or the loss, other than decided; empty when all is well.

    Args:
        host: the class, with or without DataFlex in front.
        trainer: an object of it, to which methods may have been assigned.
        sampler: whether DataFlex decides the order of rows, instead of taking the host's.
        loss: whether DataFlex builds the loss.
    """
    known = nearest_known(host)
    sides = [
        (
            (*(SAMPLER if sampler else ()), *BATCHES, *_LOOP),
            f"DataFlex hands out the rows of every step itself, and knows only how {known} does; leave it to {known}, with what is special about "
            "the rows in the data set or the collator, or train without DataFlex",
        )
    ]
    if loss:
        sides.append((LOSS, f"the weighted loss would take its place; express it as a component, or leave the loss to {known}"))
    reasons = []
    for names, why in sides:
        found = {**overrides(host, names), **({} if trainer is None else _set_on_object(trainer, names))}
        reasons += [f"the {_and(methods)} of {owner}: {why}" for owner, methods in found.items()]
    return reasons


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ------------------------------------------------------------------------------------------------ names


def collisions(mixin: type, host: type[Trainer]) -> list[str]:
    """Names that DataFlex's `mixin` adds to a Trainer and that a host uses for something else, as a method or on its objects."""
    ours = {name for cls in mixin.__mro__ if _name(cls) in _OURS for name in vars(cls) if not name.startswith("__")}
    ours = (ours | {"_dataflex"}) - set(dir(Trainer)) - {"_abc_impl"}
    theirs = {name for cls in host.__mro__ if _name(cls) not in _OURS for name in (*vars(cls), *_assigned(cls, ours))}
    return sorted(ours & theirs)


def _assigned(cls: type, names: set[str]) -> Iterator[str]:
    """Those of `names` that the methods of a class assign to `self`."""
    for member in vars(cls).values():
        parts = member, *(getattr(member, part, None) for part in ("fget", "fset", "func", "__func__"))
        for function in parts:
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            for part in _codes(code) if code is not None else ():
                if not names.isdisjoint(part.co_names):  # nearly always disjoint, which costs nothing
                    yield from _assigned_to_self(part)


def _assigned_to_self(code: CodeType) -> Iterator[str]:
    loaded: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR" and loaded == "self":
            yield instruction.argval
        value = instruction.argval  # newer Pythons load two variables at once
        loaded = (value[-1] if isinstance(value, tuple) else value) if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else None


def refuse_collisions(mixin: type, host: type[Trainer]) -> None:
    """Raises ConfigError where DataFlex and a host use the same name for different things."""
    names = collisions(mixin, host)
    if names:
        message = f"cannot be put in front of {_name(host)}, which has attributes of its own that DataFlex needs: {', '.join(names)}; rename them"
        raise ConfigError(Problem("", mixin.__name__, message))


# ------------------------------------------------------------------------------------------------ settings


def is_trl_sft(trainer: Any) -> bool:
    """Whether the host is TRL's SFTTrainer, which scores labels in a fused output layer of its own."""
    return any(_name(cls) == _SFT for cls in type(trainer).__mro__)


def unsupported_order(trainer: Any) -> list[str]:
    """Settings of the host under which the order of samples would be wrong; empty when all is well."""
    args, reasons = trainer.args, []
    if args.n_gpu > 1:
        reasons.append(
            "several GPUs in one process (nn.DataParallel): start with torchrun or FORCE_TORCHRUN=1, or show one GPU with CUDA_VISIBLE_DEVICES"
        )
    if args.accelerator_config.split_batches:
        reasons.append("accelerator_config.split_batches: DataFlex shares the rows out itself; set it to false")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_enabled", "cp_enabled", "sp_enabled"):
        if getattr(parallelism, name, False):
            reasons.append(
                f"{name.removesuffix('_enabled')} parallelism: it splits a sample over ranks, which is not supported yet; use data parallelism"
            )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        reasons.append("train_sampling_strategy: batch_rebalance orders rows by rank; use random or sequential")
    if getattr(args, "enable_jit_checkpoint", False):
        reasons.append("enable_jit_checkpoint: it saves in the middle of a step; leave it out, DataFlex saves at the end of the step after SIGTERM")
    return reasons


def unsupported_loss(trainer: Any) -> list[str]:
    """Settings of the host under which per-sample losses would be wrong; empty when all is well."""
    reasons = []
    if trainer.compute_loss_func is not None:
        reasons.append(
            "compute_loss_func: it returns one number for the batch, and weighting needs a loss per sample; use a token-gate component such as dft"
        )
    if getattr(trainer.args, "loss_type", "nll") == "dft":
        reasons.append("loss_type: dft replaces the loss that is weighted; set loss_type: nll, or use component_name: dft")
    return reasons


def causal_lm(trainer: Any) -> Any:
    """The bare model: without DDP's wrapper and without PEFT's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def fused_head_losses(trainer: Any, host_compute_loss: Any, model: nn.Module, inputs: dict[str, Any], meta: BatchMeta, num_items: Any) -> TokenLosses:
    """Token losses of TRL's SFTTrainer, from the forward pass and the output layer it runs anyway; it keeps its own metrics.

    Args:
        host_compute_loss: the `compute_loss` that SFTTrainer defines.

    Raises:
        TrainingError: its output has no per-token log-probabilities (another TRL version).
    """
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        host_compute_loss(model, inputs, num_items_in_batch=num_items)
    finally:
        handle.remove()
    log_probs = getattr(outputs[0], "log_probs", None) if outputs else None
    if log_probs is None:
        raise TrainingError("this version of TRL's SFTTrainer gives no per-token log-probabilities; DataFlex needs trl >= 1.16")
    width = log_probs.shape[1]
    # Labels start at the second token, so row positions reach meta.width - 1; prompt tuning puts virtual tokens in front.
    extra = width - (meta.width if "shift_labels" in inputs else meta.width - 1)
    device = log_probs.device
    index = meta.rows.to(device, non_blocking=True) * width + meta.positions.to(device, non_blocking=True) + extra
    auxiliary = trainer.router_aux_loss_coef * outputs[0].aux_loss if trainer.aux_loss_enabled else None
    return TokenLosses(-log_probs, index, auxiliary=auxiliary)


def host_state(trainer: Any) -> dict[str, Any]:
    """Counters the host keeps in memory only. TRL forgets its token count and pending averages on resume."""
    state: dict[str, Any] = {}
    if is_trl_sft(trainer):
        state["num_tokens"] = trainer._total_train_tokens
        state["metrics"] = {name: list(values) for name, values in trainer._metrics["train"].items()}
    return state


def restore_host_state(trainer: Any, state: dict[str, Any]) -> None:
    if is_trl_sft(trainer) and state:
        trainer._total_train_tokens = state["num_tokens"]
        trainer._metrics["train"].update(state["metrics"])


def logging_state(trainer: Any) -> dict[str, Any]:
    """This rank's loss since the last log line, which the Trainer forgets on resume, and the step of that line."""
    return {"loss": float(trainer._tr_loss), "last_logged": trainer._globalstep_last_logged}


def restore_logging_state(trainer: Any, losses: list[float], last_logged: int) -> None:
    """Give each rank its own pending loss back, or their mean when the number of ranks has changed."""
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    loss = losses[rank] if len(losses) == world else sum(losses) / len(losses)
    trainer._tr_loss = torch.full_like(trainer._tr_loss, loss)
    trainer._total_loss_scalar -= sum(losses) / len(losses)  # it belongs to steps before the checkpoint, which train_loss leaves out
    trainer._globalstep_last_logged = last_logged
