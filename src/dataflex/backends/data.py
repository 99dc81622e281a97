"""From `dataset: a,b` and `dataset_dir` with LLaMA-Factory's `dataset_info.json` to tokenised rows.

`find_datasets` looks at the head of every file and reports all problems before anything heavy is loaded; `encode_sft` and `encode_text` read all.
A row that lacks something is left out and counted. A file that is not what it should be (bad JSON, a list where text belongs) is an error.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataflex.errors import ConfigError, Problem, listing, nearest

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from transformers import PreTrainedTokenizerBase

INFO_FILE = "dataset_info.json"
IGNORED = -100  # the label that a loss leaves out
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
MALFORMED, NO_REPLY, NO_TEMPLATE = "malformed", "no assistant turn", "chat template failed"
NO_TARGET, TOO_SHORT = "no target tokens within cutoff_len", "fewer than 2 tokens"

_HEAD = 100  # rows that find_datasets reads
_BATCH = 5000  # rows that are Python objects at one time
_DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "text": {"prompt": "text"},
}
_OPTIONAL_COLUMNS = {"alpaca": ("query", "system", "history"), "sharegpt": ("system",), "text": ()}
_UNREAD_COLUMNS = ("tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
_ROLES = ("prompt", "query", "response", "history", "messages", "system", *_UNREAD_COLUMNS)
_DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
_OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool"}
_REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_HUB_ONLY_KEYS = ("subset", "split", "folder", "revision")
_ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "num_samples", "ranking", *_REMOTE_KEYS, *_HUB_ONLY_KEYS)

DOMAIN_ROLE = "domain"  # of the column that `domain_column` names

Stage = Literal["sft", "pt"]
Formatting = Literal["alpaca", "sharegpt", "text"]


@dataclass(frozen=True)
class DatasetSpec:
    """Where one data set lies and how its rows are read.

    Attributes:
        path: a file, or a folder whose files are all read in the order of their names.
        columns: role (`prompt`, `response`, `messages`, ...) to column name. An optional role that is not listed is not read.
        tags: for sharegpt, LLaMA-Factory's `role_tag`, `content_tag`, `user_tag`, ... with defaults filled in; otherwise empty.
        num_samples: rows to take; a smaller data set is repeated from its start.
        key: the setting that named the data set, for messages.
    """

    name: str
    path: Path
    formatting: Formatting
    columns: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    key: str = "dataset"


@dataclass(frozen=True)
class Encoded:
    """Tokenised data sets, one after the other.

    Attributes:
        dataset: columns `input_ids` and `labels` (lists of equal length) and `domain_id` (an index into `names`).
        names: data set names.
        dropped: reason to number of rows left out.
    """

    dataset: datasets.Dataset
    names: list[str]
    dropped: dict[str, int]


# ---- Which data sets --------------------------------------------------------------------------------------------------------------------------


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
    entries = _parse_json(_decode(path.read_bytes(), path, "dataset_dir"), path, "dataset_dir")
    if not isinstance(entries, dict):
        raise ConfigError(Problem(str(path), "dataset_dir", "must hold an object: data set names to their descriptions"))
    return entries


def _direct_file(name: str, dataset_dir: Path, stage: Stage) -> Path | None:
    if not name.endswith(_suffixes(stage)):
        return None
    return next((path for path in (Path(name), dataset_dir / name) if path.is_file()), None)


def _direct_spec(name: str, path: Path, stage: Stage, key: str) -> DatasetSpec:
    """A spec for a file without an entry, by the columns of its first row."""
    _check_files(path, stage, key)
    row = next((row for _, row in _records(path, key)), None)
    known = row if isinstance(row, dict) else {}
    formatting: Formatting = "text" if stage == "pt" else "alpaca"
    columns, tags = dict(_DEFAULT_COLUMNS[formatting]), {}
    if stage == "sft" and "conversations" in known:
        formatting, columns, tags = "sharegpt", dict(_DEFAULT_COLUMNS["sharegpt"]), dict(_DEFAULT_TAGS)
    elif stage == "sft" and "messages" in known:
        formatting, columns, tags = "sharegpt", {"messages": "messages"}, {**_DEFAULT_TAGS, **_OPENAI_TAGS}
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
            _check_files(path, stage, key)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    formatting: Formatting = "text" if stage == "pt" else entry.get("formatting", "alpaca")
    tags = {**_DEFAULT_TAGS, **entry.get("tags", {})} if formatting == "sharegpt" else {}
    spec = DatasetSpec(name, path, formatting, _columns(entry, formatting), tags, entry.get("num_samples"), key)
    _check_head(spec)
    return spec


def _columns(entry: Mapping[str, Any], formatting: Formatting) -> dict[str, str]:
    """Roles to columns. As in LLaMA-Factory, an optional role that a given `columns` leaves out is not read."""
    defaults, given = _DEFAULT_COLUMNS[formatting], entry.get("columns")
    if given is None:
        return dict(defaults)
    return {role: column for role, column in defaults.items() if role not in _OPTIONAL_COLUMNS[formatting]} | given


def _entry_troubles(entry: Mapping[str, Any], stage: Stage) -> Iterator[str]:
    """Everything wrong with one entry, except its file."""
    for option in entry:
        if option not in _ENTRY_KEYS:
            yield f"'{option}' is not a known key.{nearest(option, _ENTRY_KEYS)} Known: {listing(_ENTRY_KEYS)}"
        elif option in _REMOTE_KEYS:
            yield f"{option}: data sets are not downloaded here; save the rows to a file and name it in file_name"
        elif option in _HUB_ONLY_KEYS and (option, entry[option]) != ("split", "train"):
            yield f"{option} concerns data sets on a hub, which are not downloaded here; remove it"
    if entry.get("ranking"):
        yield "ranking: preference pairs cannot be trained on in stage sft or pt"
    if not any(option in entry for option in _REMOTE_KEYS) and not (isinstance(entry.get("file_name"), str) and entry["file_name"]):
        yield "file_name is missing; it names the data file, or a folder of them, relative to dataset_dir"
    number = entry.get("num_samples", 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        yield f"num_samples must be a whole number above 0, got {number!r}"
    yield from _format_troubles(entry, stage)


def _format_troubles(entry: Mapping[str, Any], stage: Stage) -> Iterator[str]:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        yield f"formatting must be alpaca or sharegpt, got {formatting!r}"
        return
    read = "text" if stage == "pt" else formatting
    allowed = {*_DEFAULT_COLUMNS[read], *_OPTIONAL_COLUMNS[read]}
    use = "stage pt" if stage == "pt" else f"formatting {formatting}"
    for role in _table_keys(entry, "columns"):
        if role not in allowed:
            what = f"is not used with {use}" if role in _ROLES else "is not a known role"
            yield f"columns: '{role}' {what}.{nearest(role, allowed)} Allowed: {listing(allowed)}"
    for tag in _table_keys(entry, "tags"):
        if tag not in _DEFAULT_TAGS:
            yield f"tags: '{tag}' is not known.{nearest(tag, _DEFAULT_TAGS)} Known: {listing(_DEFAULT_TAGS)}"
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


# ---- Files ------------------------------------------------------------------------------------------------------------------------------------


def _suffixes(stage: Stage) -> tuple[str, ...]:
    return (*SUFFIXES, ".txt") if stage == "pt" else SUFFIXES


def _files(path: Path) -> list[Path]:
    """The file itself, or the visible files of a folder in the order of their names."""
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")) if path.is_dir() else [path]


def _check_files(path: Path, stage: Stage, key: str) -> None:
    """Existence, type and size.

    Raises:
        ConfigError: one problem per file.
    """
    if not path.exists():
        raise ConfigError(Problem(str(path), key, "does not exist"))
    if not _files(path):
        raise ConfigError(Problem(str(path), key, "is a folder without files"))
    problems = []
    for file in _files(path):
        if file.suffix not in _suffixes(stage):
            only = " (.txt is for stage pt)" if file.suffix == ".txt" else ""
            problems.append(Problem(str(file), key, f"has no supported file type{only}; supported: {listing(_suffixes(stage))}"))
        elif file.stat().st_size == 0:
            problems.append(Problem(str(file), key, "is empty"))
    if problems:
        raise ConfigError(problems)


def _check_head(spec: DatasetSpec) -> None:
    """The first rows of every file: valid, with the required columns.

    Raises:
        ConfigError: one problem per file.
    """
    problems = []
    for file in _files(spec.path):
        try:
            head = list(islice(_records(file, spec.key), _HEAD))
            if not head:
                raise ConfigError(Problem(str(file), spec.key, "holds no rows"))
            for place, record in head:
                _reduced_row(place, record, spec)
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


def _records(path: Path, key: str, wanted: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """(place, record) for each record of a file; `place` is `file:LINE` or `file, row N`.

    Args:
        wanted: columns that are needed; a format that can read columns one by one skips the others.

    Raises:
        ConfigError: the file is not what its name says.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path, key, wanted)
        elif path.suffix == ".csv":
            yield from _csv_records(path, key)
        elif path.suffix == ".txt":
            yield from ((f"{path}:{number}", {"text": line}) for number, line in _lines(path, key))
        else:
            yield from _json_records(path, key)
    except OSError as error:
        raise ConfigError(Problem(str(path), key, f"cannot be read: {error.strerror or error}")) from None


