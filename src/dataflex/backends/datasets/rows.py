"""The rows of a data set, reduced to the columns that are read, with fixed types."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from dataflex.backends.datasets.cells import kind_of, text_or_none
from dataflex.backends.datasets.files import data_files, records
from dataflex.backends.datasets.spec import DatasetSpec
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
    if value is None or role not in ("messages", "history"):
        return text_or_none(value, what)
    if not isinstance(value, list):
        raise ValueError(f"{what} is {kind_of(value)}, not a list")
    if role == "history":
        return [_reduced_pair(pair, what) for pair in value]
    return [_reduced_message(message, what, (spec.tags["role_tag"], spec.tags["content_tag"])) for message in value]


def _reduced_pair(pair: Any, what: str) -> list[str | None]:
    if not isinstance(pair, list):
        raise ValueError(f"{what} holds {kind_of(pair)}, not a [prompt, response] pair")
    return [text_or_none(item, what) for item in pair]


def _reduced_message(message: Any, what: str, tags: tuple[str, str]) -> dict[str, str | None]:
    if not isinstance(message, dict):
        raise ValueError(f"{what} holds {kind_of(message)}, not a message with '{tags[0]}' and '{tags[1]}'")
    return {tag: text_or_none(message.get(tag), f"{what}: '{tag}' of a message") for tag in tags}
