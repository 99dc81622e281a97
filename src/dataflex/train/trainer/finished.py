"""`output_dir/dataflex/finished.json`: a run that the command line has finished says so, and starting it again with resume does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        write_sealed_json(_path(folder), {"global_step": trainer.state.global_step, "settings": trainer._dataflex.settings, "files": files})


def forget_finished(output_dir: str | Path) -> None:
    """The run goes on."""
    _path(output_dir).unlink(missing_ok=True)


def read_finished(output_dir: str | Path) -> dict[str, Any] | None:
    """What a finished run recorded, if all its files are there."""
    try:
        found = read_sealed_json(_path(output_dir))
        present = {name: (Path(output_dir) / name).stat().st_size for name in found["files"]}
    except (OSError, DamagedFile, KeyError):
        return None
    return found if "seal" in found and present == found["files"] else None
