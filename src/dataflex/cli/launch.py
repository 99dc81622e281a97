"""Starting torchrun from one command, with LLaMA-Factory's environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

from dataflex.utils.launching import processes_per_node, should_launch

__all__ = ["launch", "should_launch"]


def launch(arguments: list[str]) -> int:
    """Run `dataflex-cli <arguments>` under torchrun and return its exit code."""
    env = os.environ
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", env.get("NNODES", "1"), "--node-rank", env.get("NODE_RANK", "0")]
    command += ["--nproc-per-node", str(processes_per_node())]
    if "MASTER_ADDR" in env or env.get("NNODES", "1") != "1":
        command += ["--master-addr", env.get("MASTER_ADDR", "127.0.0.1"), "--master-port", env.get("MASTER_PORT", "29500")]
    else:
        command += ["--standalone"]
    return subprocess.run([*command, "-m", "dataflex.cli", *arguments], check=False).returncode
