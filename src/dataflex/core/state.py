"""What DataFlex keeps inside a checkpoint: `checkpoint-N/dataflex/{state.json,state.safetensors}`, and which checkpoints can be resumed.

No pickle. The tensors are written first, the JSON, which carries their digest and a seal over itself, last, both atomically and before the
Trainer writes `trainer_state.json`. The manifest (`manifest.py`) comes after everything: a checkpoint of ours without one is half-written.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from dataflex.core.manifest import NAME, Share, digest_flaws, read_manifest, size_flaws
from dataflex.errors import ResumeError
from dataflex.utils.files import DamagedFile, read_json, read_sealed_json, sha256, write_bytes_atomically, write_sealed_json

FOLDER = "dataflex"
VERSION = 3
_WITHOUT_SEAL = 2
"""The version before, which had neither seal nor manifest; it holds the same."""

Agree = Callable[[list[str]], list[str]]


def save_state(checkpoint: str | Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write `state` (JSON types) and `tensors` into the checkpoint folder."""
    folder = Path(checkpoint) / FOLDER
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_bytes_atomically(folder / "state.safetensors", data)
    write_sealed_json(folder / "state.json", {"version": VERSION, "sha256": sha256(data), **state})


def load_state(checkpoint: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what `save_state` wrote.

    Raises:
        ResumeError: there is none, it is damaged, or another version wrote it.
    """
    folder = Path(checkpoint) / FOLDER
    name = "state.json"
    try:
        state = read_sealed_json(folder / name)
        name = "state.safetensors"
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        raise ResumeError(f"{checkpoint} holds no DataFlex state ({name} is missing), so it cannot be resumed exactly") from None
    except DamagedFile as error:
        raise ResumeError(f"{folder / name} is damaged: {error}") from None
    except OSError as error:
        raise ResumeError(f"{folder / name} cannot be read: {error.strerror}") from None
    version = state.get("version")
    if version == VERSION and "seal" not in state:
        raise ResumeError(f"{folder / 'state.json'} is damaged: it has no seal")
    if version not in (VERSION, _WITHOUT_SEAL):
        raise ResumeError(f"{folder} was written by state version {version}; this DataFlex reads version {VERSION}")
    if sha256(data) != state.get("sha256"):
        raise ResumeError(f"{folder / 'state.safetensors'} is damaged: its digest differs from the one in state.json")
    return state, load(data)


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-N`, the highest number first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=checkpoint_number, reverse=True)


def checkpoint_number(checkpoint: Path) -> int:
    """The step a checkpoint is of, -1 if its name does not say."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def newest_complete_checkpoint(
    output_dir: str | Path, *, with_state: bool = True, share: Share | None = None, agree: Agree = lambda flaws: flaws
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed, and why newer ones were passed over.

    The Trainer's own search takes the highest number even when a killed process left it half-written.

    Args:
        with_state: whether it must hold DataFlex's state, which a run of the Trainer alone does not write.
        share: the part of the files whose content is read and compared with the manifest; without it, names and sizes are.
        agree: joins what the ranks found out.
    """
    skipped: list[str] = []
    names = agree([str(path) for path in checkpoint_folders(output_dir)])
    for path in sorted(map(Path, names), key=checkpoint_number, reverse=True):
        flaws = agree(checkpoint_flaws(path, with_state=with_state, share=share))
        if not flaws:
            return path, skipped
        skipped.append("; ".join(flaws))
    return None, skipped


def checkpoint_flaws(path: Path, *, with_state: bool = True, share: Share | None = None, named: bool = False) -> list[str]:
    """Why a checkpoint cannot be resumed; empty if it can. Arguments as in `newest_complete_checkpoint`.

    Args:
        named: whether the user named it; then it may lack its manifest, as one that was uploaded does.
    """
    try:
        ranks = _check_state(path, required=with_state)
        files = read_manifest(path)
        flaws = [] if files is None else size_flaws(path, files)
        if flaws:
            return flaws
        _check_trainer_state(path)
        if files is not None:
            return [] if share is None else digest_flaws(path, files, share)
        if ranks is not None and not named:
            return [f"{path} is incomplete (no {NAME})"]
    except ResumeError as error:
        return [str(error)]
    return list(_unlisted_flaws(path))


def is_verifiable(path: Path) -> bool:
    """Whether a checkpoint has a manifest."""
    return (path / NAME).is_file()


def _check_state(path: Path, *, required: bool) -> int | None:
    """The number of ranks that wrote the state, None if it is not there or of the version without a manifest."""
    if not required and not (path / FOLDER).exists():
        return None
    state, _ = load_state(path)
    if required and "stream" not in state:
        raise ResumeError(f"{path} is of a run without an algorithm (train_type: static), so there is no state of one to go on from")
    ranks = len(state.get("pending", {}).get("loss", []))
    if state["version"] == VERSION:
        return ranks
    # Rank 0 writes trainer_state.json without waiting for the other ranks' generators.
    missing = [name for rank in range(ranks) if ranks > 1 and not (path / (name := f"rng_state_{rank}.pth")).is_file()]
    if missing:
        raise ResumeError(f"{path} is incomplete (no {', '.join(missing)})")
    return None


def _check_trainer_state(path: Path) -> None:
    try:
        read_json((path / "trainer_state.json").read_bytes())
    except FileNotFoundError:
        raise ResumeError(f"{path} is incomplete (no trainer_state.json)") from None
    except DamagedFile as error:
        raise ResumeError(f"{path / 'trainer_state.json'} is damaged: {error}") from None
    except OSError as error:
        raise ResumeError(f"{path / 'trainer_state.json'} cannot be read: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------ without a manifest

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def _unlisted_flaws(path: Path) -> Iterator[str]:
    """What a checkpoint lacks that the Trainer alone wrote, as far as can be told: it goes on with a fresh optimizer when one is missing."""
    sharded = any(path.glob("global_step*")) or any(path.glob("pytorch_model_fsdp*"))  # DeepSpeed and FSDP keep all in folders of theirs
    parts = {name for index in _INDICES if (path / index).is_file() for name in _weight_map(path / index).values()}
    if not sharded and not parts and not any((path / name).is_file() for name in _WEIGHTS) and not any(path.glob(f"*/{_WEIGHTS[2]}")):
        yield f"{path} is incomplete (no {_WEIGHTS[0]})"
    needed = set() if sharded else {"optimizer.pt"}
    needed |= set() if any(path.glob("global_step*")) else {"scheduler.pt"}
    for name in sorted(parts | needed):
        if not (path / name).exists():
            yield f"{path} is incomplete (no {name})"
    if not any(path.glob("rng_state*.pth")):
        yield f"{path} is incomplete (no rng_state.pth)"
    for file in sorted(path.rglob("*")):
        if file.suffix in (".safetensors", ".pt", ".pth", ".bin") and file.is_file() and not _readable(file):
            yield f"{file} is damaged: it is {'cut off' if file.stat().st_size else 'empty'}"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(read_json(index.read_bytes())["weight_map"])
    except (DamagedFile, OSError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{index} is damaged: {error}") from None


def _readable(file: Path) -> bool:
    """Whether a file of tensors has its beginning and its end."""
    try:
        if file.suffix != ".safetensors":
            return zipfile.is_zipfile(file)
        with safe_open(str(file), framework="pt"):
            return True
    except (SafetensorError, OSError, json.JSONDecodeError):
        return False
