"""A run stopped anywhere and resumed ends with the bits of one that was never stopped: parameters and logged values."""

import json
from pathlib import Path

import pytest
from harness import HOSTS, run, train
from transformers import TrainingArguments

from dataflex.core.state import newest_complete_checkpoint
from dataflex.errors import ResumeError

# 13 rows in micro-batches of 2: an epoch has 7, so with accumulation 2 it ends in a remainder step. Dropout draws from the global generator.
SPEC = {
    "rows": 13,
    "batch": 2,
    "accumulation": 2,
    "epochs": 2,
    "dropout": 0.1,
    "optim": "adamw_torch",
    "args": {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3, "lr_scheduler_type": "cosine"},
}
WEIGHTERS = {
    "loss": ("loss", {"r_steps": 6, "anneal": "linear"}),
    "window": ("loss", {"scope": "window"}),
    "ema": ("loss", {"scope": "ema", "r": 0.4}),
    "adapt": ("adapt", {"refresh_steps": 3}),
    "joint": ("joint_update_aware", {"refresh_steps": 3}),
    "custom": ("custom", {}),
    "dft": ("dft", {}),
    "focal": ("focal", {}),
}


def same(resumed, whole):
    """Equal parameters, and equal log lines from the checkpoint on."""
    assert resumed.parameters.equal(whole.parameters)
    assert resumed.logged() == whole.logged()


@pytest.mark.parametrize("name", WEIGHTERS)
def test_resume_at_every_step(tmp_path, name):
    component, params = WEIGHTERS[name]
    spec = {**SPEC, "component": component, "params": params, "dataflex": {"warmup_step": 2}}
    whole = run(spec, tmp_path / "whole")
    for step in range(1, 8):
        resumed = run({**spec, "resume": str(tmp_path / "whole" / f"checkpoint-{step}")}, tmp_path / f"resumed-{step}")
        same(resumed, whole)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_of_hosts_and_adapters(tmp_path, host, lora, accumulation):
    spec = {**SPEC, "host": host, "lora": lora, "accumulation": accumulation, "component": "loss", "params": {"scope": "ema"}}
    whole = run(spec, tmp_path / "whole")
    resumed = run({**spec, "resume": str(tmp_path / "whole" / "checkpoint-3")}, tmp_path / "resumed")
    same(resumed, whole)


