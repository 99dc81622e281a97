"""Names of files and folders that no file can have, or behind which there is none; found before anything opens them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.errors import Problem

# Keys that name a file or a folder, or several.
PATHS = (
    "model_name_or_path",
    "adapter_name_or_path",
    "cache_dir",
    "dataset",
    "eval_dataset",
    "dataset_dir",
    "template",
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "components_cfg_file",
    "plugins",
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
)
_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, on the usual file systems


def path_problems(settings: Mapping[str, Any], folder: Path) -> list[Problem]:
    """What is wrong with the names under `PATHS`, which may be relative to `folder`, that of the training file."""
    return [Problem("", key, trouble) for key in PATHS for name in _names(settings.get(key)) if (trouble := _trouble(name, folder))]


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from value.split(",")
    elif isinstance(value, list | tuple):
        yield from (name for name in value if isinstance(name, str))


def _trouble(name: str, folder: Path) -> str:
    if "\0" in name:
        return "holds a zero byte, which no name of a file can"
    parts = [os.fsencode(part) if _encodable(part) else None for part in name.strip().split("/")]
    if None in parts:
        return "holds half of a surrogate pair, which no name of a file can"
    longest = max(len(part or b"") for part in parts)
    if longest > _LONGEST_NAME or len(os.fsencode(name)) > _LONGEST_PATH:
        return f"'{name[:40]}...' is too long for a name of a file: {max(longest, len(name))} bytes; {_LONGEST_NAME} are allowed"
    return "is a pipe or a device, not a file or folder" if any(map(_is_special, (Path(name.strip()), folder / name.strip()))) else ""


def _encodable(part: str) -> bool:
    try:
        os.fsencode(part)
    except UnicodeEncodeError:
        return False
    return True


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
