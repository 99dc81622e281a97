"""Every row number that a user reads or writes is the row of his data, whatever was dropped, held out, reordered or packed before training."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from workspace import make_workspace, run_cli, write_config, write_rows

LONG = "x" * 300  # no answer within cutoff_len
DROPPED = {0, 3, 4, 8, 9, 15}


def rows(number: int = 16, start: int = 0, dropped=DROPPED) -> list[dict[str, str]]:
    """Rows whose text says which they are; `dropped` ones have no target within cutoff_len."""
    return [
        {"instruction": f"row {k + start}" + LONG * (k in dropped), "input": "", "output": f"this is {k + start}", "id": f"id-{k + start}"}
        for k in range(number)
    ]


@pytest.fixture
def folder(tmp_path):
    folder = make_workspace(tmp_path / "w")
    write_rows(folder / "data/rows.jsonl", rows())
    write_rows(folder / "data/more.jsonl", rows(8, 100, {1}))
    info = {name: {"file_name": f"{name}.jsonl"} for name in ("rows", "more", "held_out")}
    (folder / "data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


SELECT = {"train_type": "dynamic_select", "component_name": "random", "warmup_step": 0, "update_step": 2, "update_times": 2, "train_step": 4}


def train(folder: Path, **changes) -> Path:
    config = write_config(folder, **{**SELECT, "dataset_dir": str(folder / "data"), "model_name_or_path": str(folder / "model"), **changes})
    done = run_cli("train", str(config), f"output_dir={folder / 'out'}")
    assert done.exit_code == 0, done.output
    return folder / "out" / "dataflex"


def selected(out: Path) -> list[int]:
    return np.concatenate([np.load(path) for path in sorted(out.glob("selections/step_*.npy"))]).tolist()


def table(out: Path) -> list[dict]:
    return pq.read_table(out / "rows.parquet").to_pylist()


def check_texts(out: Path, text=lambda row: f"this is {row}") -> None:
    """What the summary calls row k really is row k."""
    summary = json.loads((out / "selections/summary.json").read_text())
    assert summary["most"]
    for row in [*summary["most"], *summary["least"]]:
        assert text(row["row"]) + "<" in row["text"], row


def test_a_pool_names_rows_of_the_file_when_rows_are_dropped(folder):
    (folder / "pool.json").write_text(json.dumps([1, 5, "rows:7", 3]))
    out = train(folder, component_params={"candidate_pool": str(folder / "pool.json")})
    assert set(selected(out)) == {1, 5, 7}
    check_texts(out)
    found = table(out)
    assert [row["row"] for row in found if not row["kept"]] == sorted(DROPPED)
    assert {row["reason"] for row in found if not row["kept"]} == {"no target tokens within cutoff_len"}
    assert all((row["dataset"], row["file_row"], row["id"]) == ("rows", row["row"], f"id-{row['row']}") for row in found)
    assert all(Path(row["file"]).name == "rows.jsonl" for row in found)


def test_numbers_go_on_over_data_sets_and_do_not_depend_on_max_samples(folder):
    pool = folder / "pool.npy"
    np.save(pool, np.array([2, 18, 16]))
    out = train(folder, dataset="rows,more", max_samples=6, component_params={"candidate_pool": str(pool)})
    assert set(selected(out)) == {2, 16, 18}
    check_texts(out, lambda row: f"this is {row if row < 16 else row + 84}")
    assert sorted(row["row"] for row in table(out)) == [*range(6), *range(16, 22)]
    assert {row["row"] for row in table(out) if not row["kept"]} == {0, 3, 4, 17}


def test_rows_held_out_are_numbered_too(folder):
    out = train(folder, val_size=0.3)
    held = {row["row"] for row in table(out) if row["reason"] == "held out for evaluation (val_size)"}
    assert len(held) == 3
    assert set(selected(out)) == set(range(16)) - DROPPED - held
    check_texts(out)


def test_domains_reorder_rows_but_not_their_numbers(folder):
    data = rows()
    for k, row in enumerate(data):
        row["topic"] = "ab"[k % 2]
    write_rows(folder / "data/rows.jsonl", data)
    (folder / "pool.json").write_text(json.dumps([True] * 3 + [False] * 4 + [True] * 9))
    out = train(folder, domain_column="topic", component_params={"candidate_pool": str(folder / "pool.json")})
    assert set(selected(out)) == {1, 2, 7, 10, 11, 12, 13, 14}
    check_texts(out)
    assert all(row["domain"] == "ab"[row["row"] % 2] for row in table(out))


def test_repeated_rows_keep_their_number(folder):
    info = {"rows": {"file_name": "rows.jsonl", "num_samples": 30}}
    (folder / "data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "pool.json").write_text(json.dumps([5]))
    out = train(folder, component_params={"candidate_pool": str(folder / "pool.json")})
    assert set(selected(out)) == {5}
    check_texts(out)


def test_packed_text_lists_its_documents(folder):
    write_rows(folder / "data/rows.jsonl", [{"text": "d" * (40 + k % 3)} for k in range(16)])
    (folder / "data/dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", "columns": {"prompt": "text"}}}))
    out = train(folder, stage="pt", cutoff_len=64, per_device_train_batch_size=2)
    ends = np.cumsum([41 + k % 3 for k in range(16)])
    blocks = [set(np.flatnonzero((ends > start) & (np.concatenate([[0], ends[:-1]]) < start + 64)).tolist()) for start in range(0, ends[-1], 64)]
    assert set(selected(out)) <= set(range(16))
    steps = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    first = next(event for event in steps if event["event"] == "selection")
    numbers = np.load(out / f"selections/step_{first['step']}.npy").tolist()
    assert first["documents"] == len(numbers) > first["samples"]
    for _ in range(first["samples"]):  # the file is a sequence of blocks, each with all of its documents
        block = next(block for block in blocks if numbers[: len(block)] == sorted(block))
        del numbers[: len(block)]
    assert not numbers
    (folder / "pool.json").write_text(json.dumps([0, 1, 2, 3]))
    within = [block for block in blocks if block <= {0, 1, 2, 3}]
    out = train(folder, stage="pt", cutoff_len=64, component_params={"candidate_pool": str(folder / "pool.json")}, overwrite_output_dir=True)
    assert within and set(selected(out)) == set.union(*within)
    assert run_cli("inspect", str(folder / "out")).exit_code == 0


def test_packed_conversations_list_their_documents(folder):
    out = train(folder, packing=True, cutoff_len=128, per_device_train_batch_size=2)
    assert set(selected(out)) == set(range(16)) - DROPPED
    assert {row["row"] for row in table(out) if row["kept"]} == set(range(16)) - DROPPED


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_is_that_of_trl(strategy):
    import datasets
    from trl import pack_dataset

    from dataflex.backends.datasets.packing import pack_conversations
    from dataflex.testing.tiny import tiny_rows

    table = datasets.Dataset.from_list(tiny_rows(40, lengths=(3, 30))).remove_columns("attention_mask")
    ours = pack_conversations(table.add_column("dataflex_row", [7 * k for k in range(40)]), 24, strategy)
    theirs = pack_dataset(table.select_columns(["input_ids", "labels"]), 24, strategy)
    assert ours.remove_columns("dataflex_row")[:] == theirs[:]
    for row in ours:
        lengths, start = row.get("seq_lengths") or [], 0
        for length, number in zip(lengths, row["dataflex_row"], strict=bool(lengths)):
            tokens = row["input_ids"][start : start + length]
            whole = table[number // 7]["input_ids"]
            assert any(whole[k : k + length] == tokens for k in range(len(whole)))
            start += length


def test_offline_results_and_embeddings_are_by_row_of_the_file(folder):
    config = write_config(folder, **SELECT, eval_dataset="held_out")
    done = run_cli("offline", "near", str(config), "-o", str(folder / "near.safetensors"), f"dataset_dir={folder / 'data'}", *here(folder))
    assert done.exit_code == 0, done.output
    from safetensors.numpy import load_file

    order = load_file(folder / "near.safetensors")["order"].tolist()
    assert set(order) == set(range(16)) - DROPPED
    few = {"per_device_train_batch_size": 1, "update_step": 3, "update_times": 1, "train_step": 3}
    out = train(folder, component_name="near", component_params={"file": str(folder / "near.safetensors")}, **few)
    assert set(selected(out)) == set(order[:3])
    check_texts(out)
    features = np.eye(16, dtype=np.float32)
    np.save(folder / "all.npy", features)
    np.save(folder / "queries.npy", features[[5, 12, 7]])
    files = {"embeddings_file": str(folder / "all.npy"), "query_embeddings_file": str(folder / "queries.npy")}
    out = train(folder, component_name="rds", component_params=files, overwrite_output_dir=True, **few)
    assert {5, 12, 7} == set(selected(out))


def here(folder: Path) -> list[str]:
    return [f"model_name_or_path={folder / 'model'}", f"output_dir={folder / 'out'}"]


def test_embeddings_of_the_kept_rows_only_are_refused(folder):
    np.save(folder / "kept.npy", np.eye(10, dtype=np.float32))
    files = {"embeddings_file": str(folder / "kept.npy"), "query_embeddings_file": str(folder / "kept.npy")}
    config = write_config(folder, **{**SELECT, "component_name": "rds", "component_params": files})
    done = run_cli("train", str(config), f"dataset_dir={folder / 'data'}", *here(folder))
    assert done.exit_code == 2 and "has 10 rows; the data set has 16" in done.output


def test_weighters_see_the_rows_of_the_file(folder):
    (folder / "seen.py").write_text(
        "import json, torch\nfrom dataflex import SampleWeighter, register_weighter\n"
        "@register_weighter('seen')\nclass Seen(SampleWeighter):\n"
        "    def sample_weights(self, losses, *, ctx, model, inputs):\n"
        f"        open({str(folder / 'seen.txt')!r}, 'a').write(json.dumps([ctx.sample_ids.tolist(), inputs['input_ids'].tolist()]) + '\\n')\n"
        "        return torch.ones_like(losses)\n"
    )
    (folder / "components.yaml").write_text("weighters: {seen: {params: {}}}\n")
    plain = {"train_type": "dynamic_weight", "component_name": "seen", "warmup_step": 0, "train_step": 3, "update_step": ..., "update_times": ...}
    train(folder, **plain, plugins=[str(folder / "seen.py")], components_cfg_file=str(folder / "components.yaml"))
    from dataflex.testing.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    for line in (folder / "seen.txt").read_text().splitlines():
        ids, batch = json.loads(line)
        assert [f"this is {row}<" in tokenizer.decode(tokens) for row, tokens in zip(ids, batch, strict=True)] == [True] * len(ids)


def test_validate_counts_what_training_sees(folder):
    config = write_config(folder, **{**SELECT, "dataset": "rows"})
    plan = run_cli("validate", str(config), f"dataset_dir={folder / 'data'}", *here(folder)).output
    assert "rows: 10 rows to train on, of 16" in plan
    assert "6 rows: no target tokens within cutoff_len" in plan
    assert "at most 100% of the rows are seen" in plan


def test_validate_counts_packed_text(folder):
    write_rows(folder / "data/rows.jsonl", [{"text": "d" * 500} for k in range(16)])
    (folder / "data/dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", "columns": {"prompt": "text"}}}))
    config = write_config(
        folder, stage="pt", cutoff_len=64, train_type="static", component_name=..., warmup_step=..., train_step=..., num_train_epochs=2
    )
    arguments = [str(config), f"dataset_dir={folder / 'data'}", *here(folder)]
    plan = run_cli("validate", *arguments).output
    assert "126 packed rows" in plan  # 16 x 501 tokens in rows of 64
    assert " 64, 2.0 passes" in plan  # steps of 4 rows
    assert run_cli("train", *arguments, "save_strategy=no").exit_code == 0
    assert json.loads((folder / "out/trainer_state.json").read_text())["global_step"] == 64
