"""What looking at every row costs: losses of all candidates, and a boundary of a large data set.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py losses [--model FOLDER] [--rows 256] [--repetitions 5]
    OMP_NUM_THREADS=1 python benchmarks/scoring.py boundary [--rows 1000000] [--samples 64000] [--boundaries 20]

`losses`: rows as long as Alpaca's (log-normal), scored as selectors score them, and in the two ways that come to mind first. The arms take
turns; the ratio of each repetition is taken within it, and the median reported. On a CPU the time is CPU time, which other programs on the
machine disturb least. All arms must find the same losses.
`boundary`: everything that `SelectTrainer` does when rows are chosen (here at random, so that the model is not run): selection, checks, plan, files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dataflex import SelectTrainer
from dataflex.signals.batches import length_buckets
from dataflex.signals.signals import Signals
from dataflex.testing.tiny import pad_collator, tiny_model

MEDIAN, SPREAD, SHORTEST, LONGEST = 130, 0.83, 8, 512  # p10, p50, p90 and maximum near 43, 130, 376 and 512


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _trainer(model: Any, data: Any, out: str, update_step: int = 1, **arguments: Any) -> Any:
    settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    args = TrainingArguments(out, **settings, **arguments)
    config = {"component_name": "random", "update_step": update_step, "update_times": -1}
    return SelectTrainer.over(Trainer)(model=model, args=args, train_dataset=data, data_collator=pad_collator, dataflex=config)


# ------------------------------------------------------------------------------------------------ losses


def alpaca_like(number: int, vocabulary: int, masked: float) -> datasets.Dataset:
    """Rows of random tokens, the first `masked` share of which carry no label."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(math.log(MEDIAN), SPREAD, number)).astype(int), SHORTEST, LONGEST)
    tokens = [rng.integers(5, vocabulary, length).tolist() for length in lengths]
    return datasets.Dataset.from_list(
        [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * (k := int(masked * len(row))) + row[k:]} for row in tokens]
    )


def padded_losses(model: Any, data: datasets.Dataset, size: int) -> np.ndarray:
    """Mean loss of each row, in batches of `size` rows as they come, with all logits."""
    found = []
    for start in range(0, len(data), size):
        batch = {name: value.to(model.device) for name, value in pad_collator([data[k] for k in range(start, min(start + size, len(data)))]).items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        found.append((losses.sum(1) / (labels != -100).sum(1)).cpu())
    return torch.cat(found).numpy()


def compare_losses(folder: str | None, number: int, repetitions: int, masked: float) -> None:
    if folder is None:
        sizes: dict[str, Any] = {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=8000, max_position_embeddings=LONGEST, **sizes))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data, rows = alpaca_like(number, model.config.vocab_size, masked), np.arange(number)
    lengths = np.array([len(row) for row in data["input_ids"]])
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(model, data, out)
        model.eval()
        whole = _trainer(model, data, out)
        whole.dataflex.project_targets_only = False
        arms: dict[str, Callable[[], np.ndarray]] = {
            "Signals.losses": lambda: Signals(trainer).losses(data, rows),
            "Signals.losses, all logits": lambda: Signals(whole).losses(data, rows),
            "batches of 8 in the order of the rows, padded": lambda: padded_losses(model, data, 8),
            "one row at a time": lambda: padded_losses(model, data, 1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        expected = arms["one row at a time"]()  # warms up, too
        for _ in range(repetitions):
            for name, arm in arms.items():
                start = clock()
                found = arm()
                seconds[name].append(clock() - start)
                np.testing.assert_allclose(found, expected, rtol=2e-4)
    budget = trainer.dataflex.scoring_tokens
    padded = {"Signals": [lengths[batch] for batch in length_buckets(lengths, budget)], "batches": [lengths[k : k + 8] for k in range(0, number, 8)]}
    tokens = {name: sum(len(batch) * int(batch.max()) for batch in batches) for name, batches in padded.items()}
    quantiles = "/".join(f"{value:.0f}" for value in np.quantile(lengths, [0.1, 0.5, 0.9, 1.0]))
    name = "a Llama with H 256, 8 layers, V 8000" if folder is None else f"{Path(folder).name} ({model.num_parameters() / 1e6:.0f} M parameters)"
    print(f"\n{name}; {number} rows, lengths p10/50/90/max {quantiles}, {masked:.0%} without label; {repetitions} repetitions\n")
    print("| losses of all rows | time / Signals.losses | s per 1000 rows | tokens per row, padding included |\n| --- | ---: | ---: | ---: |")
    for title, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["Signals.losses"], strict=True))
        per_row = tokens.get(title.split()[0].split(".")[0], int(lengths.sum())) / number
        print(f"| {title} | {ratio:.2f} | {statistics.median(values) / number * 1000:.2f} | {per_row:.0f} |", flush=True)


# ------------------------------------------------------------------------------------------------ boundary


def many_short_rows(number: int) -> datasets.Dataset:
    """`number` rows of 4 tokens in two domains."""
    tokens = pa.array(np.random.default_rng(0).integers(5, 261, 4 * number, dtype=np.int32))
    column = pa.ListArray.from_arrays(pa.array(np.arange(0, 4 * number + 1, 4, dtype=np.int32)), tokens)
    domain = pa.array(np.arange(number) % 2)
    return datasets.Dataset(pa.table({"input_ids": column, "labels": column, "domain_id": domain}))


def _status(name: str) -> float:
    """MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def time_boundaries(number: int, samples: int, boundaries: int) -> None:
    batch = 64
    with tempfile.TemporaryDirectory() as out:
        arguments: dict[str, Any] = {"per_device_train_batch_size": batch, "use_cpu": True, "max_steps": boundaries * (samples // batch)}
        trainer = _trainer(tiny_model(), many_short_rows(number), out, samples // batch, **arguments)
        trainer.get_train_dataloader()
        trainer.create_optimizer_and_scheduler(int(trainer.args.max_steps))
        trainer._dataflex.started = time.perf_counter()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
        before, cpu, wall = _status("VmRSS"), [], []
        for interval in trainer.schedule.intervals():
            trainer.state.global_step, trainer._dataflex.stream.row = interval.start, len(trainer._dataflex.stream.plan)
            start = time.perf_counter(), time.process_time()
            trainer._decide()
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
        peak, files = _status("VmHWM") - before, sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        kept = _status("VmRSS") - before
    print(f"\n{number:,} rows, {samples:,} samples in an interval, {boundaries} boundaries\n")
    print("| a boundary | first | median | last | largest |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in (("CPU time, s", cpu), ("wall time, s", wall)):
        print(f"| {name} | {values[0]:.3f} | {statistics.median(values):.3f} | {values[-1]:.3f} | {max(values):.3f} |")
    print(f"\nmemory: {peak:.0f} MiB at the peak ({peak * 2**20 / number:.0f} bytes a row), {kept:.0f} MiB kept; files: {files / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = {"losses": {"rows": 256, "repetitions": 5}, "boundary": {"rows": 1_000_000, "samples": 64_000, "boundaries": 20}}
    for command, defaults in numbers.items():
        added = commands.add_parser(command)
        for name, default in defaults.items():
            added.add_argument(f"--{name}", type=int, default=default)
        if command == "losses":
            added.add_argument("--model", help="folder of a model; a small one with random weights by default")
            added.add_argument("--masked", type=float, default=0.4, help="share of a row without label")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}", file=sys.stdout)
    if options.command == "losses":
        compare_losses(options.model, options.rows, options.repetitions, options.masked)
    else:
        time_boundaries(options.rows, options.samples, options.boundaries)


if __name__ == "__main__":
    main()
