"""Writing files so that a killed process never leaves a half-written one, and reading them so that a damaged one is noticed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

# A name of its own for every write: two processes never write into the same file, and what a dead one left can be told from everything else.
_TEMPORARY = re.compile(r"^\..+\.\d+-[0-9a-f]{8}\.tmp$")
_NO_SEAL = "0" * 64
_SEAL_STARTS = b'{\n "seal": "'


class DamagedFile(ValueError):
    """A file that is not as it was written; the message says in which way, without the path."""


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """As `write_bytes_atomically`, in UTF-8."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, which holds either its old content or all of the new one at any time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # such as a full disk
        temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Delete what killed processes left of their writes. Nobody else may be writing below `folder`."""
    for path in Path(folder).rglob(".*.tmp"):
        if _TEMPORARY.match(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def write_json_atomically(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON. NaN and infinity are written as Python's `json` reads them: a loss that diverged must not stop a save."""
    write_text_atomically(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_sealed_json(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """As `write_json_atomically`, with a seal in front: the digest of every byte of the file, itself read as zeros."""
    body = json.dumps(value, indent=1, sort_keys=True).removeprefix("{")
    text = _SEAL_STARTS + f'{_NO_SEAL}",{body}\n'.encode()
    write_bytes_atomically(path, text.replace(_NO_SEAL.encode(), sha256(text).encode(), 1))


def read_sealed_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_sealed_json` wrote. A file without a seal is read as it is, and has no key `seal`.

    Raises:
        DamagedFile: a byte is not as it was written, or it holds something else than a JSON object.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    start, end = len(_SEAL_STARTS), len(_SEAL_STARTS) + 64
    if data.startswith(_SEAL_STARTS) and sha256(data[:start] + _NO_SEAL.encode() + data[end:]).encode() != data[start:end]:
        raise DamagedFile("its bytes are not those that were written" if data.endswith(b"}\n") else "it is cut off")
    return read_json(data)


def read_json(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DamagedFile: `data` is something else.
    """
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError:
        raise DamagedFile("it is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedFile("it is empty" if not data.strip() else f"it is cut off or no JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"it holds no JSON object but {type(value).__name__}")
    return value


def write_array_atomically(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write `array` as .npy, without pickle."""
    write_bytes_atomically(path, _npy(array))


def write_sealed_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """As `write_array_atomically`, followed by the digest of all that, which `np.load` does not read."""
    data = _npy(array)
    write_bytes_atomically(path, data + hashlib.sha256(data).digest())


def read_sealed_array(path: str | os.PathLike[str]) -> np.ndarray:
    """What `write_sealed_array` wrote.

    Raises:
        DamagedFile: it is not as it was written.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    if len(data) < 32 or hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
        raise DamagedFile("its digest is not that of what it holds" if data else "it is empty")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def sync(path: str | os.PathLike[str]) -> None:
    """Have a file's content, or a folder's list of names, survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: str | os.PathLike[str]) -> str:
    """What tells a file's content from any that damage would leave: XXH3, 128 bits, as fast as memory. It is no proof against forgery."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
