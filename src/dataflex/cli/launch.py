"""Starting torchrun from one command, with LLaMA-Factory's environment variables, and what one rank of several prints."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import TracebackType
from typing import Any

from dataflex.utils.launching import processes_per_node, should_launch

__all__ = ["launch", "should_launch"]


def launch(arguments: list[str]) -> int:
    """Run `dataflex-cli <arguments>` under torchrun, in this process, which hands SIGTERM on to the ranks.

    Returns:
        The exit code: 0, that of the rank that failed first, or 128 and the number of the signal that ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    env = os.environ
    options = ["--nnodes", env.get("NNODES", "1"), "--node-rank", env.get("NODE_RANK", "0")]
    options += ["--nproc-per-node", str(processes_per_node())]
    if "MASTER_ADDR" in env or env.get("NNODES", "1") != "1":
        options += ["--master-addr", env.get("MASTER_ADDR", "127.0.0.1"), "--master-port", env.get("MASTER_PORT", "29500")]
    else:
        options += ["--standalone"]
    try:
        run(parse_args([*options, "-m", "dataflex.cli", *arguments]))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        return _report(error.failures)
    return 0


def _report(failures: dict[int, Any]) -> int:
    """Say how the rank ended that ended first; its exit code. An error that DataFlex raised comes before those that follow from it."""
    first = min(failures, key=lambda rank: (failures[rank].timestamp, failures[rank].exitcode != 2, rank))
    code = failures[first].exitcode
    how = f"with exit code {code}" if code >= 0 else f"by signal {-code} ({signal.Signals(-code).name})"
    sys.stderr.write(f"dataflex-cli: rank {first} ended {how}, and the other ranks with it; see above what it says\n")
    return code if code >= 0 else 128 - code


def rank_prefix() -> str:
    """`rank 1 of 2: ` in one of several processes, before they know of each other, too; else nothing."""
    started, number = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    return f"rank {number} of {started}: " if started not in ("", "0", "1") else ""


def name_rank_in_tracebacks() -> None:
    """In one of several processes: say which one a traceback comes from."""
    if not rank_prefix():
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # In one piece, as the others may be writing, too.
        sys.stderr.write(f"dataflex-cli: {rank_prefix()}stopped by\n" + "".join(traceback.format_exception(kind, error, trace)))
        sys.stderr.flush()

    sys.excepthook = hook
