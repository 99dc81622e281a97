"""Every error DataFlex raises on purpose, and the one place that words a bad setting.

A leaf also derives from the built-in type a caller would expect (`ValueError`, `KeyError`, ...), so plain `except` clauses work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class DataflexError(Exception):
    """Base of all errors raised by DataFlex."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a user's input.

    Attributes:
        where: file and, where known, line or key path (`config.yaml:12`, `dataset_info.json`).
        key: the setting concerned, or "" when the problem is about the whole file.
        message: what is wrong, what is allowed, what to do.
    """

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.key}: {self.message}" if self.key else f"{place}{self.message}"


class ConfigError(DataflexError, ValueError):
    """A configuration that cannot be run; holds every problem found, not just the first."""

    def __init__(self, problems: Problem | Sequence[Problem]):
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ComponentError(DataflexError, ValueError):
    """A component that is unknown, registered twice, misconfigured or misbehaving."""


class ResumeError(DataflexError, ValueError):
    """A checkpoint that is damaged or belongs to another run."""


class TrainingError(DataflexError, RuntimeError):
    """Training cannot go on without giving a wrong result."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence naming the valid name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def listing(names: Iterable[str]) -> str:
    """Names in a fixed order for messages: `a, b, c`, or `(none)`."""
    return ", ".join(sorted(names)) or "(none)"
