"""Finding a component's parameters in a components file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from dataflex.configs.schema import COMPONENT_BUCKETS, PACKAGED_COMPONENTS
from dataflex.configs.yaml_files import read_yaml
from dataflex.errors import ConfigError, Problem, listing, nearest


def components_path(path: str, base: Path | None = None) -> Path:
    """The file `components_cfg_file` means: as given, or relative to the YAML file, or the packaged one.

    Raises:
        ConfigError: no such file, and it is not the packaged file's name.
    """
    for candidate in (Path(path), (base or Path()) / path):
        if candidate.is_file():
            return candidate
    if path == PACKAGED_COMPONENTS:
        return Path(str(files("dataflex") / "configs" / "components.yaml"))
    raise ConfigError(Problem("", "components_cfg_file", f"no file '{path}'. Leave the key out to use the packaged components"))


def component_params(kind: str, name: str, path: str, base: Path | None = None, substitute: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The `params` of component `name`.

    Args:
        kind: weighter, selector, mixer or reorder.
        path: components file, see `components_path`.
        base: folder of the YAML file that names it.
        substitute: values for `${name}` references, such as output_dir.

    Raises:
        ConfigError: no such entry, or the entry is malformed.
    """
    file = components_path(path, base)
    content = read_yaml(file, substitute)
    bucket_name = COMPONENT_BUCKETS[kind]
    buckets = [*COMPONENT_BUCKETS.values(), "reorderers", "pipelines"]
    unknown = [key for key in content if key not in buckets]
    if unknown:
        raise ConfigError(
            [Problem(str(file), key, f"is not a kind of component.{nearest(key, buckets)} Allowed: {listing(buckets)}") for key in unknown]
        )
    bucket = content.get(bucket_name) or (content.get("reorderers") if kind == "reorder" else None) or {}
    if name not in bucket:
        raise ConfigError(
            Problem(str(file), "component_name", f"{bucket_name} '{name}' not found.{nearest(name, bucket)} Available: {listing(bucket)}")
        )
    entry = bucket[name] or {}
    stray = [key for key in entry if key not in ("name", "params")]
    if stray:
        raise ConfigError([Problem(str(file), f"{bucket_name}.{name}.{key}", "is not allowed here; parameters go under 'params'") for key in stray])
    params = entry.get("params") or {}
    if not isinstance(params, dict):
        raise ConfigError(Problem(str(file), f"{bucket_name}.{name}.params", f"must be a mapping, not {params!r}"))
    return dict(params)
