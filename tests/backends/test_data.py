"""Data sets from files to tokens: what is read, what is refused and with which words, and which tokens carry labels."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_files import ALPACA, TALK, labelled, problems_of, spec_of, talk, write_info, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.backends.datasets.conversations import to_messages
from dataflex.backends.datasets.encode import encode_sft, encode_text
from dataflex.backends.datasets.find import find_datasets
from dataflex.backends.datasets.rows import load_rows
from dataflex.backends.datasets.spec import DatasetSpec
from dataflex.errors import ConfigError
from dataflex.testing.tiny import tiny_tokenizer

# Like Qwen3: only the last reply is written with its (empty) thoughts.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT_TEMPLATE = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + str(tiny_tokenizer().chat_template)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()


class TestFormats:
    rows = ({"instruction": "a", "input": "b", "output": "c"}, {"instruction": "你好", "input": "", "output": "世界"})

    def write(self, path: Path) -> None:
        if path.suffix == ".json":
            path.write_text(json.dumps(list(self.rows), indent=1, ensure_ascii=False), encoding="utf-8")
        elif path.suffix == ".jsonl":
            write_lines(path, list(self.rows))
        elif path.suffix == ".csv":
            path.write_text("instruction,input,output\na,b,c\n你好,,世界\n", encoding="utf-8")
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist([{**row, "extra": [1]} for row in self.rows]), path)

    @pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
    def test_all_formats_read_the_same(self, tmp_path, suffix):
        self.write(tmp_path / f"d{suffix}")
        write_info(tmp_path, d={"file_name": f"d{suffix}"})
        (spec,) = find_datasets(["d"], tmp_path, stage="sft")
        assert load_rows(spec).to_list() == list(self.rows)

    def test_a_folder_is_read_in_the_order_of_names(self, tmp_path):
        write_lines(tmp_path / "many/b.jsonl", [{**ALPACA, "output": "2"}])
        write_lines(tmp_path / "many/a.jsonl", [{**ALPACA, "output": "1"}])
        (tmp_path / "many/.hidden").write_text("x")
        write_info(tmp_path, d={"file_name": "many"})
        assert load_rows(find_datasets(["d"], tmp_path, stage="sft")[0])["output"][:] == ["1", "2"]

    def test_byte_order_mark_blank_lines_and_lines_in_a_json_file(self, tmp_path):
        (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ALPACA).encode() + b"\r\n\n  \n" + json.dumps(ALPACA).encode())
        assert len(load_rows(find_datasets(["d.json"], tmp_path, stage="sft")[0])) == 2

    def test_text_files_hold_one_document_per_line(self, tmp_path):
        (tmp_path / "d.txt").write_text("one\n\ntwo\n")
        write_info(tmp_path, d={"file_name": "d.txt"})
        assert load_rows(find_datasets(["d"], tmp_path, stage="pt")[0])["text"][:] == ["one", "two"]

    def test_csv_with_quoted_newlines_and_long_fields(self, tmp_path):
        (tmp_path / "d.csv").write_text('instruction,input,output\n"a\nb",,' + "c" * 200_000 + "\n")
        row = load_rows(find_datasets(["d.csv"], tmp_path, stage="sft")[0])[0]
        assert row["instruction"] == "a\nb" and len(row["output"]) == 200_000

    def test_other_columns_may_have_mixed_types(self, tmp_path):
        spec = spec_of(tmp_path, [{**ALPACA, "id": 1}, {**ALPACA, "id": "x", "output": 2.5}, {**ALPACA, "id": [None]}])
        assert load_rows(spec).column_names == ["instruction", "input", "output"]
        assert load_rows(spec)["output"][:] == ["hi", "2.5", "hi"]

    def test_max_samples_and_num_samples(self, tmp_path):
        rows = [{**ALPACA, "output": str(number)} for number in range(3)]
        assert load_rows(spec_of(tmp_path, rows), 2)["output"][:] == ["0", "1"]
        assert load_rows(spec_of(tmp_path, rows, num_samples=2))["output"][:] == ["0", "1"]
        assert load_rows(spec_of(tmp_path, rows, num_samples=5))["output"][:] == ["0", "1", "2", "0", "1"]
        assert load_rows(spec_of(tmp_path, rows, num_samples=5), 1)["output"][:] == ["0"]


class TestFinding:
    def test_defaults_of_each_formatting(self, tmp_path):
        write_lines(tmp_path / "a.jsonl", [ALPACA])
        write_lines(tmp_path / "s.jsonl", [talk()])
        write_info(
            tmp_path,
            a={"file_name": "a.jsonl", "split": "train"},
            s={"file_name": "s.jsonl", "formatting": "sharegpt", "tags": {"user_tag": "human"}},
        )
        alpaca, sharegpt = find_datasets(["a", "s"], tmp_path, stage="sft")
        assert alpaca.columns == {"prompt": "instruction", "query": "input", "response": "output"} and alpaca.tags == {}
        assert sharegpt.columns == {"messages": "conversations"}
        assert sharegpt.tags == {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "system_tag": "system",
            "observation_tag": "observation",
            "function_tag": "function_call",
        }

    def test_given_columns_leave_optional_roles_out_as_llama_factory_does(self, tmp_path):
        spec = spec_of(tmp_path, [{**ALPACA, "input": "unread", "clean": "yes"}], columns={"response": "clean"})
        assert spec.columns == {"prompt": "instruction", "response": "clean"}
        assert to_messages(load_rows(spec)[0], spec)[0]["content"] == "Say hi"

    def test_direct_files_by_their_first_row(self, tmp_path, monkeypatch):
        write_lines(tmp_path / "sub/alpaca.jsonl", [ALPACA])
        write_lines(tmp_path / "sub/share.jsonl", [talk()])
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        write_lines(tmp_path / "openai.jsonl", [{"messages": chat}])
        monkeypatch.chdir(tmp_path)
        specs = find_datasets(["alpaca.jsonl", "share.jsonl", "openai.jsonl"], Path("sub"), stage="sft")
        assert [spec.formatting for spec in specs] == ["alpaca", "sharegpt", "sharegpt"]
        assert to_messages(load_rows(specs[2])[0], specs[2]) == chat
        assert [spec.name for spec in specs] == ["alpaca.jsonl", "share.jsonl", "openai.jsonl"]

    def test_direct_text_needs_no_folder(self, tmp_path):
        path = write_lines(tmp_path / "t.jsonl", [{"text": "x"}])
        (spec,) = find_datasets([str(path)], tmp_path / "nowhere", stage="pt")
        assert (spec.formatting, spec.columns) == ("text", {"prompt": "text"})

    def test_the_head_is_enough_for_a_long_file(self, tmp_path):
        path = write_lines(tmp_path / "d.jsonl", [ALPACA] * 150)
        with path.open("a") as file:
            file.write("{broken\n")
        (spec,) = find_datasets(["d.jsonl"], tmp_path, stage="sft")
        with pytest.raises(ConfigError, match=r"d\.jsonl:151: dataset: is not valid JSON: Expecting property name"):
            load_rows(spec)
        assert len(load_rows(spec, 150)) == 150


class TestRefusals:
    def test_folder_and_info_file(self, tmp_path):
        assert problems_of(tmp_path / "no", "d") == [
            f"{tmp_path / 'no'}: dataset_dir: is not a folder; set it to the one that holds dataset_info.json"
        ]
        assert "dataset_info.json: dataset_dir: does not exist" in problems_of(tmp_path, "d")[0]
        (tmp_path / "dataset_info.json").write_text('{\n  "a": 1,\n  oops\n}')
        assert problems_of(tmp_path, "d", "e") == [
            "dataset_info.json:3: dataset_dir: is not valid JSON: Expecting property name enclosed in double quotes (column 3)"
        ]
        (tmp_path / "dataset_info.json").write_text("[]")
        assert "must hold an object" in problems_of(tmp_path, "d")[0]

    def test_unknown_names_are_all_reported_with_the_nearest(self, tmp_path):
        write_info(tmp_path, **{f"math_{number:02}": {} for number in range(12)})
        first, second = problems_of(tmp_path, "mth_03", "zzz.jsonl", key="eval_dataset")
        available = ", ".join(f"math_{number:02}" for number in range(10)) + ", ..."
        assert first == f"dataset_info.json: eval_dataset: has no data set 'mth_03'. Did you mean 'math_03'? Available: {available}"
        assert "'zzz.jsonl'" in second

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"file_nam": "d.jsonl", "file_name": "d.jsonl"}, "'file_nam' is not a known key. Did you mean 'file_name'?"),
            ({}, "file_name is missing"),
            ({"hf_hub_url": "a/b"}, "hf_hub_url: data sets are not downloaded here"),
            ({"script_url": "a"}, "script_url: data sets are not downloaded here"),
            ({"file_name": "d.jsonl", "subset": "x"}, "subset concerns data sets on a hub"),
            ({"file_name": "d.jsonl", "split": "test"}, "split concerns data sets on a hub"),
            ({"file_name": "d.jsonl", "ranking": True}, "ranking: preference pairs cannot be trained on"),
            ({"file_name": "d.jsonl", "num_samples": 0}, "num_samples must be a whole number above 0, got 0"),
            (
                {"file_name": "d.jsonl", "formatting": "opneai"},
                "formatting must be one of alpaca, openai, prompt_completion, sharegpt, got 'opneai'. Did you mean 'openai'?",
            ),
            ({"file_name": "d.jsonl", "columns": {"promt": "a"}}, "columns: 'promt' is not a known role. Did you mean 'prompt'?"),
            ({"file_name": "d.jsonl", "columns": {"images": "a"}}, "columns: 'images' is not used with formatting alpaca. Allowed: history, prompt"),
            ({"file_name": "d.jsonl", "columns": ["a"]}, "columns must be an object of names to names"),
            ({"file_name": "d.jsonl", "formatting": "sharegpt", "tags": {"rol_tag": "x"}}, "tags: 'rol_tag' is not known. Did you mean 'role_tag'?"),
            ({"file_name": "d.jsonl", "tags": {"role_tag": "x"}}, "tags say how messages are written, and rows of formatting: alpaca"),
        ],
    )
    def test_entries(self, tmp_path, entry, message):
        write_lines(tmp_path / "d.jsonl", [ALPACA])
        write_info(tmp_path, d=entry)
        (problem,) = problems_of(tmp_path, "d")
        assert problem.startswith(f"dataset_info.json: dataset: 'd': {message}")

    def test_columns_of_conversations_are_not_for_stage_pt(self, tmp_path):
        write_lines(tmp_path / "d.jsonl", [ALPACA])
        write_info(tmp_path, d={"file_name": "d.jsonl", "columns": {"prompt": "instruction", "response": "output"}})
        assert "'response' is not used with stage pt. Allowed: prompt" in problems_of(tmp_path, "d", stage="pt")[0]

    def test_every_problem_at_once(self, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        (tmp_path / "blank.jsonl").write_text("\n\n")
        (tmp_path / "x.xml").write_text("<x/>")
        (tmp_path / "x.txt").write_text("x")
        (tmp_path / "folder").mkdir()
        (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
        (tmp_path / "bad.json").write_text('[{"a": 1},\n {"a": }]')
        (tmp_path / "latin.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
        (tmp_path / "list.jsonl").write_text('{"instruction": "a", "output": ["b"]}\n')
        (tmp_path / "bad.csv").write_text("instruction,output\na,b\na,b,c\n")
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
        write_lines(tmp_path / "number.jsonl", [{"instruction": "a", "output": "b"}, 3])
        write_lines(tmp_path / "other.jsonl", [{"q": "a", "output": "b"}])
        names = ["none.jsonl", "empty.jsonl", "blank.jsonl", "x.xml", "x.txt", "folder", "bad.jsonl", "bad.json", "latin.jsonl", "list.jsonl"]
        names += ["bad.csv", "bad.parquet", "number.jsonl", "other.jsonl"]
        write_info(tmp_path, **{name.replace(".", "_"): {"file_name": name} for name in names})
        found = problems_of(tmp_path, *(name.replace(".", "_") for name in names))
        expected = [
            "none.jsonl: dataset: does not exist",
            "empty.jsonl: dataset: is empty",
            "blank.jsonl: dataset: holds no rows",
            "x.xml: dataset: has no supported file type; supported: .csv, .json, .jsonl, .parquet",
            "x.txt: dataset: has no supported file type (.txt is for stage pt)",
            "folder: dataset: is a folder without files",
            "bad.jsonl:2: dataset: is not valid JSON: Expecting value",
            "bad.json:2: dataset: is not valid JSON: Expecting value",
            "latin.jsonl:2: dataset: is not UTF-8 text",
            "list.jsonl:1: dataset: column 'output' is a list, not text",
            "bad.csv:3: dataset: has 3 fields, but the header names 2",
            "bad.parquet: dataset: is not a valid parquet file",
            "number.jsonl:2: dataset: is a number; each row must be an object",
            "other.jsonl: dataset: has no column 'instruction'; its columns: output, q. `columns` of 'other_jsonl' in dataset_info.json says which",
        ]
        assert len(found) == len(expected)
        for problem, start in zip(found, expected, strict=True):
            assert problem.startswith(start)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"conversations": "hello"}, "column 'conversations' is text, not a list"),
            ({"conversations": ["hello"]}, "column 'conversations' holds text, not a message with 'from' and 'value'"),
            ({"conversations": [None]}, "column 'conversations' holds null, not a message"),
            (
                {"conversations": [{"from": "human", "value": [{"type": "image"}]}]},
                "column 'conversations': 'value' of a message is a list, not text",
            ),
            ({"conversations": [{"from": "human", "value": True}]}, "'value' of a message is a true/false value, not text"),
        ],
    )
    def test_values_of_the_wrong_type(self, tmp_path, row, message):
        write_lines(tmp_path / "d.jsonl", [row])
        assert message in problems_of(tmp_path, "d.jsonl")[0]

    def test_half_a_surrogate_pair(self, tmp_path):
        (tmp_path / "d.jsonl").write_text('{"instruction": "\\ud800", "output": "x"}\n')
        assert "d.jsonl:1: dataset: column 'instruction' holds half of a surrogate pair" in problems_of(tmp_path, "d.jsonl")[0]


class TestMessages:
    spec = DatasetSpec(
        "d", Path("d.jsonl"), "alpaca", {"prompt": "instruction", "query": "input", "response": "output", "system": "sys", "history": "past"}
    )
    share = DatasetSpec(
        "s",
        Path("s.jsonl"),
        "sharegpt",
        {"messages": "c", "system": "sys"},
        {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "system_tag": "system",
            "observation_tag": "observation",
            "function_tag": "function_call",
        },
    )

    def test_alpaca(self):
        row = {"instruction": "add", "input": "1 2", "output": 3, "sys": "be kind", "past": [["q", "a"]]}
        assert [(turn["role"], turn["content"]) for turn in to_messages(row, self.spec, "unused")] == [
            ("system", "be kind"),
            ("user", "q"),
            ("assistant", "a"),
            ("user", "add\n1 2"),
            ("assistant", "3"),
        ]

    def test_the_default_system_prompt(self):
        row = {"instruction": "你好", "input": None, "output": "世界", "sys": "", "past": None}
        assert [turn["content"] for turn in to_messages(row, self.spec, "default")] == ["default", "你好", "世界"]
        assert [turn["content"] for turn in to_messages(row, self.spec)] == ["你好", "世界"]

    def test_sharegpt_roles(self):
        turns = [("system", "s"), ("human", "h"), ("function_call", "f"), ("observation", "o"), ("gpt", "g")]
        row = {"c": [{"from": role, "value": text} for role, text in turns], "sys": "not used: the conversation has its own"}
        assert [turn["role"] for turn in to_messages(row, self.share, "d")] == ["system", "user", "assistant", "tool", "assistant"]
        assert to_messages({"c": row["c"][1:], "sys": "column"}, self.share)[0] == {"role": "system", "content": "column"}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"c": []}, "column 'c' holds no conversation"),
            ({}, "column 'c' holds no conversation"),
            ({"c": [{"from": "bot", "value": "x"}]}, "'from' is 'bot'; known: function_call, gpt, human, observation, system"),
            ({"c": [{"from": "gpt", "value": None}]}, "'value' of a message is null, not text"),
            ({"c": [{"from": "gpt", "value": {"a": 1}}]}, "'value' of a message is an object, not text"),
        ],
    )
    def test_sharegpt_troubles(self, row, message):
        with pytest.raises(ValueError, match=message):
            to_messages(row, self.share)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"instruction": "a"}, "column 'output' is null, not text"),
            ({"output": "a"}, "column 'instruction' is null, not text"),
            ({**ALPACA, "past": [["only"]]}, "must hold .prompt, response. pairs"),
            ({**ALPACA, "input": ["x"]}, "column 'input' is a list, not text"),
        ],
    )
    def test_alpaca_troubles(self, row, message):
        with pytest.raises(ValueError, match=message):
            to_messages(row, self.spec)


class TestSft:
    def test_single_turn(self, tmp_path, tokenizer):
        encoded = encode_sft([spec_of(tmp_path, [{**ALPACA, "output": "你好 hi"}])], tokenizer, cutoff_len=200)
        assert encoded.dataset.column_names == ["input_ids", "labels", "domain_id", "dataflex_row"]
        assert tokenizer.decode(encoded.dataset[0]["input_ids"]) == "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n你好 hi<|im_end|>\n"
        assert labelled(encoded, tokenizer) == ["你好 hi<|im_end|>\n"]
        assert (encoded.names, encoded.dropped) == (["d"], {})

    @pytest.mark.parametrize("template", [None, THINKING_TEMPLATE])
    def test_every_reply_is_labelled(self, tmp_path, template):
        tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
        thoughts = "<think>\n\n</think>\n\n" if template else ""
        spec = spec_of(tmp_path, [talk([*TALK, ("human", "not answered")])], formatting="sharegpt")
        assert labelled(encode_sft([spec], tokenizer, cutoff_len=500), tokenizer) == ["1<|im_end|>\n", f"{thoughts}2<|im_end|>\n"]
        assert labelled(encode_sft([spec], tokenizer, cutoff_len=500, mask_history=True), tokenizer) == [f"{thoughts}2<|im_end|>\n"]
        row = encode_sft([spec], tokenizer, cutoff_len=500, train_on_prompt=True).dataset[0]
        assert row["labels"] == row["input_ids"]

    def test_a_template_without_a_generation_prompt(self, tmp_path):
        tokenizer = tiny_tokenizer("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}")
        encoded = encode_sft([spec_of(tmp_path, [talk()], formatting="sharegpt")], tokenizer, cutoff_len=500)
        assert labelled(encoded, tokenizer) == ["[assistant] 1<|im_end|>", "[assistant] 2<|im_end|>"]

    def test_truncation_keeps_the_start(self, tmp_path, tokenizer):
        spec = spec_of(tmp_path, [talk()], formatting="sharegpt")
        whole = encode_sft([spec], tokenizer, cutoff_len=500).dataset[0]
        cut = encode_sft([spec], tokenizer, cutoff_len=40).dataset[0]
        assert cut["input_ids"] == whole["input_ids"][:40] and cut["labels"] == whole["labels"][:40]

    def test_rows_left_out_are_counted(self, tmp_path):
        rows = [
            talk(),
            talk([("human", "x" * 200), ("gpt", "y")]),
            talk([("human", "x")]),
            talk([("bot", "x")]),
            talk([]),
            talk([("gpt", "1"), ("human", "2"), ("gpt", "3")]),
        ]
        encoded = encode_sft([spec_of(tmp_path, rows, formatting="sharegpt")], tiny_tokenizer(STRICT_TEMPLATE), cutoff_len=100)
        assert len(encoded.dataset) == 1
        assert encoded.dropped == {"no target tokens within cutoff_len": 1, "no assistant turn": 1, "malformed": 2, "chat template failed": 1}

    def test_a_data_set_without_usable_rows(self, tmp_path, tokenizer):
        good = spec_of(tmp_path, [ALPACA])
        write_lines(tmp_path / "bad.jsonl", [{"instruction": "a", "output": None}, {"instruction": "a" * 100, "output": "b"}])
        (bad,) = find_datasets(["bad.jsonl"], tmp_path, stage="sft", key="eval_dataset")
        with pytest.raises(ConfigError) as caught:
            encode_sft([good, bad], tokenizer, cutoff_len=60)
        assert str(caught.value) == (
            "bad.jsonl: eval_dataset: no row of 'bad.jsonl' can be trained on: 1 x malformed, 1 x no target tokens within cutoff_len "
            "(for example: malformed: column 'output' is null, not text)"
        )

    def test_a_tokenizer_without_a_chat_template(self, tmp_path):
        with pytest.raises(ConfigError, match=r"1 x chat template failed \(for example: .*chat_template"):
            encode_sft([spec_of(tmp_path, [ALPACA])], tiny_tokenizer(None), cutoff_len=60)

    def test_several_data_sets_in_order_whatever_the_number_of_processes(self, tmp_path, tokenizer):
        write_lines(tmp_path / "a.jsonl", [{**ALPACA, "output": f"a{number}"} for number in range(5)])
        write_lines(tmp_path / "b.jsonl", [{**ALPACA, "output": "b"}, {**ALPACA, "output": None}])
        specs = find_datasets(["b.jsonl", "a.jsonl"], tmp_path, stage="sft")
        one = encode_sft(specs, tokenizer, cutoff_len=100, max_samples=3, default_system="s")
        two = encode_sft(specs, tokenizer, cutoff_len=100, max_samples=3, default_system="s", num_proc=2)
        assert one.dataset["domain_id"][:] == [0, 1, 1, 1] and one.names == ["b.jsonl", "a.jsonl"]
        assert one.dataset[:] == two.dataset[:] and one.dropped == two.dropped == {"malformed": 1}
        assert tokenizer.decode(one.dataset[1]["input_ids"]).startswith("<|im_start|>system\ns<|im_end|>")

    text = st.one_of(st.none(), st.text(max_size=12), st.integers())
    turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "bot"]), "value": text})

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rows=st.lists(st.lists(turn, max_size=5), min_size=1, max_size=6), cutoff=st.integers(8, 120), mask=st.booleans())
    def test_labels_are_tokens_and_no_row_is_lost(self, tmp_path, tokenizer, rows, cutoff, mask):
        write_lines(tmp_path / "d.jsonl", [talk(), *({"conversations": turns} for turns in rows)])
        (spec,) = find_datasets(["d.jsonl"], tmp_path, stage="sft")
        try:
            encoded = encode_sft([spec], tokenizer, cutoff_len=cutoff, mask_history=mask)
        except ConfigError as error:
            assert "no row of 'd.jsonl' can be trained on" in str(error)
            return
        assert len(encoded.dataset) + sum(encoded.dropped.values()) == len(rows) + 1
        for row in encoded.dataset:
            assert len(row["labels"]) == len(row["input_ids"]) <= cutoff
            assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
            assert any(label != -100 for label in row["labels"][1:])


class TestText:
    def specs(self, folder: Path, *documents: list[Any]) -> list[DatasetSpec]:
        names = [write_lines(folder / f"{number}.jsonl", [{"text": text} for text in texts]).name for number, texts in enumerate(documents)]
        return find_datasets(names, folder, stage="pt")

    def test_one_document_per_row(self, tmp_path, tokenizer):
        encoded = encode_text(self.specs(tmp_path, ["你好", "abcdefghij", "", None, 42]), tokenizer, cutoff_len=8, pack=False)
        assert [tokenizer.decode(ids) for ids in encoded.dataset["input_ids"]] == ["你好<|im_end|>", "abcdefgh", "42<|im_end|>"]
        assert encoded.dataset["labels"][:] == encoded.dataset["input_ids"][:]
        assert encoded.dropped == {"fewer than 2 tokens": 1, "malformed": 1}

    def test_packing_within_a_data_set(self, tmp_path, tokenizer):
        encoded = encode_text(self.specs(tmp_path, ["abc", "", "defg"], ["xy"]), tokenizer, cutoff_len=4, pack=True, num_proc=2)
        assert [tokenizer.decode(ids) for ids in encoded.dataset["input_ids"]] == ["abc<|im_end|>", "defg", "xy<|im_end|>"]
        assert encoded.dataset["labels"][:] == encoded.dataset["input_ids"][:]
        assert encoded.dataset["domain_id"][:] == [0, 0, 1]
        assert encoded.dropped == {"fewer than 2 tokens": 2}  # the empty document, and the end of the last one, alone in its row

    def test_the_last_short_row_is_kept(self, tmp_path, tokenizer):
        encoded = encode_text(self.specs(tmp_path, ["abcde"]), tokenizer, cutoff_len=4, pack=True)
        assert [tokenizer.decode(ids) for ids in encoded.dataset["input_ids"]] == ["abcd", "e<|im_end|>"]

    def test_packing_loses_no_token(self, tmp_path, tokenizer):
        texts = ["alpha", "beta gamma", "δ" * 8]
        encoded = encode_text(self.specs(tmp_path, texts), tokenizer, cutoff_len=7, pack=True)
        rows = encoded.dataset["input_ids"][:]
        assert "".join(tokenizer.decode([token for row in rows for token in row])) == "".join(f"{text}<|im_end|>" for text in texts)
        assert Counter(len(row) for row in rows[:-1]) == {7: len(rows) - 1}

    def test_nothing_left(self, tmp_path, tokenizer):
        for pack in (True, False):
            with pytest.raises(ConfigError, match=r"no row of '0\.jsonl' can be trained on: 2 x fewer than 2 tokens"):
                encode_text(self.specs(tmp_path, ["", ""]), tokenizer, cutoff_len=4, pack=pack)

    def test_a_tokenizer_without_an_end_of_text_token(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ConfigError, match="pt needs a tokenizer with an end-of-text token"):
            encode_text(self.specs(tmp_path, ["a b"]), tokenizer, cutoff_len=4, pack=True)
