"""LLaMA-Factory forgets which rows it leaves out; the numbers that a user reads and writes are those of his files all the same."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from dataflex.backends import load_backend
from dataflex.cli.plan import check_run
from dataflex.errors import ConfigError

DROPPED = {1, 4, 8}
BASE = {
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset": "first,second",
    "template": "empty",
    "cutoff_len": 64,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "train_type": "dynamic_select",
    "component_name": "random",
    "update_step": 2,
    "update_times": 1,
}


@pytest.fixture
def write(tmp_path, model):
    rows = [{"instruction": f"row {k}", "input": "", "output": None if k in DROPPED else f"this is {k}"} for k in range(14)]
    for name, part in (("first", rows[:10]), ("second", rows[10:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    texts = [{"text": f"this is {k}"} for k in range(10)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    info = {"first": {"file_name": "first.json"}, "second": {"file_name": "second.json"}, "drawn": {"file_name": "first.json", "num_samples": 6}}
    info["texts"] = {"file_name": "texts.json", "columns": {"prompt": "text"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    def write(pool=None, **keys):
        path = tmp_path / "config.yaml"
        params = {"candidate_pool": str(tmp_path / "pool.json")} if pool is not None else {}
        (tmp_path / "pool.json").write_text(json.dumps(pool))
        keys = {"dataset_dir": str(tmp_path), "model_name_or_path": model, "output_dir": str(tmp_path / "out"), "component_params": params, **keys}
        path.write_text(yaml.safe_dump({**BASE, **keys}))
        return path

    return write


def trained(path, tmp_path):
    """Selected rows, and the text that the summary gives for each."""
    run, prepared = check_run(path)
    load_backend("llamafactory").train(run, prepared)
    out = tmp_path / "out" / "dataflex"
    rows = set(np.concatenate([np.load(file) for file in out.glob("selections/step_*.npy")]).tolist())
    summary = json.loads((out / "selections/summary.json").read_text())
    return rows, {row["row"]: row["text"] for row in [*summary["most"], *summary["least"]]}, pq.read_table(out / "rows.parquet").to_pylist()


@pytest.mark.parametrize(("keys", "pool", "expected"), [({}, [1, 5, "second:2"], {5, 12}), ({"max_samples": 6}, [0, 5, 9, 11], {0, 5, 11})])
def test_a_pool_names_rows_of_the_files(write, tmp_path, keys, pool, expected):
    rows, texts, table = trained(write(pool, **keys), tmp_path)
    assert rows == expected
    assert all(re.search(rf"this is {row}\b", texts[row]) for row in texts)
    assert {row["row"] for row in table if row["reason"]} == {k for k in DROPPED if not keys or k < 6}


def test_rows_held_out_are_numbered(write, tmp_path):
    rows, texts, table = trained(write(val_size=0.3), tmp_path)
    assert all(re.search(rf"this is {row}\b", texts[row]) for row in texts)
    held = {row["row"] for row in table if row["reason"] == "held out for evaluation (val_size)"}
    assert held and not held & rows and rows == {row["row"] for row in table if row["kept"]}


def test_text_that_is_not_packed(write, tmp_path):
    rows, texts, _ = trained(write([3, 7], stage="pt", dataset="texts", packing=False), tmp_path)
    assert rows == {3, 7} and all(f"this is {row}<" in texts[row] for row in texts)


@pytest.mark.parametrize(("keys", "reason"), [({"packing": True}, "packs them"), ({"dataset": "drawn"}, "draws them at random")])
def test_what_cannot_be_numbered_is_refused(write, tmp_path, keys, reason):
    run, prepared = check_run(write([3], **keys))
    with pytest.raises(ConfigError, match=reason):
        load_backend("llamafactory").train(run, prepared)
