"""`output_dir/dataflex/events.jsonl`: one line per decision, for people and scripts that look at a run afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataflex.utils.files import write_bytes_atomically
from dataflex.utils.logging import logger


class EventLog:
    """Appends events. Only the main process writes; the others' log is inactive."""

    def __init__(self, output_dir: str | Path, active: bool):
        self.path = Path(output_dir) / "dataflex" / "events.jsonl"
        self.active = active

    def write(self, step: int, event: str, **details: Any) -> None:
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "event": event, **details}) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the events of `step` and later: training goes on from there and writes them again. Damaged lines go, too: a killed process
        may leave half of one."""
        if not self.active or not self.path.is_file():
            return
        lines = self.path.read_bytes().split(b"\n")
        steps = [_step(line) for line in lines]
        damaged = [number for number, (line, found) in enumerate(zip(lines, steps, strict=True), 1) if found is None and line]
        if damaged and step:
            places = ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else "")
            logger.warning("%s: damaged lines are left out: %s", self.path, places)
        kept = [line + b"\n" for line, found in zip(lines, steps, strict=True) if found is not None and found < step]
        write_bytes_atomically(self.path, b"".join(kept))


def _step(line: bytes) -> int | None:
    """The step of an event, or None if the line holds none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        return None
    whole = isinstance(event, dict) and isinstance(event.get("event"), str) and type(event.get("step")) is int
    return event["step"] if whole else None
