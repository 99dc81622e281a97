"""`checkpoint-N/dataflex_manifest.json`: size and digest (XXH3) of every file of a checkpoint, the host's too.

It is written last, after the files it lists have reached the disk. So a checkpoint with a manifest is whole even after a power loss, and any
file that changed since is found. The ranks share the reading, since digests of large files take time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.errors import ResumeError
from dataflex.utils.files import DamagedFile, file_digest, read_sealed_json, sync, write_sealed_json

NAME = "dataflex_manifest.json"
VERSION = 1
_OF_RANK = re.compile(r"^rng_state_(\d+)\.pth$")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """Which part of the files is this process's: it is the `index`-th of `size` processes that see the folder."""

    index: int = 0
    size: int = 1

    def of(self, files: dict[str, int]) -> list[str]:
        """This share of `files` (name: bytes): a rank's own, and of the others about equally many bytes."""
        loads = dict.fromkeys(range(self.size), 0)
        mine = []
        for name, size in sorted(files.items(), key=lambda item: (-item[1], item[0])):
            own = _OF_RANK.match(name)
            rank = int(own.group(1)) % self.size if own else min(loads, key=lambda index: (loads[index], index))
            loads[rank] += size
            if rank == self.index:
                mine.append(name)
        return mine


ALL = Share()


def files_of(folder: Path) -> dict[str, int]:
    """Every file below a checkpoint folder with its size, except the manifest."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found if path.name != NAME}


def describe(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Size and digest of files, which are then safe on the disk."""
    names = list(names)
    with _readers(len(names)) as readers:
        synced = readers.map(lambda name: sync(folder / name), names)  # the disk works while digests are taken
        found = list(readers.map(lambda name: _entry(folder / name), names))
        list(synced)
    return dict(zip(names, found, strict=True))


def write_manifest(folder: Path, step: int, entries: dict[str, Entry]) -> None:
    """Write the manifest; with it the checkpoint is whole."""
    for inner in {folder, *((folder / name).parent for name in entries)}:
        sync(inner)
    write_sealed_json(folder / NAME, {"version": VERSION, "global_step": step, "files": entries})
    sync(folder)
    sync(folder.parent)


def read_manifest(folder: Path) -> dict[str, Entry] | None:
    """The files that a checkpoint should have, or None if nothing says so.

    Raises:
        ResumeError: the manifest is damaged.
    """
    path = folder / NAME
    try:
        content = read_sealed_json(path)
        if "seal" not in content or content.get("version") != VERSION:
            raise DamagedFile("it has no seal" if "seal" not in content else f"version {content.get('version')} is not {VERSION}")
    except FileNotFoundError:
        return None
    except (DamagedFile, OSError) as error:
        raise ResumeError(f"{path} is damaged: {error}") from None
    files: dict[str, Entry] = content["files"]
    return files


def size_flaws(folder: Path, files: dict[str, Entry]) -> list[str]:
    """What is wrong with a checkpoint as far as names and sizes tell."""
    return [flaw for name, entry in files.items() if (flaw := _size_flaw(folder, name, entry["size"]))]


def _size_flaw(folder: Path, name: str, wanted: int) -> str:
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{folder} is incomplete (no {name})"
    except OSError as error:
        return f"{folder / name} cannot be read: {error.strerror}"
    how = "empty" if not size else "cut off" if size < wanted else "longer than it was"
    return "" if size == wanted else f"{folder / name} is damaged: it is {how} ({size} bytes instead of {wanted})"


def digest_flaws(folder: Path, files: dict[str, Entry], share: Share = ALL) -> list[str]:
    """Which files of a checkpoint, of this share of them, hold something else than what was written."""
    names = share.of({name: entry["size"] for name, entry in files.items()})

    def flaw(name: str) -> str:
        try:
            changed = _entry(folder / name) != files[name]
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
        return f"{folder / name} is damaged: its digest differs from the one in {NAME}" if changed else ""

    with _readers(len(names)) as readers:
        return [found for found in readers.map(flaw, names) if found]


def _entry(path: Path) -> Entry:
    return {"size": path.stat().st_size, "xxh3_128": file_digest(path)}


def _readers(files: int) -> ThreadPoolExecutor:
    """Threads for reading: digests are taken outside Python's lock."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ThreadPoolExecutor(max(1, min(files, 8, (os.cpu_count() or 1) // local + 1)))
