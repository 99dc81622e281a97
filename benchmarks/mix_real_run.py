"""The mixing table and picture in docs/results.md: seven domains, one model, every mixer at equal tokens, several seeds.

    python benchmarks/mix_real_run.py MODEL_FOLDER DATA_FOLDER OUTPUT_FOLDER [--small] [--seeds 1,2] [--jobs 1] [key=value ...]

MODEL_FOLDER gives the model and its tokenizer; with --small a Llama of about 19M parameters is trained from scratch instead. DATA_FOLDER is a
`dataset_dir` with pt_<domain>_train and pt_<domain>_valid. Runs that are finished are not repeated, and OUTPUT_FOLDER/results.json holds all that
the table and the picture show.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig

DOMAINS = ("wiki", "books", "code", "abstracts", "legal", "dialogue", "c4")
FIXED = ["static_mix=true", "component_name=null"]
ONLINE = ["update_step=1", "update_times=-1"]
ARMS: dict[str, list[str]] = {
    "static, uniform": [*FIXED, "mixture_sample_rule=uniform"],
    "static, by size": [*FIXED, "mixture_sample_rule=stratified"],
    "odm": ["component_name=odm", *ONLINE, "warmup_step=5"],
    "ado": ["component_name=ado", "component_params={start_step: 20, refit_step: 20}", *ONLINE, "warmup_step=40"],
    "doremi": ["component_name=doremi", *ONLINE],
}
SETTINGS: dict[str, Any] = {
    "stage": "pt",
    "finetuning_type": "full",
    "dataset": ",".join(f"pt_{domain}_train" for domain in DOMAINS),
    "eval_dataset": ",".join(f"pt_{domain}_valid" for domain in DOMAINS),
    "cutoff_len": 512,
    "train_type": "dynamic_mix",
    "train_step": 200,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "eval_on_each_dataset": True,
    "logging_steps": 10,
    "save_strategy": "no",
    "disable_gradient_checkpointing": True,
    "bf16": torch.cuda.is_available(),
    "report_to": "none",
    "disable_tqdm": True,
    "overwrite_output_dir": True,
}
SMALL = {"train_from_scratch": True, "learning_rate": 1e-3, "train_step": 600}
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#777777")


def run(command: str, config: Path, folder: Path, extra: list[str]) -> dict[str, Any]:
    """`dataflex-cli train` or `doremi`, and what the table and the picture need of it."""
    found = folder.with_suffix(".json")
    if not found.is_file():
        started = time.perf_counter()
        arguments = [f"output_dir={folder}", *extra]
        with open(folder.with_suffix(".log"), "w") as log:
            subprocess.run([sys.executable, "-m", "dataflex.cli", command, str(config), *arguments], check=True, stdout=log, stderr=subprocess.STDOUT)
        final = folder / "final" if command == "doremi" else folder
        results = json.loads((final / "all_results.json").read_text())
        record = {
            "losses": {domain: results[f"eval_pt_{domain}_valid_loss"] for domain in DOMAINS},
            "mixtures": list(mixtures(final / "dataflex" / "events.jsonl")),
            "seconds": time.perf_counter() - started,
        }
        found.write_text(json.dumps(record))
    return dict(json.loads(found.read_text()))


def mixtures(events: Path) -> Iterator[tuple[int, list[float]]]:
    """Every mixture of a run and the optimizer step from which on it held."""
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "mixture":
            yield event["step"], list(event["proportions"].values())


def small_model(source: str, out: Path) -> str:
    """A folder with the configuration of a small Llama and the tokenizer of `source`."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=512, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    folder = out / "small"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Perplexity per domain, from the mean loss over seeds, and of the mean loss over domains."""
    lines = ["| mixture | " + " | ".join(DOMAINS) + " | all | per seed |", "| --- |" + " ---: |" * (len(DOMAINS) + 2)]
    for arm, runs in results.items():
        losses = [run["losses"] for run in runs]
        cells = [f"{math.exp(statistics.mean(loss[domain] for loss in losses)):.1f}" for domain in DOMAINS]
        means = [statistics.mean(loss.values()) for loss in losses]
        cells += [f"{math.exp(statistics.mean(means)):.2f}", ", ".join(f"{math.exp(mean):.2f}" for mean in means)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: dict[str, list[dict[str, Any]]], steps: int, path: Path) -> None:
    """The mixtures of each arm's first seed over the optimizer steps."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3 * len(results), 3.2), sharey=True, layout="constrained")
    for axis, (arm, runs) in zip(axes, results.items(), strict=True):
        starts, shares = zip(*runs[0]["mixtures"], strict=True)
        bands = axis.stackplot([*starts, steps], *zip(*shares, shares[-1], strict=True), step="post", colors=COLOURS, labels=DOMAINS)
        axis.set(title=arm, xlabel="optimizer step", xlim=(0, steps), ylim=(0, 1))
    axes[0].set_ylabel("proportion")
    figure.legend(bands, DOMAINS, loc="outside right center")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = small_model(options.model, options.out) if options.small else options.model
    settings = SETTINGS | (SMALL if options.small else {}) | {"model_name_or_path": model, "dataset_dir": str(options.data)}
    settings |= {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in options.settings)}
    config = options.out / "mix_real_run.yaml"
    config.write_text(yaml.safe_dump(settings))
    runs = {(arm, int(seed)) for arm in ARMS for seed in options.seeds.split(",")}
    longest_first = sorted(runs, key=lambda key: (key[0] != "doremi", key))
    with ThreadPoolExecutor(options.jobs) as pool:
        begun = {
            (arm, seed): pool.submit(
                run,
                "doremi" if arm == "doremi" else "train",
                config,
                options.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}",
                [f"seed={seed}", *ARMS[arm]],
            )
            for arm, seed in longest_first
        }
    results = {arm: [begun[arm, seed].result() for seed in sorted(seed for name, seed in runs if name == arm)] for arm in ARMS}
    (options.out / "results.json").write_text(json.dumps(results))
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads")
    print(table(results))
    picture(results, settings["train_step"], options.out / "mixtures.png")


if __name__ == "__main__":
    main()
