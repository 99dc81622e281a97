"""Backends: what turns a YAML file into a model, data and a Trainer.

A backend is a module of this package with

- `REQUIRES`: the packages it needs;
- `check(run)`: notes every problem in `run` and returns what `train` needs, with a list `notes`; or None if there is too little to go on;
- `summary(run, prepared)`: lines for `dataflex-cli validate`, and the run's `Sizes`;
- `train(run, prepared)`;
- `scoring_trainer(run, prepared, cache_dir)`: a `SelectTrainer` for `dataflex-cli offline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from dataflex.configs.schema import DataflexConfig
from dataflex.errors import ConfigError, Problem

TOKENISED = "tokenised rows"  # the line of a plan that says where they were written

REQUIRES = {"trl": ("trl", "peft", "datasets"), "llamafactory": ("llamafactory",)}


class Sizes(NamedTuple):
    """How large a run is, as far as its file and data tell.

    Attributes:
        rows, eval_rows: of the training and evaluation data; None when they are counted only after tokenising.
        batch: samples of an optimizer step, over all processes.
        epochs: `num_train_epochs`.
        fixed: optimizer steps when the file sets them, else 0.
        steps: optimizer steps of ordinary training, None if not known.
        packed: whether rows are packed, so that there will be fewer.
        domains: names of the domains, if known.
    """

    rows: int | None
    eval_rows: int | None
    batch: int
    epochs: float
    fixed: int
    steps: int | None
    packed: bool = False
    domains: Sequence[str] = ()


def for_scoring(config: DataflexConfig, cache_dir: Path) -> DataflexConfig:
    """Settings of a trainer that is only asked for signals, which are kept in `cache_dir`."""
    return DataflexConfig(
        train_type="dynamic_select",
        component_name="random",
        component_params={"cache_dir": str(cache_dir)},
        update_step=1,
        scoring_tokens=config.scoring_tokens,
        project_targets_only=config.project_targets_only,
    )


def backend_name(name: str) -> str:
    """`auto` is LLaMA-Factory where it is installed, since it and current TRL exclude each other, and TRL elsewhere."""
    if name != "auto":
        return name
    return "llamafactory" if installed("llamafactory") else "trl"


def installed(package: str) -> bool:
    """Whether a package is there; a mere folder of that name on the path is not."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def load_backend(name: str) -> ModuleType:
    """The backend's module.

    Raises:
        ConfigError: a package it needs is not installed.
    """
    chosen = backend_name(name)
    missing = [package for package in REQUIRES[chosen] if not installed(package)]
    if missing:
        raise ConfigError(Problem("", "backend", f"needs {', '.join(missing)}, which is not installed: pip install 'dataflex[{chosen}]'"))
    return import_module(f"dataflex.backends.{chosen}")
