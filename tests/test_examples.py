"""Every example works: the YAML files are valid and train, the scripts run. A tiny model stands in for the one they name."""

import runpy
import sys
from pathlib import Path

import pytest

from dataflex.backends import trl
from dataflex.cli.plan import check_run, plan
from dataflex.testing.tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
YAML_FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.name != "components.yaml")
SCRIPTS = sorted(EXAMPLES.glob("library_*.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def _overrides(path, model):
    reference = [f"component_params.reference_model={model}"] if path.stem == "doremi_2_proxy" else []
    return [f"model_name_or_path={model}", *reference]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.stem)
def test_yaml_file_is_valid(path, model):
    lines = plan(*check_run(path, _overrides(path, model)))
    assert "warning" not in dict(lines)


@pytest.mark.slow
@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.stem)
def test_yaml_file_trains_for_two_steps(path, model, tmp_path):
    overrides = [*_overrides(path, model), f"output_dir={tmp_path / 'out'}", "train_step=2", "warmup_step=1", "logging_steps=1", "use_cpu=true"]
    overrides += ["max_steps=2"] if path.stem == "static" else []
    trl.train(*check_run(path, [item for item in overrides if path.stem != "static" or "_step=" not in item or item.startswith("max")]))
    assert (tmp_path / "out" / "all_results.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(path, model, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path), model])
    trainer = runpy.run_path(str(path))["trainer"]
    assert trainer.state.global_step == 4
    assert any(name.startswith("dataflex/") for entry in trainer.state.log_history for name in entry)
