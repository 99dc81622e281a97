"""What a weighted or mixed training step costs over the host's own, in time, peak memory and, on a GPU, waits of the host for the device.

    python benchmarks/step_overhead.py [--layers 4] [--repetitions 7] [--batch 4] [--length 256]

Every arm trains the same model on the same batches at learning rate 0, one arm after the other, again and again; the ratio of each
repetition is taken within it, and the median reported. On a CPU the time is CPU time, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dataflex import MixTrainer, Weighter, WeightTrainer
from dataflex.testing.tiny import pad_collator, tiny_tokenizer

VOCABULARY, HIDDEN, DOMAINS = 49152, 576, 4
STEPS = 4  # the first warms up
MIX = {"component_name": "odm", "update_step": 1, "update_times": -1}


class SecondCrossEntropy(Weighter):
    """The naive way: the model's own loss, then another cross-entropy from the full logits."""

    def get_weighted_loss(self, losses: torch.Tensor, *, ctx: Any = None, model: Any = None, inputs: Any = None) -> torch.Tensor:
        return (torch.softmax(losses.detach(), 0) * losses).sum()

    def training_step(self, ctx: Any, model: Any, inputs: Any, num_items_in_batch: Any = None, use_weighter: bool = False) -> torch.Tensor:
        model.train()
        inputs = ctx._prepare_inputs(inputs)
        outputs = model(**inputs)
        logits, labels = outputs.logits[:, :-1].contiguous(), inputs["labels"][:, 1:].contiguous()
        tokens = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="none").view_as(labels)
        losses = tokens.sum(1) / (labels != -100).sum(1).clamp(min=1)
        loss = self.get_weighted_loss(losses, ctx=ctx)
        ctx.accelerator.backward(loss)
        return loss.detach()


class Meter(TrainerCallback):
    """Time, peak memory and host syncs of an optimizer step: means and the peak over all but the first."""

    def __init__(self, counting: bool):
        self.counting = counting and torch.cuda.is_available()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                self.before = torch.cuda.memory_allocated()
            else:
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
                self.before = _status("VmRSS")
            if self.counting:
                torch.cuda.set_sync_debug_mode("warn")  # a warning for each; slower, so not where time is taken
            self.start = clock()
        elif state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            self.seconds = (clock() - self.start) / (state.max_steps - 1)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
            self.memory = (peak - self.before) / 2**20


def clock() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def rows(number: int, length: int, masked: float) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, VOCABULARY, (number, length), generator=generator).tolist()
    prompt = int(length * masked)
    return datasets.Dataset.from_list(
        [
            {"input_ids": row, "attention_mask": [1] * length, "labels": [-100] * prompt + row[prompt:], "domain_id": number % DOMAINS}
            for number, row in enumerate(tokens)
        ]
    )


def arguments(out: str, batch: int, cls: Any = TrainingArguments, **extra: Any) -> Any:
    settings: dict[str, Any] = {"per_device_train_batch_size": batch, "max_steps": STEPS, "learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0}
    settings |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "bf16": torch.cuda.is_available()}
    return cls(out, **settings, **extra)


def arms(model: Any, data: Any, batch: int, out: str) -> dict[str, Callable[[], Any]]:
    """How to make each trainer. The name in front of the colon says which arm it is compared with."""
    from trl import SFTConfig, SFTTrainer

    plain = {"model": model, "train_dataset": data, "data_collator": pad_collator}
    weighted, mixed = WeightTrainer.over(Trainer), MixTrainer.over(Trainer)
    sft_args: dict[str, Any] = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}

    def sft(base: Any, **extra: Any) -> Any:
        return base(model=model, train_dataset=data, processing_class=tiny_tokenizer(), args=arguments(out, batch, SFTConfig, **sft_args), **extra)

    return {
        "Trainer: static": lambda: Trainer(**plain, args=arguments(out, batch)),
        "Trainer: loss weighter": lambda: weighted(**plain, args=arguments(out, batch), dataflex={"component_name": "loss"}),
        "Trainer: loss weighter, all logits": lambda: weighted(
            **plain, args=arguments(out, batch), dataflex={"component_name": "loss", "project_targets_only": False}
        ),
        "Trainer: second cross-entropy": lambda: weighted(**plain, args=arguments(out, batch), component=SecondCrossEntropy(), dataflex={}),
        "Trainer: static_mix": lambda: mixed(**plain, args=arguments(out, batch), dataflex={"static_mix": True}),
        "Trainer: static_mix, all logits": lambda: mixed(
            **plain, args=arguments(out, batch), dataflex={"static_mix": True, "project_targets_only": False}
        ),
        "Trainer: odm at every step": lambda: mixed(**plain, args=arguments(out, batch), dataflex=MIX),
        "SFTTrainer: static": lambda: sft(SFTTrainer),
        "SFTTrainer: loss weighter": lambda: sft(WeightTrainer.over(SFTTrainer), dataflex={"component_name": "loss"}),
        "SFTTrainer: odm at every step": lambda: sft(MixTrainer.over(SFTTrainer), dataflex=MIX),
    }


def measure(make: Callable[[], Any], counting: bool = False) -> tuple[float, float, float]:
    trainer, meter = make(), Meter(counting)
    trainer.add_callback(meter)
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    trainer.model.zero_grad()
    vars(trainer.model).pop("forward", None)  # TRL replaces it; the other arms use the model's own
    return meter.seconds, meter.memory, sum("synchronizing CUDA" in str(warning.message) for warning in caught) / (STEPS - 1)


def run(layers: int, batch: int, length: int, masked: float, repetitions: int) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3
    )
    config.tie_word_embeddings = True
    model, data = LlamaForCausalLM(config), rows(STEPS * batch, length, masked)
    with tempfile.TemporaryDirectory() as out:
        makers = arms(model, data, batch, out)
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in makers}
        syncs = {name: measure(make, counting=True)[2] for name, make in makers.items()}  # also warms up
        for _ in range(repetitions):
            for name, make in makers.items():
                results[name].append(measure(make))
    print(f"\n{layers} layers, batch {batch}, length {length}, {masked:.0%} masked, {repetitions} repetitions\n")
    print("| step | time / static | peak memory / static | seconds | MiB | host syncs |\n| --- |" + " ---: |" * 5)
    for name, runs in results.items():
        base = results[f"{name.split(':')[0]}: static"]
        ratios = [statistics.median(a[k] / b[k] for a, b in zip(runs, base, strict=True)) for k in (0, 1)]
        waits = f"{syncs[name]:.1f}" if torch.cuda.is_available() else "-"
        middle = [statistics.median(values[k] for values in runs) for k in (0, 1)]
        print(f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} | {middle[0]:.3f} | {middle[1]:.0f} | {waits} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("repetitions", 7), ("batch", 4), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}", file=sys.stdout)
    for masked in (0.0, 0.5):
        run(options.layers, options.batch, options.length, masked, options.repetitions)


if __name__ == "__main__":
    main()
