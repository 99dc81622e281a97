"""What `dataflex-cli validate` says a selection run will do: 12 rows, 4 to a step, 3 rows of evaluation data."""

import re

import numpy as np
import pytest
import torch
from workspace import make_workspace, run_cli, write_config

from dataflex.cli.plan import check_run
from dataflex.cli.plan import plan as said
from dataflex.train.trainer.select_trainer import SelectTrainer

ROWS, EVALUATION = 12, 3
BASE = {"train_type": "dynamic_select", "component_name": "random", "warmup_step": 0, "train_step": 0, "num_train_epochs": 1, "update_step": 1}
FREE = "none: the model is not run for a selection"


@pytest.fixture
def folder(tmp_path):
    return make_workspace(tmp_path)


def plan(folder, *overrides, **changes):
    """The printed lines by name; what may come up several times comes as a list."""
    write_config(folder, **{**BASE, **changes})
    result = run_cli("validate", "config.yaml", *overrides)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split("  ", 1) for line in result.stdout.splitlines()[:-1]]
    warnings = [text.strip() for name, text in lines if name == "warning"]
    return {**{name.strip(): text.strip() for name, text in lines}, "warnings": warnings}


@pytest.mark.parametrize(
    ("changes", "steps", "boundaries", "drawn"),
    [
        # One stage: 1 + 2 * 2 steps of 4 samples, of which the warm-up takes 4.
        (
            {"warmup_step": 1, "update_step": 2, "update_times": 2},
            "5, 1.7 passes over the data",
            "2 selections, at steps 1, 3",
            "20: 4 at random in warm-up, 16 selected; at most 100% of the rows are seen",
        ),
        # A single decision of 4 out of 12 rows.
        ({}, "1, 0.3 passes over the data", "1 selection, at step 0", "4: 0 at random in warm-up, 4 selected; at most 33% of the rows are seen"),
        # Stages of 3 steps each, of which the first is warm-up.
        (
            {"warmup_step": 1, "update_step": 1, "update_times": 2, "num_train_epochs": 2},
            "6, 2.0 passes over the data",
            "4 selections, at steps 1, 2, 4, 5; 2 stages",
            "24: 8 at random in warm-up, 16 selected; at most 100% of the rows are seen",
        ),
        # Half a stage of 4 steps; train_step and max_steps win over epochs and may end in the middle of an interval, or of the second stage.
        (
            {"update_step": 2, "update_times": 2, "num_train_epochs": 0.5},
            "2, 0.7 passes over the data",
            "1 selection, at step 0",
            "8: 0 at random in warm-up, 8 selected; at most 67% of the rows are seen",
        ),
        (
            {"warmup_step": 1, "update_step": 2, "train_step": 6},
            "6, 2.0 passes over the data",
            "2 selections, at steps 1, 4; 2 stages",
            "24: 8 at random in warm-up, 16 selected; at most 100% of the rows are seen",
        ),
        (
            {"warmup_step": 1, "update_step": 2, "max_steps": 2},
            "2, 0.7 passes over the data",
            "1 selection, at step 1",
            "8: 4 at random in warm-up, 4 selected; at most 67% of the rows are seen",
        ),
        # Without end: epochs count passes of 3 steps, and the last interval is cut short.
        (
            {"warmup_step": 1, "update_step": 2, "update_times": -1, "num_train_epochs": 2},
            "6, 2.0 passes over the data",
            "3 selections, at steps 1, 3, 5",
            "24: 4 at random in warm-up, 20 selected; at most 100% of the rows are seen",
        ),
        (
            {"update_times": -1, "num_train_epochs": 4},
            "12, 4.0 passes over the data",
            "12 selections, at steps 0, 1, 2, 3, ..., 10, 11",
            "48: 0 at random in warm-up, 48 selected; at most 100% of the rows are seen",
        ),
        # Rows held out for evaluation are not trained on: 8 are left, 2 steps a pass.
        (
            {"update_times": -1, "val_size": 4},
            "2, 1.0 passes over the data",
            "2 selections, at steps 0, 1",
            "8: 0 at random in warm-up, 8 selected; at most 100% of the rows are seen",
        ),
        (
            {"update_step": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 5},
            "1, 0.4 passes over the data",
            "1 selection, at step 0",
            "5: 0 at random in warm-up, 5 selected; at most 42% of the rows are seen",
        ),
        # Packing makes 3 rows of 12; stages do not depend on it.
        (
            {"warmup_step": 1, "update_times": 2, "num_train_epochs": 2, "packing": True, "per_device_train_batch_size": 1},
            "6, 2.0 passes over the data",
            "4 selections, at steps 1, 2, 4, 5; 2 stages",
            "6: 2 at random in warm-up, 4 selected; at most 100% of the rows are seen",
        ),
    ],
)
def test_boundaries_and_samples(folder, changes, steps, boundaries, drawn):
    found = plan(folder, **changes)
    assert (found["optimizer steps"], found["boundaries"], found["samples drawn"]) == (steps, boundaries, drawn)
    assert found["warnings"] == [] and found["extra cost"] == FREE


def test_boundaries_of_packed_rows_without_end(folder):
    found = plan(folder, update_times=-1, packing=True, per_device_train_batch_size=2)
    assert found["boundaries"] == "2 selections, at steps 0, 1" and found["data"] == "rows: 3 packed rows to train on, of 12"


