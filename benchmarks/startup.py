"""Time and memory from a data file to the first optimizer step, for many rows; beside plain TRL.

    python benchmarks/startup.py MODEL_OR_TOKENIZER DATA.jsonl [--rows 200000] [--memory-rows 1000000] [--out startup_work]

`DATA.jsonl` (alpaca) is repeated, each row made distinct, until there are enough rows. The model that trains is a Llama with two small layers, so
that data is all there is. Every figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = {
    "TRL": None,
    "static": {"train_type": "static"},
    "weight": {"train_type": "dynamic_weight", "component_name": "loss"},
    "mix": {"train_type": "dynamic_mix", "component_name": "static", "update_step": 2, "update_times": -1},
    "select": {"train_type": "dynamic_select", "component_name": "random", "update_step": 2, "update_times": -1},
}


def write_data(source: Path, path: Path, rows: int) -> None:
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = lines[number % len(lines)]
            file.write(json.dumps({"instruction": f"{number}: {row['instruction']}", "input": row.get("input", ""), "output": row["output"]}) + "\n")


def small_model(tokenizer: str, folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(vocab_size=len(loaded), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(folder)
    loaded.save_pretrained(folder)


def settings(work: Path, arm: str) -> dict[str, Any]:
    parts = ["a", "b"]  # two data sets, so that there is something to mix
    return {
        "model_name_or_path": str(work / "model"),
        "dataset": ",".join(str(work / f"{part}.jsonl") for part in parts),
        "finetuning_type": "full",
        "cutoff_len": 256,
        "output_dir": str(work / f"out_{arm}"),
        "per_device_train_batch_size": 4,
        "train_step": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "overwrite_output_dir": True,
        **(ARMS[arm] or {}),
    }


def run_trl(work: Path) -> None:
    """The same rows, model and steps with TRL alone, its own tokenising included."""
    import os

    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = load_dataset("json", data_files=[str(work / f"{part}.jsonl") for part in "ab"], split="train", cache_dir=str(work / "trl_cache"))
    data = data.map(
        lambda row: {
            "prompt": [{"role": "user", "content": "\n".join(filter(None, [row["instruction"], row["input"]]))}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        },
        remove_columns=data.column_names,
        num_proc=os.cpu_count(),
    )
    args = SFTConfig(
        str(work / "out_TRL"), max_steps=3, per_device_train_batch_size=4, max_length=256, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False, dataset_num_proc=os.cpu_count(),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    SFTTrainer(model=model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(work / "model")).train()


def child(work: Path, arm: str) -> None:
    begun = time.perf_counter()
    if arm == "TRL":
        run_trl(work)
    else:
        import yaml

        from dataflex.cli.app import _train

        config = work / f"{arm}.yaml"
        config.write_text(yaml.safe_dump(settings(work, arm)))
        _train(str(config), [])
    seconds = time.perf_counter() - begun
    rss = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"arm": arm, "seconds": round(seconds, 1), "peak_mb": round(peak), "anonymous_mb": round(int(rss.split()[1]) / 1024)}))


def measure(work: Path, arms: list[str]) -> list[dict[str, Any]]:
    found = []
    for arm in arms:
        done = subprocess.run([sys.executable, __file__, "--child", arm, "--out", str(work)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--arms", default="static,static,TRL,weight,mix,select")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "startup_work")
    parser.add_argument("--child")
    options = parser.parse_args()
    os.environ.setdefault("DATAFLEX_CACHE", str(options.out / "cache"))
    if options.child:
        return child(options.out, options.child)
    options.out.mkdir(parents=True, exist_ok=True)
    small_model(options.model, options.out / "model")
    for part, rows in (("a", options.rows // 2), ("b", options.rows - options.rows // 2)):
        write_data(options.data, options.out / f"{part}.jsonl", rows)
    measure(options.out, options.arms.split(","))
    return None


if __name__ == "__main__":
    main()
