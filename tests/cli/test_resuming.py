"""Resuming from the command line: what is finished stays as it is, what is left is done, and two runs do not share a folder."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
from workspace import listing, make_workspace, run_cli, write_config

from dataflex.utils.logging import logger

HOLDER = "import sys, time; from dataflex.core.lock import run_lock\nwith run_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
TYPES = {
    "static": {"train_type": "static", "component_name": ..., "warmup_step": ...},
    "weight": {},
    "select": {"train_type": "dynamic_select", "update_step": 2, "update_times": -1},
    "mix": {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 2, "update_times": -1, "dataset": "rows,held_out"},
}
SAVING = {"save_steps": 2, "train_step": 4, "eval_dataset": "held_out"}


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


def bits(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def files(folder):
    return {name: when for name, when in listing(folder).items() if (folder / name).is_file()}


def ok(*arguments):
    logger.handlers.clear()  # of the command before, whose stderr is closed
    result = run_cli("train", "config.yaml", *arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("kind", TYPES)
def test_a_finished_run_is_left_alone_and_one_without_its_final_files_is_finished(workspace, kind):
    write_config(workspace, **{**SAVING, **TYPES[kind]})
    ok()
    out, before = workspace / "out", files(workspace / "out")
    results, model = json.loads((out / "all_results.json").read_text()), bits(out)
    done = ok("resume_from_checkpoint=true")
    assert "this run is finished (step 4), so there is nothing to do" in done.stderr
    assert files(out) == before
    for name in ("model.safetensors", "trainer_state.json", "all_results.json", "train_results.json"):
        (out / name).unlink()
    done = ok("resume_from_checkpoint=true")
    assert "is the end of training (step 4 of 4): no step is left to do" in done.stderr
    assert bits(out) == model and json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    again = json.loads((out / "all_results.json").read_text())
    assert again.keys() == results.keys()
    assert [again[name] for name in ("train_loss", "eval_loss", "epoch")] == [results[name] for name in ("train_loss", "eval_loss", "epoch")]


def test_a_finished_run_with_a_damaged_checkpoint_gets_it_back(workspace):
    write_config(workspace, **{**SAVING, **TYPES["static"]})
    ok()
    out = workspace / "out"
    model, path = bits(out), out / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:100])
    assert "checkpoint-4/optimizer.pt is damaged: it is cut off" in ok("resume_from_checkpoint=true").stderr
    assert bits(out) == model
    assert "this run is finished" in ok("resume_from_checkpoint=true").stderr


def test_a_finished_run_whose_file_changed_goes_on(workspace):
    write_config(workspace, **SAVING)
    ok()
    ok("resume_from_checkpoint=true", "train_step=6", "allow_changed_resume=true")
    assert json.loads((workspace / "out" / "trainer_state.json").read_text())["global_step"] == 6


def test_a_second_run_is_refused_before_it_writes_anything(workspace):
    write_config(workspace, **SAVING)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(workspace / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = listing(workspace)
        refused = run_cli("train", "config.yaml")
        assert (refused.exit_code, listing(workspace)) == (2, before)
        assert f"output_dir 'out' is in use by another run, process {holder.pid} on " in refused.stderr
        assert run_cli("validate", "config.yaml").exit_code == 0  # looks only
        assert listing(workspace) == before
    finally:
        holder.kill()
        holder.wait()
    ok()  # the killed one locks nobody out
    assert not (workspace / "out" / "dataflex" / "lock").exists()


PATIENT = {"learning_rate": 1e-30, "early_stopping_steps": 3, "eval_dataset": "held_out", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


@pytest.mark.parametrize(("kind", "switch", "steps"), [("weight", ..., 4), ("static", ..., 4), ("weight", False, 6)])
def test_early_stopping_stops_where_it_would_have(workspace, kind, switch, steps):
    write_config(workspace, **{**PATIENT, "train_step": 20, **TYPES[kind], "restore_callback_states_from_checkpoint": switch})
    ok()
    out = workspace / "out"
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    shutil.rmtree(out / "checkpoint-4")
    for path in [*out.glob("*.json"), out / "model.safetensors"]:
        path.unlink()
    ok("resume_from_checkpoint=true")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == steps


@pytest.mark.parametrize("size", [200, 0])
def test_a_damaged_cache_is_computed_anew(workspace, size):
    write_config(workspace, **{**SAVING, **TYPES["select"]})
    ok()
    model, caches = bits(workspace / "out"), list((workspace / "out").glob("dataflex/cache/*/values.npy"))
    assert caches
    for path in caches:
        path.write_bytes(path.read_bytes()[:size])
    again = ok("overwrite_output_dir=true")
    assert "values.npy cannot be used" in again.stderr and bits(workspace / "out") == model


def test_damaged_events_do_not_block_a_resume(workspace):
    write_config(workspace, **{**SAVING, **TYPES["select"]})
    ok()
    model, path = bits(workspace / "out"), workspace / "out" / "dataflex" / "events.jsonl"
    shutil.rmtree(workspace / "out" / "checkpoint-4")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"}") + 1])  # a whole event has more than one
    ok("resume_from_checkpoint=true")
    assert bits(workspace / "out") == model
    assert all(json.loads(line)["event"] for line in path.read_text().splitlines())


@pytest.mark.parametrize("kind", ["static", "weight"])
def test_a_missing_optimizer_is_named_and_the_checkpoint_passed_over(workspace, kind):
    write_config(workspace, **{**SAVING, **TYPES[kind], "train_step": 6})
    ok()
    model = bits(workspace / "out")
    shutil.rmtree(workspace / "out" / "checkpoint-6")
    (workspace / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    again = ok("resume_from_checkpoint=true")
    assert "checkpoint-4 is incomplete (no optimizer.pt)" in again.stderr and bits(workspace / "out") == model
    named = run_cli("train", "config.yaml", "resume_from_checkpoint=out/checkpoint-9")
    assert named.exit_code == 2


def test_a_named_checkpoint_that_is_damaged_is_refused(workspace):
    write_config(workspace, **SAVING)
    ok()
    path = workspace / "out" / "checkpoint-2" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    refused = run_cli("train", "config.yaml", "resume_from_checkpoint=out/checkpoint-2")
    assert refused.exit_code == 2 and "checkpoint-2/model.safetensors is damaged: its digest differs" in refused.stderr
    path.write_bytes(data[:100])
    assert (
        "checkpoint-2/model.safetensors is damaged: it is cut off"
        in run_cli("validate", "config.yaml", "resume_from_checkpoint=out/checkpoint-2").stderr
    )