def test_more_processes_take_more_samples(folder, monkeypatch):
    config = write_config(folder, **{**BASE, "update_times": -1})
    checked = check_run(config)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it; checking would look for the other process
    found = dict(said(*checked))
    assert found["samples per step"] == "8 (2 processes)"
    assert (found["boundaries"], found["samples drawn"].split(":")[0]) == ("2 selections, at steps 0, 1", "16")


def test_parameters_of_file_and_override_are_shown(folder):
    found = plan(folder, "component_params.focus=high", component_name="loss")
    assert found["train type"] == "dynamic_select, loss (focus=high, focus_weight=5.0)"


# ------------------------------------------------------------------------------------------------ extra cost

# Two decisions in each of two stages.
TWICE_TWO = {"update_times": 2, "num_train_epochs": 2, "eval_dataset": "held_out"}
COSTS = [
    ("random", {}, FREE),
    ("custom", {}, FREE),
    ("loss", {}, "48 rows forward"),  # 4 * 12
    ("loss", {"diversity": 0.9}, "48 rows forward and the best rows forward (diversity)"),
    ("delta_loss", {}, "48 rows forward"),
    ("near", {}, "60 rows forward"),  # 4 * (12 + 3)
    ("rds", {"aggregation": "max"}, "60 rows forward"),
    ("tsds", {}, "60 rows forward"),
    ("ifd", {"min_tokens": 1}, "96 rows forward"),  # 4 * 2 * 12
    ("less", {}, "72 rows forward and backward"),  # 4 * (12 + 2 * 3)
    ("less", {"target": "cosine_of_mean"}, "60 rows forward and backward"),  # 4 * (12 + 3)
    # Embeddings of 12 + 3 rows once, then at each decision 2 of every 4 rows, and the evaluation data twice.
    ("cluster_less", {"cluster_size": 4, "representatives": 2}, "15 rows forward and 48 rows forward and backward"),
    ("near", {"embeddings_file": "rows.npy", "query_embeddings_file": "held_out.npy"}, FREE),
    ("rds", {"embeddings_file": "rows.npy", "query_embeddings_file": "held_out.npy"}, FREE),
]


@pytest.mark.parametrize(("component", "params", "cost"), COSTS, ids=lambda value: str(value)[:40])
def test_extra_cost(folder, component, params, cost):
    np.save("rows.npy", np.eye(ROWS)), np.save("held_out.npy", np.eye(ROWS)[:EVALUATION])
    assert plan(folder, **TWICE_TWO, component_name=component, component_params=params)["extra cost"] == cost


@pytest.mark.parametrize("component", ["near", "rds", "tsds", "ifd"])
def test_a_result_made_before_costs_nothing(folder, component):
    (folder / "made.safetensors").write_bytes(b"")
    assert plan(folder, component_name=component, component_params={"file": "made.safetensors"})["extra cost"] == FREE


def test_cost_of_packed_rows(folder):
    found = plan(folder, component_name="less", eval_dataset="held_out", packing=True)
    assert found["extra cost"] == "5 rows forward and backward"  # 3 for training, once; 1 for evaluation, twice


class Meter:
    """Rows that go through the model while rows are selected."""

    def __init__(self, monkeypatch):
        self.forward = self.backward = 0
        select, embed, meter = SelectTrainer._select, torch.nn.Embedding.forward, self

        def selecting(trainer, *args):
            def counting(module, tokens):
                meter.backward += torch.is_grad_enabled() * len(tokens)
                meter.forward += (not torch.is_grad_enabled()) * len(tokens)
                return embed(module, tokens)

            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.Embedding, "forward", counting)
                return select(trainer, *args)

        monkeypatch.setattr(SelectTrainer, "_select", selecting)


@pytest.mark.parametrize(
    ("component", "params", "cost"), [case for case in COSTS if case[2] != FREE and "diversity" not in case[1]], ids=lambda value: str(value)[:40]
)
def test_the_cost_is_what_a_run_pays(folder, monkeypatch, component, params, cost):
    np.save("rows.npy", np.eye(ROWS)), np.save("held_out.npy", np.eye(ROWS)[:EVALUATION])
    plan(folder, **TWICE_TWO, component_name=component, component_params=params, disable_tqdm=True)
    meter = Meter(monkeypatch)
    result = run_cli("train", "config.yaml")
    assert result.exit_code == 0, result.exception
    expected = {"forward": 0, "forward and backward": 0} | {
        what: int(number) for number, what in re.findall(r"(\d+) rows (forward and backward|forward)", cost)
    }
    assert {"forward": meter.forward, "forward and backward": meter.backward} == expected


# ------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({"warmup_step": 3, "train_step": 3}, ["the 3 steps are over before the first selection at step 3"]),
        ({"warmup_step": 4, "max_steps": 2}, ["the 2 steps are over before the first selection at step 4"]),
        # A pass takes 3 steps, which is all that training without end has.
        (
            {"warmup_step": 5, "update_times": -1},
            ["the 3 steps are over before the first selection at step 5"],
        ),
        ({"update_step": 3}, []),  # 3 * 4 samples, each row once
        ({"update_step": 4}, ["an interval takes 16 samples and there are 12 rows: rows are repeated"]),
        ({"update_step": 9, "train_step": 3}, []),  # cut short by the end of training
        ({"warmup_step": 4}, ["an interval takes 16 samples and there are 12 rows: rows are repeated"]),
        ({"update_step": 9, "packing": True}, ["an interval takes 36 samples and there are 3 rows: rows are repeated"]),
    ],
)
def test_warnings(folder, changes, warnings):
    assert plan(folder, **changes)["warnings"] == warnings
