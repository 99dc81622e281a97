"""From `dataset: a,b` and `dataset_dir` with LLaMA-Factory's `dataset_info.json` to specs; the head of every file is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from dataflex.backends.datasets.files import check_files, data_files, decode, parse_json, records, suffixes
from dataflex.backends.datasets.rows import as_list, reduced_row, says_nothing
from dataflex.backends.datasets.spec import (
    DEFAULT_COLUMNS,
    DEFAULT_TAGS,
    ENTRY_KEYS,
    FORMATTINGS,
    HUB_ONLY_KEYS,
    INFO_FILE,
    OPENAI_TAGS,
    OPTIONAL_COLUMNS,
    REMOTE_KEYS,
    ROLES,
    TELLING_COLUMNS,
    DatasetSpec,
    Formatting,
    Stage,
)
from dataflex.errors import ConfigError, Problem, listing, nearest
from dataflex.utils.logging import warn_once

_HEAD = 100  # rows that find_datasets reads


def find_datasets(names: Sequence[str], dataset_dir: Path, *, stage: Stage, key: str = "dataset", allow_outside: bool = False) -> list[DatasetSpec]:
    """What `dataset: a,b` stands for. A name may also be a data file, as given or inside `dataset_dir`.

    Args:
        key: the setting that holds the names, for messages.
        allow_outside: relative paths may lead out of `dataset_dir`; absolute ones always may.

    Raises:
        ConfigError: every problem with the folder, `dataset_info.json`, an entry, or the head of a data file.
    """
    files = {name: file for name in names if (file := _direct_file(name, dataset_dir, stage))}
    problems: list[Problem] = []
    entries: dict[str, Any] | None = None
    if any(name not in files for name in names):
        try:
            entries = _read_info(dataset_dir)
        except ConfigError as error:
            problems += error.problems
    specs = []
    for name in names:
        try:
            if name in files:
                _check_place(name, files[name], dataset_dir, "", key, allow_outside)
                specs.append(_direct_spec(name, files[name], stage, key))
            elif entries is not None:
                specs.append(_entry_spec(name, entries, dataset_dir / INFO_FILE, stage, key, allow_outside))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return [replace(spec, outside=not _is_inside(spec.path, dataset_dir)) for spec in specs]


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path as it is written lies in a folder; links are not followed."""
    return os.path.commonpath([os.path.abspath(path), os.path.abspath(folder)]) == os.path.abspath(folder)


def _check_place(given: str, path: Path, dataset_dir: Path, what: str, key: str, allow_outside: bool) -> None:
    """A path that climbs out of `dataset_dir` reads what its owner may not have meant to be data. An absolute path says what is meant."""
    if not allow_outside and not os.path.isabs(given) and ".." in Path(given).parts and not _is_inside(path, dataset_dir):
        way_out = f"write the absolute path {os.path.abspath(path)}, or set allow_outside_dataset_dir: true"
        raise ConfigError(Problem(str(dataset_dir / INFO_FILE) if what else "", key, f"{what}'{given}' leads out of dataset_dir; {way_out}"))


def _read_info(dataset_dir: Path) -> dict[str, Any]:
    """The entries of `dataset_info.json`, by data set name."""
    path = dataset_dir / INFO_FILE
    if not dataset_dir.is_dir():
        raise ConfigError(Problem(str(dataset_dir), "dataset_dir", "is not a folder; set it to the one that holds dataset_info.json"))
    if not path.is_file():
        raise ConfigError(Problem(str(path), "dataset_dir", "does not exist; it describes the data sets that `dataset` names"))
    entries = parse_json(decode(path.read_bytes(), path, "dataset_dir"), path, "dataset_dir")
    if not isinstance(entries, dict):
        raise ConfigError(Problem(str(path), "dataset_dir", "must hold an object: data set names to their descriptions"))
    return entries


def _direct_file(name: str, dataset_dir: Path, stage: Stage) -> Path | None:
    if not name.endswith(suffixes(stage)):
        return None
    return next((path for path in (Path(name), dataset_dir / name) if os.path.isfile(path) or os.path.islink(path)), None)


def _direct_spec(name: str, path: Path, stage: Stage, key: str) -> DatasetSpec:
    """A spec for a file without an entry, by the columns of its first row."""
    check_files(path, stage, key)
    formatting, columns, tags = ("text", DEFAULT_COLUMNS["text"], {}) if stage == "pt" else _guess(path, key) or _read_if_there("alpaca", {})
    spec = DatasetSpec(name, path, formatting, columns, tags, key=key)
    _check_head(spec)
    return spec


