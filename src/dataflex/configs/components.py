"""Finding a component's parameters in a components file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dataflex.configs.schema import COMPONENT_BUCKETS, PACKAGED_COMPONENTS
from dataflex.configs.yaml_files import YamlContent, load_yaml
from dataflex.core.registry import REGISTRY
from dataflex.errors import ConfigError, Problem, listing, nearest

_BUCKETS = [*COMPONENT_BUCKETS.values(), "reorderers", "pipelines"]


@dataclass(frozen=True)
class ComponentEntry:
    """An entry of a components file.

    Attributes:
        path: dotted path of the entry, `weighters.loss`.
        params: its parameters.
    """

    file: Path
    content: YamlContent
    path: str
    params: dict[str, Any]

    def problem(self, key: str, message: str) -> Problem:
        """A problem with one parameter, located in the file."""
        dotted = f"{self.path}.params.{key}"
        return Problem(self.content.where(self.file, dotted), dotted, message)


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


def component_entry(kind: str, name: str, path: str, base: Path | None = None, substitute: Mapping[str, str] | None = None) -> ComponentEntry:
    """The entry of component `name`.

    Args:
        kind: weighter, selector, mixer or reorder.
        path: components file, see `components_path`.
        base: folder of the YAML file that names it.
        substitute: values for `${name}` references, such as output_dir.

    Raises:
        ConfigError: no such entry, or the file or the entry is malformed.
    """
    file = components_path(path, base)
    content = load_yaml(file, substitute)
    problems = content.unresolved + _stray_kinds(file, content)
    bucket_name = COMPONENT_BUCKETS[kind]
    if kind == "reorder" and bucket_name not in content.values and "reorderers" in content.values:
        bucket_name = "reorderers"
    bucket = content.values.get(bucket_name) or {}
    bucket = {str(entry): value for entry, value in bucket.items()} if isinstance(bucket, dict) else bucket
    if not isinstance(bucket, dict):
        problems.append(Problem(content.where(file, bucket_name), bucket_name, f"must be a mapping of names to components, not {bucket!r}"))
    elif name not in bucket and not (problems and not bucket):  # a misspelt kind is reported already
        missing = f" It is registered: give it an entry there, {bucket_name}: {{{name}: {{params: {{}}}}}}." if name in REGISTRY.names(kind) else ""
        message = f"{bucket_name} '{name}' not found in {file}.{missing or nearest(name, bucket)} Available: {listing(bucket)}"
        problems.append(Problem("", "component_name", message))
    elif name in bucket:
        problems += _entry_problems(file, content, f"{bucket_name}.{name}", bucket[name])
    if problems:
        raise ConfigError(problems)
    params = (bucket[name] or {}).get("params") or {}
    return ComponentEntry(file, content, f"{bucket_name}.{name}", {str(key): value for key, value in params.items()})


def component_params(kind: str, name: str, path: str, base: Path | None = None, substitute: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The `params` of component `name`; arguments and errors as in `component_entry`."""
    return component_entry(kind, name, path, base, substitute).params


def _stray_kinds(file: Path, content: YamlContent) -> list[Problem]:
    unknown = [key for key in content.values if key not in _BUCKETS]
    text = "is not a kind of component.{} Allowed: {}"
    return [Problem(content.where(file, key), key, text.format(nearest(key, _BUCKETS), listing(_BUCKETS))) for key in unknown]


def _entry_problems(file: Path, content: YamlContent, path: str, entry: Any) -> list[Problem]:
    """What is wrong with an entry's shape."""

    def problem(key: str, message: str) -> Problem:
        return Problem(content.where(file, key), key, message)

    if entry is None:
        return []
    if not isinstance(entry, dict):
        return [problem(path, f"must be a mapping with `name` and `params`, not {entry!r}")]
    name = path.split(".", 1)[1]
    problems = [problem(f"{path}.{key}", "is not allowed here; parameters go under `params`") for key in entry if key not in ("name", "params")]
    if entry.get("name", name) != name:
        problems.append(problem(f"{path}.name", f"is '{entry['name']}'; it must repeat the entry's own name, '{name}'"))
    if not isinstance(entry.get("params") or {}, dict):
        problems.append(problem(f"{path}.params", f"must be a mapping of parameters to values, not {entry['params']!r}"))
    return problems
