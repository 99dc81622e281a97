"""Records of the files that hold rows: JSON, JSON lines, CSV, parquet, text. A file that is not what its name says is an error with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataflex.backends.datasets.spec import SUFFIXES, Stage
from dataflex.errors import ConfigError, Problem, listing


def suffixes(stage: Stage) -> tuple[str, ...]:
    return (*SUFFIXES, ".txt") if stage == "pt" else SUFFIXES


def data_files(path: Path) -> list[Path]:
    """The file itself, or the visible files of a folder in the order of their names."""
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")) if path.is_dir() else [path]


def check_files(path: Path, stage: Stage, key: str) -> None:
    """Existence, type and size.

    Raises:
        ConfigError: one problem per file.
    """
    if not path.exists():
        raise ConfigError(Problem(str(path), key, "does not exist"))
    if not data_files(path):
        raise ConfigError(Problem(str(path), key, "is a folder without files"))
    problems = []
    for file in data_files(path):
        if file.suffix not in suffixes(stage):
            only = " (.txt is for stage pt)" if file.suffix == ".txt" else ""
            problems.append(Problem(str(file), key, f"has no supported file type{only}; supported: {listing(suffixes(stage))}"))
        elif file.stat().st_size == 0:
            problems.append(Problem(str(file), key, "is empty"))
    if problems:
        raise ConfigError(problems)


def records(path: Path, key: str, wanted: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
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
            line = decode(raw, path, key, number)
            if line.strip():
                yield number, line.rstrip("\r\n")


def decode(raw: bytes, path: Path, key: str, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ConfigError(Problem(f"{path}:{line}", key, "is not UTF-8 text")) from None


def parse_json(text: str, path: Path, key: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}"
        raise ConfigError(Problem(place, key, f"is not valid JSON: {error.msg} (column {error.colno})")) from None
    except RecursionError:
        raise ConfigError(Problem(f"{path}:{first_line}", key, "is nested too deeply")) from None
    except ValueError as error:  # Python reads no number of more than 4300 digits
        raise ConfigError(Problem(f"{path}:{first_line}", key, f"holds a number that cannot be read: {error}")) from None


def _json_records(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """An array of records, or one record per line, whatever the file is called."""
    _, first = next(_lines(path, key), (0, ""))
    if first.lstrip().startswith("["):
        records = parse_json(decode(path.read_bytes(), path, key), path, key)
        yield from ((f"{path}, row {row}", record) for row, record in enumerate(records, start=1))
    else:
        yield from ((f"{path}:{number}", parse_json(line, path, key, number)) for number, line in _lines(path, key))


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
