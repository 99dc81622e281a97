"""The mixing table in docs/results.md: seven domains, one model, every mixer at equal tokens, several seeds.

    python benchmarks/mix_real_run.py MODEL_FOLDER DATA_FOLDER OUTPUT_FOLDER [seeds] [key=value ...]

MODEL_FOLDER gives the tokenizer; with `small` as the last word before the settings a Llama of about 19M parameters is trained from scratch,
otherwise the model itself goes on training. DATA_FOLDER is a `dataset_dir` with pt_<domain>_train and pt_<domain>_valid. Finished runs are not
repeated.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig

DOMAINS = ("wiki", "books", "code", "abstracts", "legal", "dialogue", "c4")
FIXED = ["static_mix=true", "component_name=null"]
ARMS: dict[str, list[str]] = {
    "static, uniform": [*FIXED, "mixture_sample_rule=uniform"],
    "static, by size": [*FIXED, "mixture_sample_rule=stratified"],
    "odm": ["component_name=odm", "update_step=1", "update_times=-1", "warmup_step=2"],
    "ado": ["component_name=ado", "component_params={start_step: 5, refit_step: 5}", "update_step=1", "update_times=-1", "warmup_step=10"],
    "doremi": ["component_name=doremi", "update_step=1", "update_times=-1"],
}
SETTINGS = """\
stage: pt
finetuning_type: full
cutoff_len: 128
max_samples: 120
train_type: dynamic_mix
train_step: 40
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
eval_on_each_dataset: true
logging_steps: 10
save_strategy: "no"
disable_gradient_checkpointing: true
report_to: none
disable_tqdm: true
"""
EVALUATION_DOCUMENTS = 4  # of each domain


def run(command: str, model: str, data: str, folder: Path, extra: list[str]) -> None:
    """`dataflex-cli train` or `doremi`, unless it has been."""
    if (folder / "all_results.json").is_file() or (folder / "final" / "all_results.json").is_file():
        return
    config = folder.parent / "mix_real_run.yaml"
    names = {key: ",".join(f"pt_{domain}_{part}" for domain in DOMAINS) for key, part in (("dataset", "train"), ("eval_dataset", "valid"))}
    config.write_text(SETTINGS + "".join(f"{key}: {value}\n" for key, value in names.items()))
    arguments = [f"model_name_or_path={model}", f"dataset_dir={data}", f"output_dir={folder}", "overwrite_output_dir=true", *extra]
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        subprocess.run([sys.executable, "-m", "dataflex.cli", command, str(config), *arguments], check=True, stdout=log, stderr=subprocess.STDOUT)


def losses(folder: Path) -> dict[str, float]:
    """Validation loss of each domain."""
    results = json.loads((folder / "all_results.json").read_text())
    return {domain: results[f"eval_pt_{domain}_valid_loss"] for domain in DOMAINS}


def shortened(data: Path, out: Path) -> Path:
    """A `dataset_dir` with the same data sets, those for validation cut to their first documents."""
    info = json.loads((data / "dataset_info.json").read_text())
    chosen: dict[str, Any] = {}
    for domain in DOMAINS:
        for part in ("train", "valid"):
            entry = {**info[name := f"pt_{domain}_{part}"], "file_name": str((data / info[f"pt_{domain}_{part}"]["file_name"]).resolve())}
            chosen[name] = {**entry, **({"num_samples": EVALUATION_DOCUMENTS} if part == "valid" else {})}
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(chosen))
    return folder


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


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Perplexity per domain, mean over seeds, and of the mean loss over domains."""
    lines = ["| mixture | " + " | ".join(DOMAINS) + " | all domains | per seed |", "| --- |" + " ---: |" * (len(DOMAINS) + 2)]
    for arm, runs in results.items():
        cells = [f"{math.exp(statistics.mean(run[domain] for run in runs)):.0f}" for domain in DOMAINS]
        means = [statistics.mean(run.values()) for run in runs]
        cells += [f"{math.exp(statistics.mean(means)):.1f}", ", ".join(f"{math.exp(mean):.1f}" for mean in means)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    model, data, out_name, *rest = sys.argv[1:]
    out = Path(out_name)
    data = str(shortened(Path(data), out))
    seeds = [int(seed) for seed in rest[0].split(",")] if rest else [1, 2]
    extra = rest[1:]
    if extra[:1] == ["small"]:
        model, extra = small_model(model, out), ["train_from_scratch=true", "learning_rate=1.0e-3", *extra[1:]]
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm, settings in ARMS.items():
            folder = out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            run("doremi" if arm == "doremi" else "train", model, data, folder, [f"seed={seed}", *settings, *extra])
            results[arm].append(losses(folder / "final" if arm == "doremi" else folder))
            print(arm, seed, results[arm][-1], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
