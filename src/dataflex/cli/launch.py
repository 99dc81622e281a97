"""Starting torchrun from one command, with LLaMA-Factory's environment variables."""

from __future__ import annotations

import os
import subprocess
import sys


def should_launch() -> bool:
    """Whether this process is to start the others: FORCE_TORCHRUN is set, or there are several GPUs, and no launcher has been here."""
    if "LOCAL_RANK" in os.environ:
        return False
    forced = os.environ.get("FORCE_TORCHRUN", "").lower()
    if forced:
        return forced in ("1", "true", "yes", "on")
    import torch

    return torch.cuda.device_count() > 1


def launch(arguments: list[str]) -> int:
    """Run `dataflex-cli <arguments>` under torchrun and return its exit code."""
    import torch

    env = os.environ
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", env.get("NNODES", "1"), "--node-rank", env.get("NODE_RANK", "0")]
    command += ["--nproc-per-node", env.get("NPROC_PER_NODE", str(max(torch.cuda.device_count(), 1)))]
    if "MASTER_ADDR" in env or env.get("NNODES", "1") != "1":
        command += ["--master-addr", env.get("MASTER_ADDR", "127.0.0.1"), "--master-port", env.get("MASTER_PORT", "29500")]
    else:
        command += ["--standalone"]
    return subprocess.run([*command, "-m", "dataflex.cli", *arguments], check=False).returncode
