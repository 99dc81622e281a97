"""Values, columns and files that are not what they seem: each is a missing value, or a problem with its place."""

import json
import os

import pytest
from data_files import ALPACA, problems_of, spec_of, talk, write_info, write_lines

from dataflex.backends.datasets.encode import encode_sft
from dataflex.backends.datasets.find import find_datasets
from dataflex.backends.datasets.rows import load_rows
from dataflex.errors import ConfigError
from dataflex.testing.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()


def table(folder, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), folder / "d.parquet")
    return find_datasets(["d.parquet"], folder, stage="sft")[0]


class TestMissingValues:
    def test_nan_in_json(self, tmp_path):
        rows = [{"instruction": "a", "output": float("nan")}, {"instruction": "b", "input": float("nan"), "system": float("nan"), "output": "fine"}]
        path = write_lines(tmp_path / "d.jsonl", rows)
        assert "NaN" in path.read_text()
        (spec,) = find_datasets(["d.jsonl"], tmp_path, stage="sft")
        assert load_rows(spec)["output"][:] == [None, "fine"] and load_rows(spec)["input"][:] == [None, None]
        encoded = encode_sft([spec], tiny_tokenizer(), cutoff_len=100)
        assert encoded.dropped == {"malformed": 1}
        assert tiny_tokenizer().decode(encoded.dataset[0]["input_ids"]) == "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n"

    def test_nan_in_parquet(self, tmp_path):
        spec = table(tmp_path, instruction=["a", "b", "c"], output=[1.0, float("nan"), 2.0])
        assert load_rows(spec)["output"][:] == ["1.0", None, "2.0"]

    def test_nan_in_messages_and_lists(self, tmp_path):
        nan = float("nan")
        write_lines(
            tmp_path / "d.jsonl", [talk([("human", "q"), ("gpt", "a")]), {"conversations": nan, "tools": nan}, talk([("human", "q"), ("gpt", nan)])]
        )
        encoded = encode_sft(find_datasets(["d.jsonl"], tmp_path, stage="sft"), tiny_tokenizer(), cutoff_len=100)
        assert (len(encoded.dataset), encoded.dropped) == (1, {"malformed": 2})

    def test_nan_in_text_for_pretraining(self, tmp_path):
        write_lines(tmp_path / "d.jsonl", [{"text": "a"}, {"text": float("nan")}])
        assert load_rows(find_datasets(["d.jsonl"], tmp_path, stage="pt")[0])["text"][:] == ["a", None]

    @pytest.mark.parametrize("value", [float("inf"), -float("inf")])
    @pytest.mark.parametrize("column", ["output", "input", "system"])
    def test_infinity_is_refused_with_its_line(self, tmp_path, value, column):
        write_lines(tmp_path / "d.jsonl", [ALPACA] * 2 + [{**ALPACA, column: value}])
        assert problems_of(tmp_path, "d.jsonl") == [f"d.jsonl:3: dataset: column '{column}' is Infinity, not text"]
        write_lines(tmp_path / "d.jsonl", [ALPACA] * 150 + [{**ALPACA, column: value}])
        with pytest.raises(ConfigError, match=r"d\.jsonl:151: .* is Infinity"):
            load_rows(find_datasets(["d.jsonl"], tmp_path, stage="sft")[0])

    def test_infinity_in_what_a_tool_is_called_with(self, tmp_path):
        calls = [{"function": {"name": "f", "arguments": {"x": float("inf")}}}]
        write_lines(tmp_path / "d.jsonl", [{"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}])
        assert problems_of(tmp_path, "d.jsonl") == ["d.jsonl:1: dataset: column 'messages': a message holds NaN or Infinity"]

    def test_a_number_without_end(self, tmp_path):
        write_lines(tmp_path / "d.jsonl", [{**ALPACA, "output": 10**400}])
        assert load_rows(find_datasets(["d.jsonl"], tmp_path, stage="sft")[0])["output"][0] == str(10**400)
        (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": ' + "9" * 5000 + "}\n")
        assert "d.jsonl:1: dataset: Exceeds the limit" in problems_of(tmp_path, "d.jsonl")[0]

    def test_fields_that_parquet_adds_to_every_object(self, tmp_path):
        calls = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {"y": 2}}}]
        messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}] for call in calls]
        spec = table(tmp_path, messages=messages)
        found = [json.loads(row["messages"][1]["(fields)"])["tool_calls"] for row in load_rows(spec)]
        assert found == [[call] for call in calls]
        assert load_rows(spec)[0]["messages"][0]["(fields)"] is None


