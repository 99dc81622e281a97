"""The rows of a data set, reduced to the columns that are read, with fixed types."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from dataflex.backends.datasets.cells import content_or_none, is_missing, json_of, kind_of, text_or_none
from dataflex.backends.datasets.files import data_files, records
from dataflex.backends.datasets.spec import DEFAULT_COLUMNS, FIELDS, OPTIONAL_COLUMNS, DatasetSpec
from dataflex.errors import ConfigError, Problem

if TYPE_CHECKING:
    import datasets
    import pyarrow

_BATCH = 5000  # rows that are Python objects at one time


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
    table = pa.concat_tables([schema.empty_table(), *(pa.Table.from_pylist(batch, schema=schema) for batch in batches)])
    dataset = Dataset(table.drop_columns([column for column in _optional(spec) if table[column].null_count == len(table)]))
    if spec.num_samples is not None and limit is not None and 0 < len(dataset) < limit:
        dataset = dataset.select([index % len(dataset) for index in range(limit)])
    return dataset


def _schema(spec: DatasetSpec) -> pyarrow.Schema:
    """Fixed types, since the types that Arrow would infer from some rows may not hold for the next ones."""
    import pyarrow as pa

    text = pa.string()
    types: dict[str, Any] = {"history": pa.list_(pa.list_(text))}
    if spec.tags:
        message = pa.struct([(spec.tags["role_tag"], text), (spec.tags["content_tag"], text), (FIELDS, text)])
        types |= dict.fromkeys(spec.message_roles, pa.list_(message))
    return pa.schema({column: types.get(role, text) for role, column in spec.columns.items()})


def _optional(spec: DatasetSpec) -> list[str]:
    """Columns that are read if they are there; where no row has one, every later look at a row would pay for it."""
    always = DEFAULT_COLUMNS[spec.formatting]
    return [column for role, column in spec.columns.items() if role in OPTIONAL_COLUMNS[spec.formatting] and role not in always]


def _rows(spec: DatasetSpec) -> Iterator[dict[str, Any]]:
    """Every row of every file, reduced to the spec's columns."""
    wanted = list(spec.columns.values())
    for file in data_files(spec.path):
        for place, record in records(file, spec.key, wanted):
            yield reduced_row(place, record, spec)


def reduced_row(place: str, record: Any, spec: DatasetSpec) -> dict[str, Any]:
    """The spec's columns with the types of `_schema`: numbers become text, and what is absent is None."""
    try:
        if not isinstance(record, dict):
            raise ValueError(f"is {kind_of(record)}; each row must be an object of columns to values")
        return {column: _reduced(role, record.get(column), f"column '{column}'", spec) for role, column in spec.columns.items()}
    except ValueError as error:
        raise ConfigError(Problem(place, spec.key, str(error))) from None


def _reduced(role: str, value: Any, what: str, spec: DatasetSpec) -> Any:
    if is_missing(value):
        return None
    if role in spec.message_roles:
        return [_reduced_message(message, what, spec.tags) for message in as_list(value, what)]
    if role == "history":
        return [_reduced_pair(pair, what) for pair in as_list(value, what)]
    if role == "tools":
        tools = _parsed(value, what) or []
        return json_of([_tool(tool, what) for tool in (tools if isinstance(tools, list) else [tools])], what) if tools else None
    if role == "chat_template_kwargs":
        settings = _parsed(value, what) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{what} is {kind_of(settings)}, not an object")
        return json_of(settings, what) if settings else None
    return text_or_none(value, what)


def _parsed(value: Any, what: str) -> Any:
    """A nested value, which may be given as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is text that is not valid JSON") from None


def as_list(value: Any, what: str) -> list[Any]:
    """A list, which CSV can only hold as JSON text."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value) if value.strip() else []
    if not isinstance(value, list):
        raise ValueError(f"{what} is {kind_of(value)}, not a list")
    return value


def _tool(tool: Any, what: str) -> dict[str, Any]:
    """A tool as chat templates expect it, `{"type": "function", "function": {...}}`; LLaMA-Factory's files leave the wrapping out."""
    tool = _parsed(tool, what)
    if isinstance(tool, dict) and "name" in tool and "function" not in tool:
        tool = {"type": "function", "function": tool}
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
        raise ValueError(f"{what} holds {kind_of(tool)}, not a tool with a name")
    return tool


def _reduced_pair(pair: Any, what: str) -> list[str | None]:
    if not isinstance(pair, list):
        raise ValueError(f"{what} holds {kind_of(pair)}, not a [prompt, response] pair")
    return [text_or_none(item, what) for item in pair]


def _reduced_message(message: Any, what: str, tags: Mapping[str, str]) -> dict[str, str | None]:
    role, content = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, dict):
        raise ValueError(f"{what} holds {kind_of(message)}, not a message with '{role}' and '{content}'")
    fields = {name: value for name, value in message.items() if name not in (role, content) and not says_nothing(value)}
    weight = fields.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{what}: 'weight' of a message is {weight!r}; only 0 (no target) and 1 are known")
    return {
        role: text_or_none(message.get(role), f"{what}: '{role}' of a message"),
        content: content_or_none(message.get(content), f"{what}: '{content}' of a message"),
        FIELDS: json_of(fields, f"{what}: a message") if fields else None,
    }


def says_nothing(value: Any) -> bool:
    """A field that is there for form's sake: null, or an empty text, list or object."""
    return is_missing(value) or (isinstance(value, str | list | dict) and not value)
