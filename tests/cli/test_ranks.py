"""Several processes from one command: they are one run, errors say which rank they are from, and a signal or a hang ends all of them."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from workspace import make_workspace, run_cli, write_config

from dataflex.cli import launch
from dataflex.errors import TrainingError
from dataflex.testing.distributed import run_distributed
from dataflex.utils import distributed

IN_TURN = """
    import sys
    from dataflex.backends import load_backend
    from dataflex.cli.plan import check_run
    from dataflex.utils.distributed import leave

    for config in sys.argv[1:]:
        run, checked = check_run(config, [])
        load_backend(run.dataflex.backend).train(run, checked)
    leave()
"""
COMPONENT = """
    import os, time, torch
    from dataflex import SampleWeighter, register_weighter

    @register_weighter("shapes")
    class Shapes(SampleWeighter):
        def sample_weights(self, losses, *, ctx, model, inputs):
            ON_RANK_1
            return torch.ones(len(losses) + (os.environ.get("RANK") == "1"))
"""
QUIET = {"report_to": "none", "disable_tqdm": True, "disable_gradient_checkpointing": True, "logging_steps": 1, "save_strategy": "no"}
TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path):
    return make_workspace(tmp_path)


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dataflex.cli", *arguments]


def component(folder: Path, on_rank_1: str) -> dict[str, object]:
    (folder / "plug.py").write_text(textwrap.dedent(COMPONENT).replace("ON_RANK_1", on_rank_1))
    (folder / "comp.yaml").write_text("weighters: {shapes: {params: {}}}")
    return {"plugins": ["plug.py"], "components_cfg_file": "comp.yaml", "component_name": "shapes"}


@pytest.mark.slow
@pytest.mark.distributed
def test_without_a_gpu_several_processes_are_one_run(folder):
    """Nobody says `use_cpu`; two ranks with half the batch do what one does."""
    static = {"train_type": "static", "component_name": ..., "warmup_step": ..., "train_step": ..., "max_steps": 3}
    (folder / "in_turn.py").write_text(textwrap.dedent(IN_TURN))
    for kind, changes in (("static", static), ("weight", {})):
        for world in (1, 2):
            keys = {**QUIET, **changes, "use_cpu": ..., "per_device_train_batch_size": 4 // world, "output_dir": f"{kind}{world}"}
            write_config(folder, f"{kind}{world}.yaml", **keys)
        assert run_cli("train", f"{kind}1.yaml").exit_code == 0
    run_distributed(folder / "in_turn.py", "static2.yaml", "weight2.yaml")
    for kind in ("static", "weight"):
        assert losses(folder / f"{kind}2") == pytest.approx(losses(folder / f"{kind}1"), rel=1e-4), kind


@pytest.mark.parametrize("kind", ["static", "dynamic_weight"])
def test_processes_that_do_not_know_of_each_other_are_refused(folder, monkeypatch, kind):
    keys = {"component_name": ..., "warmup_step": ..., "train_step": ...} if kind == "static" else {}
    write_config(folder, **QUIET, use_cpu=False, train_type=kind, **keys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_cli("train", "config.yaml")
    assert result.exit_code == 2
    assert "WORLD_SIZE=2, while this Trainer runs in one process" in result.stderr and "set use_cpu to true" in result.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_on_rank_1_is_printed_with_its_rank(folder):
    write_config(folder, **QUIET, **component(folder, "pass"), warmup_step=0, per_device_train_batch_size=2)
    done = subprocess.run(command("train", "config.yaml"), env={**os.environ, **TWO}, capture_output=True, text=True)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("dataflex-cli: rank 1")]
    assert "dataflex-cli: rank 1 of 2: Shapes.sample_weights must return one weight per sample (2,), not (3,)" in said
    assert "dataflex-cli: rank 1 ended with exit code 2, and the other ranks with it; see above what it says" in said


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_hangs_ends_the_run_within_ddp_timeout(folder):
    """The signal with which torchrun ends the hanging rank works at once, or torchrun would wait for 30 seconds before it kills it."""
    hang = "if os.environ.get('RANK') == '1': import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(1000)"
    keys = {**component(folder, hang), "warmup_step": 1, "per_device_train_batch_size": 2, "ddp_timeout": 8}
    write_config(folder, **QUIET, **keys)
    (folder / "plug.py").write_text((folder / "plug.py").read_text().replace(' + (os.environ.get("RANK") == "1")', ""))
    begun = time.monotonic()
    done = subprocess.run(command("train", "config.yaml"), env={**os.environ, **TWO}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 2 and time.monotonic() - begun < 300
    expected = (
        "waited for the gradients, or another exchange of the host's, of the other ranks, and one of them did not come within ddp_timeout (8 s)"
    )
    assert f"dataflex-cli: rank 0 of 2: rank 0 {expected}" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_command_saves_a_checkpoint(folder, processes):
    """One process: static; two: weighting. The command hands the signal on to the ranks and waits for them."""
    static = {"train_type": "static", "component_name": ..., "warmup_step": ..., "train_step": ..., "max_steps": 100_000}
    keys = static if processes == 1 else {"train_step": 100_000, "per_device_train_batch_size": 2}
    write_config(folder, **QUIET, **keys)
    env = {**os.environ, **(TWO if processes == 2 else {}), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(command("train", "config.yaml"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = next(line for line in child.stdout if "'loss'" in line)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=200)
    assert line and child.returncode == 143, errors
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert f"SIGTERM: stopped after step {step}, which checkpoint-{step} in out holds" in errors
    assert errors.count("SIGTERM: stopped") == 1 and "Traceback" not in errors


# ------------------------------------------------------------------------------------------------ without processes


def test_a_traceback_says_its_rank():
    code = "from dataflex.cli.launch import name_rank_in_tracebacks as name; name(); raise RuntimeError('lost')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "RANK": "3", "WORLD_SIZE": "4"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("dataflex-cli: rank 3 of 4: stopped by\nTraceback") and done.stderr.endswith("RuntimeError: lost\n")


def test_an_error_of_one_process_has_no_rank(folder):
    result = run_cli("train", str(write_config(folder, dataset="row")))
    assert result.exit_code == 2 and "rank" not in result.stderr


class Failure:
    def __init__(self, exitcode: int, timestamp: int):
        self.exitcode, self.timestamp = exitcode, timestamp


@pytest.mark.parametrize(
    ("failures", "code", "message"),
    [
        ({0: Failure(1, 5), 1: Failure(2, 5)}, 2, "rank 1 ended with exit code 2"),
        ({0: Failure(1, 4), 1: Failure(2, 5)}, 1, "rank 0 ended with exit code 1"),
        ({3: Failure(-9, 5)}, 137, "rank 3 ended by signal 9 (SIGKILL)"),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(failures, code, message, capsys):
    assert launch._report(failures) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Timed out waiting 8000ms for recv operation to complete", "did not come within ddp_timeout (8 s): Timed out"),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer", "ended, or failed: [gloo"),
    ],
)
def test_what_was_waited_for_is_said(monkeypatch, text, expected):
    monkeypatch.setattr(distributed, "_timeout", distributed.timedelta(seconds=8))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    message = f"rank 0 waited for the mixture of the other ranks, and one of them {expected}"
    with pytest.raises(TrainingError, match=re.escape(message)), distributed.waiting("the mixture"):
        raise RuntimeError(text)
    for other in (RuntimeError("CUDA out of memory"), TrainingError("of DataFlex's own, with a timeout")):
        with pytest.raises(type(other)) as error, distributed.waiting("the mixture"):
            raise other
        assert error.value is other
