"""What LLaMA-Factory's runs are given where there is no GPU, and what SIGTERM does to them."""

import json

import pytest
import yaml
from test_backend import BASE, WEIGHT, train

from dataflex.backends import llamafactory
from dataflex.errors import ConfigError
from dataflex.train.trainer.preemption import SaveOnSigterm

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


@pytest.fixture
def write(tmp_path, model):
    def write(**keys):
        path = tmp_path / "config.yaml"
        settings = {**BASE, "model_name_or_path": model, "output_dir": str(tmp_path / "out"), **keys}
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


@pytest.mark.parametrize("kind", [{}, WEIGHT])
def test_without_a_gpu_the_cpu_is_named(write, tmp_path, monkeypatch, kind):
    seen = {}
    monkeypatch.setattr("llamafactory.train.tuner.run_exp", lambda keys, callbacks: seen.update(keys))
    with pytest.raises((FileNotFoundError, RuntimeError)):  # nothing was trained
        train(write(**kind, use_cpu=None))
    assert seen["use_cpu"] is True
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use_cpu: WORLD_SIZE=2, while this Trainer runs in one process"):
        llamafactory._on_a_device({"use_cpu": False})


@pytest.mark.parametrize("kind", [{}, WEIGHT], ids=["static", "weight"])
def test_sigterm_saves_a_checkpoint_and_the_run_can_be_resumed(write, tmp_path, monkeypatch, kind):
    with monkeypatch.context() as patched:
        begin = SaveOnSigterm.on_train_begin

        def begun(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            self._on_signal(15, None)

        patched.setattr(SaveOnSigterm, "on_train_begin", begun)
        with pytest.raises(SystemExit) as ended:
            train(write(**kind))
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((tmp_path / "out/checkpoint-1/trainer_state.json").read_text())["global_step"] == 1
    assert [entry["step"] for entry in train(write(**kind))] == [1, 2, 3]