def _guess(path: Path, key: str) -> tuple[Formatting, dict[str, str], dict[str, str]] | None:
    """Formatting, columns and tags of the first row of a file, if it is ShareGPT's, OpenAI's or TRL's format."""
    row = _first_row(path, key)
    for column in ("conversations", "messages"):
        if column in row:
            return _read_if_there("sharegpt", _guess_tags(_first_row(path, key, column).get(column), column), messages=column)
    if "prompt" in row and "completion" in row:
        return _read_if_there("prompt_completion", _completion_tags(_first_row(path, key, "completion").get("completion")))
    return None


def _read_if_there(formatting: Formatting, tags: dict[str, str], **columns: str) -> tuple[Formatting, dict[str, str], dict[str, str]]:
    """A format with all its optional columns, under their usual names."""
    optional = {role: role for role in OPTIONAL_COLUMNS[formatting]}
    return formatting, optional | DEFAULT_COLUMNS[formatting] | columns, tags


def _first_row(path: Path, key: str, filled: str | None = None) -> dict[str, Any]:
    """The first row, or the first one near the start in which a column is filled."""
    rows = islice((row for file in data_files(path) for _, row in records(file, key)), 1 if filled is None else _HEAD)
    return next((row for row in rows if isinstance(row, dict) and (filled is None or not says_nothing(row.get(filled)))), {})


def _completion_tags(completion: Any) -> dict[str, str]:
    """TRL's completion is text, or a list of messages, which have tags."""
    return _guess_tags(completion, "messages") if isinstance(completion, list) else {}


def _guess_tags(messages: Any, column: str) -> dict[str, str]:
    """Where a message's role and content stand, and what the roles are called: ShareGPT's `from: human` or OpenAI's `role: user`, or a mixture.

    Args:
        column: where the messages stand, which decides where they show nothing.
    """
    try:
        found = [message for message in as_list(messages, "") if isinstance(message, dict)]
    except ValueError:  # reported with its place when the row is read
        found = []
    tags = dict(DEFAULT_TAGS)
    openai = any("role" in message for message in found) if found else column == "messages"
    openai = openai and not any("from" in message for message in found)
    if openai:
        tags |= {tag: OPENAI_TAGS[tag] for tag in ("role_tag", "content_tag")}
    roles = {str(message.get(tags["role_tag"])) for message in found}
    if roles & {"user", "assistant"} or (openai and not roles & {"human", "gpt"}):
        tags |= {tag: name for tag, name in OPENAI_TAGS.items() if tag not in ("role_tag", "content_tag")}
    return tags


def _entry_spec(name: str, entries: dict[str, Any], info: Path, stage: Stage, key: str, allow_outside: bool) -> DatasetSpec:
    """A spec from an entry of `dataset_info.json`, with its file checked."""
    if name not in entries:
        raise ConfigError(Problem(str(info), key, f"has no data set '{name}'.{nearest(name, entries)} Available: {_some(entries)}"))
    entry = entries[name]
    if not isinstance(entry, dict):
        raise ConfigError(Problem(str(info), key, f"'{name}' must be an object with file_name, formatting, columns, ..."))
    entry = {option: value for option, value in entry.items() if value is not None}
    problems = [Problem(str(info), key, f"'{name}': {trouble}") for trouble in _entry_troubles(entry, stage)]
    path = info.parent / str(entry.get("file_name", ""))
    if "file_name" in entry:
        try:
            _check_place(str(entry["file_name"]), path, info.parent, f"'{name}': file_name ", key, allow_outside)
            check_files(path, stage, key)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    formatting, columns, tags = _described(entry, path, stage, key)
    spec = DatasetSpec(name, path, formatting, columns, tags, entry.get("num_samples"), key)
    _check_head(spec)
    return spec


def _described(entry: Mapping[str, Any], path: Path, stage: Stage, key: str) -> tuple[Formatting, dict[str, str], dict[str, str]]:
    """Formatting, columns and tags as an entry says, or, where it says only where the file is, as the file shows."""
    if stage == "pt":
        return "text", _columns(entry, "text"), {}
    if not any(option in entry for option in ("formatting", "columns", "tags")) and (guess := _guess(path, key)):
        return guess
    formatting: Formatting = entry.get("formatting", "alpaca")
    columns, tags = _columns(entry, formatting), entry.get("tags", {})
    if formatting in ("sharegpt", "openai"):
        tags = DEFAULT_TAGS | (OPENAI_TAGS if formatting == "openai" else {}) | tags
    elif formatting == "prompt_completion" and (guessed := _completion_tags(_first_row(path, key, columns["completion"]).get(columns["completion"]))):
        tags = guessed | tags
    return formatting, columns, tags


def _columns(entry: Mapping[str, Any], formatting: Formatting) -> dict[str, str]:
    """Roles to columns. As in LLaMA-Factory, an optional role that a given `columns` leaves out is not read."""
    defaults, given = DEFAULT_COLUMNS[formatting], entry.get("columns")
    if given is None:
        return dict(defaults)
    return {role: column for role, column in defaults.items() if role not in OPTIONAL_COLUMNS[formatting]} | given


