"""`output_dir/dataflex/finished.json`: a run that the command line has finished says so, and starting it again with resume does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex.core.state import checkpoint_folders, checkpoint_number
from dataflex.utils.files import DamagedFile, read_sealed_json, write_sealed_json


class RunFinished(Exception):
    """There is nothing to do, and the message says so."""


def for_command(trainer: Any, keys: dict[str, Any]) -> Any:
    """The trainer of a command, which leaves when the run is finished; and with the one switch whose default differs from the host's as the
    user's keys have it."""
    trainer._dataflex.leave_when_finished = True
    trainer.args.restore_callback_states_from_checkpoint = keys.get("restore_callback_states_from_checkpoint") is not False
    return trainer


def _path(output_dir: str | Path) -> Path:
    return Path(output_dir) / "dataflex" / "finished.json"


def write_finished(trainer: Any) -> None:
    """Record that all is written that `trainer` was to leave in its folder."""
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        record = {"global_step": trainer.state.global_step, "settings": trainer._dataflex.settings, **_present(folder)}
        write_sealed_json(_path(folder), record)


def forget_finished(output_dir: str | Path) -> None:
    """The run goes on."""
    _path(output_dir).unlink(missing_ok=True)


def read_finished(output_dir: str | Path) -> dict[str, Any] | None:
    """What a finished run recorded, if all its files and checkpoints are there: who deleted one wants it back."""
    try:
        found = read_sealed_json(_path(output_dir))
    except (OSError, DamagedFile):
        return None
    present = _present(Path(output_dir))
    return found if "seal" in found and all(found[kind].items() <= present[kind].items() for kind in present) else None


def _present(folder: Path) -> dict[str, dict[str, int]]:
    """Size of every file in the folder, and the step of every checkpoint."""
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return {"files": files, "checkpoints": {path.name: checkpoint_number(path) for path in checkpoint_folders(folder)}}
