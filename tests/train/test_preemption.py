"""SIGTERM saves a checkpoint at the end of the step, and a resumed run ends with the same bits."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from harness import HOSTS, make_trainer
from transformers import TrainerCallback

from dataflex.testing.distributed import run_distributed
from dataflex.train.trainer.preemption import SaveOnSigterm

PLANS = {
    "dynamic_weight": {"component": "loss"},
    "dynamic_select": {"component": "random", "dataflex": {"update_step": 2, "update_times": 4}},
    "dynamic_mix": {"component": "odm", "domains": 2, "dataflex": {"update_step": 2, "update_times": 4}},
}


class Signalled(TrainerCallback):
    """SIGTERM between two micro-batches of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trained(kind, out, *, stop_at=None, resume=None, host="trainer", **args):
    spec = {**PLANS[kind], "train_type": kind, "host": host, "rows": 16, "batch": 1, "accumulation": 2, "optim": "adamw_torch", "dropout": 0.1}
    trainer, _ = make_trainer({**spec, "args": {"logging_steps": 3, **args}}, str(out))
    if stop_at is not None:
        trainer.add_callback(Signalled(stop_at))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer):
    logged = [{k: v for k, v in entry.items() if "loss" in k and k != "train_loss"} for entry in trainer.state.log_history]
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), logged


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", PLANS)
def test_sigterm_saves_and_a_resumed_run_ends_alike(tmp_path, kind, host, caplog):
    whole = outcome(trained(kind, tmp_path / "whole", host=host))
    with pytest.raises(SystemExit) as ended:
        trained(kind, tmp_path / "stopped", host=host, stop_at=4)
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-5"]
    assert "SIGTERM: stopped after step 5, which checkpoint-5" in caplog.text and "resume_from_checkpoint: true goes on" in caplog.text
    resumed = outcome(trained(kind, tmp_path / "stopped", host=host, resume=True))
    assert resumed[0].equal(whole[0]) and resumed[1] == whole[1]


def test_the_handler_is_there_during_training_alone(tmp_path):
    class Watching(TrainerCallback):
        seen = None

        def on_step_end(self, *args, **kwargs):
            Watching.seen = signal.getsignal(signal.SIGTERM)

    class Failing(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise ArithmeticError

    before = signal.getsignal(signal.SIGTERM)
    trainer, _ = make_trainer({"component": "loss", "batch": 4, "max_steps": 1}, str(tmp_path))
    trainer.add_callback(Failing())
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
    trainer, _ = make_trainer({"component": "loss", "batch": 4, "max_steps": 1}, str(tmp_path))
    trainer.add_callback(Watching())
    trainer.train()
    assert Watching.seen.__self__.__class__ is SaveOnSigterm and signal.getsignal(signal.SIGTERM) is before


def test_a_handler_of_the_programs_own_is_left_alone(tmp_path, monkeypatch):
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        trainer = trained("dynamic_weight", tmp_path, stop_at=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM] and trainer.state.global_step == 8


def test_the_signal_after_the_last_step_lets_training_end(tmp_path):
    class Late(TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer, _ = make_trainer({"component": "loss", "batch": 4, "args": {"eval_strategy": "steps", "eval_steps": 2}}, str(tmp_path))
    trainer.add_callback(Late())
    trainer.train()
    assert trainer.state.global_step == 2 and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.skipif("llamafactory" in HOSTS, reason="its transformers cannot load an optimizer in several CPU processes")
@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_stop_after_the_same_step_and_check_weights_together(tmp_path):
    """SIGTERM reaches rank 0 in step 3 and rank 1 in step 4: both stop after the step that follows the later one."""
    run_distributed(Path(__file__).parent / "two_ranks_worker.py", str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank{number}.json").read_text()) for number in range(2)]
    for seen in ranks:
        assert seen["code"] == 143
        assert seen["stopped after"] == 5 and seen["resumed to"] == 8
        assert seen["same bits"] and seen["losses"][0] == seen["losses"][1]
        assert "NegativeOnRankOne gave weights down to -1 in step 1" in seen["wrong"]