def _lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """(number, line) for each line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, key, number)
            if line.strip():
                yield number, line.rstrip("\r\n")


def _decode(raw: bytes, path: Path, key: str, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ConfigError(Problem(f"{path}:{line}", key, "is not UTF-8 text")) from None


def _parse_json(text: str, path: Path, key: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}"
        raise ConfigError(Problem(place, key, f"is not valid JSON: {error.msg} (column {error.colno})")) from None
    except RecursionError:
        raise ConfigError(Problem(f"{path}:{first_line}", key, "is nested too deeply")) from None


def _json_records(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """An array of records, or one record per line, whatever the file is called."""
    _, first = next(_lines(path, key), (0, ""))
    if first.lstrip().startswith("["):
        records = _parse_json(_decode(path.read_bytes(), path, key), path, key)
        yield from ((f"{path}, row {row}", record) for row, record in enumerate(records, start=1))
    else:
        yield from ((f"{path}:{number}", _parse_json(line, path, key, number)) for number, line in _lines(path, key))


def _csv_records(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if row and len(row) != len(header):
                    raise ConfigError(Problem(place, key, f"has {len(row)} fields, but the header names {len(header)}"))
                if row:
                    yield place, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ConfigError(Problem(f"{path}:{reader.line_num}", key, f"is not valid CSV: {error}")) from None
        except UnicodeDecodeError:
            raise ConfigError(Problem(str(path), key, "is not UTF-8 text")) from None


def _parquet_records(path: Path, key: str, wanted: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = None if wanted is None else [name for name in file.schema_arrow.names if name in wanted]
            row = 0
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except pa.ArrowException as error:
        raise ConfigError(Problem(str(path), key, f"is not a valid parquet file: {error}")) from None


# ---- Rows -------------------------------------------------------------------------------------------------------------------------------------


def load_rows(spec: DatasetSpec, max_samples: int | None = None) -> datasets.Dataset:
    """All rows, or the first `num_samples` and `max_samples`, in the order of the file; only the columns that the spec names.

    Unlike LLaMA-Factory, `num_samples` takes the first rows and no random ones, so that a run can be repeated.

    Raises:
        ConfigError: a row that is no object or holds a value of the wrong type, with its place.
    """
    import pyarrow as pa
    from datasets import Dataset

    limit = min((number for number in (spec.num_samples, max_samples) if number is not None), default=None)
    rows = islice(_rows(spec), limit)
    schema = _schema(spec)
    batches = iter(lambda: list(islice(rows, _BATCH)), [])
    dataset = Dataset(pa.concat_tables([schema.empty_table(), *(pa.Table.from_pylist(batch, schema=schema) for batch in batches)]))
    if spec.num_samples is not None and limit is not None and 0 < len(dataset) < limit:
        dataset = dataset.select([index % len(dataset) for index in range(limit)])
    return dataset


def _schema(spec: DatasetSpec) -> pyarrow.Schema:
    """Fixed types, since the types that Arrow would infer from some rows may not hold for the next ones."""
    import pyarrow as pa

    text = pa.string()
    types: dict[str, Any] = {"history": pa.list_(pa.list_(text))}
    if spec.formatting == "sharegpt":
        types["messages"] = pa.list_(pa.struct([(spec.tags["role_tag"], text), (spec.tags["content_tag"], text)]))
    return pa.schema({column: types.get(role, text) for role, column in spec.columns.items()})


def _rows(spec: DatasetSpec) -> Iterator[dict[str, Any]]:
    """Every row of every file, reduced to the spec's columns."""
    wanted = list(spec.columns.values())
    for file in _files(spec.path):
        for place, record in _records(file, spec.key, wanted):
            yield _reduced_row(place, record, spec)


