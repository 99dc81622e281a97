"""One small training run, described by a dictionary, in this process or under torchrun; what it did is read back from files.

As a program: python harness.py spec.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from dataflex.backends import installed
from dataflex.testing.distributed import run_distributed
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows, tiny_tokenizer
from dataflex.train.trainer.by_type import trainer_for
from dataflex.utils.distributed import leave

# The Trainers that DataFlex is put in front of, in the environment at hand: LLaMA-Factory excludes current TRL.
HOSTS = ["trainer", "llamafactory"] if installed("llamafactory") else ["trainer", "sft"]

DEFAULTS: dict[str, Any] = {
    "host": "trainer",
    "train_type": "dynamic_weight",
    "component": None,  # None: the host alone
    "params": {},
    "dataflex": {},
    "rows": 8,
    "lengths": [6, 24],
    "masked": 0.3,
    "batch": 8,
    "accumulation": 1,
    "max_steps": -1,
    "epochs": 1,
    "dropout": 0.0,
    "lora": False,
    "packing": None,  # "packing" or "padding_free", host sft
    "optim": "sgd",
    "args": {},
    "resume": None,
    "kill_at": None,  # SIGKILL after this optimizer step
    "stop_at": None,  # leave the loop after this optimizer step
    "model": {},
    "domains": 0,
    "eval_rows": 6,
    "kill_in": None,  # SIGKILL in the how-manieth batch that is scored
    "double": False,  # model in float64
}

SPEC_EQUAL = {"rows": 16, "lengths": [12, 12], "batch": 4, "accumulation": 2}


class Recorder(TrainerCallback):
    """Keeps the gradient of every optimizer step, and kills the process when told to."""

    def __init__(self, spec: dict[str, Any]):
        self.spec, self.gradients = spec, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.spec["stop_at"]:
            control.should_training_stop = True

    def on_substep_end(self, args, state, control, **kwargs):
        self._kill(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._kill(state.global_step)

    def _kill(self, step):
        if self.spec["kill_at"] is not None and step == self.spec["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(spec: dict[str, Any], out: str):
    """The trainer that `spec` describes."""
    spec = {**DEFAULTS, **spec}
    rows = tiny_rows(spec["rows"], lengths=tuple(spec["lengths"]), masked=spec["masked"])
    train = datasets.Dataset.from_list(rows)
    if spec["domains"]:
        train = train.add_column("domain_id", [k % spec["domains"] for k in range(len(rows))])
    evaluation = datasets.Dataset.from_list(tiny_rows(spec["eval_rows"], seed=1, lengths=tuple(spec["lengths"])))
    common = {
        "output_dir": out,
        "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": spec["accumulation"],
        "max_steps": spec["max_steps"],
        "num_train_epochs": spec["epochs"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": spec["optim"],
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **spec["args"],
    }
    model = tiny_model(attention_dropout=spec["dropout"], **spec["model"])
    model = model.double() if spec["double"] else model
    base: Any = Trainer
    kwargs: dict[str, Any] = {"model": model, "train_dataset": train, "eval_dataset": evaluation}
    if spec["host"] == "sft":
        from trl import SFTConfig, SFTTrainer

        base = SFTTrainer
        packing = {"packing": spec["packing"] == "packing", "padding_free": spec["packing"] == "padding_free"}
        kwargs["args"] = SFTConfig(
            **common,
            **packing,
            max_length=None if spec["packing"] == "padding_free" else 48,
            dataset_kwargs={"skip_prepare_dataset": spec["packing"] != "packing"},
        )
        kwargs["processing_class"] = tiny_tokenizer()
    elif spec["host"] == "llamafactory":
        from llamafactory.hparams import FinetuningArguments
        from llamafactory.hparams import TrainingArguments as LlamaFactoryArguments
        from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

        base = CustomSeq2SeqTrainer
        kwargs["args"] = LlamaFactoryArguments(**common)
        kwargs |= {"finetuning_args": FinetuningArguments(), "processor": None, "tokenizer": tiny_tokenizer(), "data_collator": pad_collator}
    else:
        kwargs["args"] = TrainingArguments(**common)
        kwargs["data_collator"] = pad_collator
    if spec["lora"]:
        kwargs = _with_lora(kwargs, spec["host"])
    recorder = Recorder(spec)
    kwargs["callbacks"] = [recorder]
    if spec["component"] is None:
        return base(**kwargs), recorder
    config = {"component_name": spec["component"], "component_params": spec["params"], **spec["dataflex"]}
    return trainer_for(spec["train_type"]).over(base)(**kwargs, dataflex=config), recorder


def _with_lora(kwargs: dict[str, Any], host: str) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    if host == "sft":
        return {**kwargs, "peft_config": config}
    torch.manual_seed(0)
    return {**kwargs, "model": get_peft_model(kwargs["model"], config)}


def _kill_while_scoring(trainer: Any, number: int) -> None:
    """SIGKILL in the middle of a pass over the rows, with everything before it on disk."""
    from dataflex.signals import store

    store._FLUSH_SECONDS = 0.0
    add, added = store.PartStore.add, []

    def adding(self, positions, values):
        add(self, positions, values)
        added.append(positions)
        if len(added) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    store.PartStore.add = adding


class Result:
    """Gradients of every optimizer step, final parameters and logged values of a run."""

    def __init__(self, out: str | Path):
        tensors = load_file(Path(out) / "result.safetensors")
        self.parameters = tensors.pop("parameters")
        self.gradients = [tensors[name] for name in sorted(tensors)]
        self.log = json.loads((Path(out) / "log.json").read_text())

    def logged(self, *names: str) -> list[Any]:
        """Per log line, the values under `names` (all but timings by default)."""
        timings = ("runtime", "per_second", "flos", "train_loss", "seconds", "share_of_time")
        keep = (lambda key: key in names) if names else (lambda key: not any(word in key for word in timings))
        return [values for entry in self.log if (values := {key: value for key, value in entry.items() if keep(key)}) and "loss" in entry]


def train(spec: dict[str, Any], out: str | Path) -> Result | None:
    """Train in this process; results are written by rank 0."""
    spec = {**DEFAULTS, **spec}
    trainer, recorder = make_trainer(spec, str(out))
    if spec["kill_in"] is not None:
        _kill_while_scoring(trainer, spec["kill_in"])
    trainer.train(resume_from_checkpoint=spec["resume"])
    if not trainer.is_world_process_zero():
        return None
    parameters = torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])
    gradients = {f"gradient{step:03d}": value for step, value in enumerate(recorder.gradients)}
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file({"parameters": parameters, **gradients}, Path(out) / "result.safetensors")
    (Path(out) / "log.json").write_text(json.dumps(trainer.state.log_history))
    return Result(out)


def run(spec: dict[str, Any], out: str | Path, world: int = 1, check: bool = True) -> Result:
    """Train in `world` processes (in a child process when a kill is wanted) and read the result."""
    killed = spec.get("kill_at") is not None or spec.get("kill_in") is not None
    if world == 1 and not killed:
        result = train(spec, out)
        assert result is not None
        return result
    Path(out).mkdir(parents=True, exist_ok=True)
    path = Path(out) / "spec.json"
    path.write_text(json.dumps({**spec, "out": str(out)}))
    done = run_distributed(__file__, str(path), world=world, check=check and not killed)
    assert not killed or done.returncode != 0
    return None if killed else Result(out)  # type: ignore[return-value]


def run_in_turn(specs: dict[str, dict[str, Any]], out: Path, world: int) -> dict[str, Result]:
    """Train several specs one after the other in the same processes, which take longer to start than to train. Results by name."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "specs.json"
    path.write_text(json.dumps([{**spec, "out": str(out / name)} for name, spec in specs.items()]))
    run_distributed(__file__, str(path), world=world)
    return {name: Result(out / name) for name in specs}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a - b).double().norm() / b.double().norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    described = json.loads(Path(sys.argv[1]).read_text())
    for one in described if isinstance(described, list) else [described]:
        train(one, one.pop("out"))
    leave()
