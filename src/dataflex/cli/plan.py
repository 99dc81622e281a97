"""Checking a training file as a whole, and saying what it will do."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.configs.components import component_entry
from dataflex.configs.loading import RunFile, load_run
from dataflex.configs.schema import COMPONENT_KIND
from dataflex.core.plugins import load_plugins
from dataflex.core.registry import REGISTRY, check_parameters
from dataflex.errors import ComponentError, ConfigError

if TYPE_CHECKING:
    from dataflex.backends.trl_checks import Checked


def check_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunFile, Checked]:
    """A training file, checked as a whole.

    Raises:
        ConfigError: with every problem that was found.
    """
    run = load_run(path, overrides)
    _check_component(run)
    missing = [name for name in ("trl", "peft", "datasets") if find_spec(name) is None]
    if missing:
        run.add("backend", f"needs {', '.join(missing)}, which is not installed: pip install 'dataflex[trl]'")
        run.raise_problems()
    from dataflex.backends import trl_checks

    checked = trl_checks.check(run)
    run.raise_problems()
    assert checked is not None
    return run, checked


def _check_component(run: RunFile) -> None:
    config = run.dataflex
    if config.train_type == "static" or config.component_name is None:
        return
    if config.train_type not in ("dynamic_weight",):
        run.add("train_type", f"{config.train_type} is not available in this version; allowed: static, dynamic_weight")
        return
    kind = COMPONENT_KIND[config.train_type]
    try:
        load_plugins(config.plugins, base=run.folder, where=run.where("plugins"))
        entry = component_entry(kind, config.component_name, config.components_cfg_file, run.folder, _references(run))
        cls: Any = REGISTRY.get(kind, config.component_name)
    except ConfigError as error:
        return run.add_all(error.problems)
    except ComponentError as error:
        return run.add("component_name", str(error))
    for problem in check_parameters(cls, {**entry.params, **config.component_params}):
        if problem.key in entry.params and problem.key not in config.component_params:
            run.problems.append(entry.problem(problem.key, problem.message))
        else:
            run.add(f"component_params.{problem.key}", problem.message)
    if cls.needs_eval_dataset and not (run.backend.get("eval_dataset") or run.backend.get("val_size")):
        run.add("component_name", f"{config.component_name} compares samples with evaluation data: set eval_dataset or val_size")
    # The trainer finds the same files from wherever it is started.
    if config.plugins:
        config.plugins = [str(p.resolve()) if (p := run.folder / name).is_file() else name for name in config.plugins]
    local = run.folder / config.components_cfg_file
    if local.is_file() and not Path(config.components_cfg_file).is_file():
        config.components_cfg_file = str(local)
    return None


def _references(run: RunFile) -> dict[str, str]:
    return {"output_dir": str(run.backend.get("output_dir", ""))}


def _steps(rows: int, batch: int, keys: dict[str, Any]) -> int:
    """Optimizer steps as the Trainer counts them from epochs."""
    accumulation = keys.get("gradient_accumulation_steps", 1)
    rounded = math.floor if keys.get("dataloader_drop_last") else math.ceil
    micro_batches = rounded(rows / (batch // accumulation))
    return math.ceil(max(math.ceil(micro_batches / accumulation), 1) * keys.get("num_train_epochs", 3))


def plan(run: RunFile, checked: Checked) -> list[tuple[str, str]]:
    """What the run will do, as (name, value) lines."""
    from dataflex.backends.data import load_rows
    from dataflex.backends.trl import held_out_rows

    config, keys, options = run.dataflex, checked.trainer_keys, checked.options
    rows = sum(len(load_rows(spec, options.max_samples)) for spec in checked.train)
    with run.locating():
        train_rows = rows - held_out_rows(rows, options.val_size)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = keys.get("per_device_train_batch_size", 8) * keys.get("gradient_accumulation_steps", 1) * world
    steps = config.train_step or (keys["max_steps"] if keys.get("max_steps", -1) > 0 else 0)
    packed = options.packing or options.neat_packing or options.stage == "pt"
    about = "at most " if packed and not steps else ""
    steps = steps or _steps(train_rows, batch, keys)
    lines = [
        ("model", f"{options.model_name_or_path}, {options.finetuning_type}, stage {options.stage}"),
        ("data", f"{', '.join(options.dataset)}: {train_rows} rows"),
        ("evaluation data", ", ".join(options.eval_dataset) or (f"{rows - train_rows} rows of the above" if options.val_size else "none")),
        ("samples per step", f"{batch} ({world} process{'es' if world > 1 else ''})"),
        ("optimizer steps", f"{about}{steps}, {steps * batch / max(train_rows, 1):.1f} passes over the data"),
    ]
    if config.train_type != "static":
        assert config.component_name is not None
        entry = component_entry("weighter", config.component_name, config.components_cfg_file, run.folder, _references(run))
        params = {**entry.params, **config.component_params}
        cls: Any = REGISTRY.get("weighter", config.component_name)
        lines += [
            ("train type", f"{config.train_type}, {config.component_name} ({', '.join(f'{k}={v}' for k, v in params.items())})"),
            ("warmup_step", f"weights are 1 for the first {config.warmup_step} of {steps} optimizer steps"),
            ("extra cost", "; ".join(cls.costs(params)) or "none: weights come from the training forward"),
        ]
        if config.warmup_step >= steps and not about:
            lines.append(("warning", f"warmup_step {config.warmup_step} leaves no step to weight"))
    else:
        lines.append(("train type", "static: the backend's own training"))
    warmup = f"{options.warmup_ratio:.0%} of the steps" if options.warmup_ratio else keys.get("warmup_steps", 0)
    lines.append(("warmup_steps", f"{warmup} (learning rate; not the same as warmup_step)"))
    lines += [("note", note) for note in checked.notes]
    return lines
