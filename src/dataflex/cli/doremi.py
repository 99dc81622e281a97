"""`dataflex-cli doremi`: DoReMi's three steps from one training file, each an ordinary run in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
import yaml

from dataflex.backends.outputs import recorded_settings
from dataflex.cli.plan import check_run
from dataflex.configs.loading import METADATA_KEY
from dataflex.configs.secrets import recorded_argument
from dataflex.configs.yaml_files import load_yaml
from dataflex.core.state import newest_complete_checkpoint
from dataflex.errors import ConfigError, Problem, TrainingError
from dataflex.utils.printable import one_line, shell_word

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
    if not _finished(folder, "proxy"):
        _check_all(config, overrides, folder)
    for step in STEPS:
        settings = [*overrides, f"output_dir={folder / step}", *_settings(step, folder)]
        if _finished(folder, step):
            _check_unchanged(config, settings, folder / step)
            typer.echo(one_line(f"{step}: finished before, in {folder / step}"))
            continue
        settings += _unfinished(folder / step)
        check_run(config, settings)
        told = [shell_word(recorded_argument(argument)) for argument in (config, *settings)]
        typer.echo(f"{step}: dataflex-cli train {' '.join(told)}")
        done = subprocess.run([sys.executable, "-m", "dataflex.cli", "train", config, *settings], check=False)
        if done.returncode:
            raise TrainingError(f"the {step} step failed; start the same command again to go on from there")
    weights = _weights(folder)
    typer.echo(one_line("weights: " + ", ".join(f"{name} {weight:.4f}" for name, weight in weights.items())))


def _finished(folder: Path, step: str) -> bool:
    return (folder / step / "all_results.json").is_file()


def _check_unchanged(config: str, settings: list[str], folder: Path) -> None:
    """A finished step counts only if it was trained with the settings that are asked for now.

    Raises:
        ConfigError: with every key that differs.
    """
    run, _ = check_run(config, [*settings, "overwrite_output_dir=true"])
    now = yaml.safe_load(yaml.safe_dump(recorded_settings(run)))
    before = load_yaml(folder / "dataflex" / "run.yaml").written
    keys = sorted((now.keys() | before.keys()) - {METADATA_KEY, "overwrite_output_dir", "resume_from_checkpoint"})
    problems = []
    for key in keys:
        if now.get(key) != before.get(key):
            new = f"is {now[key]!r}" if key in now else "is left out"
            old = f"with {before[key]!r}" if key in before else "without it"
            message = f"{new}, but {folder} was trained {old}; name another output_dir, or delete that folder to train it again"
            problems.append(Problem(config, key, message))
    if problems:
        raise ConfigError(problems)


def _unfinished(folder: Path) -> list[str]:
    """How to go on with a step that was interrupted."""
    found, _ = newest_complete_checkpoint(folder)
    return ["resume_from_checkpoint=true"] if found is not None else ["overwrite_output_dir=true"]


def _check_all(config: str, overrides: list[str], folder: Path) -> None:
    """Look for mistakes in the later steps before the first one trains; what it leaves behind is not there yet."""
    equal = [*_FIXED, "mixture_sample_rule=mixture", "mixture_unit=token"]
    with TemporaryDirectory() as stand_in:
        for name in ("config.json", "model.safetensors"):
            (Path(stand_in) / name).touch()
        proxy = [f"component_params.reference_model={stand_in}", "component_name=doremi"]
        for step, settings in (("reference", _FIXED), ("proxy", proxy), ("final", equal)):
            check_run(config, [*overrides, f"output_dir={folder / step}", *settings, "overwrite_output_dir=true"])


_FIXED = ["static_mix=true", "component_name=null", "component_params={}"]


def _settings(step: str, folder: Path) -> list[str]:
    if step == "proxy":
        return ["component_name=doremi", f"component_params.reference_model={folder / 'reference'}"]
    if step == "reference":
        return _FIXED
    return [*_FIXED, "mixture_sample_rule=mixture", "mixture_unit=token", f"init_mixture_proportions={list(_weights(folder).values())}"]


def _weights(folder: Path) -> dict[str, Any]:
    """Mean weight of each domain that the proxy has found."""
    found = json.loads((folder / "proxy" / "dataflex" / "doremi_weights.json").read_text(encoding="utf-8"))
    return dict(zip(found["names"], found["average_weights"], strict=True))
