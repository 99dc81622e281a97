"""The selection table in docs/results.md: one model, a mixed pool, one target task, every selector at equal optimizer steps, several seeds.

    python benchmarks/select_real_run.py MODEL_FOLDER DATA_FOLDER OUTPUT_FOLDER [seeds] [key=value ...]

DATA_FOLDER is a `dataset_dir` with general_train, math_train, code_train, mix_c30_train, math_valid and math_test. Runs that have finished are
not repeated.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataflex.backends.datasets.encode import encode_sft
from dataflex.backends.datasets.find import find_datasets

ARMS = {
    "static": ["train_type=static", "component_name=null", "warmup_step=null", "update_step=null"],
    "random": ["component_name=random"],
    "loss": ["component_name=loss"],
    "near": ["component_name=near"],
    "rds": ["component_name=rds"],
    "less": ["component_name=less"],
}
SETTINGS = """\
stage: sft
finetuning_type: lora
dataset: general_train,math_train,code_train,mix_c30_train
eval_dataset: math_valid
cutoff_len: 112
train_type: dynamic_select
component_name: random
warmup_step: 4
update_step: 20
train_step: 24
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
learning_rate: 5.0e-4
logging_steps: 4
save_strategy: "no"
disable_gradient_checkpointing: true
report_to: none
disable_tqdm: true
"""
ROWS = {"general_train": 80, "math_train": 80, "code_train": 80, "mix_c30_train": 80, "math_valid": 16, "math_test": 48}


def run(model: str, data: str, out: Path, arm: str, seed: int, extra: list[str]) -> dict[str, Any]:
    """Train one arm with one seed, unless it has been; its test loss, time and what it was trained on."""
    folder = out / f"{arm}-{seed}"
    if not (folder / "eval_results.json").is_file():
        config = out / "select_real_run.yaml"
        config.write_text(SETTINGS)
        command = [sys.executable, "-m", "dataflex.cli", "train", str(config), f"model_name_or_path={model}", f"dataset_dir={data}"]
        command += [f"output_dir={folder}", "overwrite_output_dir=true", f"seed={seed}", *ARMS[arm], *extra]
        with open(out / f"{folder.name}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    result = folder / "test.json"
    if not result.is_file():
        result.write_text(json.dumps({"loss": test_loss(model, folder, data)}))
    trained = json.loads((folder / "all_results.json").read_text())
    return {
        "test": json.loads(result.read_text())["loss"],
        "valid": trained["eval_loss"],
        "seconds": trained["train_runtime"],
        **selected(folder),
    }


def selected(folder: Path) -> dict[str, Any]:
    """Seconds of the decisions and the samples per data set after the warm-up."""
    path = folder / "dataflex" / "events.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    events = [event for event in lines if event["event"] == "selection"]
    counts: dict[str, int] = {}
    for event in events:
        for name, number in event["domains"].items() if event["kind"] == "selection" else []:
            counts[name] = counts.get(name, 0) + number
    return {"decision_seconds": sum(event["seconds"] for event in events), "counts": counts}


@torch.no_grad()
def test_loss(model_folder: str, adapter: Path, data: str) -> float:
    """Mean loss of the target tokens of the test rows."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(adapter)).eval()
    specs = find_datasets(["math_test"], Path(data), stage="sft")
    rows = encode_sft(specs, tokenizer, cutoff_len=112, train_on_prompt=False, mask_history=False).dataset
    total = tokens = 0.0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * count
        tokens += count
    return total / tokens


def shortened(data: Path, out: Path) -> Path:
    """A `dataset_dir` with the same data sets, cut to their first rows."""
    info = json.loads((data / "dataset_info.json").read_text())
    chosen = {
        name: {**info[name], "file_name": str((data / info[name]["file_name"]).resolve()), "num_samples": number} for name, number in ROWS.items()
    }
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(chosen))
    return folder


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds."""
    names = [name for name in ROWS if name.endswith("_train")]
    head = ["training", "math_test", "per seed", "math_valid", "seconds", "of it deciding", *names]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for arm, runs in results.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in ("test", "valid", "seconds", "decision_seconds")}
        cells = [f"{mean['test']:.4f}", ", ".join(f"{run['test']:.4f}" for run in runs), f"{mean['valid']:.4f}"]
        cells += [f"{mean['seconds']:.0f}", f"{mean['decision_seconds']:.0f}"]
        cells += [f"{statistics.mean(run['counts'].get(name, 0) for run in runs):.0f}" if runs[0]["counts"] else "-" for name in names]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    model, data, out, *rest = sys.argv[1:]
    data = str(shortened(Path(data), Path(out)))
    seeds = [int(seed) for seed in rest[0].split(",")] if rest else [1, 2]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            results[arm].append(run(model, data, Path(out), arm, seed, rest[1:]))
            print(arm, seed, results[arm][-1], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
