"""Values, files and credentials that LLaMA-Factory's backend must not stumble over or give away."""

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dataflex.cli.app import app

DATA = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture
def write(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**keys):
        settings = {
            "model_name_or_path": model,
            "stage": "sft",
            "finetuning_type": "lora",
            "dataset_dir": str(DATA),
            "dataset": "arithmetic",
            "template": "qwen",
            "max_samples": 12,
            "max_steps": 2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "output_dir": "out",
            **keys,
        }
        Path("config.yaml").write_text(yaml.safe_dump(settings))

    return write


def run(command, *overrides):
    result = CliRunner().invoke(app, [command, "config.yaml", *overrides])
    assert result.exit_code in (0, 2), (result.exception, result.stderr)
    return result


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=.inf", "learning_rate: inf is not valid: must be a number of at most 64 bits"),
        ("num_train_epochs=1e300", "num_train_epochs: 1e+300 is not valid"),
        ("num_train_epochs=1e10", "num_train_epochs: 10000000000.0 is not valid: must be at most 1000000000"),
        ("max_samples=9999999999999999999999", "max_samples: 9999999999999999999999 is not valid"),
        ("dataset_dir=" + "x" * 300, "is too long for a name of a file"),
        ("dataset_dir=pipes", "'pipes/dataset_info.json' does not exist, or is no file"),
        ("dataset_dir=lists", "must hold an object"),
        ("dataset_dir=numbers", "'arithmetic' must be an object"),
        ("dataset_dir=bytes", "cannot be read"),
        ("component_name=loss", "component_name: has no effect with train_type: static"),
        ("learning_rate=!!float x", "a value does not fit its tag"),
    ],
)
def test_refused_in_words(write, override, message):
    write()
    for name, content in {"lists": b"[]", "numbers": b'{"arithmetic": 3}', "bytes": b"\xff\xfe"}.items():
        os.makedirs(name)
        Path(name, "dataset_info.json").write_bytes(content)
    os.makedirs("pipes")
    os.mkfifo("pipes/dataset_info.json")
    result = run("validate", override)
    assert result.exit_code == 2 and message in result.stderr and "cannot be checked" not in result.stderr


@pytest.mark.parametrize("keys", [{}, {"train_type": "dynamic_weight", "component_name": "loss"}])
def test_a_credential_stays_out_of_every_file(write, monkeypatch, capfd, keys):
    monkeypatch.setenv("MYTOK", "hf_SECRET")
    write(hub_token="${oc.env:MYTOK}", **keys)
    assert run("train", "hf_hub_token=hf_LITERAL").exit_code == 0
    files = [path for path in Path("out").rglob("*") if path.is_file()]
    assert Path("out/training_args.bin") in files
    for word in (b"hf_SECRET", b"hf_LITERAL"):
        assert [path for path in files if word in path.read_bytes()] == []
    shown = capfd.readouterr()
    assert "hf_SECRET" not in shown.out + shown.err and "hf_LITERAL" not in shown.out + shown.err
    settings = yaml.safe_load(Path("out/dataflex/run.yaml").read_text())
    assert (settings["hub_token"], settings["hf_hub_token"]) == ("${oc.env:MYTOK}", "${oc.env:HF_HUB_TOKEN}")


def test_overwriting_is_not_recorded(write):
    write()
    assert run("train", "overwrite_output_dir=true").exit_code == 0
    assert "overwrite_output_dir" not in yaml.safe_load(Path("out/dataflex/run.yaml").read_text())
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 2