def _entry_troubles(entry: Mapping[str, Any], stage: Stage) -> Iterator[str]:
    """Everything wrong with one entry, except its file."""
    for option in entry:
        if option not in ENTRY_KEYS:
            yield f"'{option}' is not a known key.{nearest(option, ENTRY_KEYS)} Known: {listing(ENTRY_KEYS)}"
        elif option in REMOTE_KEYS:
            yield f"{option}: data sets are not downloaded here; save the rows to a file and name it in file_name"
        elif option in HUB_ONLY_KEYS and (option, entry[option]) != ("split", "train"):
            yield f"{option} concerns data sets on a hub, which are not downloaded here; remove it"
    if entry.get("ranking"):
        yield "ranking: preference pairs cannot be trained on in stage sft or pt"
    if not any(option in entry for option in REMOTE_KEYS) and not (isinstance(entry.get("file_name"), str) and entry["file_name"]):
        yield "file_name is missing; it names the data file, or a folder of them, relative to dataset_dir"
    number = entry.get("num_samples", 1)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 10**12:
        yield f"num_samples must be a whole number above 0, got {number!r}"
    yield from _format_troubles(entry, stage)


def _format_troubles(entry: Mapping[str, Any], stage: Stage) -> Iterator[str]:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        yield f"formatting must be one of {listing(FORMATTINGS)}, got {formatting!r}.{nearest(str(formatting), FORMATTINGS)}".rstrip(".")
        return
    read = "text" if stage == "pt" else formatting
    allowed = {*DEFAULT_COLUMNS[read], *OPTIONAL_COLUMNS[read]}
    use = "stage pt" if stage == "pt" else f"formatting {formatting}"
    for role in _table_keys(entry, "columns"):
        if role not in allowed:
            what = f"is not used with {use}" if role in ROLES else "is not a known role"
            yield f"columns: '{role}' {what}.{nearest(role, allowed)} Allowed: {listing(allowed)}"
    for tag in _table_keys(entry, "tags"):
        if tag not in DEFAULT_TAGS:
            yield f"tags: '{tag}' is not known.{nearest(tag, DEFAULT_TAGS)} Known: {listing(DEFAULT_TAGS)}"
    if entry.get("tags") and read == "alpaca":
        yield "tags say how messages are written, and rows of formatting: alpaca hold none; use formatting: sharegpt or openai"
    for table in ("columns", "tags"):
        if not _is_table(entry.get(table, {})):
            yield f"{table} must be an object of names to names, got {entry[table]!r}"


def _table_keys(entry: Mapping[str, Any], table: str) -> list[str]:
    value = entry.get(table, {})
    return list(value) if _is_table(value) else []


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def _some(names: Iterable[str]) -> str:
    """At most ten names."""
    ordered = sorted(names)
    return listing(ordered[:10]) + (", ..." if len(ordered) > 10 else "")


def _check_head(spec: DatasetSpec) -> None:
    """The first rows of every file: valid, with the required columns.

    Raises:
        ConfigError: one problem per file.
    """
    problems, unread = [], set()
    for file in data_files(spec.path):
        try:
            head = list(islice(records(file, spec.key), _HEAD))
            if not head:
                raise ConfigError(Problem(str(file), spec.key, "holds no rows"))
            for place, record in head:
                reduced_row(place, record, spec)
            _check_columns(head[0][1], file, spec)
            unread |= {column for _, record in head for column, value in record.items() if _is_unread(column, value, spec)}
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if unread:
        names, verb = ", ".join(f"'{column}'" for column in sorted(unread)), "is" if len(unread) == 1 else "are"
        warn_once(f"{spec.path}: {spec.key}: {names} {verb} not read. What is to be read can be named in `columns` of '{spec.name}' in {INFO_FILE}")


def _is_unread(column: str, value: Any, spec: DatasetSpec) -> bool:
    """Whether a column that says something about the answer is filled and not used."""
    return spec.formatting != "text" and column in TELLING_COLUMNS and column not in spec.columns.values() and not says_nothing(value)


def _check_columns(row: Mapping[str, Any], file: Path, spec: DatasetSpec) -> None:
    missing = [column for role, column in spec.columns.items() if role not in OPTIONAL_COLUMNS[spec.formatting] and column not in row]
    if missing:
        names = ", ".join(f"'{column}'" for column in missing)
        roles = "text" if spec.formatting == "text" else "/".join(DEFAULT_COLUMNS[spec.formatting])
        hint = f"`columns` of '{spec.name}' in {INFO_FILE} says which column is the {roles}"
        raise ConfigError(Problem(str(file), spec.key, f"has no column {names}; its columns: {_some(row)}. {hint}"))
