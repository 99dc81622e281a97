"""`dataflex-cli doremi`: DoReMi's three steps from one training file, each an ordinary run in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from dataflex.cli.plan import check_run
from dataflex.configs.yaml_files import load_yaml
from dataflex.errors import ConfigError, Problem, TrainingError

STEPS = ("reference", "proxy", "final")


def doremi(config: str, overrides: list[str]) -> None:
    """Train a reference model on the initial mixture, find weights with a proxy model against it, train the final model on their mean.

    Raises:
        ConfigError: a step's settings are not valid; found for the first step before anything starts.
        TrainingError: a step failed.
    """
    content = load_yaml(Path(config), overrides=overrides).values
    if content.get("train_type") != "dynamic_mix":
        raise ConfigError(Problem(config, "train_type", f"must be dynamic_mix, not {content.get('train_type', 'static')}"))
    if content.get("component_name", "doremi") != "doremi":
        raise ConfigError(Problem(config, "component_name", f"must be doremi, not {content['component_name']}"))
    folder = Path(str(content.get("output_dir", "")))
    for step in STEPS:
        results = folder / step / "all_results.json"
        if results.is_file():
            typer.echo(f"{step}: finished before, in {folder / step}")
            continue
        settings = [*overrides, f"output_dir={folder / step}", *_settings(step, folder)]
        check_run(config, settings)
        typer.echo(f"{step}: dataflex-cli train {config} {' '.join(settings)}")
        done = subprocess.run([sys.executable, "-m", "dataflex.cli", "train", config, *settings], check=False)
        if done.returncode:
            raise TrainingError(f"the {step} step failed; start the same command again to go on from there")
    weights = _weights(folder)
    typer.echo("weights: " + ", ".join(f"{name} {weight:.4f}" for name, weight in weights.items()))


def _settings(step: str, folder: Path) -> list[str]:
    if step == "proxy":
        return ["component_name=doremi", f"component_params.reference_model={folder / 'reference'}"]
    fixed = ["static_mix=true", "component_name=null", "component_params={}"]
    return fixed if step == "reference" else [*fixed, f"init_mixture_proportions={list(_weights(folder).values())}"]


def _weights(folder: Path) -> dict[str, Any]:
    """Mean weight of each domain that the proxy has found."""
    found = json.loads((folder / "proxy" / "dataflex" / "doremi_weights.json").read_text(encoding="utf-8"))
    return dict(zip(found["names"], found["average_weights"], strict=True))
