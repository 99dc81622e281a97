"""Row numbers in the library: a host that drops rows, one that packs them, and selectors that are given by the user."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import HOSTS

from dataflex import DataflexConfig, SelectTrainer
from dataflex.errors import ConfigError
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows, tiny_tokenizer
from dataflex.train.selector.random_selector import RandomSelector

DROPPED = {2, 3, 11}
SCHEDULE = {"component_name": "random", "update_step": 2, "update_times": 1}
ARGUMENTS = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}

needs_sft = pytest.mark.skipif("sft" not in HOSTS, reason="TRL is not in LLaMA-Factory's environment")


def conversations() -> datasets.Dataset:
    rows = [{"id": f"id-{k}", "prompt": "q" * (400 if k in DROPPED else 5), "completion": f" this is {k}"} for k in range(16)]
    return datasets.Dataset.from_list(rows)


def sft_trainer(out: Path, data, *, component=None, **dataflex):
    from trl import SFTConfig, SFTTrainer

    packing = dataflex.pop("packing", False)
    args = SFTConfig(output_dir=str(out), max_length=64, packing=packing, bf16=False, gradient_checkpointing=False, **ARGUMENTS)
    config = DataflexConfig(**{**SCHEDULE, **dataflex, "train_type": "dynamic_select"})
    return SelectTrainer.over(SFTTrainer)(
        model=tiny_model(), args=args, train_dataset=data, processing_class=tiny_tokenizer(), dataflex=config, component=component
    )


def selected(out: Path) -> set[int]:
    return set(np.concatenate([np.load(path) for path in out.glob("dataflex/selections/step_*.npy")]).tolist())


@needs_sft
def test_rows_that_sft_trainer_drops_do_not_move_the_others(tmp_path):
    (tmp_path / "pool.json").write_text(json.dumps([1, 3, 5, 12]))
    trainer = sft_trainer(tmp_path, conversations(), component_params={"candidate_pool": str(tmp_path / "pool.json")})
    assert len(trainer.train_dataset) == 13
    trainer.train()
    assert selected(tmp_path) == {1, 5, 12}
    for row in json.loads((tmp_path / "dataflex/selections/summary.json").read_text())["most"]:
        assert f"this is {row['row']}" in row["text"]
    found = pq.read_table(tmp_path / "dataflex/rows.parquet").to_pylist()
    assert {row["row"] for row in found if not row["kept"]} == DROPPED
    assert all(row["id"] == f"id-{row['row']}" for row in found if row["kept"])


@needs_sft
def test_a_ready_made_selector_is_asked_for_rows_of_the_users_data(tmp_path):
    selector = RandomSelector()
    selector.set_candidate_pool([4, 12, 2])
    trainer = sft_trainer(tmp_path, conversations(), component=selector)
    assert selector.get_candidate_pool() == [2, 4, 12]
    trainer.train()
    assert selected(tmp_path) == {4, 12}


@needs_sft
def test_what_speaks_of_rows_is_refused_where_the_host_packs(tmp_path):
    (tmp_path / "pool.json").write_text("[1]")
    with pytest.raises(ConfigError, match="candidate_pool: speaks of the rows of your data, and which of them training sees is not known"):
        sft_trainer(tmp_path, conversations(), packing=True, component_params={"candidate_pool": str(tmp_path / "pool.json")})
    trainer = sft_trainer(tmp_path, conversations(), packing=True)
    trainer.train()
    assert "packing" in json.loads((tmp_path / "dataflex/selections/summary.json").read_text())["numbering"]
    assert "kept" not in pq.read_table(tmp_path / "dataflex/rows.parquet").column_names


def test_the_data_of_a_plain_trainer_is_not_touched(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = datasets.Dataset.from_list(tiny_rows(16)).shuffle(seed=0)
    trainer = SelectTrainer.over(Trainer)(
        tiny_model(),
        TrainingArguments(str(tmp_path), **ARGUMENTS),
        pad_collator,
        data,
        dataflex=DataflexConfig(**SCHEDULE, train_type="dynamic_select"),
    )
    assert trainer.train_dataset is data and not trainer.row_numbers.changed
    trainer.train()
    assert pq.read_table(tmp_path / "dataflex/rows.parquet").column("kept").to_pylist() == [True] * 16
