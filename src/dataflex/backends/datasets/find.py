"""From `dataset: a,b` and `dataset_dir` with LLaMA-Factory's `dataset_info.json` to specs; the head of every file is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dataflex.backends.datasets.files import check_files, data_files, decode, parse_json, records, suffixes
from dataflex.backends.datasets.rows import reduced_row
from dataflex.backends.datasets.spec import (
    DEFAULT_COLUMNS,
    DEFAULT_TAGS,
    ENTRY_KEYS,
    HUB_ONLY_KEYS,
    INFO_FILE,
    OPENAI_TAGS,
    OPTIONAL_COLUMNS,
    REMOTE_KEYS,
    ROLES,
    DatasetSpec,
    Formatting,
    Stage,
)
from dataflex.errors import ConfigError, Problem, listing, nearest

_HEAD = 100  # rows that find_datasets reads


def find_datasets(names: Sequence[str], dataset_dir: Path, *, stage: Stage, key: str = "dataset") -> list[DatasetSpec]:
    """What `dataset: a,b` stands for. A name may also be a data file, as given or inside `dataset_dir`.

    Args:
        key: the setting that holds the names, for messages.

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
                specs.append(_direct_spec(name, files[name], stage, key))
            elif entries is not None:
                specs.append(_entry_spec(name, entries, dataset_dir / INFO_FILE, stage, key))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return specs


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
    return next((path for path in (Path(name), dataset_dir / name) if path.is_file()), None)


def _direct_spec(name: str, path: Path, stage: Stage, key: str) -> DatasetSpec:
    """A spec for a file without an entry, by the columns of its first row."""
    check_files(path, stage, key)
    row = next((row for _, row in records(path, key)), None)
    known = row if isinstance(row, dict) else {}
    formatting: Formatting = "text" if stage == "pt" else "alpaca"
    columns, tags = dict(DEFAULT_COLUMNS[formatting]), {}
    if stage == "sft" and "conversations" in known:
        formatting, columns, tags = "sharegpt", dict(DEFAULT_COLUMNS["sharegpt"]), dict(DEFAULT_TAGS)
    elif stage == "sft" and "messages" in known:
        formatting, columns, tags = "sharegpt", {"messages": "messages"}, {**DEFAULT_TAGS, **OPENAI_TAGS}
    spec = DatasetSpec(name, path, formatting, columns, tags, key=key)
    _check_head(spec)
    return spec


def _entry_spec(name: str, entries: dict[str, Any], info: Path, stage: Stage, key: str) -> DatasetSpec:
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
            check_files(path, stage, key)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    formatting: Formatting = "text" if stage == "pt" else entry.get("formatting", "alpaca")
    tags = {**DEFAULT_TAGS, **entry.get("tags", {})} if formatting == "sharegpt" else {}
    spec = DatasetSpec(name, path, formatting, _columns(entry, formatting), tags, entry.get("num_samples"), key)
    _check_head(spec)
    return spec


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
    if formatting not in ("alpaca", "sharegpt"):
        yield f"formatting must be alpaca or sharegpt, got {formatting!r}"
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
        yield "tags are used with formatting: sharegpt only"
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
    problems = []
    for file in data_files(spec.path):
        try:
            head = list(islice(records(file, spec.key), _HEAD))
            if not head:
                raise ConfigError(Problem(str(file), spec.key, "holds no rows"))
            for place, record in head:
                reduced_row(place, record, spec)
            _check_columns(head[0][1], file, spec)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def _check_columns(row: Mapping[str, Any], file: Path, spec: DatasetSpec) -> None:
    missing = [spec.columns[role] for role in spec.columns if role not in ("query", "system", "history") and spec.columns[role] not in row]
    if missing:
        names = ", ".join(f"'{column}'" for column in missing)
        hint = f"`columns` of '{spec.name}' in {INFO_FILE} says which column is the {'text' if spec.formatting == 'text' else '/'.join(spec.columns)}"
        raise ConfigError(Problem(str(file), spec.key, f"has no column {names}; its columns: {_some(row)}. {hint}"))