def _reduced_row(place: str, record: Any, spec: DatasetSpec) -> dict[str, Any]:
    """The spec's columns with the types of `_schema`: numbers become text, and what is absent is None."""
    try:
        if not isinstance(record, dict):
            raise ValueError(f"is {_kind(record)}; each row must be an object of columns to values")
        return {column: _reduced(role, record.get(column), f"column '{column}'", spec) for role, column in spec.columns.items()}
    except ValueError as error:
        raise ConfigError(Problem(place, spec.key, str(error))) from None


def _reduced(role: str, value: Any, what: str, spec: DatasetSpec) -> Any:
    if value is None or role not in ("messages", "history"):
        return _text_or_none(value, what)
    if not isinstance(value, list):
        raise ValueError(f"{what} is {_kind(value)}, not a list")
    if role == "history":
        return [_reduced_pair(pair, what) for pair in value]
    return [_reduced_message(message, what, (spec.tags["role_tag"], spec.tags["content_tag"])) for message in value]


def _reduced_pair(pair: Any, what: str) -> list[str | None]:
    if not isinstance(pair, list):
        raise ValueError(f"{what} holds {_kind(pair)}, not a [prompt, response] pair")
    return [_text_or_none(item, what) for item in pair]


def _reduced_message(message: Any, what: str, tags: tuple[str, str]) -> dict[str, str | None]:
    if not isinstance(message, dict):
        raise ValueError(f"{what} holds {_kind(message)}, not a message with '{tags[0]}' and '{tags[1]}'")
    return {tag: _text_or_none(message.get(tag), f"{what}: '{tag}' of a message") for tag in tags}


