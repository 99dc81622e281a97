"""Reading YAML with OmegaConf (LLaMA-Factory's parser, hence the same `key=value` overrides) and locating keys in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dataflex.errors import ConfigError, Problem, nearest

COMMAND_LINE = "command line"  # the place of a problem with an override


@dataclass(frozen=True)
class YamlContent:
    """A YAML file, read.

    Attributes:
        values: the mapping, without the keys that could not be resolved.
        unresolved: one problem per `${...}` reference to nothing.
        lines: where each key stands, see `key_lines`.
    """

    values: dict[str, Any]
    unresolved: list[Problem]
    lines: dict[str, int]

    def where(self, path: str | Path, key: str) -> str:
        """`file:LINE` of a dotted key, or of the innermost key around it that the file has."""
        parts = key.split(".")
        line = next((self.lines[prefix] for end in range(len(parts), 0, -1) if (prefix := ".".join(parts[:end])) in self.lines), None)
        return f"{path}:{line}" if line else str(path)


def load_yaml(path: str | Path, substitute: Mapping[str, str] | None = None, overrides: Sequence[str] = ()) -> YamlContent:
    """The file's mapping with overrides merged in and `${...}` references resolved.

    Args:
        substitute: extra values that references may name; they do not appear in the result.
        overrides: `key=value` strings, nested keys with dots.

    Raises:
        ConfigError: unreadable file, YAML syntax (with line), duplicate keys, malformed overrides.
    """
    text = _text(Path(path))
    loaded, changes = _parsed(text, path), _overrides(overrides)
    lines = key_lines(text)
    kept = [*map(str, loaded), *(str(key) for key in changes if key not in loaded)]
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(substitute or {})), loaded, changes)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(Problem(COMMAND_LINE if overrides else str(path), "", f"cannot be merged: {_first_line(error)}")) from None
    content = YamlContent({}, [], lines)
    for key in kept:
        try:
            content.values[key] = _plain(merged, key)
        except OmegaConfBaseException as error:
            full_key = str(error.full_key or key)
            place = COMMAND_LINE if key in changes else content.where(path, full_key)
            content.unresolved.append(Problem(place, full_key, _unresolved(error, kept)))
    return content


def read_yaml(path: str | Path, substitute: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The values of `load_yaml`; a reference to nothing is an error too."""
    content = load_yaml(path, substitute)
    if content.unresolved:
        raise ConfigError(content.unresolved)
    return content.values


def key_lines(text: str) -> dict[str, int]:
    """Line number (from 1) of each key, nested ones with dots."""
    lines: dict[str, int] = {}

    def visit(node: yaml.Node | None, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            visit(value, f"{prefix}{key.value}.")

    visit(yaml.compose(text), "")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(Problem(str(path), "", "cannot be read: it is not UTF-8 text")) from None
    except OSError as error:
        others = [other.name for other in path.parent.glob("*.y*ml")] if not path.exists() else []
        raise ConfigError(Problem(str(path), "", f"cannot be read: {error.strerror}.{nearest(path.name, others)}".rstrip("."))) from None


def _parsed(text: str, path: str | Path) -> DictConfig:
    try:
        content = yaml.compose(text)
        if content is not None and not isinstance(content, yaml.MappingNode):
            kind = "a list" if isinstance(content, yaml.SequenceNode) else f"the text '{content.value}'"
            raise ConfigError(Problem(str(path), "", f"must hold a mapping of keys to values (`key: value` lines), not {kind}"))
        loaded = OmegaConf.create(text) if content is not None else OmegaConf.create({})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        why = str(getattr(error, "problem", None) or error).replace("found duplicate key", "this key occurs twice:")
        raise ConfigError(Problem(place, "", f"is not valid YAML: {why}")) from None
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        place = YamlContent({}, [], key_lines(text)).where(path, key)
        raise ConfigError(Problem(place, key, "holds a malformed reference; write ${key}, or ${oc.env:NAME} for an environment variable")) from None
    assert isinstance(loaded, DictConfig)
    return loaded


def _overrides(items: Sequence[str]) -> DictConfig:
    problems = []
    for item in items:
        if "=" not in item or item.startswith(("=", "-")):
            problems.append(Problem(COMMAND_LINE, item, "is not an override; write key=value (no spaces, no leading dashes)"))
            continue
        try:
            OmegaConf.from_dotlist([item])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            problems.append(Problem(COMMAND_LINE, item, f"is not a valid value: {getattr(error, 'problem', None) or _first_line(error)}"))
    if problems:
        raise ConfigError(problems)
    return OmegaConf.from_dotlist(list(items))


def _plain(merged: Any, key: str) -> Any:
    """The value of one key as plain Python."""
    value = merged._get_node(next(name for name in merged if str(name) == key))
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return merged[next(name for name in merged if str(name) == key)]


def _unresolved(error: OmegaConfBaseException, keys: Sequence[str]) -> str:
    missing = re.match(r"Interpolation key '(.*)' not found", str(error))
    if missing is None:
        return f"cannot be resolved: {_first_line(error)}"
    name = missing[1]
    return f"refers to ${{{name}}}, but there is no key '{name}'.{nearest(name, keys)} Environment variables are written ${{oc.env:NAME}}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
