"""Tokenised rows, kept on disk by content: `validate` counts them, `train` and every rank read the same file, mapped into memory.

A key is a digest of the data files, of how rows are read and of everything that turns them into tokens, the code of this package included.
An entry is `KEY.arrow` and `KEY.json`, which holds its digest and is written last; one that does not fit its digest is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.utils.files import file_digest, write_json_atomically
from dataflex.utils.logging import logger

VARIABLE = "DATAFLEX_CACHE"


def cache_folder() -> Path:
    """`$DATAFLEX_CACHE`, or `dataflex` in the user's cache folder. It may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(VARIABLE) or Path(base) / "dataflex") / "tokenised"


def digest(*parts: Any) -> str:
    """Of JSON values; a part of another kind is an error rather than a key that means nothing."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str().partition('"added_tokens"')[2]  # before it stand truncation and padding, which are of the last call
    else:
        content = [sorted(tokenizer.get_vocab().items()), {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items())}]
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    return digest(type(tokenizer).__name__, content, special, str(tokenizer.chat_template))


@cache
def code_digest() -> str:
    """Of the code that reads and tokenises, and the versions of what it calls."""
    from importlib.metadata import version

    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest([file_digest(file) for file in files], [version(name) for name in ("transformers", "tokenizers", "jinja2")])


def cached(key: str, write: Callable[[Path], list[str]], *, renew: bool = False) -> tuple[Path, list[str]]:
    """The Arrow file of `key`, and what there was to say when it was made; made by `write`, in one process of the machine while the others wait,
    if it is not there or damaged.

    Args:
        write: writes the file at a given path, and returns what there is to say.
        renew: make it again.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / f"{key}.lock")
    except OSError as error:
        folder, lock = _temporary(error), nullcontext()
    path = folder / f"{key}.arrow"
    with lock:
        known = None if renew and key not in _HERE else _intact(path)
        if known is not None:
            return path, known["notes"]
        partial = folder / f".{key}.{os.getpid()}.partial"
        try:
            notes = write(partial)
            note = {"xxh3_128": file_digest(partial), "bytes": partial.stat().st_size, "notes": notes}
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        write_json_atomically(path.with_suffix(".json"), note)
        _HERE.add(key)
    return path, notes


_HERE: set[str] = set()  # entries that this process has made


def _lock(path: Path) -> AbstractContextManager[Any]:
    from filelock import FileLock

    lock = FileLock(path)
    lock.acquire(blocking=True)
    lock.release()
    return lock


def _intact(path: Path) -> dict[str, Any] | None:
    """The note of an entry that fits its digest."""
    note = path.with_suffix(".json")
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if path.stat().st_size == known["bytes"] and file_digest(path) == known["xxh3_128"] and isinstance(known["notes"], list):
            return dict(known)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is damaged; the rows are tokenised again", path)
    note.unlink(missing_ok=True)
    return None


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="dataflex-tokenised-")


def _temporary(error: OSError) -> Path:
    logger.warning(
        "%s cannot be written (%s): tokenised rows are not kept for the next run. Set %s to another folder", cache_folder(), error, VARIABLE
    )
    return Path(_temporary_folder().name)


def list_array(values: list[list[int]]) -> Any:
    """Lists of whole numbers as an Arrow array of int32 lists."""
    import pyarrow as pa

    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.concatenate([np.asarray(value, dtype=np.int32) for value in values]) if values else np.zeros(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()))