def _text_or_none(value: Any, what: str) -> str | None:
    return None if value is None else _text(value, what)


def _text(value: Any, what: str) -> str:
    """Text as it is, numbers written out.

    Raises:
        ValueError: anything else, or text that no tokenizer can read.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{what} holds half of a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", bool: "a true/false value", type(None): "null", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def to_messages(row: Mapping[str, Any], spec: DatasetSpec, default_system: str | None = None) -> list[dict[str, str]]:
    """The conversation in a row, as chat templates take it: `[{"role": ..., "content": ...}, ...]`.

    Args:
        default_system: system prompt of a conversation that has none of its own.

    Raises:
        ValueError: an unknown role, a conversation without turns, or content that is missing or no text.
    """
    turns = _sharegpt_turns(row, spec) if spec.formatting == "sharegpt" else _alpaca_turns(row, spec.columns)
    column = spec.columns.get("system")
    system = (_text_or_none(row.get(column), f"column '{column}'") if column else None) or default_system
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _alpaca_turns(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, str]]:
    pairs = (row.get(columns["history"]) if "history" in columns else None) or []
    turns = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"column '{columns['history']}' must hold [prompt, response] pairs")
        turns += [{"role": role, "content": _text(text, "history")} for role, text in zip(("user", "assistant"), pair, strict=True)]
    prompt = _text(row.get(columns["prompt"]), f"column '{columns['prompt']}'")
    query = _text_or_none(row.get(columns["query"]), f"column '{columns['query']}'") if "query" in columns else None
    response = _text(row.get(columns["response"]), f"column '{columns['response']}'")
    user = "\n".join(part for part in (prompt, query) if part)
    return [*turns, {"role": "user", "content": user}, {"role": "assistant", "content": response}]


def _sharegpt_turns(row: Mapping[str, Any], spec: DatasetSpec) -> list[dict[str, str]]:
    """Turns with the roles of chat templates: `observation` becomes `tool`, and a `function_call` is what the assistant says."""
    column, tags = spec.columns["messages"], spec.tags
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    roles = {tags["observation_tag"]: "tool", tags["function_tag"]: "assistant", **roles}
    messages = row.get(column)
    if not messages:
        raise ValueError(f"column '{column}' holds no conversation")
    turns = []
    for message in messages:
        role = message.get(tags["role_tag"])
        if role not in roles:
            raise ValueError(f"'{tags['role_tag']}' is {role!r}; known: {listing(roles)}")
        turns.append({"role": roles[role], "content": _text(message.get(tags["content_tag"]), f"'{tags['content_tag']}' of a message")})
    return turns


# ---- Tokens -----------------------------------------------------------------------------------------------------------------------------------


def encode_sft(
    specs: Sequence[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    default_system: str | None = None,
    max_samples: int | None = None,
    num_proc: int | None = None,
) -> Encoded:
    """Conversations as tokens of the tokenizer's chat template; labels are the assistant's turns with the end that the template gives them.

    Args:
        cutoff_len: tokens kept from the start of a conversation.
        train_on_prompt: label every token.
        mask_history: label the last turn of the assistant only; of no effect with `train_on_prompt`.
        max_samples: rows per data set.

    Raises:
        ConfigError: a file that cannot be read, or a data set of which no row is left.
    """
    options: dict[str, Any] = {
        "cutoff_len": cutoff_len,
        "train_on_prompt": train_on_prompt,
        "mask_history": mask_history,
        "default_system": default_system,
    }
    return _encode(specs, partial(_encode_conversation, tokenizer=tokenizer, **options), max_samples=max_samples, num_proc=num_proc)


def encode_text(
    specs: Sequence[DatasetSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    pack: bool,
    max_samples: int | None = None,
    num_proc: int | None = None,
) -> Encoded:
    """Documents as tokens, each with an end-of-text token; labels equal `input_ids`.

    Args:
        cutoff_len: tokens per row.
        pack: join the documents of a data set and cut them into rows of `cutoff_len` tokens, the last one shorter; otherwise one document per row.
        max_samples: documents per data set.

    Raises:
        ConfigError: a file that cannot be read, or a data set of which no row is left.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(Problem("", "stage", "pt needs a tokenizer with an end-of-text token, to put between documents; this one has none"))
    encode_row = partial(_encode_document, tokenizer=tokenizer, cutoff_len=None if pack else cutoff_len)
    return _encode(specs, encode_row, block=cutoff_len if pack else None, max_samples=max_samples, num_proc=num_proc)


