"""The comparison in docs/results.md: one model, one data set, static training and every strategy of the `loss` weighter, several seeds.

    python benchmarks/real_run.py MODEL_FOLDER DATA_FOLDER OUTPUT_FOLDER [seeds] [key=value ...]

DATA_FOLDER is a `dataset_dir` with mix_c30_train and general_valid, math_valid, code_valid. Runs that have finished are not repeated.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

ARMS = {
    "static": ["train_type=static", "component_name=null", "component_params=null", "warmup_step=null"],
    "loss: uniform": ["component_params.strategy=uniform"],
    "loss: linupper": ["component_params.strategy=linupper"],
    "loss: quadratic": ["component_params.strategy=quadratic"],
    "loss: extremes": ["component_params.strategy=extremes"],
}
SETTINGS = """\
stage: sft
finetuning_type: lora
dataset: mix_c30_train
eval_dataset: general_valid,math_valid,code_valid
eval_on_each_dataset: true
cutoff_len: 128
train_type: dynamic_weight
component_name: loss
component_params: {r: 0.4}
warmup_step: 5
train_step: 60
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
learning_rate: 5.0e-4
logging_steps: 5
save_strategy: "no"
disable_gradient_checkpointing: true
report_to: none
disable_tqdm: true
"""
EVALUATION_ROWS = 32  # of each set
EVALUATED = ("general_valid", "math_valid", "code_valid")


def run(model: str, data: str, out: Path, arm: str, seed: int, extra: list[str]) -> dict[str, float]:
    """Train one arm with one seed, unless it has been, and return its evaluation losses."""
    folder = out / f"{arm.replace(': ', '-')}-{seed}"
    if not (folder / "eval_results.json").is_file():
        config = out / "real_run.yaml"
        config.write_text(SETTINGS)
        command = [sys.executable, "-m", "dataflex.cli", "train", str(config), f"model_name_or_path={model}", f"dataset_dir={data}"]
        command += [f"output_dir={folder}", "overwrite_output_dir=true", f"seed={seed}", *ARMS[arm], *extra]
        with open(out / f"{folder.name}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    results = json.loads((folder / "all_results.json").read_text())
    return {name: results[f"eval_{name}_loss"] for name in EVALUATED} | {"seconds": results["train_runtime"]}


def shortened(data: Path, out: Path) -> Path:
    """A `dataset_dir` with the same data sets, those for evaluation cut to their first rows."""
    info = json.loads((data / "dataset_info.json").read_text())
    chosen = {name: {**info[name], "file_name": str((data / info[name]["file_name"]).resolve())} for name in ("mix_c30_train", *EVALUATED)}
    for name in EVALUATED:
        chosen[name]["num_samples"] = EVALUATION_ROWS
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(chosen))
    return folder


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean over seeds, and the seeds' values, of the evaluation loss averaged over the three sets."""
    lines = ["| training | " + " | ".join(EVALUATED) + " | mean | mean, per seed |", "| --- |" + " ---: |" * 5]
    for arm, runs in results.items():
        means = [statistics.mean(run[name] for name in EVALUATED) for run in runs]
        cells = [f"{statistics.mean(run[name] for run in runs):.4f}" for name in EVALUATED]
        lines.append(f"| {arm} | {' | '.join(cells)} | {statistics.mean(means):.4f} | {', '.join(f'{mean:.4f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    model, data, out, *rest = sys.argv[1:]
    data = str(shortened(Path(data), Path(out)))
    seeds = [int(seed) for seed in rest[0].split(",")] if rest else [1, 2]
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            results[arm].append(run(model, data, Path(out), arm, seed, rest[1:]))
            print(arm, seed, results[arm][-1], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
