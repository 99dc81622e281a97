"""Checking a training file as a whole, and saying what it will do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex.backends import load_backend
from dataflex.configs.components import component_entry
from dataflex.configs.loading import RunFile, load_run
from dataflex.configs.schema import COMPONENT_KIND
from dataflex.core.plugins import load_plugins
from dataflex.core.registry import REGISTRY, check_parameters
from dataflex.errors import ComponentError, ConfigError


def check_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunFile, Any]:
    """A training file, checked as a whole, and what its backend needs to run it.

    Raises:
        ConfigError: with every problem that was found.
    """
    run = load_run(path, overrides)
    _check_component(run)
    try:
        checked = load_backend(run.dataflex.backend).check(run)
    except ConfigError as error:
        run.add_all(error.problems)
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


def plan(run: RunFile, prepared: Any) -> list[tuple[str, str]]:
    """What the run will do, as (name, value) lines."""
    config = run.dataflex
    lines, steps = load_backend(config.backend).summary(run, prepared)
    lines += _component_lines(run, steps) if config.train_type != "static" else [("train type", "static: the backend's own training")]
    return [*lines, *(("note", note) for note in prepared.notes)]


def _component_lines(run: RunFile, steps: int | None) -> list[tuple[str, str]]:
    config = run.dataflex
    assert config.component_name is not None
    kind = COMPONENT_KIND[config.train_type]
    entry = component_entry(kind, config.component_name, config.components_cfg_file, run.folder, _references(run))
    params = {**entry.params, **config.component_params}
    cls: Any = REGISTRY.get(kind, config.component_name)
    lines = [
        ("train type", f"{config.train_type}, {config.component_name} ({', '.join(f'{k}={v}' for k, v in params.items())})"),
        ("warmup_step", f"weights are 1 for the first {config.warmup_step}{f' of {steps}' if steps else ''} optimizer steps"),
        ("extra cost", "; ".join(cls.costs(params)) or "none: weights come from the training forward"),
    ]
    if steps and config.warmup_step >= steps:
        lines.append(("warning", f"warmup_step {config.warmup_step} leaves no step to weight"))
    return lines