def test_resume_with_loader_workers(tmp_path):
    spec = {**SPEC, "component": "loss", "args": {**SPEC["args"], "dataloader_num_workers": 2}}
    whole = run({**spec, "args": SPEC["args"]}, tmp_path / "whole")
    resumed = run({**spec, "resume": str(tmp_path / "whole" / "checkpoint-3")}, tmp_path / "resumed")
    same(resumed, whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_resume_after_sigkill_between_two_saves(tmp_path):
    spec = {**SPEC, "component": "loss", "params": {"scope": "ema"}, "args": {**SPEC["args"], "save_steps": 2}}
    whole = run(spec, tmp_path / "whole")
    run({**spec, "kill_at": 5}, tmp_path / "killed")
    found, _ = newest_complete_checkpoint(tmp_path / "killed")
    assert found is not None and found.name == "checkpoint-4"
    same(run({**spec, "resume": True}, tmp_path / "killed"), whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["loss", "ema", "adapt"])
def test_resume_of_two_processes(tmp_path, name):
    component, params = WEIGHTERS[name]
    spec = {**SPEC, "component": component, "params": params, "dataflex": {"warmup_step": 1}}
    whole = run(spec, tmp_path / "whole", world=2)
    resumed = run({**spec, "resume": str(tmp_path / "whole" / "checkpoint-2")}, tmp_path / "resumed", world=2)
    same(resumed, whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_agree_on_a_damaged_file_of_one_of_them(tmp_path):
    spec = {**SPEC, "component": "loss", "params": {"scope": "ema"}, "args": {**SPEC["args"], "save_steps": 3}}
    whole = run(spec, tmp_path / "out", world=2)
    newest, _ = newest_complete_checkpoint(tmp_path / "out")
    assert newest is not None
    files = json.loads((newest / "dataflex_manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= files.keys()
    path = newest / "rng_state_1.pth"
    data = path.read_bytes()
    path.write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
    same(run({**spec, "resume": True}, tmp_path / "out", world=2), whole)
    assert path.read_bytes() == data  # written again, by a run that went on from the checkpoint before


def test_a_component_that_draws_global_random_numbers_in_its_plan_does_not_break_resume(tmp_path):
    # adapt encodes evaluation rows at step 3, which is also the checkpoint's step.
    spec = {**SPEC, "component": "adapt", "params": {"refresh_steps": 3}}
    whole = run(spec, tmp_path / "whole")
    same(run({**spec, "resume": str(tmp_path / "whole" / "checkpoint-3")}, tmp_path / "resumed"), whole)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def finished(tmp_path):
    spec = {**SPEC, "component": "loss"}
    run(spec, tmp_path / "whole")
    return spec, tmp_path / "whole" / "checkpoint-2", tmp_path / "again"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": 12}, "dataset rows was 13, now 12"),
        ({"masked": 0.5}, "dataset content was"),
        ({"component": "dft"}, "component_name was 'loss', now 'dft'"),
        ({"params": {"r": 0.4}}, "component_params was"),
        ({"dataflex": {"warmup_step": 3}}, "warmup_step was 0, now 3"),
        ({"dataflex": {"loss_normalization": "token"}}, "loss_normalization was 'sample', now 'token'"),
        ({"batch": 4}, "rows per micro-batch over all ranks was 2, now 4"),
        ({"accumulation": 1}, "gradient_accumulation_steps was '2', now '1'"),
        ({"args": {**SPEC["args"], "learning_rate": 0.5}}, "learning_rate was '0.01', now '0.5'"),
    ],
)
def test_a_changed_run_is_refused(finished, change, named):
    spec, checkpoint, out = finished
    with pytest.raises(ResumeError, match="belongs to another run") as error:
        train({**spec, **change, "resume": str(checkpoint)}, out)
    assert named in str(error.value)
    assert "allow_changed_resume" in str(error.value)


def test_a_changed_run_is_allowed_on_request(finished):
    spec, checkpoint, out = finished
    changed = {**spec, "args": {**SPEC["args"], "learning_rate": 0.5}, "dataflex": {"allow_changed_resume": True}}
    assert train({**changed, "resume": str(checkpoint)}, out) is not None


def test_a_damaged_state_is_refused(finished):
    spec, checkpoint, out = finished
    (checkpoint / "dataflex" / "state.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(ResumeError, match="is damaged: its digest differs"):
        train({**spec, "resume": str(checkpoint)}, out)


def test_incomplete_checkpoints_are_passed_over(finished):
    _, checkpoint, _ = finished
    folder = checkpoint.parent
    newest = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    (folder / f"checkpoint-{newest}" / "trainer_state.json").unlink()
    (folder / f"checkpoint-{newest - 1}" / "dataflex" / "state.json").write_text('{"version": 1, ')
    found, skipped = newest_complete_checkpoint(folder)
    assert found == folder / f"checkpoint-{newest - 2}"
    assert [("no trainer_state.json" in reason, "is damaged" in reason) for reason in skipped] == [(True, False), (False, True)]


def test_cut_off_and_missing_host_files_make_a_checkpoint_incomplete(finished):
    _, checkpoint, _ = finished
    folder = checkpoint.parent
    newest = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    (folder / f"checkpoint-{newest}" / "trainer_state.json").write_text('{"epoch": 1.0, ')
    (folder / f"checkpoint-{newest - 1}" / "rng_state.pth").unlink()
    found, skipped = newest_complete_checkpoint(folder)
    assert found == folder / f"checkpoint-{newest - 2}"
    assert "trainer_state.json is damaged: it is cut off" in skipped[0] and "(no rng_state.pth)" in skipped[1]


def test_an_overwritten_checkpoint_does_not_look_whole_before_it_is(finished, monkeypatch):
    spec, checkpoint, _ = finished

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        train({**spec, "args": {**SPEC["args"], "save_steps": 2}}, checkpoint.parent)
    assert not (checkpoint / "trainer_state.json").exists()


@pytest.mark.parametrize("change", [{"args": {**SPEC["args"], "train_sampling_strategy": "sequential"}}])
def test_another_order_of_rows_is_refused(finished, change):
    spec, checkpoint, out = finished
    if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
        change = {"args": {**SPEC["args"], "neftune_noise_alpha": 3.0}}
    with pytest.raises(ResumeError, match=r"train_sampling_strategy was|neftune_noise_alpha was"):
        train({**spec, **change, "resume": str(checkpoint)}, out)


def test_a_checkpoint_without_state_is_refused(tmp_path):
    run({**SPEC, "max_steps": 2}, tmp_path / "static")
    with pytest.raises(ResumeError, match="holds no DataFlex state"):
        train({**SPEC, "component": "loss", "resume": str(tmp_path / "static" / "checkpoint-2")}, tmp_path / "again")


def test_state_holds_no_pickle(finished):
    _, checkpoint, _ = finished
    assert sorted(path.name for path in (checkpoint / "dataflex").iterdir()) == ["state.json", "state.safetensors"]
    state = json.loads(Path(checkpoint / "dataflex" / "state.json").read_text())
    assert state["global_step"] == 2 and state["settings"]["component_name"] == "loss"


def test_events_after_the_checkpoint_are_written_once(tmp_path):
    spec = {**SPEC, "component": "adapt", "params": {"refresh_steps": 2}}
    run(spec, tmp_path / "run")
    events = tmp_path / "run" / "dataflex" / "events.jsonl"
    before = [(e["step"], e["event"]) for e in map(json.loads, events.read_text().splitlines())]
    run({**spec, "resume": str(tmp_path / "run" / "checkpoint-3")}, tmp_path / "run")
    after = [(e["step"], e["event"]) for e in map(json.loads, events.read_text().splitlines())]
    assert before == after == [(0, "weighting starts"), (0, "target refreshed"), *((step, "target refreshed") for step in (2, 4, 6))]
