"""How many processes a run has, or will have once `dataflex-cli` has started the others."""

from __future__ import annotations

import os


def should_launch() -> bool:
    """Whether this process is to start the others: FORCE_TORCHRUN is set, or there are several GPUs, and no launcher has been here."""
    if "LOCAL_RANK" in os.environ:
        return False
    forced = os.environ.get("FORCE_TORCHRUN", "").lower()
    if forced:
        return forced in ("1", "true", "yes", "on")
    import torch

    return torch.cuda.device_count() > 1


def processes_per_node() -> int:
    """Processes that are started on this machine."""
    import torch

    return int(os.environ.get("NPROC_PER_NODE") or max(torch.cuda.device_count(), 1))


def planned_processes() -> int:
    """Processes of the run over all machines."""
    if should_launch():
        return processes_per_node() * int(os.environ.get("NNODES", "1"))
    return int(os.environ.get("WORLD_SIZE", "1"))