def _encode(
    specs: Sequence[DatasetSpec],
    encode_row: Callable[..., dict[str, Any]],
    *,
    block: int | None = None,
    max_samples: int | None,
    num_proc: int | None,
) -> Encoded:
    """Every data set through `encode_row`, joined in order. `block`: pack into rows of this many tokens."""
    from datasets import concatenate_datasets

    parts: list[datasets.Dataset] = []
    dropped: Counter[str] = Counter()
    problems = []
    domains = find_domains(specs, max_samples)
    for domain_id, (name, spec, raw) in enumerate(domains):
        rows = _map(raw, partial(encode_row, spec=spec, domain_id=domain_id), num_proc, f"Tokenising {name}")
        troubles = list(rows["trouble"])
        kept = [index for index, trouble in enumerate(troubles) if not trouble]
        reasons = Counter(trouble.partition(": ")[0] for trouble in troubles if trouble)
        part = (rows if len(kept) == len(rows) else rows.select(kept)).remove_columns("trouble")
        if block is not None and kept:
            part, reasons[TOO_SHORT] = _pack(part, block, domain_id), reasons[TOO_SHORT] + (_total(part) % block == 1)
        if len(part) == 0:
            problems.append(_nothing_left(spec, reasons, troubles))
        parts.append(part)
        dropped += reasons
    if problems:
        raise ConfigError(problems)
    return Encoded(concatenate_datasets(parts), [name for name, _, _ in domains], dict(dropped))


