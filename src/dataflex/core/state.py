"""What DataFlex keeps inside a checkpoint: `checkpoint-N/dataflex/{state.json,state.safetensors}`. No pickle.

The tensors are written first, the JSON, which carries their digest, last, both atomically and before the Trainer writes
`trainer_state.json`. So a checkpoint with a `trainer_state.json` has our state, and a damaged one is told from a whole one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from dataflex.errors import ResumeError
from dataflex.utils.files import sha256, write_json_atomically

FOLDER = "dataflex"
VERSION = 2


def save_state(checkpoint: str | Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write `state` (JSON types) and `tensors` into the checkpoint folder."""
    folder = Path(checkpoint) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    temporary = folder / "state.safetensors.tmp"
    temporary.write_bytes(data)
    temporary.replace(folder / "state.safetensors")
    write_json_atomically(folder / "state.json", {"version": VERSION, "sha256": sha256(data), **state})


def load_state(checkpoint: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what `save_state` wrote.

    Raises:
        ResumeError: there is none, it is damaged, or another version wrote it.
    """
    folder = Path(checkpoint) / FOLDER
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        data = (folder / "state.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise ResumeError(f"{checkpoint} holds no DataFlex state ({Path(error.filename).name} is missing), so it cannot be resumed exactly") from None
    except json.JSONDecodeError as error:
        raise ResumeError(f"{folder / 'state.json'} is damaged: {error}") from None
    if state.get("version") != VERSION:
        raise ResumeError(f"{folder} was written by state version {state.get('version')}; this DataFlex reads version {VERSION}")
    if sha256(data) != state["sha256"]:
        raise ResumeError(f"{folder / 'state.safetensors'} is damaged: its digest differs from the one in state.json")
    return state, load(data)


def _check_host_files(path: Path) -> None:
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResumeError(f"{path} is incomplete (no trainer_state.json)") from None
    except json.JSONDecodeError:
        raise ResumeError(f"{path} is incomplete (trainer_state.json is cut off)") from None


def _check_ranks(path: Path, ranks: int) -> None:
    """Rank 0 writes trainer_state.json without waiting for the other ranks' generators."""
    missing = [name for rank in range(ranks) if ranks > 1 and not (path / (name := f"rng_state_{rank}.pth")).is_file()]
    if missing:
        raise ResumeError(f"{path} is incomplete (no {', '.join(missing)})")


def newest_complete_checkpoint(output_dir: str | Path, *, with_state: bool = True) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed, and why newer ones were passed over.

    The Trainer's own search takes the highest number even when a killed process left it half-written.

    Args:
        with_state: whether it must hold DataFlex's state, which a static run does not write.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    skipped = []
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            _check_host_files(path)
            if with_state:
                state, _ = load_state(path)
                _check_ranks(path, len(state.get("pending", {}).get("loss", [])))
        except ResumeError as error:
            skipped.append(str(error))
            continue
        return path, skipped
    return None, skipped
