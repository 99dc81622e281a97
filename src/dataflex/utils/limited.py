"""Running what comes from a user's file and may never end."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

_WAIT = 8.0  # seconds, whatever else the machine has to do
_MORE_MEMORY = 1 << 30  # bytes that the action may take


def limited(action: Callable[[], str], seconds: int) -> str | None:
    """What `action` returns, or None if it takes more than `seconds` of computing, or dies.

    It runs in a copy of this process, which can be ended whatever it does; where a process cannot be copied it runs here.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return action()
    context = multiprocessing.get_context("fork")
    answer, ours = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(action, ours, seconds), daemon=True)
    child.start()
    ours.close()
    try:
        return str(answer.recv()) if answer.poll(_WAIT) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()
        answer.close()


def _run(action: Callable[[], str], connection: Connection, seconds: int) -> None:
    _limit(seconds)
    connection.send(action())


def _limit(seconds: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_MEMORY, used + _MORE_MEMORY))
    except (ImportError, OSError, ValueError):  # not every system has such limits
        pass