def find_domains(specs: Sequence[DatasetSpec], max_samples: int | None) -> list[tuple[str, DatasetSpec, datasets.Dataset]]:
    """Name, spec and raw rows of each domain: a data set, or the rows of a data set with one value in its column of the role `domain`.

    Raises:
        ConfigError: a row without a domain.
    """
    found = []
    for spec in specs:
        rows = load_rows(spec, max_samples)
        if DOMAIN_ROLE not in spec.columns:
            found.append((spec.name, spec, rows))
            continue
        values = np.array(rows[spec.columns[DOMAIN_ROLE]], dtype=object)
        absent = int(sum(value is None or value == "" for value in values))
        if absent:
            message = f"'{spec.columns[DOMAIN_ROLE]}' is empty in {absent} of {len(values)} rows of '{spec.name}'; every row needs a domain"
            raise ConfigError(Problem(str(spec.path), "domain_column", message))
        names = sorted(set(values.tolist()))
        prefix = f"{spec.name}/" if len(specs) > 1 else ""
        found += [(f"{prefix}{name}", spec, rows.select(np.flatnonzero(values == name))) for name in names]
    return found


def _map(rows: datasets.Dataset, encode_row: Callable[..., dict[str, Any]], num_proc: int | None, desc: str) -> datasets.Dataset:
    from datasets import Features, List, Value

    features = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "domain_id": Value("int64"), "trouble": Value("string")}
    return rows.map(
        encode_row,
        remove_columns=rows.column_names,
        features=Features(features),
        num_proc=min(num_proc, len(rows)) if num_proc and num_proc > 1 and len(rows) > 1 else None,
        load_from_cache_file=False,
        keep_in_memory=True,
        desc=desc,
    )


def _nothing_left(spec: DatasetSpec, reasons: Counter[str], troubles: Sequence[str]) -> Problem:
    counts = ", ".join(f"{number} x {reason}" for reason, number in reasons.most_common() if number) or "it has no rows"
    example = next((trouble for trouble in troubles if ": " in trouble), "")
    return Problem(str(spec.path), spec.key, f"no row of '{spec.name}' can be trained on: {counts}{f' (for example: {example})' if example else ''}")


def _left_out(domain_id: int, trouble: str) -> dict[str, Any]:
    return {"input_ids": [], "labels": [], "domain_id": domain_id, "trouble": trouble}


