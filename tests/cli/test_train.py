"""`dataflex-cli train` from a YAML file to what lies in `output_dir`, with a small model."""

import ast
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from workspace import ROWS, make_workspace, run_cli, write_config, write_rows

import dataflex
from dataflex.core.registry import REGISTRY

TUTORIAL = """
train_type: dynamic_weight
components_cfg_file: src/dataflex/configs/components.yaml
component_name: loss
warmup_step: 1
train_step: 3
"""
TUTORIAL_WEIGHTER = """
from dataflex.core.registry import register_weighter
from dataflex.utils.logging import logger
from dataflex.train.weighter.base_weighter import Weighter
import torch
from torch import nn
from typing import Any, Union


@register_weighter("my_custom")
class CustomWeighter(Weighter):
    def __init__(self, strategy: str = "uniform", **kwargs):
        super().__init__(**kwargs)
        self.strategy = strategy
        logger.info(f"CustomWeighter initialized with strategy: {strategy}")

    def get_weighted_loss(
        self,
        losses: torch.Tensor,
        *,
        ctx: Any = None,
        model: nn.Module | None = None,
        inputs: dict[str, Union[torch.Tensor, Any]] | None = None,
    ) -> torch.Tensor:
        if not torch.is_tensor(losses) or losses.dim() == 0:
            return losses
        weights = torch.ones_like(losses) / losses.numel()
        return torch.sum(weights * losses)
"""
QUIET: dict[str, Any] = {"logging_steps": 1, "disable_tqdm": True}


@pytest.fixture
def folder(tmp_path):
    return make_workspace(tmp_path)


def train(*overrides: str, config: str = "config.yaml"):
    """Train; an error of any kind fails the test."""
    result = run_cli("train", config, *overrides)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def history(out: Path, key: str = "loss") -> list[float]:
    return [entry[key] for entry in read(out / "trainer_state.json")["log_history"] if key in entry]


def changed(folder: Path, out: str = "out") -> set[str]:
    """Names of the parameters that differ from the model that training started from."""
    before, after = load_file(folder / "model/model.safetensors"), load_file(folder / out / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name])}


