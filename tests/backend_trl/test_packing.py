"""What only TRL's SFTTrainer has: packed and padding-free batches, where a sample is a document, and its own dft loss."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from harness import make_trainer, relative, run
from test_resume import SPEC, same

from dataflex.errors import ConfigError


@pytest.mark.parametrize("packing", ["packing", "padding_free"])
def test_global_batch_of_packed_rows(tmp_path, packing):
    # Packing fixes which documents share a row, so rows are compared with other splits of the same rows.
    spec = {"host": "sft", "packing": packing, "component": "loss", "params": {"scope": "window"}, "rows": 24, "lengths": [6, 20]}
    reference = run({**spec, "batch": 8}, tmp_path / "reference")
    split = run({**spec, "batch": 2, "accumulation": 4}, tmp_path / "split")
    assert relative(split.gradients[0], reference.gradients[0]) < 1e-6


@pytest.mark.parametrize("packing", ["packing", "padding_free"])
def test_resume_of_packed_rows(tmp_path, packing):
    spec = {**SPEC, "host": "sft", "packing": packing, "rows": 30, "component": "loss"}
    whole = run(spec, tmp_path / "whole")
    resumed = run({**spec, "resume": str(tmp_path / "whole" / "checkpoint-2")}, tmp_path / "resumed")
    same(resumed, whole)


def test_dft_loss_of_trl_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="component_name: dft"):
        make_trainer({"host": "sft", "component": "loss", "args": {"loss_type": "dft"}}, str(tmp_path))
