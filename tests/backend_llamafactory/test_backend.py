"""LLaMA-Factory's YAML files plus DataFlex's keys: static is `llamafactory-cli train`, dynamic goes through the same workflow."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner

from dataflex.backends import llamafactory, load_backend
from dataflex.cli.app import app
from dataflex.cli.plan import check_run, plan
from dataflex.errors import ComponentError, ConfigError

DATA = Path(__file__).parents[2] / "examples" / "data"
BASE = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset_dir": str(DATA),
    "dataset": "arithmetic",
    "template": "qwen",
    "cutoff_len": 128,
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}
SELECT = {
    "train_type": "dynamic_select",
    "warmup_step": 1,
    "update_step": 2,
    "max_steps": None,
    "num_train_epochs": 1.0,
    "max_samples": 24,
    "eval_dataset": "arithmetic_clean",
}
WEIGHT = {"train_type": "dynamic_weight", "component_name": "loss", "warmup_step": 1, "train_step": 3}


@pytest.fixture
def write(tmp_path, model):
    def write(**keys):
        path = tmp_path / "config.yaml"
        settings = {**BASE, "model_name_or_path": model, "output_dir": str(tmp_path / "out"), **keys}
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


def train(path, overrides=()):
    run, prepared = check_run(path, overrides)
    load_backend(run.dataflex.backend).train(run, prepared)
    return history(run.backend["output_dir"])


def history(out):
    entries = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def test_it_is_the_backend_here():
    assert load_backend("auto") is llamafactory


def test_static_gives_the_losses_of_llamafactory_cli(write, tmp_path):
    ours = train(write())
    out = tmp_path / "theirs"
    command = [sys.executable, "-c", "from llamafactory.train.tuner import run_exp; run_exp()", str(write(output_dir=str(out)))]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in history(out)]


@pytest.mark.parametrize(
    "keys", [{}, {"finetuning_type": "full"}, {"neat_packing": True}, {"packing": True}, {"dataset": "arithmetic,arithmetic_clean"}]
)
def test_dynamic_weight_trains(write, keys):
    log = train(write(**WEIGHT, max_steps=None, **keys))
    assert len(log) == 3
    assert log[1]["dataflex/weight_max"] > 1 > log[1]["dataflex/weight_min"] > 0


def test_pretraining_and_evaluation_data(write, tmp_path):
    keys = {"stage": "pt", "dataset": "notes", "val_size": 0.3, "eval_strategy": "steps", "eval_steps": 3, "component_name": "adapt"}
    log = train(write(**{**WEIGHT, **keys}, max_steps=None))
    assert log[2]["dataflex/effective_sample_size"] < 1
    assert (tmp_path / "out" / "dataflex" / "run.yaml").is_file()


def test_equal_weights_per_token_give_the_static_losses(write, tmp_path):
    static = train(write())
    keys = {"component_params": {"strategy": "uniform"}, "loss_normalization": "token", "project_targets_only": False}
    ours = train(write(**WEIGHT, **keys, output_dir=str(tmp_path / "dynamic")))
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in static]


def test_masking_and_evaluation_data_of_conversations(write, tmp_path):
    turns = [("human", "one?"), ("gpt", "two."), ("human", "three?"), ("gpt", "four, five, six.")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    (tmp_path / "talk.json").write_text(json.dumps([row] * 8))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"talk": {"file_name": "talk.json", "formatting": "sharegpt"}}))
    keys = {**WEIGHT, "dataset_dir": str(tmp_path), "dataset": "talk", "eval_dataset": "talk", "do_eval": True, "learning_rate": 0.0}
    losses, evaluated = {}, {}
    for name, masking in {"answers": {}, "last answer": {"mask_history": True}, "everything": {"train_on_prompt": True}}.items():
        out = tmp_path / name
        losses[name] = train(write(**keys, **masking, output_dir=str(out)))[0]["loss"]
        evaluated[name] = json.loads((out / "all_results.json").read_text())["eval_loss"]
    assert len({round(loss, 6) for loss in losses.values()}) == 3
    assert evaluated["answers"] == pytest.approx(losses["answers"], rel=1e-5)  # equal rows: no weight differs from 1


@pytest.fixture
def seen(monkeypatch):
    """The data set and the micro-batches, in order, that training sees."""
    seen = {"batches": []}
    step = transformers.Trainer.training_step

    def recording(self, model, inputs, *args, **kwargs):
        seen["data"] = self.train_dataset
        seen["batches"].append(inputs["input_ids"][inputs["attention_mask"].bool()].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", recording)
    return seen


def selected(out):
    return {int(path.stem.split("_")[1]): np.load(path).tolist() for path in (out / "dataflex" / "selections").glob("step_*.npy")}


@pytest.mark.parametrize("keys", [{"component_name": "random"}, {"component_name": "loss", "stage": "pt", "dataset": "notes", "eval_dataset": None}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dynamic_select_trains_on_the_rows_selected(write, tmp_path, seen, keys, accumulation):
    settings = {**SELECT, **keys, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    log = train(write(**settings, update_times=2))
    chosen = selected(tmp_path / "out")
    assert {step: len(rows) for step, rows in chosen.items()} == {0: 2 * accumulation, 1: 4 * accumulation, 3: 4 * accumulation}
    rows = [row for step in sorted(chosen) for row in chosen[step]]
    expected = [[token for row in rows[start : start + 2] for token in seen["data"][row]["input_ids"]] for start in range(0, len(rows), 2)]
    assert seen["batches"] == expected and len(log) == 5
    assert [entry["step"] for entry in log if "dataflex/decision_seconds" in entry] == [1, 2, 4]


@pytest.mark.parametrize("name", ["less", "cluster_less", "near", "rds", "tsds", "delta_loss"])
def test_selectors_that_run_the_model(write, tmp_path, name):
    log = train(write(**SELECT, component_name=name))
    assert len(log) == 3 and len(selected(tmp_path / "out")[1]) == 8
    assert (tmp_path / "out" / "dataflex" / "run.yaml").is_file()


def embeddings(model, rows):
    """Weighted mean of the last hidden states of each row alone."""
    found = []
    for row in rows:
        with torch.no_grad():
            hidden = model(torch.tensor([row["input_ids"]])).last_hidden_state[0].double()
        pooled = (torch.arange(1.0, len(hidden) + 1)[:, None] * hidden).sum(0)
        found.append((pooled / pooled.norm()).numpy())
    return np.array(found)


def test_a_selection_made_offline(write, tmp_path, model, seen):
    keys = {**SELECT, "finetuning_type": "full", "warmup_step": 0}
    result = CliRunner().invoke(app, ["offline", "rds", str(write(**keys)), "--aggregation", "max", "-o", str(tmp_path / "rds.safetensors")])
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "rds.safetensors"]
    order = load_file(tmp_path / "rds.safetensors")["order"].tolist()
    made = load_backend("auto").scoring_trainer(*check_run(write(**keys), scoring=True), tmp_path / "scoring")
    body = transformers.AutoModel.from_pretrained(model).eval()
    similarity = embeddings(body, made.eval_dataset) @ embeddings(body, made.train_dataset).T
    assert similarity.shape == (16, 24) and order == np.argsort(-similarity.max(0), kind="stable").tolist()
    train(write(**keys, component_name="rds", component_params={"file": str(tmp_path / "rds.safetensors")}))
    assert sorted(selected(tmp_path / "out")[0]) == sorted(order[:8])
    assert len(seen["batches"]) == 2


def test_a_selection_made_offline_is_refused_for_other_rows(write, tmp_path):
    result = CliRunner().invoke(app, ["offline", "ifd", str(write(**SELECT)), "-o", str(tmp_path / "ifd.safetensors")])
    assert result.exit_code == 0, result.stderr
    keys = {**SELECT, "component_name": "ifd", "component_params": {"file": str(tmp_path / "ifd.safetensors")}}
    with pytest.raises(ComponentError, match="was made for another data set of 24 rows"):
        train(write(**keys, cutoff_len=40))


def test_resume_gives_the_same_bits(write, tmp_path):
    keys = {**WEIGHT, "save_steps": 1, "component_params": {"scope": "ema"}}
    whole = train(write(**keys, output_dir=str(tmp_path / "whole")))
    for name in ("checkpoint-3", "checkpoint-2"):
        (tmp_path / "whole" / name / "trainer_state.json").unlink()  # as if it had been killed
    resumed = train(write(**keys, output_dir=str(tmp_path / "whole")))
    assert [entry["loss"] for entry in whole] == [entry["loss"] for entry in resumed]
    first, second = (load_file(tmp_path / "whole" / name / "adapter_model.safetensors") for name in ("", "checkpoint-3"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_trainer_class_is_put_back(write):
    module = import_module("llamafactory.train.sft.workflow")
    before = module.CustomSeq2SeqTrainer
    train(write(**WEIGHT))
    assert module.CustomSeq2SeqTrainer is before


@pytest.mark.parametrize("stage", llamafactory.TRAINERS)
def test_the_names_we_replace_exist(stage):
    module, name = llamafactory.TRAINERS[stage]
    assert isinstance(getattr(import_module(module), name), type)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": "dpo", **WEIGHT}, "stage: dpo cannot be combined with train_type: dynamic_weight; allowed: pt, sft"),
        ({"lora_rnak": 4}, "lora_rnak: is not a key of LLaMA-Factory. Did you mean 'lora_rank'?"),
        ({"warmup_stpe": 4}, "warmup_stpe: is not a key of LLaMA-Factory. Did you mean 'warmup_step'?"),
        ({"dataset": "arithmetik"}, "has no data set 'arithmetik'. Did you mean 'arithmetic'?"),
        ({"dataset": None}, "dataset: is required"),
        ({"dataset_dir": "nowhere"}, "dataset_dir: 'nowhere/dataset_info.json' does not exist"),
        ({**WEIGHT, "max_steps": 7}, "train_step: is 3 but max_steps is 7"),
        ({**WEIGHT, "component_name": "adapt"}, "set eval_dataset or val_size"),
        ({**SELECT, "component_name": "less", "update_step": 1, "eval_dataset": None}, "set eval_dataset or val_size"),
        ({**SELECT, "component_name": "random", "update_step": None}, "update_step: must be at least 1"),
        ({"save_strategy": "sometimes"}, "sometimes"),
    ],
)
def test_mistakes_are_found_before_training(write, tmp_path, keys, message):
    with pytest.raises(ConfigError) as error:
        check_run(write(**keys))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_validate_prints_a_plan(write):
    lines = dict(plan(*check_run(write(**WEIGHT))))
    assert lines["backend"] == "llamafactory" and lines["optimizer steps"] == "3"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_from_one_command(write, tmp_path):
    env = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    keys = {**WEIGHT, "component_params": {"scope": "window"}}
    command = [sys.executable, "-m", "dataflex.cli", "train"]
    subprocess.run(
        [*command, str(write(**keys, ddp_backend="gloo", per_device_train_batch_size=2, output_dir=str(tmp_path / "two")))], check=True, env=env
    )
    one = train(write(**keys, output_dir=str(tmp_path / "one")))
    assert [entry["loss"] for entry in history(tmp_path / "two")] == pytest.approx([entry["loss"] for entry in one], rel=1e-5)
