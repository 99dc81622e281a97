"""Running a script in several processes on this machine's CPU, as torchrun does on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_distributed(script: str | Path, *arguments: str, world: int = 2, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `script` under torchrun with `world` processes and gloo.

    Raises:
        RuntimeError: it failed and `check` is set; the message holds the end of its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), str(script), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{script} failed in {world} processes with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done