class TestTutorial:
    def test_the_block_of_the_tutorial(self, folder):
        own = dict.fromkeys(yaml.safe_load(TUTORIAL), ...)
        config = write_config(folder, **own, **QUIET, finetuning_type="lora", plot_loss=True, report_to="tensorboard", eval_dataset="held_out")
        config.write_text(config.read_text() + TUTORIAL)
        train()
        out = folder / "out"
        assert read(out / "trainer_state.json")["global_step"] == 3 and len(history(out)) == 3
        files = ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "training_loss.png"]
        assert [name for name in files if not (out / name).is_file()] == []
        results = read(out / "all_results.json")
        assert {"train_loss", "eval_loss", "epoch"} <= results.keys()
        assert [json.loads(line) for line in (out / "dataflex/events.jsonl").read_text().splitlines()] == [
            {"step": 1, "event": "weighting starts", "component": "loss"}
        ]
        settings = yaml.safe_load((out / "dataflex/run.yaml").read_text())
        assert {key: settings[key] for key in own} == yaml.safe_load(TUTORIAL)
        assert settings["dataflex_run"]["seed"] == 42 and settings["dataflex_run"]["versions"]["dataflex"] == dataflex.__version__
        self.check_tensorboard(out)

    def check_tensorboard(self, out: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        points = {}
        for path in out.glob("runs/*/events*"):
            events = EventAccumulator(str(path)).Reload()
            points |= {tag: [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        weights = points["train/dataflex/weight_max"]
        assert [step for step, _ in weights] == [2, 3] and all(value > 1 for _, value in weights)
        assert [step for step, _ in points["train/loss"]] == [1, 2, 3]

    def test_a_weighter_from_a_plugin(self, folder, caplog):
        (folder / "mine.py").write_text(TUTORIAL_WEIGHTER)
        (folder / "my.yaml").write_text("weighters:\n  my_custom:\n    name: my_custom\n    params:\n      strategy: uniform\n")
        write_config(folder, **QUIET, plugins=["mine.py"], components_cfg_file="my.yaml", component_name="my_custom")
        write_config(folder, "same.yaml", **QUIET, component_name="custom", output_dir="same")
        try:
            result = train()
        finally:
            REGISTRY._classes["weighter"].pop("my_custom", None)
        assert "INFO dataflex: CustomWeighter initialized with strategy: uniform\n" in result.stderr
        train(config="same.yaml")
        assert history(folder / "out") == history(folder / "same")

    def test_relative_files_are_found_from_the_training_file(self, folder, monkeypatch):
        (folder / "my.yaml").write_text("weighters:\n  loss:\n    params:\n      r: 0.5\n")
        write_config(folder, components_cfg_file="my.yaml")
        (folder / "elsewhere").mkdir()
        monkeypatch.chdir(folder / "elsewhere")
        train(config="../config.yaml")
        assert (folder / "elsewhere/out/model.safetensors").is_file()


class TestRunFile:
    @pytest.mark.parametrize("train_type", ["static", "dynamic_weight"])
    def test_replaying_a_run(self, folder, train_type):
        write_config(folder, **QUIET, train_type=train_type, max_steps=3)
        train("seed=7", *(["component_params.r=0.5"] if train_type != "static" else []))
        train("output_dir=again", config="out/dataflex/run.yaml")
        assert history(folder / "again") == history(folder / "out")
        assert history(folder / "again", "grad_norm") == history(folder / "out", "grad_norm")
        first, second = (yaml.safe_load((folder / out / "dataflex/run.yaml").read_text()) for out in ("out", "again"))
        assert second.pop("output_dir") == "again" and first.pop("output_dir") == "out"
        assert (first.pop("dataflex_run"), second.pop("dataflex_run"))[0]["command"] and first == second

    def test_start_anew_with_overwrite(self, folder):
        write_config(folder, **QUIET, save_steps=1)
        train()
        train("overwrite_output_dir=true", "train_step=2")
        assert sorted(path.name for path in (folder / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
        assert len((folder / "out/dataflex/events.jsonl").read_text().splitlines()) == 1


class TestWhatIsTrained:
    def test_full(self, folder):
        write_config(folder)
        train()
        assert changed(folder) == set(load_file(folder / "model/model.safetensors"))

    @pytest.mark.parametrize(("layers", "layer"), [(1, "1"), (-1, "0")])
    def test_freeze(self, folder, layers, layer):
        write_config(folder, finetuning_type="freeze", freeze_trainable_layers=layers, freeze_extra_modules="norm")
        train()
        names = changed(folder)
        assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {layer}
        assert {name for name in names if not name.startswith("model.layers.")} == {"model.norm.weight"}

    @pytest.mark.parametrize("train_type", ["static", "dynamic_weight"])
    def test_lora(self, folder, train_type):
        write_config(folder, finetuning_type="lora", lora_target="q_proj,v_proj", lora_rank=4, train_type=train_type)
        train()
        adapter = load_file(folder / "out/adapter_model.safetensors")
        assert not (folder / "out/model.safetensors").exists()
        assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj"}
        assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
        assert all(tensor.shape[0] == 4 for name, tensor in adapter.items() if "lora_A" in name)

    def test_going_on_with_an_adapter(self, folder):
        write_config(folder, **QUIET, finetuning_type="lora")
        train()
        train("adapter_name_or_path=out", "output_dir=more")
        first, second = (load_file(folder / out / "adapter_model.safetensors") for out in ("out", "more"))
        assert first.keys() == second.keys() and not any(first[name].equal(second[name]) for name in first)
        assert history(folder / "more")[0] < history(folder / "out")[0]


class TestData:
    def test_plain_text(self, folder):
        (folder / "data/text.txt").write_text("".join(f"line number {number}\n" for number in range(20)))
        write_config(folder, **QUIET, stage="pt", dataset="text.txt", cutoff_len=16)
        train()
        assert len(history(folder / "out", "dataflex/weight_max")) == 2

    @pytest.mark.parametrize("train_type", ["static", "dynamic_weight"])
    def test_packing(self, folder, train_type):
        write_config(folder, **QUIET, packing=True, train_type=train_type, max_steps=3, per_device_train_batch_size=1)
        train()
        assert len(history(folder / "out")) == 3

    @pytest.mark.parametrize("suffix", ["parquet", "csv"])
    def test_file_types_train_the_same(self, folder, suffix):
        path = folder / f"data/other.{suffix}"
        if suffix == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ROWS[0])
                writer.writeheader()
                writer.writerows(ROWS)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(ROWS), path)
        write_config(folder, **QUIET)
        train()
        train(f"dataset=other.{suffix}", "output_dir=other")
        assert history(folder / "other") == history(folder / "out")

    def test_several_data_sets(self, folder):
        write_rows(folder / "data/more.jsonl", ROWS[:4])
        write_config(folder, **QUIET, dataset="rows,more.jsonl", per_device_train_batch_size=16)
        train()
        shares = [history(folder / "out", f"dataflex/weight_share/{name}") for name in ("rows", "more.jsonl")]
        assert [sum(pair) for pair in zip(*shares, strict=True)] == pytest.approx([1, 1]) and 0.5 < shares[0][0] < 1

    @pytest.mark.parametrize("evaluation", [{"eval_dataset": "held_out"}, {"val_size": 0.25}])
    def test_evaluation_loss_is_the_plain_loss(self, folder, evaluation):
        write_config(folder, **QUIET, **evaluation, learning_rate=0, max_steps=3, component_params={"r": 0.1})
        train()
        train("train_type=static", "component_name=null", "warmup_step=null", "component_params=null", "output_dir=static")
        found, plain = (read(folder / out / "all_results.json")["eval_loss"] for out in ("out", "static"))
        assert found == plain > 0

    def test_evaluation_on_each_data_set_and_early_stopping(self, folder):
        write_config(folder, **QUIET, eval_dataset="held_out,rows", eval_on_each_dataset=True)
        train()
        assert {"eval_held_out_loss", "eval_rows_loss"} <= read(folder / "out/all_results.json").keys()
        stop = ["eval_dataset=held_out", "eval_on_each_dataset=false", "eval_strategy=steps", "eval_steps=1", "early_stopping_steps=1"]
        train(*stop, "learning_rate=0", "train_step=9", "output_dir=stopped")
        assert read(folder / "stopped/trainer_state.json")["global_step"] == 2


class TestResume:
    @pytest.mark.parametrize("train_type", ["static", "dynamic_weight"])
    def test_an_interrupted_run_ends_like_a_whole_one(self, folder, train_type, monkeypatch):
        from trl import SFTTrainer

        write_config(folder, **QUIET, train_type=train_type, train_step=7, save_steps=2, per_device_train_batch_size=2)
        train("output_dir=whole")
        original = SFTTrainer.training_step

        def failing(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise RuntimeError("power cut")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SFTTrainer, "training_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            train()
        monkeypatch.setattr(SFTTrainer, "training_step", original)
        train("resume_from_checkpoint=true")
        whole, resumed = (load_file(folder / out / "model.safetensors") for out in ("whole", "out"))
        assert all(whole[name].equal(resumed[name]) for name in whole)
        assert history(folder / "out") == history(folder / "whole")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 0.5, "per_device_train_batch_size": 2},
        {"num_train_epochs": 2.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"num_train_epochs": 2, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
    ],
)
def test_as_many_steps_as_validate_says(folder, settings):
    write_config(folder, **{**QUIET, **settings, "train_step": 0})
    planned = next(line.split()[2] for line in run_cli("validate", "config.yaml").stdout.splitlines() if line.startswith("optimizer steps"))
    train()
    assert read(folder / "out/trainer_state.json")["global_step"] == int(planned.rstrip(","))


class TestLogs:
    def test_one_line_per_logging_step_and_nothing_else(self, folder):
        write_config(folder, train_step=6, logging_steps=2, disable_tqdm=True)
        result = train()
        lines = [ast.literal_eval(line) for line in result.stdout.splitlines()]
        assert ["loss" in line for line in lines] == [True, True, True, False]
        assert [entry["step"] for entry in read(folder / "out/trainer_state.json")["log_history"] if "loss" in entry] == [2, 4, 6]

    def test_no_print_in_the_package(self):
        found = [
            f"{path}:{node.lineno}"
            for path in Path(dataflex.__file__).parent.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert found == []

    def test_no_avoidable_warnings(self, folder):
        """In a process of its own: warnings are printed once per process."""
        write_config(folder, **QUIET)
        done = subprocess.run([sys.executable, "-m", "dataflex.cli", "train", "config.yaml"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "pin_memory" not in done.stderr and "`gradient_checkpointing` is deprecated" not in done.stderr
        assert "Traceback" not in done.stderr and read(folder / "out/trainer_state.json")["global_step"] == 3

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [({}, True), ({"disable_gradient_checkpointing": True}, False), ({"gradient_checkpointing": False}, False)],
    )
    def test_activation_checkpointing(self, folder, changes, expected):
        write_config(folder, **changes)
        train()
        args = torch.load(folder / "out/training_args.bin", weights_only=False)
        assert args.gradient_checkpointing is expected and args.dataloader_pin_memory is False
