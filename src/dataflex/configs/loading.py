"""From a YAML file and `key=value` overrides to checked settings; every problem is collected before anything is reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dataflex.configs.schema import DataflexConfig
from dataflex.configs.values import wording
from dataflex.configs.yaml_files import COMMAND_LINE, YamlContent, load_yaml
from dataflex.errors import ConfigError, Problem

METADATA_KEY = "dataflex_run"  # what run.yaml records beside the settings; ignored when the file is run again

M = TypeVar("M", bound=BaseModel)


@dataclass
class RunFile:
    """A YAML file with overrides, split into DataFlex's own keys and the backend's.

    Attributes:
        path: the file.
        dataflex: DataFlex's settings; defaults stand in for those that have a problem.
        backend: the other keys, as read.
        content: the file as read, which knows where its keys stand.
        overridden: top-level keys given on the command line.
        problems: what is wrong so far.
    """

    path: Path
    dataflex: DataflexConfig
    backend: dict[str, Any]
    content: YamlContent
    overridden: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent

    def add(self, key: str, message: str) -> None:
        """Note a problem with a key of this file."""
        self.problems.append(Problem(self.where(key), key, message))

    def add_all(self, problems: Iterable[Problem]) -> None:
        """Note problems found elsewhere; those that name a key of this file but no place are located here."""
        self.problems += self._located(problems)

    def where(self, key: str) -> str:
        return COMMAND_LINE if key.split(".")[0] in self.overridden else self.content.where(self.path, key)

    def raise_problems(self) -> None:
        """Report what was noted; a key whose reference leads nowhere is not also reported as missing."""
        unresolved = {problem.key.split(".")[0] for problem in self.content.unresolved}
        own = [problem for problem in self.problems if problem.key.split(".")[0] not in unresolved]
        problems = list(dict.fromkeys([*self.content.unresolved, *own]))
        if problems:
            raise ConfigError(problems)

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Give errors raised inside that name a key of this file their place."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(self._located(error.problems)) from error

    def _located(self, problems: Iterable[Problem]) -> list[Problem]:
        return [Problem(p.where or self.where(p.key), p.key, p.message) for p in problems]


def load_run(path: str | Path, overrides: Sequence[str] = (), *, scoring: bool = False) -> RunFile:
    """Read a training file and check DataFlex's own keys.

    Args:
        scoring: rows are only to be scored, so that the file's `train_type` does not matter.

    Raises:
        ConfigError: the file cannot be read at all; anything else is noted in `problems`.
    """
    path = Path(path)
    content = load_yaml(path, overrides=overrides)
    values = {key: value for key, value in content.values.items() if key != METADATA_KEY}
    own = {key: value for key, value in values.items() if key in DataflexConfig.model_fields and value is not None}  # null: as if left out
    if scoring:
        own.pop("train_type", None)
    elif content.written.get("train_type") is None:
        own["train_type"] = "static"
    backend = {key: value for key, value in values.items() if key not in DataflexConfig.model_fields}
    run = RunFile(path, DataflexConfig(), backend, content, overridden={item.split("=")[0].split(".")[0] for item in overrides})
    stand_ins = {"update_step": 1} if own.get("train_type") in ("dynamic_select", "dynamic_mix") else {}  # its default is no value for these
    run.dataflex = checked(DataflexConfig, own, run, stand_ins) or DataflexConfig()
    return run


def checked(model: type[M], values: Mapping[str, Any], run: RunFile, stand_ins: Mapping[str, Any] | None = None) -> M | None:
    """`values` as `model`. Problems are noted in `run`; the keys concerned then have their defaults.

    Args:
        stand_ins: values for required keys that have a problem. Without them None is returned in that case.
    """
    kept = dict(values)
    while True:
        try:
            return model(**kept)
        except ValidationError as error:
            found = [problem for detail in error.errors(include_url=False) for problem in _problems(detail, run)]
        new = [problem for problem in found if problem not in run.problems]
        run.problems += new
        if not new:
            return None
        bad = {problem.key.split(".")[0] for problem in new}
        kept = {key: value for key, value in kept.items() if key not in bad} | {k: v for k, v in (stand_ins or {}).items() if k in bad}


def _problems(detail: ErrorDetails, run: RunFile) -> list[Problem]:
    if not detail["loc"]:  # checks of several keys together word their own messages, "key: text" lines
        lines = [line.partition(": ") for line in detail["msg"].removeprefix("Value error, ").split("\n")]
        return [Problem(run.where(key), key, text) for key, _, text in lines]
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(("function-", "list[", "dict[")))
    if detail["type"] == "missing":
        return [Problem(str(run.path), key, "is required")]
    return [Problem(run.where(key), key, wording(detail))]
