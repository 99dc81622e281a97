"""What `test_preemption.py` has two ranks do, one thing after the other, since they take longer to start than to train. Each rank leaves a file."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from harness import make_trainer
from transformers import TrainerCallback

from dataflex import SampleWeighter, register_weighter
from dataflex.errors import ComponentError
from dataflex.utils.distributed import leave, rank

SPEC = {"component": "loss", "rows": 16, "batch": 1, "epochs": 1, "optim": "adamw_torch", "args": {"logging_steps": 3}}


class Signalled(TrainerCallback):
    """SIGTERM at the beginning of a step, on each rank in another one."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@register_weighter("negative_on_rank_1")
class NegativeOnRankOne(SampleWeighter):
    mean_scope = "micro_batch"

    def sample_weights(self, losses, *, ctx, model, inputs):
        return torch.full_like(losses, 3.0 if rank() == 0 else -1.0)  # mean 1 over the ranks


def trained(out, resume=None, stop_at=None, **changes):
    """What ended the training, and the trainer."""
    trainer, _ = make_trainer({**SPEC, **changes}, str(out))
    if stop_at is not None:
        trainer.add_callback(Signalled(stop_at))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (SystemExit, ComponentError) as ended:
        return ended, trainer
    return None, trainer


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    _, whole = trained(out / "whole")
    ended, stopped = trained(out / "stopped", stop_at={0: 2, 1: 3}[rank()])
    _, resumed = trained(out / "stopped", resume=True)
    components = out / f"components-{rank()}.yaml"
    components.write_text("weighters: {negative_on_rank_1: {params: {}}}")
    wrong, _ = trained(out / "wrong", component="negative_on_rank_1", dataflex={"components_cfg_file": str(components)})
    seen = {
        "code": getattr(ended, "code", None),
        "stopped after": stopped.state.global_step,
        "resumed to": resumed.state.global_step,
        "same bits": bool(parameters(resumed).equal(parameters(whole))),
        "losses": [[entry.get("loss") for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)],
        "wrong": str(wrong),
    }
    (out / f"rank{rank()}.json").write_text(json.dumps(seen))
    leave()
