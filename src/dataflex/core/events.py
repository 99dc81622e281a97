"""`output_dir/dataflex/events.jsonl`: one line per decision, for people and scripts that look at a run afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataflex.utils.files import write_text_atomically


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
        """Drop the events of `step` and later: training goes on from there and writes them again."""
        if self.active and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _complete(line) and json.loads(line)["step"] < step]
            write_text_atomically(self.path, "".join(line + "\n" for line in kept))


def _complete(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")  # a killed process may leave half a line at the end
