"""Backends: what turns a YAML file into a model, data and a Trainer.

A backend is a module of this package with

- `REQUIRES`: the packages it needs;
- `check(run)`: notes every problem in `run` and returns what `train` needs, with a list `notes`; or None if there is too little to go on;
- `summary(run, prepared)`: lines for `dataflex-cli validate`, and the number of optimizer steps or None if it cannot be known;
- `train(run, prepared)`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from dataflex.errors import ConfigError, Problem

REQUIRES = {"trl": ("trl", "peft", "datasets"), "llamafactory": ("llamafactory",)}


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
