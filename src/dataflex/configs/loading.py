"""From a YAML file and `key=value` overrides to checked settings; every problem is collected before anything is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dataflex.configs.schema import DataflexConfig
from dataflex.configs.yaml_files import key_lines, read_yaml
from dataflex.errors import ConfigError, Problem, nearest

METADATA_KEY = "dataflex_run"  # what run.yaml records beside the settings; ignored when the file is run again

M = TypeVar("M", bound=BaseModel)


@dataclass
class RunFile:
    """A YAML file with overrides, split into DataFlex's own keys and the backend's.

    Attributes:
        path: the file.
        dataflex: DataFlex's settings; defaults stand in for those that have a problem.
        backend: the other keys, as read.
        problems: what is wrong so far.
    """

    path: Path
    dataflex: DataflexConfig
    backend: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent

    def add(self, key: str, message: str) -> None:
        """Note a problem with a key of this file."""
        self.problems.append(Problem(self.where(key), key, message))

    def add_all(self, problems: Iterable[Problem]) -> None:
        """Note problems found elsewhere; those that name a key of this file but no place are located here."""
        self.problems += [Problem(p.where or self.where(p.key), p.key, p.message) for p in problems]

    def where(self, key: str) -> str:
        line = self.lines.get(key.split(".")[0])
        return f"{self.path}:{line}" if line else str(self.path)

    def raise_problems(self) -> None:
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read a training file and check DataFlex's own keys.

    Raises:
        ConfigError: the file cannot be read at all; anything else is noted in `problems`.
    """
    path = Path(path)
    content = read_yaml(path, overrides=overrides)
    content.pop(METADATA_KEY, None)
    lines = {key: line for key, line in key_lines(path).items() if key not in {item.split("=")[0].split(".")[0] for item in overrides}}
    own = {key: value for key, value in content.items() if key in DataflexConfig.model_fields}
    run = RunFile(path, DataflexConfig(), {key: value for key, value in content.items() if key not in own}, lines=lines)
    run.dataflex = checked(DataflexConfig, own, run) or DataflexConfig()
    return run


def checked(model: type[M], values: Mapping[str, Any], run: RunFile) -> M | None:
    """`values` as `model`. Problems are noted in `run`; the keys concerned then have their defaults, or None is returned if that fails too."""
    try:
        return model(**values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            run.problems.append(_problem(detail, run))
        bad = {str(detail["loc"][0]) for detail in details if detail["loc"]}
        try:
            return model(**{key: value for key, value in values.items() if key not in bad})
        except ValidationError as again:
            run.problems += [problem for detail in again.errors(include_url=False) if (problem := _problem(detail, run)) not in run.problems]
            return None


def _problem(detail: ErrorDetails, run: RunFile) -> Problem:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:  # a check of several keys together words its own message as "key: text"
        key, _, text = message.partition(": ")
        return Problem(run.where(key), key, text)
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(("function-", "list[", "dict[")))
    if detail["type"] == "missing":
        return Problem(str(run.path), key, "is required")
    hint = ""
    if detail["type"] == "literal_error":
        hint = nearest(str(detail["input"]), [choice.strip(" '") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(",")])
    return Problem(run.where(key), key, f"{detail['input']!r} is not valid: {message}.{hint}")
