"""Resuming through LLaMA-Factory's workflow, which goes on from a checkpoint in output_dir by itself."""

import json
import shutil

import pytest
import yaml
from test_backend import BASE, WEIGHT
from typer.testing import CliRunner

from dataflex.cli.app import app
from dataflex.utils.logging import logger

TYPES = {"static": {"train_type": "static"}, "weight": WEIGHT}
SAVING = {"save_steps": 2, "max_steps": 4, "train_step": None, "eval_dataset": "arithmetic_clean", "max_samples": 16, "do_eval": True}


@pytest.fixture
def train(tmp_path, model):
    def train(kind, **keys):
        settings = {**BASE, "model_name_or_path": model, "output_dir": str(tmp_path / "out"), **TYPES[kind], **SAVING, **keys}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        logger.handlers.clear()
        done = CliRunner().invoke(app, ["train", str(path)])
        assert done.exit_code == 0, (done.output, done.exception)
        return done

    return train


def adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


def files(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_left_is_done_and_what_is_finished_left_alone(train, tmp_path, kind):
    out = tmp_path / "out"
    train(kind)
    results, bits, before = json.loads((out / "all_results.json").read_text()), adapter(out), files(out)
    assert (out / "checkpoint-4" / "dataflex_manifest.json").is_file()
    assert "this run is finished (step 4)" in train(kind).stderr
    assert "this run is finished (step 4)" in train(kind, resume_from_checkpoint=True).stderr
    assert files(out) == before
    for name in ("adapter_model.safetensors", "trainer_state.json", "all_results.json"):
        (out / name).unlink()
    assert "is the end of training (step 4 of 4)" in train(kind).stderr
    again = json.loads((out / "all_results.json").read_text())
    assert adapter(out) == bits and [again[name] for name in ("train_loss", "eval_loss")] == [results[name] for name in ("train_loss", "eval_loss")]
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    anew = train(kind)
    assert "optimizer.pt is damaged: it is empty" in anew.stderr and "so training starts anew" in anew.stderr
    assert adapter(out) == bits


@pytest.mark.parametrize("kind", TYPES)
def test_early_stopping_keeps_its_patience(train, tmp_path, kind):
    patient = {"learning_rate": 1e-30, "early_stopping_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 12}
    patient |= {"metric_for_best_model": "eval_loss", "load_best_model_at_end": False}
    train(kind, **patient)
    state = tmp_path / "out" / "trainer_state.json"
    stopped = json.loads(state.read_text())["global_step"]
    assert stopped < 12
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{stopped}")
    state.unlink()
    train(kind, **patient)
    assert json.loads(state.read_text())["global_step"] == stopped
