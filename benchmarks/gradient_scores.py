"""What exact gradient scores cost: products of every row's own gradient with a target, over the batched training step on the same rows.

    python benchmarks/gradient_scores.py [--model FOLDER] [--batches 6] [--budget 2048] [--targets 1] [--repetitions 5]

Row lengths are like those of Alpaca; the batches are some of those that 2000 rows make, sorted by length under a budget of tokens. One
arm runs after the other, again and again; the ratio of each repetition is taken within it, and the median reported. On a CPU the time is
CPU time, which other programs on the machine disturb least; set OMP_NUM_THREADS=1 for steady figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dataflex.signals.batches import length_buckets
from dataflex.signals.gradients import Batch, Moments, Preconditioner, per_sample_products, scored_parameters, sketch
from dataflex.testing.tiny import pad_collator
from dataflex.train.data.sample_meta import BatchMeta, build_meta
from dataflex.train.trainer.token_losses import losses_from_logits, segment_means

POOL = 2000
MASKED = 0.14  # share of Alpaca's tokens without a label
DIMENSIONS = 4096
BETAS, EPS = (0.9, 0.999), 1e-8
Arm = Callable[[], Any]


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def row_batches(number: int, budget: int, vocabulary: int) -> list[list[dict[str, list[int]]]]:
    """Rows of random tokens; the percentiles 10, 50 and 90 of their lengths are near 43, 130 and 376, the longest has 512."""
    quantiles = (torch.arange(POOL, dtype=torch.float64) + 0.5) / POOL
    lengths = (130 * torch.exp(0.83 * torch.special.ndtri(quantiles))).clamp(8, 512).long().numpy()
    buckets = length_buckets(lengths, budget)
    generator = torch.Generator().manual_seed(0)

    def row(length: int) -> dict[str, list[int]]:
        tokens = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        prompt = int(MASKED * length)
        return {"input_ids": tokens, "attention_mask": [1] * length, "labels": [-100] * prompt + tokens[prompt:]}

    chosen = [buckets[int((k + 0.5) * len(buckets) / number)] for k in range(number)]
    return [[row(int(length)) for length in lengths[places]] for places in chosen]


def batch_of(part: list[dict[str, list[int]]], device: torch.device) -> Batch:
    batch = pad_collator(part)
    return {name: x.to(device) for name, x in batch.items()}, build_meta(list(range(len(part))), part, batch)


def small_model() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=8000, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4)
    return LlamaForCausalLM(config)


def with_lora(model: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:  # it starts at 0, and so do the gradients of A
            nn.init.normal_(p, std=0.01)
    return model


def row_losses(model: Any, inputs: dict[str, Any], meta: BatchMeta) -> torch.Tensor:
    tokens = losses_from_logits(model, inputs, meta, head=model.get_output_embeddings()).of_targets()
    return segment_means(tokens, meta.counts.to(tokens.device))


def arms(model: Any, parameters: dict[str, nn.Parameter], batches: list[Batch], singles: list[Batch], targets: int) -> dict[str, Arm]:
    adam = {name: Moments(torch.randn_like(p) * 1e-3, torch.rand_like(p) * 1e-5 + 1e-8, *BETAS, EPS) for name, p in parameters.items()}
    flat = [torch.cat([getattr(m, key).flatten() for m in adam.values()]) for key in ("exp_avg", "exp_avg_sq")]
    directions = [{name: torch.randn_like(p) for name, p in parameters.items()} for _ in range(targets)]

    def step(inputs: dict[str, Any]) -> None:
        model(**inputs).loss.backward()

    def training() -> None:
        for inputs, _ in batches:
            step(inputs)
            model.zero_grad()

    def products(preconditioner: Preconditioner) -> list[Any]:
        return list(per_sample_products(model, parameters, batches, row_losses, directions, preconditioner))

    def one_by_one() -> None:
        for inputs, _ in singles:
            step(inputs)
            gradient = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
            model.zero_grad()
            scale = flat[1].mul(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1]).sqrt_().add_(EPS)
            gradient.mul_(1 - BETAS[0]).add_(flat[0], alpha=BETAS[0]).div_(scale)

    return {
        "training step, batched": training,
        "products and norms, sgd": lambda: products(Preconditioner()),
        "products and norms, adam": lambda: products(Preconditioner("adam", adam)),
        f"sketch to {DIMENSIONS}, adam": lambda: sketch(model, parameters, batches, row_losses, Preconditioner("adam", adam), DIMENSIONS, 0),
        "autograd row by row, adam, no projection": one_by_one,
    }


def projection_seconds(size: int, device: torch.device) -> float:
    """A dense projection of one gradient of `size` entries to 4096: measured on a slice of it, the signs drawn once for 16 rows."""
    part = 8192

    def measured(action: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            start = clock()
            action()
            times.append(clock() - start)
        return statistics.median(times[1:])

    def draw() -> torch.Tensor:
        return torch.randint(0, 2, (part, DIMENSIONS), device=device, dtype=torch.int8).float().mul_(2).sub_(1)

    signs, gradients = draw(), torch.randn(16, part, device=device)
    return (measured(draw) + measured(lambda: gradients @ signs)) / 16 * size / part


def run(model: Any, name: str, data: list[list[dict[str, list[int]]]], targets: int, repetitions: int) -> None:
    device = next(model.parameters()).device
    parameters = scored_parameters(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters.values():
        p.requires_grad_(True)
    batches, singles = [batch_of(part, device) for part in data], [batch_of([row], device) for part in data for row in part]
    number, tokens, padded = len(singles), *(sum(inputs["input_ids"].numel() for inputs, _ in part) for part in (singles, batches))
    table = arms(model.eval(), parameters, batches, singles, targets)
    times: dict[str, list[float]] = {arm: [] for arm in table}
    for repetition in range(repetitions + 1):
        for arm, action in table.items():
            start = clock()
            action()
            if repetition:  # the first one warms up
                times[arm].append(clock() - start)
    base = next(iter(times.values()))
    size = sum(p.numel() for p in parameters.values())
    print(f"\n{name}: {size / 1e6:.2f}M scored parameters, {targets} target(s)")
    print(f"{number} rows, {tokens} tokens, {padded} with padding, {len(batches)} batches, {repetitions} repetitions\n")
    print("| arm | time / training step | ms per row |\n| --- | ---: | ---: |")
    for arm, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"| {arm} | {ratio:.2f} | {statistics.median(values) / number * 1e3:.1f} |")
    seconds = projection_seconds(size, device)
    ratio = seconds * number / statistics.median(base)
    print(f"| dense projection to {DIMENSIONS} on top, from a slice | +{ratio:.1f} | +{seconds * 1e3:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; by default a Llama of 8 layers, hidden size 256")
    parser.add_argument("--parameters", choices=["lora", "full"], nargs="+", default=["lora", "full"])
    for name, default in (("batches", 6), ("budget", 2048), ("targets", 1), ("repetitions", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}", file=sys.stdout)
    for kind in options.parameters:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) if options.model else small_model()
        name = "LoRA r=8, all linear layers" if kind == "lora" else "full, without embedding and output layer"
        model = (with_lora(model) if kind == "lora" else model).to(device)
        run(model, name, row_batches(options.batches, options.budget, model.config.vocab_size), options.targets, options.repetitions)


if __name__ == "__main__":
    main()