class TestNamesThatComeTwice:
    def test_in_the_header_of_a_csv_file(self, tmp_path):
        (tmp_path / "d.csv").write_text("instruction,output,output\na,b,c\n")
        assert problems_of(tmp_path, "d.csv") == ["d.csv:1: dataset: names the column 'output' twice"]

    def test_in_the_header_behind_a_byte_order_mark(self, tmp_path):
        (tmp_path / "d.csv").write_bytes("\ufeffoutput,instruction,output\na,b,c\n".encode())
        assert problems_of(tmp_path, "d.csv") == ["d.csv:1: dataset: names the column 'output' twice"]

    def test_in_a_parquet_file(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
        pq.write_table(pa.Table.from_arrays(columns, names=["instruction", "output", "output"]), tmp_path / "d.parquet")
        assert problems_of(tmp_path, "d.parquet") == ["d.parquet: dataset: names the column 'output' twice"]

    def test_in_a_json_object(self, tmp_path):
        (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b", "output": "c"}\n')
        assert problems_of(tmp_path, "d.jsonl") == ["d.jsonl:2: dataset: holds the key 'output' twice in one object"]
        (tmp_path / "d.json").write_text('[\n{"instruction": "a", "output": "b", "output": "c"}]')
        assert problems_of(tmp_path, "d.json") == ["d.json: dataset: holds the key 'output' twice in one object"]

    def test_in_dataset_info(self, tmp_path):
        write_lines(tmp_path / "d.jsonl", [ALPACA])
        (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.jsonl"},\n "d": {"file_name": "d.jsonl"}}')
        assert problems_of(tmp_path, "d") == ["dataset_info.json: dataset_dir: holds the key 'd' twice in one object"]


class TestPlaces:
    @pytest.fixture
    def data(self, tmp_path):
        """A folder `data` for dataset_dir, and rows beside it."""
        write_lines(tmp_path / "elsewhere/x.jsonl", [ALPACA])
        write_lines(tmp_path / "data/in.jsonl", [ALPACA])
        return tmp_path / "data"

    def test_an_absolute_file_name(self, data):
        path = data.parent / "elsewhere/x.jsonl"
        write_info(data, d={"file_name": str(path)}, near={"file_name": str(data / "in.jsonl")})
        far, near = find_datasets(["d", "near"], data, stage="sft")
        assert (far.path, far.shown, near.shown) == (path, f"d ({path})", "near")
        assert len(load_rows(far)) == 1

    @pytest.mark.parametrize("name", ["../elsewhere/x.jsonl", "sub/../../elsewhere/x.jsonl", "./../elsewhere"])
    def test_a_relative_one_that_leads_out(self, data, name):
        write_info(data, d={"file_name": name})
        (problem,) = problems_of(data, "d")
        expected = f"dataset_info.json: dataset: 'd': file_name '{name}' leads out of dataset_dir; write the absolute path {data.parent}/elsewhere"
        assert problem.startswith(expected) and problem.endswith("or set allow_outside_dataset_dir: true")
        if name.startswith("sub"):
            (data / "sub").mkdir()
        (spec,) = find_datasets(["d"], data, stage="sft", allow_outside=True)
        assert len(load_rows(spec)) == 1 and spec.shown == f"d ({spec.path})"

    def test_one_that_comes_back(self, data):
        (data / "sub").mkdir()
        write_info(data, d={"file_name": "sub/../in.jsonl"}, e={"file_name": "../data/in.jsonl"})
        assert [spec.shown for spec in find_datasets(["d", "e"], data, stage="sft")] == ["d", "e"]

    def test_a_file_named_directly(self, data, monkeypatch):
        (problem,) = problems_of(data, "../elsewhere/x.jsonl")
        assert problem.startswith("dataset: '../elsewhere/x.jsonl' leads out of dataset_dir; write the absolute path")
        monkeypatch.chdir(data)
        assert "leads out of dataset_dir" in problems_of(data, "../elsewhere/x.jsonl")[0]
        assert len(find_datasets(["../elsewhere/x.jsonl"], data, stage="sft", allow_outside=True)) == 1
        assert len(find_datasets([str(data.parent / "elsewhere/x.jsonl")], data, stage="sft")) == 1
        assert len(find_datasets(["../data/in.jsonl"], data, stage="sft")) == 1

    def test_links(self, data):
        (data / "gone.jsonl").symlink_to("nowhere.jsonl")
        (data / "many").mkdir()
        (data / "many/a.jsonl").symlink_to(data / "in.jsonl")
        (data / "many/b.jsonl").symlink_to(data / "nowhere.jsonl")
        write_info(data, gone={"file_name": "gone.jsonl"}, many={"file_name": "many"})
        expected = "gone.jsonl: dataset: is a link to 'nowhere.jsonl', which does not exist"
        assert problems_of(data, "gone", "many") == [
            expected,
            f"many/b.jsonl: dataset: is a link to '{data}/nowhere.jsonl', which does not exist".replace(f"'{data}/", "'"),
        ]
        assert problems_of(data, "gone.jsonl") == [expected]

    def test_a_folder_within_the_folder_of_a_data_set(self, data):
        write_lines(data / "many/a.jsonl", [ALPACA])
        write_lines(data / "many/deeper/b.jsonl", [ALPACA])
        write_info(data, many={"file_name": "many"})
        assert problems_of(data, "many")[0].startswith("many/deeper: dataset: is a folder within the folder of a data set, and would not be read")

    @pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "a\0b.jsonl"])
    def test_names_that_no_file_can_have(self, data, name):
        write_info(data, d={"file_name": name})
        assert problems_of(data, "d")[0].endswith("does not exist")
        assert "has no data set" in problems_of(data, name)[0]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_folder_that_cannot_be_read(self, data):
        write_lines(data / "many/a.jsonl", [ALPACA])
        (data / "many").chmod(0)
        write_info(data, many={"file_name": "many"})
        assert "cannot be read: Permission denied" in problems_of(data, "many")[0]


def test_by_dataset_info_a_row_is_read_as_its_columns_say(tmp_path):
    """What was allowed stays allowed: an unread column may hold anything."""
    spec = spec_of(tmp_path, [{**ALPACA, "score": float("inf"), "meta": {"a": float("nan")}}])
    assert load_rows(spec).to_list() == [ALPACA]


def test_the_module_that_data_was_in():
    """Scripts that read data sets without a Trainer import from it."""
    from dataflex.backends import data

    assert data.encode_sft is encode_sft and data.find_datasets is find_datasets and data.load_rows is load_rows