def _encode_conversation(
    row: Mapping[str, Any],
    *,
    spec: DatasetSpec,
    domain_id: int,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    train_on_prompt: bool,
    mask_history: bool,
    default_system: str | None,
) -> dict[str, Any]:
    """One row of `encode_sft`; `trouble` is empty, or `reason` or `reason: detail` for a row to leave out."""
    try:
        messages = to_messages(row, spec, default_system)
    except ValueError as error:
        return _left_out(domain_id, f"{MALFORMED}: {error}")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return _left_out(domain_id, NO_REPLY)
    try:
        tokens = _tokens(tokenizer, messages)
        spans = [(0, len(tokens))] if train_on_prompt else _reply_spans(tokenizer, messages, tokens, last_only=mask_history)
    except Exception as error:  # a template is a program of its own, and what it may raise is not known
        return _left_out(domain_id, f"{NO_TEMPLATE}: {error}")
    labels = [IGNORED] * len(tokens)
    for start, end in spans:
        labels[start:end] = tokens[start:end]
    tokens, labels = tokens[:cutoff_len], labels[:cutoff_len]
    # The first label has no token before it that could predict it.
    if all(label == IGNORED for label in labels[1:]):
        return _left_out(domain_id, NO_TARGET)
    return {"input_ids": tokens, "labels": labels, "domain_id": domain_id, "trouble": ""}


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    tokens: Any = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    return list(tokens)


def _reply_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], tokens: list[int], *, last_only: bool) -> list[tuple[int, int]]:
    """(start, end) in `tokens` of each turn of the assistant, from after its header to after its end-of-turn token."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for turn in turns[-1:] if last_only else turns:
        start = _common(tokens, _tokens(tokenizer, messages[:turn], prompt=True))
        last = turn + 1 == len(messages)
        spans.append((start, len(tokens) if last else _turn_end(tokens, _tokens(tokenizer, messages[: turn + 1]), start)))
    return spans


def _turn_end(tokens: list[int], prefix: list[int], start: int) -> int:
    """Where the turn that begins at `start`, and is the last one of `prefix`, ends in `tokens`."""
    common = _common(tokens, prefix)
    if common == len(prefix):
        return common
    # Some templates write a turn differently once others follow it: Qwen3 leaves out its thoughts. What is left is the end of the turn in `prefix`.
    for end in range(min(len(tokens), len(prefix)), max(common, start), -1):
        if tokens[start:end] == prefix[len(prefix) - (end - start) :]:
            return end
    return max(common, start)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((index for index, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right)))


def _encode_document(
    row: Mapping[str, Any], *, spec: DatasetSpec, domain_id: int, tokenizer: PreTrainedTokenizerBase, cutoff_len: int | None
) -> dict[str, Any]:
    """One document of `encode_text`; `trouble` as in `_encode_conversation`."""
    column = spec.columns["prompt"]
    try:
        text = _text(row[column], f"column '{column}'")
    except ValueError as error:
        return _left_out(domain_id, f"{MALFORMED}: {error}")
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:cutoff_len]
    if len(tokens) < 2:
        return _left_out(domain_id, TOO_SHORT)
    return {"input_ids": tokens, "labels": tokens, "domain_id": domain_id, "trouble": ""}


def _total(rows: datasets.Dataset) -> int:
    """Number of tokens."""
    import pyarrow.compute as pc

    return pc.sum(pc.list_value_length(rows.with_format("arrow")[:]["input_ids"])).as_py() or 0


def _pack(rows: datasets.Dataset, block: int, domain_id: int) -> datasets.Dataset:
    """All tokens in rows of `block`; the last row is shorter, and left out when it has a single token."""
    import pyarrow as pa
    from datasets import Dataset

    tokens = pa.concat_arrays([chunk.flatten() for chunk in rows.with_format("arrow")[:]["input_ids"].chunks])
    total = len(tokens) - (len(tokens) % block == 1)
    offsets = pa.array([*range(0, total, block), total], pa.int32())
    packed = pa.ListArray.from_arrays(offsets, tokens[:total])
    domains = pa.array([domain_id] * len(packed), pa.int64())
    return Dataset(pa.table({"input_ids": packed, "labels": packed, "domain_id": domains}), info=rows.info)
