"""Whether training on a GPU does what the tests check on the CPU: every algorithm, a small model in fp32, some optimizer steps.

    python benchmarks/gpu_check.py

For each algorithm: by how much the trained parameters differ between GPU and CPU, and between a run on the GPU and one resumed half-way.
Relative differences of a few 1e-5 are rounding. Where rows are chosen by losses or gradients, ties may fall either way.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainingArguments

from dataflex import MixTrainer, SelectTrainer, WeightTrainer
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows

STEPS = 8
PERIODS = {"warmup_step": 2, "update_step": 2, "update_times": 3}
ALGORITHMS: dict[Any, dict[str, dict[str, Any]]] = {
    WeightTrainer: {"loss": {}, "adapt": {}, "dft": {}, "focal": {}, "joint_update_aware": {}},
    SelectTrainer: {"random": {}, "loss": {}, "delta_loss": {}, "less": {}, "near": {}, "rds": {}, "tsds": {}, "ifd": {}},
    MixTrainer: {"static": {}, "random": {}, "odm": {}, "ado": {"start_step": 0, "refit_step": 2}, "doremi": {"reference_model": "reference"}},
}


def train(kind: Any, name: str, params: dict[str, Any], out: str, *, cpu: bool, resume: str | None = None) -> torch.Tensor:
    """The parameters after training."""
    rows = datasets.Dataset.from_list(tiny_rows(48)).add_column("domain_id", [row % 3 for row in range(48)])
    args = TrainingArguments(
        out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS if kind is WeightTrainer else -1,
        num_train_epochs=1,
        learning_rate=1e-2,
        optim="adamw_torch" if name == "less" else "sgd",  # `less` reads the moments of AdamW
        lr_scheduler_type="constant",
        save_steps=STEPS // 2,
        use_cpu=cpu,
        report_to="none",
        disable_tqdm=True,
        logging_steps=2,
    )
    periods = {"warmup_step": 2} if kind is WeightTrainer else PERIODS
    trainer = kind.over(Trainer)(
        model=tiny_model(),
        args=args,
        train_dataset=rows,
        eval_dataset=datasets.Dataset.from_list(tiny_rows(6, seed=1)),
        data_collator=pad_collator,
        dataflex={"component_name": name, "component_params": params, **periods},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([parameter.detach().cpu().double().flatten() for parameter in trainer.model.parameters()])


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU only'}")
    print("| algorithm | GPU against CPU | resumed against uninterrupted |\n| --- | ---: | ---: |")
    for kind, algorithms in ALGORITHMS.items():
        for name, params in algorithms.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                if "reference_model" in params:
                    tiny_model(seed=3).save_pretrained(out / "reference")
                    params = {**params, "reference_model": str(out / "reference")}
                try:
                    there = train(kind, name, params, str(out / "gpu"), cpu=not cuda)
                    here = train(kind, name, params, str(out / "cpu"), cpu=True)
                    again = train(kind, name, params, str(out / "gpu"), cpu=not cuda, resume=str(out / "gpu" / f"checkpoint-{STEPS // 2}"))
                    cells = f"{difference(there, here):.1e} | {difference(again, there):.1e}"
                except Exception as error:
                    cells = f"{type(error).__name__}: {error} |"
                print(f"| {kind.train_type} {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
