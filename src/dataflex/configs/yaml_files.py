"""Reading YAML with OmegaConf (LLaMA-Factory's parser, hence the same `key=value` overrides) and locating keys in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException, UnsupportedValueType

from dataflex.configs.secrets import recorded_argument, remember
from dataflex.errors import ConfigError, Problem, nearest
from dataflex.utils.printable import shortened

COMMAND_LINE = "command line"  # the place of a problem with an override

# What a file may hold at most. OmegaConf has the same limit of values; here it is found before anything takes long.
_MOST_BYTES = 2_000_000
_MOST_VALUES = 10_000
_MOST_LEVELS = 50
_MOST_CHARACTERS = 1_000_000  # that references expand to
_REFERENCE = re.compile(r"\$\{\s*([\w.]+)\s*\}")
_SLOW_ABOVE = 100_000  # characters; PyYAML's own parser words errors better than the C one, and takes seconds for a longer text


@dataclass(frozen=True)
class YamlContent:
    """A YAML file, read.

    Attributes:
        values: the mapping, without the keys that could not be resolved.
        unresolved: one problem per `${...}` reference to nothing.
        lines: where each key stands, see `key_lines`.
        written: the mapping with its references as they are written.
    """

    values: dict[str, Any]
    unresolved: list[Problem]
    lines: dict[str, int]
    written: dict[str, Any] = field(default_factory=dict)

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
    kept = [*loaded, *(key for key in changes if key not in loaded)]
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(substitute or {})), loaded, changes)
    except Exception as error:
        raise ConfigError(Problem(COMMAND_LINE if overrides else str(path), "", f"cannot be merged: {_first_line(error)}")) from None
    if key := _exploding(merged):
        raise ConfigError(
            Problem(str(path), key, f"grows to more than {_MOST_CHARACTERS:,} characters, since its references refer to others in turn")
        )
    content = YamlContent({}, [], lines)
    for key in kept:
        name = str(key)
        content.written[name] = _plain(merged, key, resolve=False)
        try:
            content.values[name] = _plain(merged, key)
        except Exception as error:  # whatever a resolver raises
            full_key = str(getattr(error, "full_key", None) or name)
            place = COMMAND_LINE if key in changes else content.where(path, full_key)
            content.unresolved.append(Problem(place, full_key, _unresolved(error, list(map(str, kept)))))
    remember(content.written, content.values)
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
            if isinstance(key, yaml.ScalarNode):
                lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
                visit(value, f"{prefix}{key.value}.")

    visit(_composed(text), "")
    return lines


def _composed(text: str) -> yaml.Node | None:
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.CSafeLoader if len(text) > _SLOW_ABOVE and yaml.__with_libyaml__ else yaml.SafeLoader)
    return node


def _too_large(text: str) -> str:
    """What is too much about a text, told from its events without building anything; an empty string if nothing is."""
    values = level = deepest = 0
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
            values += not isinstance(event, yaml.CollectionEndEvent)
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            deepest = max(deepest, level)
            if deepest > _MOST_LEVELS or values > _MOST_VALUES:
                break
    except yaml.YAMLError as error:
        if "nesting depth" not in str(error):
            return ""  # a syntax error is worded where the text is read
        deepest = _MOST_LEVELS + 1
    if deepest > _MOST_LEVELS:
        return f"is nested more than {_MOST_LEVELS} levels deep"
    return f"holds more than {_MOST_VALUES} keys and values; keep long lists in a file of their own" if values > _MOST_VALUES else ""


def _text(path: Path) -> str:
    def refused(why: str) -> ConfigError:
        return ConfigError(Problem(str(path), "", f"cannot be read: {why}"))

    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise refused("it is a pipe or a device, not a file")  # reading one may never end
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            raise refused(f"it has more than {_MOST_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise refused("it is not UTF-8 text") from None
    except OSError as error:
        raise refused(f"{error.strerror}.{_near(path)}".rstrip(".")) from None
    except ValueError as error:  # such as a zero byte in the name
        raise refused(str(error)) from None


def _near(path: Path) -> str:
    try:
        return nearest(path.name, [other.name for other in path.parent.glob("*.y*ml")]) if not path.exists() else ""
    except OSError:
        return ""


def _parsed(text: str, path: str | Path) -> DictConfig:
    if trouble := _too_large(text):
        raise ConfigError(Problem(str(path), "", trouble))
    try:
        content = _composed(text)
        if content is not None and not isinstance(content, yaml.MappingNode):
            kind = "a list" if isinstance(content, yaml.SequenceNode) else f"the text '{content.value}'"
            raise ConfigError(Problem(str(path), "", f"must hold a mapping of keys to values (`key: value` lines), not {kind}"))
        loaded = OmegaConf.create(text) if content is not None else OmegaConf.create({})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        why = str(getattr(error, "problem", None) or error).replace("found duplicate key", "this key occurs twice:")
        raise ConfigError(Problem(place, "", f"is not valid YAML: {why}")) from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_unreadable(error, text, path)) from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(Problem(str(path), "", "must hold a mapping of keys to values (`key: value` lines)"))
    return loaded


def _unreadable(error: Exception, text: str, path: str | Path) -> Problem:
    """A text that is YAML and holds a value that cannot be read; a tag such as `!!float x` fails with any kind of error."""
    key = str(getattr(error, "full_key", None) or "")
    line_of = YamlContent({}, [], key_lines(text)).where
    if isinstance(error, UnsupportedValueType | KeyValidationError):
        return Problem(line_of(path, key), key, f"is not valid: {_first_line(error)}")
    if isinstance(error, OmegaConfBaseException):
        return Problem(line_of(path, key), key, "holds a malformed reference; write ${key}, or ${oc.env:NAME} for an environment variable")
    return Problem(_first_failing(text, path), "", f"is not valid YAML: {_value_error(error)}")


def _first_failing(text: str, path: str | Path) -> str:
    """`file:LINE` of the first top-level key whose value cannot be read alone."""
    node = _composed(text)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        alone = yaml.MappingNode("tag:yaml.org,2002:map", [(key, value)])
        if _fails(partial(OmegaConf.create, yaml.serialize(alone))):
            return f"{path}:{key.start_mark.line + 1}"
    return str(path)


def _fails(action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception:
        return True
    return False


def _value_error(error: Exception) -> str:
    return f"a value does not fit its tag ({type(error).__name__}: {_first_line(error)})"


def _exploding(merged: Any) -> str:
    """The first key whose references, followed, make more text than any setting has; an empty string if none does."""
    texts = dict(_texts(OmegaConf.to_container(merged, resolve=False)))
    sizes: dict[str, int] = {}

    def size(key: str) -> int:
        if key not in sizes:
            sizes[key] = 0  # stands for a reference to itself, which is reported when it is resolved
            inside = [texts[key]] if key in texts else [text for name, text in texts.items() if name.startswith(f"{key}.")]
            sizes[key] = min(sum(len(text) + sum(map(size, _REFERENCE.findall(text))) for text in inside), 2 * _MOST_CHARACTERS)
        return sizes[key]

    referring = [key for key, text in texts.items() if "${" in text]
    return next((key for key in referring if size(key) > _MOST_CHARACTERS), "")


def _texts(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every value that is no collection."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _texts(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, values if isinstance(values, str) else ""


def _overrides(items: Sequence[str]) -> DictConfig:
    problems = []
    for item in items:
        shown = shortened(recorded_argument(item), 100)
        if "=" not in item or item.startswith(("=", "-")):
            problems.append(Problem(COMMAND_LINE, shown, "is not an override; write key=value (no spaces, no leading dashes)"))
            continue
        try:
            trouble = _too_large(item.partition("=")[2])
            OmegaConf.from_dotlist([] if trouble else [item])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            trouble = f"is not a valid value: {getattr(error, 'problem', None) or _first_line(error)}"
        except Exception as error:
            trouble = f"is not a valid value: {_value_error(error)}"
        if trouble:
            problems.append(Problem(COMMAND_LINE, shown, trouble))
    if problems:
        raise ConfigError(problems)
    return OmegaConf.from_dotlist(list(items))


def _plain(merged: Any, key: Any, resolve: bool = True) -> Any:
    """The value of one key as plain Python."""
    value = merged._get_node(key)
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=resolve)
    return merged[key] if resolve else value._value()


def _unresolved(error: Exception, keys: Sequence[str]) -> str:
    missing = re.match(r"Interpolation key '(.*)' not found", str(error))
    if missing is None:
        return f"cannot be resolved: {_first_line(error)}"
    name = missing[1]
    return f"refers to ${{{name}}}, but there is no key '{name}'.{nearest(name, keys)} Environment variables are written ${{oc.env:NAME}}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
