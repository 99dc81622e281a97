"""Reading YAML with OmegaConf (LLaMA-Factory's parser, hence the same `key=value` overrides) and locating keys in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dataflex.errors import ConfigError, Problem


def read_yaml(path: str | Path, substitute: Mapping[str, str] | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's mapping with overrides merged in and `${...}` references resolved.

    Args:
        substitute: extra values that references may name; they do not appear in the result.
        overrides: `key=value` strings, nested keys with dots.

    Raises:
        ConfigError: unreadable file, YAML syntax (with line and column), duplicate keys, a reference to nothing, malformed overrides.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", str(error))
        raise ConfigError(Problem(str(path), "", f"cannot be read: {reason}")) from None
    try:
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(Problem(place, "", f"is not valid YAML: {getattr(error, 'problem', None) or error}")) from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(Problem(str(path), "", "must hold a mapping of keys to values"))
    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError([Problem("command line", item, "is not an override; write key=value (no spaces, no leading dashes)") for item in bad])
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(substitute or {})), loaded, OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(Problem(str(path), "", f"cannot be resolved: {str(error).splitlines()[0]}")) from None
    assert isinstance(content, dict)
    kept = {str(key) for key in loaded} | {item.split("=", 1)[0].split(".")[0] for item in overrides}
    return {str(key): value for key, value in content.items() if str(key) in kept}


def key_lines(path: str | Path) -> dict[str, int]:
    """Line number (from 1) of each top-level key."""
    node = yaml.compose(Path(path).read_text(encoding="utf-8"))
    return {key.value: key.start_mark.line + 1 for key, _ in node.value} if isinstance(node, yaml.MappingNode) else {}
