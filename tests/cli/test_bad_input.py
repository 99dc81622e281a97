"""Mistakes a user makes, and the very words that answer them. Every one is found before training starts and leaves no file behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workspace import listing, make_workspace, run_cli, write_config, write_rows

import dataflex
from dataflex.testing.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Mistake:
    """What is wrong, and the lines that must be printed for it.

    Attributes:
        changes: keys of the training file; `...` takes a key out.
        prepare: what else is done to the folder.
        text: the whole training file, instead of `changes`.
        overrides: arguments after the file's name.
    """

    name: str
    expected: list[str]
    changes: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path], object] | None = None
    text: str | None = None
    overrides: tuple[str, ...] = ()


def wrong(name: str, *expected: str, prepare=None, text=None, overrides=(), **changes: Any) -> Mistake:
    return Mistake(name, list(expected), changes, prepare, text, tuple(overrides))


def write(path: str, text: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")

    return prepare


def change_json(path: str, **changes: Any) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        content = json.loads((folder / path).read_text(encoding="utf-8"))
        (folder / path).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return prepare


def delete(*paths: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / path).unlink() for path in paths]


def write_array(path: str, values: Any) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / path, np.asarray(values))


def without_chat_template(folder: Path) -> None:
    tiny_tokenizer(None).save_pretrained(folder / "model")
    (folder / "model/chat_template.jinja").unlink(missing_ok=True)


def select(name: str, *expected: str, **changes: Any) -> Mistake:
    """A mistake in a training file with `train_type: dynamic_select`; what is added to it begins in line 16."""
    return wrong(name, *expected, **{"train_type": "dynamic_select", "component_name": "random", "update_step": 1, **changes})


COMPONENTS = "weighters:\n  loss:\n    name: loss\n    params:\n      r: 0.5\n"

MISTAKES = [
    # The training file as a file.
    wrong(
        "no such file",
        "config.yaml: cannot be read: No such file or directory. Did you mean 'confg.yaml'?",
        prepare=lambda folder: (folder / "config.yaml").rename(folder / "confg.yaml"),
    ),
    wrong(
        "empty file",
        "config.yaml: output_dir: is required",
        "config.yaml: model_name_or_path: is required",
        "config.yaml: dataset: is required",
        text="",
    ),
    wrong("a list", "config.yaml: must hold a mapping of keys to values (`key: value` lines), not a list", text="- stage: sft\n- dataset: rows\n"),
    wrong("a word", "config.yaml: must hold a mapping of keys to values (`key: value` lines), not the text 'hello'", text="hello\n"),
    wrong("a number", "config.yaml: must hold a mapping of keys to values (`key: value` lines), not the text '3'", text="3\n"),
    wrong(
        "not UTF-8",
        "config.yaml: cannot be read: it is not UTF-8 text",
        prepare=lambda folder: (folder / "config.yaml").write_bytes(b"stage: \xff\n"),
    ),
    wrong(
        "a folder",
        "config.yaml: cannot be read: Is a directory",
        prepare=lambda folder: [(folder / "config.yaml").unlink(), (folder / "config.yaml").mkdir()],
    ),
    wrong("syntax", "config.yaml:3: is not valid YAML: expected ',' or ']', but got ':'", text="stage: sft\ndataset: [rows\noutput_dir: out\n"),
    wrong("two colons", "config.yaml:2: is not valid YAML: mapping values are not allowed here", text="stage: sft\ndataset: a: b\n"),
    wrong("duplicate key", "config.yaml:3: is not valid YAML: this key occurs twice: stage", text="stage: sft\noutput_dir: out\nstage: pt\n"),
    wrong(
        "undefined reference",
        "config.yaml:7: output_dir: refers to ${root}, but there is no key 'root'. Environment variables are written ${oc.env:NAME}",
        output_dir="${root}/out",
    ),
    wrong(
        "malformed reference",
        "config.yaml:7: output_dir: holds a malformed reference; write ${key}, or ${oc.env:NAME} for an environment variable",
        output_dir="${root/out",
    ),
    # The command line.
    wrong(
        "option instead of an override",
        "command line: --lr: is not an override; write key=value (no spaces, no leading dashes)",
        "command line: 3: is not an override; write key=value (no spaces, no leading dashes)",
        overrides=("--lr", "3"),
    ),
    wrong("override without a key", "command line: =3: is not an override; write key=value (no spaces, no leading dashes)", overrides=("=3",)),
    wrong("override without a value", "command line: foo: is not an override; write key=value (no spaces, no leading dashes)", overrides=("foo",)),
    wrong(
        "override that is no YAML",
        "command line: dataset=[rows: is not a valid value: did not find expected ',' or ']'",
        overrides=("dataset=[rows",),
    ),
    wrong(
        "override of the wrong type",
        "command line: train_step: 'many' is not valid: must be a valid integer, unable to parse string as an integer",
        overrides=("train_step=many",),
    ),
    wrong(
        "override with a misspelt key",
        "command line: learning_rat: is not a known key. Did you mean 'learning_rate'? `dataflex-cli reference` lists all keys",
        overrides=("learning_rat=1",),
    ),
    # Keys and values.
    wrong(
        "misspelt DataFlex key",
        "config.yaml:15: warmup_stp: is not a known key. Did you mean 'warmup_step'? `dataflex-cli reference` lists all keys",
        warmup_stp=1,
    ),
    wrong(
        "misspelt backend key",
        "config.yaml:15: cutof_len: is not a known key. Did you mean 'cutoff_len'? `dataflex-cli reference` lists all keys",
        cutof_len=100,
    ),
    wrong(
        "misspelt Trainer key",
        "config.yaml:15: learning_rte: is not a known key. Did you mean 'learning_rate'? `dataflex-cli reference` lists all keys",
        learning_rte=0.1,
    ),
    wrong("unlike any key", "config.yaml:15: xyzzy: is not a known key. `dataflex-cli reference` lists all keys", xyzzy=1),
    wrong(
        "required keys left out",
        "config.yaml: output_dir: is required",
        "config.yaml: model_name_or_path: is required",
        "config.yaml: dataset: is required",
        model_name_or_path=...,
        dataset=...,
        output_dir=...,
    ),
    wrong(
        "wrong type",
        "config.yaml:13: warmup_step: 'one' is not valid: must be a valid integer, unable to parse string as an integer",
        warmup_step="one",
    ),
    wrong(
        "wrong type of a backend key",
        "config.yaml:6: cutoff_len: 20.5 is not valid: must be a valid integer, got a number with a fractional part",
        cutoff_len=20.5,
    ),
    wrong(
        "wrong type of a Trainer key",
        "config.yaml:9: learning_rate: 'fast' is not valid: must be a valid number, unable to parse string as a number",
        learning_rate="fast",
    ),
    wrong(
        "wrong literal",
        (
            "config.yaml:11: train_type: 'dynamic_wieght' is not valid: must be 'static', 'dynamic_weight', 'dynamic_select' or "
            "'dynamic_mix'. Did you mean 'dynamic_weight'?"
        ),
        train_type="dynamic_wieght",
    ),
    wrong(
        "wrong literal of a backend key",
        "config.yaml:3: finetuning_type: 'fulll' is not valid: must be 'lora', 'full' or 'freeze'. Did you mean 'full'?",
        finetuning_type="fulll",
    ),
    wrong(
        "negative steps",
        "config.yaml:13: warmup_step: -1 is not valid: must be greater than or equal to 0",
        "config.yaml:14: train_step: -3 is not valid: must be greater than or equal to 0",
        warmup_step=-1,
        train_step=-3,
    ),
    wrong("negative learning rate", "config.yaml:9: learning_rate: -0.1 is not valid: must be at least 0", learning_rate=-0.1),
    wrong(
        "warm-up longer than training",
        (
            "config.yaml:13: warmup_step: is 5 but train_step, which includes the warm-up, is 3; the algorithm would never set in. "
            "Allowed: warmup_step <= train_step"
        ),
        warmup_step=5,
    ),
    wrong(
        "train_step and max_steps", "config.yaml:14: train_step: is 3 but max_steps is 4; both set the total number of optimizer steps", max_steps=4
    ),
    wrong("lr_scheduler_type", "config.yaml:15: lr_scheduler_type: 'cosin' is not valid. Did you mean 'cosine'?", lr_scheduler_type="cosin"),
    wrong("save_strategy", "config.yaml:15: save_strategy: 'step' is not valid. Did you mean 'steps'?", save_strategy="step"),
    wrong("optim", "config.yaml:15: optim: 'adamw_toch' is not valid. Did you mean 'adamw_torch'?", optim="adamw_toch"),
    wrong(
        "refused key",
        "config.yaml:15: quantization_bit: cannot be honoured: quantised loading is not supported by the trl backend",
        quantization_bit=4,
    ),
    wrong("derived key", "config.yaml:15: max_length: is set from cutoff_len; set that instead", max_length=100),
    wrong(
        "warmup_ratio and warmup_steps",
        "config.yaml:15: warmup_ratio: cannot be combined with warmup_steps; use one of them",
        warmup_ratio=0.1,
        warmup_steps=3,
    ),
    wrong(
        "early stopping without data",
        "config.yaml:15: early_stopping_steps: needs evaluation data; set eval_dataset or val_size, and eval_strategy: steps or epoch",
        early_stopping_steps=2,
    ),
    wrong(
        "early stopping without evaluations",
        "config.yaml:15: early_stopping_steps: needs evaluations during training; set eval_strategy: steps or epoch",
        early_stopping_steps=2,
        eval_dataset="held_out",
    ),
    wrong(
        "eval_strategy without data",
        "config.yaml:15: eval_strategy: is 'steps' but there is nothing to evaluate on; set eval_dataset or val_size",
        eval_strategy="steps",
        eval_steps=1,
    ),
    wrong(
        "best model of no evaluation",
        "config.yaml:15: load_best_model_at_end: needs eval_strategy and save_strategy to be equal, but they are no and steps",
        load_best_model_at_end=True,
        eval_dataset="held_out",
    ),
    wrong(
        "eval_dataset and val_size",
        "config.yaml:16: val_size: cannot be combined with eval_dataset; use one of them",
        eval_dataset="held_out",
        val_size=0.2,
    ),
    wrong("val_size takes all", "config.yaml:15: val_size: 12 takes 12 of 12 rows; at least one must remain on either side", val_size=12),
    wrong(
        "val_size neither share nor number",
        "config.yaml:15: val_size: 1.5 is not valid: write a share below 1 or a whole number of rows",
        val_size=1.5,
    ),
    wrong(
        "freeze more layers than there are",
        "config.yaml:15: freeze_trainable_layers: 3 is not valid: the model has 2 layers. Allowed: 1 to 2, or -1 to -2",
        finetuning_type="freeze",
        freeze_trainable_layers=3,
    ),
    wrong(
        "LoRA on a module that is not there",
        (
            "config.yaml:15: lora_target: the model has no module 'q_prj'. Did you mean 'q_proj'? Its modules: act_fn, down_proj, "
            "embed_tokens, gate_proj, input_layernorm, k_proj, layers, lm_head, mlp, model, norm, o_proj, post_attention_layernorm, "
            "q_proj, rotary_emb, self_attn, up_proj, v_proj"
        ),
        finetuning_type="lora",
        lora_target="q_prj",
    ),
    wrong("adapter without LoRA", "config.yaml:15: adapter_name_or_path: needs finetuning_type: lora, not full", adapter_name_or_path="adapter"),
    wrong(
        "adapter that is not there",
        "config.yaml:15: adapter_name_or_path: no folder 'adapter'",
        finetuning_type="lora",
        adapter_name_or_path="adapter",
    ),
    # Components.
    wrong(
        "no component_name",
        "config.yaml: component_name: is required with train_type: dynamic_weight; `dataflex-cli components` lists the algorithms",
        component_name=...,
    ),
    wrong(
        "no component_name and too long a warm-up",
        "config.yaml: component_name: is required with train_type: dynamic_weight; `dataflex-cli components` lists the algorithms",
        (
            "config.yaml:12: warmup_step: is 5 but train_step, which includes the warm-up, is 3; the algorithm would never set in. "
            "Allowed: warmup_step <= train_step"
        ),
        component_name=...,
        warmup_step=5,
    ),
    wrong(
        "unknown component",
        (
            "config.yaml:12: component_name: weighters 'los' not found in {package}/configs/components.yaml. Did you mean 'loss'? "
            "Available: adapt, custom, dft, focal, joint_update_aware, loss"
        ),
        component_name="los",
    ),
    wrong(
        "misspelt parameter",
        (
            "config.yaml:16: component_params.stratgy: is not a parameter of LossWeighter. Did you mean 'strategy'? It accepts: "
            "anneal, delta, ema_decay, r, r_init, r_steps, scope, strategy"
        ),
        component_params={"stratgy": "uniform"},
    ),
    wrong(
        "misspelt parameter on the command line",
        (
            "command line: component_params.stratgy: is not a parameter of LossWeighter. Did you mean 'strategy'? It accepts: "
            "anneal, delta, ema_decay, r, r_init, r_steps, scope, strategy"
        ),
        overrides=("component_params.stratgy=uniform",),
    ),
    wrong("parameter out of range", "config.yaml:16: component_params.r: 0 is not valid: must be greater than 0", component_params={"r": 0}),
    wrong(
        "parameter with a wrong literal",
        (
            "config.yaml:16: component_params.strategy: 'quadratc' is not valid: must be 'linupper', 'uniform', 'quadratic' or "
            "'extremes'. Did you mean 'quadratic'?"
        ),
        component_params={"strategy": "quadratc"},
    ),
    wrong(
        "parameters that are no mapping", "config.yaml:15: component_params: 'uniform' is not valid: must be a mapping", component_params="uniform"
    ),
    wrong(
        "no components file",
        "config.yaml:15: components_cfg_file: no file 'my.yaml'. Leave the key out to use the packaged components",
        components_cfg_file="my.yaml",
    ),
    wrong(
        "unknown kind",
        (
            "my.yaml:1: weighter: is not a kind of component. Did you mean 'weighters'? Allowed: mixers, pipelines, reorderers, "
            "reorders, selectors, weighters"
        ),
        prepare=write("my.yaml", COMPONENTS.replace("weighters", "weighter")),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "misspelt parameter in the file",
        (
            "my.yaml:5: weighters.loss.params.rr: is not a parameter of LossWeighter. Did you mean 'r'? It accepts: anneal, delta, "
            "ema_decay, r, r_init, r_steps, scope, strategy"
        ),
        prepare=write("my.yaml", COMPONENTS.replace("r:", "rr:")),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "wrong value in the file",
        "my.yaml:5: weighters.loss.params.r: -1 is not valid: must be greater than 0",
        prepare=write("my.yaml", COMPONENTS.replace("0.5", "-1")),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "parameters beside params",
        "my.yaml:3: weighters.loss.r: is not allowed here; parameters go under `params`",
        prepare=write("my.yaml", "weighters:\n  loss:\n    r: 0.5\n"),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "params as a list",
        "my.yaml:3: weighters.loss.params: must be a mapping of parameters to values, not ['r']",
        prepare=write("my.yaml", "weighters:\n  loss:\n    params: [r]\n"),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "entry that is no mapping",
        "my.yaml:2: weighters.loss: must be a mapping with `name` and `params`, not 3",
        prepare=write("my.yaml", "weighters:\n  loss: 3\n"),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "components as a list",
        "my.yaml:1: weighters: must be a mapping of names to components, not ['loss']",
        prepare=write("my.yaml", "weighters: [loss]\n"),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "entry under another name",
        "my.yaml:3: weighters.loss.name: is 'dft'; it must repeat the entry's own name, 'loss'",
        prepare=write("my.yaml", COMPONENTS.replace("name: loss", "name: dft")),
        components_cfg_file="my.yaml",
    ),
    wrong(
        "entry without a class",
        (
            "config.yaml:12: component_name: unknown weighter 'mine'. Registered: adapt, custom, dft, focal, joint_update_aware, "
            "loss (add one with @register_weighter)"
        ),
        prepare=write("my.yaml", "weighters:\n  mine:\n    name: mine\n"),
        components_cfg_file="my.yaml",
        component_name="mine",
    ),
    wrong(
        "adapt without evaluation data",
        "config.yaml:12: component_name: adapt compares samples with evaluation data: set eval_dataset or val_size",
        component_name="adapt",
    ),
    wrong(
        "joint_update_aware without evaluation data",
        "config.yaml:12: component_name: joint_update_aware compares samples with evaluation data: set eval_dataset or val_size",
        component_name="joint_update_aware",
    ),
    # Selection.
    select(
        "no update_step",
        "config.yaml: update_step: must be at least 1 with train_type: dynamic_select; it is the number of steps between decisions",
        update_step=...,
    ),
    select(
        "update_step 0",
        "config.yaml:15: update_step: must be at least 1 with train_type: dynamic_select; it is the number of steps between decisions",
        update_step=0,
    ),
    select("negative update_step", "config.yaml:15: update_step: -1 is not valid: must be greater than or equal to 0", update_step=-1),
    select(
        "no update_step and a misspelt parameter",
        "config.yaml: update_step: must be at least 1 with train_type: dynamic_select; it is the number of steps between decisions",
        "config.yaml:16: component_params.replacment: is not a parameter of RandomSelector. Did you mean 'replacement'? It accepts: "
        "candidate_pool, replacement",
        update_step=...,
        component_params={"replacment": True},
    ),
    select(
        "update_times 0",
        "config.yaml:16: update_times: must be at least 1, or -1 to decide until training ends; with 0 the algorithm would never set in",
        update_times=0,
    ),
    select("update_times -2", "config.yaml:16: update_times: -2 is not valid: must be greater than or equal to -1", update_times=-2),
    select(
        "selection sets in after the end",
        (
            "config.yaml:13: warmup_step: is 5 but train_step, which includes the warm-up, is 3; the algorithm would never set in. "
            "Allowed: warmup_step <= train_step"
        ),
        warmup_step=5,
    ),
    select(
        "unknown selector",
        (
            "config.yaml:12: component_name: selectors 'lesss' not found in {package}/configs/components.yaml. Did you mean 'less'? "
            "Available: cluster_less, custom, delta_loss, ifd, less, loss, near, random, rds, tsds"
        ),
        component_name="lesss",
    ),
    select(
        "a weighter as selector",
        (
            "config.yaml:12: component_name: selectors 'focal' not found in {package}/configs/components.yaml. "
            "Available: cluster_less, custom, delta_loss, ifd, less, loss, near, random, rds, tsds"
        ),
        component_name="focal",
    ),
    select(
        "misspelt parameter of a selector",
        (
            "config.yaml:17: component_params.fokus: is not a parameter of LossSelector. Did you mean 'focus'? It accepts: "
            "candidate_pool, diversity, focus, focus_weight, lower_quantile, temperature, upper_quantile"
        ),
        component_name="loss",
        component_params={"fokus": "low"},
    ),
    select(
        "band that there is not",
        "config.yaml:17: component_params.focus: 'hihg' is not valid: must be 'low', 'medium' or 'high'. Did you mean 'high'?",
        component_name="loss",
        component_params={"focus": "hihg"},
    ),
    select(
        "quantiles out of range and of the wrong type",
        "config.yaml:17: component_params.lower_quantile: 0 is not valid: must be greater than 0",
        "config.yaml:18: component_params.upper_quantile: 'half' is not valid: must be a valid number, unable to parse string as a number",
        component_name="loss",
        component_params={"lower_quantile": 0, "upper_quantile": "half"},
    ),
    select(
        "diversity out of range",
        "config.yaml:18: component_params.diversity: 1.5 is not valid: must be less than or equal to 1",
        component_name="rds",
        eval_dataset="held_out",
        component_params={"diversity": 1.5},
    ),
    select(
        "diversity of a selector without scores",
        (
            "config.yaml:18: component_params.diversity: is not a parameter of TsdsSelector. It accepts: C, alpha, candidate_pool, "
            "embeddings_file, file, max_neighbours, pooling, query_embeddings_file, replacement, sigma"
        ),
        component_name="tsds",
        eval_dataset="held_out",
        component_params={"diversity": 0.9},
    ),
    select(
        "fractional refreshes",
        "config.yaml:18: component_params.refreshes: 1.5 is not valid: must be a valid integer, got a number with a fractional part",
        component_name="less",
        eval_dataset="held_out",
        component_params={"refreshes": 1.5},
    ),
    select(
        "no offline result",
        "config.yaml:17: component_params.file: 'near.safetensors' is not valid: Path does not point to a file",
        component_name="near",
        component_params={"file": "near.safetensors"},
    ),
    select(
        "a folder as candidate pool",
        "config.yaml:17: component_params.candidate_pool: 'data' is not valid: Path does not point to a file",
        component_params={"candidate_pool": "data"},
    ),
    select(
        "less without evaluation data",
        "config.yaml:12: component_name: less compares samples with evaluation data: set eval_dataset or val_size",
        component_name="less",
    ),
    select(
        "near without evaluation data",
        "config.yaml:12: component_name: near compares samples with evaluation data: set eval_dataset or val_size",
        component_name="near",
    ),
    select(
        "near with embeddings of candidates alone",
        "config.yaml:12: component_name: near compares samples with evaluation data: set eval_dataset or val_size",
        prepare=write_array("rows.npy", np.ones((12, 3))),
        component_name="near",
        component_params={"embeddings_file": "rows.npy"},
    ),
    select(
        "a live object as parameter",
        "config.yaml:17: component_params.dataset: is provided by the run and cannot be set here",
        component_params={"dataset": "rows"},
    ),
    # Plugins.
    wrong("no plugin file", "config.yaml:15: plugins: no file 'mine.py' in {folder}", plugins=["mine.py"]),
    wrong(
        "no plugin module",
        "config.yaml:15: plugins: 'no_such_module' failed on import: ModuleNotFoundError: No module named 'no_such_module'",
        plugins=["no_such_module"],
    ),
    wrong(
        "plugin that fails",
        "config.yaml:15: plugins: 'mine.py' failed on import: ValueError: math domain error (line 3)",
        prepare=write("mine.py", "import math\n\nmath.sqrt(-1)\n"),
        plugins=["mine.py"],
    ),
    wrong(
        "plugin with a syntax error",
        "config.yaml:15: plugins: 'mine.py' failed on import: SyntaxError: '(' was never closed (mine.py, line 1)",
        prepare=write("mine.py", "x = (\n"),
        plugins=["mine.py"],
    ),
    wrong(
        "plugin that exits",
        "config.yaml:15: plugins: 'mine.py' failed on import: SystemExit: 0 (line 1)",
        prepare=write("mine.py", "raise SystemExit(0)\n"),
        plugins=["mine.py"],
    ),
    wrong(
        "plugin with a name that is taken",
        (
            "config.yaml:15: plugins: 'mine.py' cannot be used: weighter.loss already registered by "
            "{package}/train/weighter/loss_weighter.py:LossWeighter; {folder}/mine.py:Mine needs another name"
        ),
        prepare=write(
            "mine.py", "from dataflex import SampleWeighter, register_weighter\n\n@register_weighter('loss')\nclass Mine(SampleWeighter):\n    pass\n"
        ),
        plugins=["mine.py"],
    ),
    # Data.
    wrong("no data file", "data/rows.jsonl: dataset: does not exist", prepare=delete("data/rows.jsonl")),
    wrong(
        "unknown data set", "data/dataset_info.json: dataset: has no data set 'row'. Did you mean 'rows'? Available: held_out, rows", dataset="row"
    ),
    wrong(
        "unknown evaluation data set",
        "data/dataset_info.json: eval_dataset: has no data set 'heldout'. Did you mean 'held_out'? Available: held_out, rows",
        eval_dataset="heldout",
    ),
    wrong("no dataset_dir", "dta: dataset_dir: is not a folder; set it to the one that holds dataset_info.json", dataset_dir="dta"),
    wrong(
        "no dataset_info.json",
        "data/dataset_info.json: dataset_dir: does not exist; it describes the data sets that `dataset` names",
        prepare=delete("data/dataset_info.json"),
    ),
    wrong(
        "malformed dataset_info.json",
        "data/dataset_info.json:4: dataset_dir: is not valid JSON: Expecting property name enclosed in double quotes (column 2)",
        prepare=write("data/dataset_info.json", '{\n "rows": {\n  "file_name": "rows.jsonl",\n }\n}\n'),
    ),
    wrong(
        "malformed row",
        "data/rows.jsonl:2: dataset: is not valid JSON: Expecting value (column 17)",
        prepare=write("data/rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": \n'),
    ),
    wrong(
        "missing column",
        (
            "data/rows.jsonl: dataset: has no column 'output'; its columns: answer, instruction. `columns` of 'rows' in "
            "dataset_info.json says which column is the prompt/query/response"
        ),
        prepare=lambda folder: write_rows(folder / "data/rows.jsonl", [{"instruction": "a", "answer": "b"}]),
    ),
    wrong("empty data file", "data/rows.jsonl: dataset: is empty", prepare=write("data/rows.jsonl", "")),
    wrong(
        "no label within cutoff_len",
        "data/rows.jsonl: dataset: no row of 'rows' can be trained on: 12 x no target tokens within cutoff_len",
        cutoff_len=8,
    ),
    wrong(
        "a data set that is not there and one of no use",
        "data/dataset_info.json: dataset: has no data set 'row'. Did you mean 'rows'? Available: held_out, rows",
        "data/rows.jsonl: dataset: holds no rows",
        dataset="row,rows",
        prepare=write("data/rows.jsonl", "[]"),
    ),
    # Model, tokenizer, template.
    wrong("no model folder", "config.yaml:1: model_name_or_path: no folder './modl'. Did you mean 'model'?", model_name_or_path="./modl"),
    wrong(
        "neither folder nor hub id",
        (
            "config.yaml:1: model_name_or_path: 'modl' is no folder, and no model of that name can be had from the hub: We couldn't "
            "connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files. Did you mean 'model'?"
        ),
        model_name_or_path="modl",
    ),
    wrong(
        "no config.json",
        "config.yaml:1: model_name_or_path: 'model' holds no config.json; a model folder has one",
        prepare=delete("model/config.json"),
    ),
    wrong(
        "broken config.json",
        (
            "config.yaml:1: model_name_or_path: 'model' holds no readable model configuration: It looks like the config file at "
            "'model/config.json' is not a valid JSON file"
        ),
        prepare=write("model/config.json", "{"),
    ),
    wrong(
        "no weights",
        (
            "config.yaml:1: model_name_or_path: 'model' holds no weights (*.safetensors or *.bin); set train_from_scratch: true to "
            "start from random ones"
        ),
        prepare=delete("model/model.safetensors"),
    ),
    wrong(
        "no tokenizer",
        "config.yaml:1: model_name_or_path: 'model' holds no readable tokenizer. Save it there with tokenizer.save_pretrained('model')",
        prepare=delete("model/tokenizer.json", "model/tokenizer_config.json"),
    ),
    wrong(
        "not a causal language model",
        "config.yaml:1: model_name_or_path: 'model' is a t5 model, not a causal language model",
        prepare=write("model/config.json", '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'),
    ),
    wrong(
        "no chat template",
        ("config.yaml: template: the tokenizer has no chat template; set template to one of alpaca, chatml, default, or to a .jinja file"),
        prepare=without_chat_template,
    ),
    wrong(
        "unknown template",
        (
            "config.yaml:15: template: 'chatlm' is not known. Did you mean 'chatglm3'? Known: alpaca, chatglm3, chatml, deepseek3, "
            "default, gemma, gemma3, glm4, llama2, llama3, mistral, phi3, phi4, qwen, qwen3, smollm, yi; or leave it out to use the "
            "tokenizer's own"
        ),
        template="chatlm",
    ),
    wrong(
        "template of another family",
        (
            "config.yaml:15: template: 'llama3' stands for the tokenizer's own chat template, which is another one (it lacks "
            "<|start_header_id|>); use one of alpaca, chatml, default, or a .jinja file"
        ),
        template="llama3",
    ),
    wrong(
        "template of a family, and none in the tokenizer",
        (
            "config.yaml:15: template: 'qwen' stands for the tokenizer's own chat template, and this tokenizer has none; use one of "
            "alpaca, chatml, default, or a .jinja file"
        ),
        prepare=without_chat_template,
        template="qwen",
    ),
    wrong("no template file", "config.yaml:15: template: no file '{folder}/mine.jinja'", template="mine.jinja"),
    wrong(
        "malformed template file",
        "config.yaml:15: template: is not a valid Jinja template (line 1): Expected an expression, got 'end of statement block'",
        prepare=write("mine.jinja", "{% for %}"),
        template="mine.jinja",
    ),
    # output_dir and checkpoints.
    wrong(
        "a file in the way of output_dir",
        "config.yaml:7: output_dir: 'out' cannot be written: 'out' is a file, not a folder",
        prepare=write("out", ""),
    ),
    wrong(
        "a file in the way above output_dir",
        "config.yaml:7: output_dir: 'runs/one' cannot be written: '{folder}/runs' is a file, not a folder",
        prepare=write("runs", ""),
        output_dir="runs/one",
    ),
    wrong("output_dir without a name", "config.yaml:7: output_dir: must name a folder", output_dir=""),
    wrong(
        "output_dir with a run",
        (
            "config.yaml:7: output_dir: 'out' already holds a run. It has no checkpoint that can be resumed: start anew with "
            "overwrite_output_dir: true, or use another folder"
        ),
        prepare=write("out/checkpoint-3/trainer_state.json", "{}"),
    ),
    wrong(
        "no such checkpoint",
        "config.yaml:15: resume_from_checkpoint: 'out/checkpoint-9' is not a complete checkpoint (no trainer_state.json)",
        resume_from_checkpoint="out/checkpoint-9",
    ),
    wrong(
        "nothing to resume",
        ("config.yaml:15: resume_from_checkpoint: is true, but 'out' holds no checkpoint that can be resumed. Leave the key out to start anew"),
        resume_from_checkpoint=True,
    ),
    wrong(
        "checkpoint of a static run",
        "config.yaml:15: resume_from_checkpoint: old holds no DataFlex state (state.json is missing), so it cannot be resumed exactly",
        prepare=write("old/trainer_state.json", "{}"),
        resume_from_checkpoint="old",
    ),
    wrong(
        "half a checkpoint",
        (
            "config.yaml:13: resume_from_checkpoint: is true, but 'out' holds no checkpoint that can be resumed; out/checkpoint-3 is "
            "incomplete (no trainer_state.json). Leave the key out and set overwrite_output_dir: true, since the folder holds a run, to start anew"
        ),
        prepare=write("out/checkpoint-3/config.json", "{}"),
        resume_from_checkpoint=True,
        train_type="static",
    ),
    wrong(
        "resume and overwrite",
        "config.yaml:16: overwrite_output_dir: would delete the checkpoint to resume from; use one of them",
        prepare=write("out/checkpoint-3/trainer_state.json", "{}"),
        resume_from_checkpoint=True,
        overwrite_output_dir=True,
    ),
]


def lines_of(*problems: str) -> list[str]:
    """What is printed for these problems."""
    if len(problems) == 1:
        return [f"dataflex-cli: {problems[0]}"]
    return [f"dataflex-cli: {len(problems)} problems", *(f"  {problem}" for problem in problems)]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_words_and_that_nothing_is_written(mistake, tmp_path, monkeypatch):
    make_workspace(tmp_path)
    write_config(tmp_path, **mistake.changes)
    if mistake.text is not None:
        (tmp_path / "config.yaml").write_text(mistake.text, encoding="utf-8")
    if mistake.prepare:
        mistake.prepare(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # plugins are imported
    before = listing(tmp_path)
    result = run_cli("train", "config.yaml", *mistake.overrides)
    places = {"{folder}": str(tmp_path), "{package}": str(Path(dataflex.__file__).parent)}
    expected = [reduce(lambda text, place: text.replace(*place), places.items(), problem) for problem in mistake.expected]
    assert result.stderr.splitlines() == lines_of(*expected)
    assert (result.exit_code, result.stdout) == (2, "")
    assert listing(tmp_path) == before


def test_all_problems_of_a_file_in_one_report(tmp_path):
    make_workspace(tmp_path)
    write_config(
        tmp_path,
        model_name_or_path=...,
        dataset="row",
        output_dir="${root}/out",
        learning_rate="fast",
        warmup_step=5,
        component_params={"r": -1, "stratgy": "uniform"},
        eval_strategy="steps",
        cutof_len=3,
        save_strategy="step",
        lora_rank=0,
    )
    result = run_cli("train", "config.yaml", "val_size=-1")
    keys = {line.strip().split(": ")[1] for line in result.stderr.splitlines()[1:]}
    assert keys == {
        "model_name_or_path",
        "dataset",
        "output_dir",
        "learning_rate",
        "warmup_step",
        "component_params.r",
        "component_params.stratgy",
        "eval_strategy",
        "cutof_len",
        "save_strategy",
        "lora_rank",
        "val_size",
    }
    assert result.exit_code == 2 and result.stderr.startswith("dataflex-cli: 12 problems\n")


WHEN_BUILT = [
    ("loss", {"lower_quantile": 0.7}, "lower_quantile 0.7 must be below upper_quantile 0.66"),
    ("near", {"embeddings_file": "rows.npy"}, "query_embeddings_file is missing: embeddings of candidates and queries are only comparable when "),
    ("near", {"query_embeddings_file": "rows.npy"}, "embeddings_file is missing: embeddings of candidates and queries are only comparable when "),
    (
        "rds",
        {"embeddings_file": "short.npy", "query_embeddings_file": "rows.npy"},
        "embeddings_file short.npy has 11 rows; the data set has 12, and every row needs an embedding",
    ),
    (
        "tsds",
        {"embeddings_file": "pool.npy", "query_embeddings_file": "rows.npy"},
        "embeddings_file pool.npy must hold floats of shape (rows, dimensions), not int64 of shape (2,)",
    ),
    ("near", {"file": "rows.npy"}, "file rows.npy cannot be read: "),
    ("ifd", {"file": "model/model.safetensors"}, "file model/model.safetensors was not written by `dataflex-cli offline`"),
    ("random", {"candidate_pool": "config.yaml"}, "candidate_pool config.yaml cannot be read: "),
    (
        "random",
        {"candidate_pool": "rows.npy"},
        "candidate_pool rows.npy must be a list of row numbers (or 'name:row', or true and",
    ),
    ("random", {"candidate_pool": "pool.npy"}, "config.yaml: candidate_pool: has rows from 0 to 12, and there are 12, numbered from 0"),
]


@pytest.mark.parametrize(("component", "params", "words"), WHEN_BUILT, ids=lambda value: str(value)[:40])
def test_what_only_the_component_can_tell_is_told_before_training(tmp_path, component, params, words):
    """These need the rows or two parameters together, so `validate` does not find them. No more than an empty folder is left."""
    make_workspace(tmp_path)
    np.save("rows.npy", np.ones((12, 3))), np.save("short.npy", np.ones((11, 3))), np.save("pool.npy", np.array([0, 12]))
    write_config(tmp_path, train_type="dynamic_select", component_name=component, update_step=1, eval_dataset="held_out", component_params=params)
    before = listing(tmp_path)
    result = run_cli("train", "config.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"dataflex-cli: {words}" in result.stderr and "Traceback" not in result.stderr
    assert listing(tmp_path).keys() - before.keys() <= {"out"}


@pytest.mark.parametrize(
    ("component", "params"),
    [
        ("near", {"file": "config.yaml"}),
        ("rds", {"embeddings_file": "rows.npy", "query_embeddings_file": "rows.npy"}),
        ("ifd", {}),
        ("random", {}),
    ],
)
def test_no_evaluation_data_where_none_is_looked_at(tmp_path, component, params):
    make_workspace(tmp_path)
    np.save("rows.npy", np.ones((12, 3)))
    write_config(tmp_path, train_type="dynamic_select", component_name=component, update_step=1, component_params=params)
    result = run_cli("validate", "config.yaml")
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_traceback_with_debug_only(tmp_path, command):
    make_workspace(tmp_path)
    write_config(tmp_path, warmup_step=-1)
    plain, debug = run_cli(command, "config.yaml"), run_cli(command, "config.yaml", "--debug")
    assert plain.exit_code == debug.exit_code == 2
    assert "Traceback" not in plain.stderr and "Traceback" in debug.stderr and debug.stderr.endswith(plain.stderr)


def test_resuming_another_run(tmp_path):
    make_workspace(tmp_path)
    write_config(tmp_path, save_steps=2)
    assert run_cli("train", "config.yaml").exit_code == 0
    kept = (tmp_path / "out/dataflex/run.yaml").read_bytes()
    result = run_cli("train", "config.yaml", "resume_from_checkpoint=true", "learning_rate=0.02")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "dataflex-cli: out/checkpoint-3 belongs to another run: learning_rate was '0.01', now '0.02'. "
        "Set allow_changed_resume: true to resume all the same"
    )
    assert (tmp_path / "out/dataflex/run.yaml").read_bytes() == kept
