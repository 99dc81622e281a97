"""TRL's own row formats: `messages`, and `prompt` with `completion`, as text or as messages."""

import json

import pytest
from data_files import labelled, problems_of, talk, write_info, write_lines

from dataflex.backends.datasets.encode import encode_sft
from dataflex.backends.datasets.find import find_datasets
from dataflex.errors import ConfigError
from dataflex.testing.tiny import tiny_model, tiny_tokenizer

TEXT = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "1 + 1 =", "completion": " 2<|im_end|>"}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
MESSAGES = [
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]},
    {
        "prompt": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    },
]


@pytest.fixture(autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()


def ours(folder, rows, *, entry=None, **options):
    write_lines(folder / "d.jsonl", rows)
    if entry is not None:
        write_info(folder, d={"file_name": "d.jsonl", **entry})
    return encode_sft(find_datasets(["d" if entry is not None else "d.jsonl"], folder, stage="sft"), tiny_tokenizer(), cutoff_len=200, **options)


@pytest.mark.parametrize("rows", [TEXT, MESSAGES], ids=["text", "messages"])
def test_as_sft_trainer_reads_them(tmp_path, rows):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", max_length=200)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    theirs = [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]
    encoded = ours(tmp_path, rows)
    assert [(row["input_ids"], row["labels"]) for row in encoded.dataset] == theirs and encoded.dropped == {}


@pytest.mark.parametrize("entry", [{}, {"formatting": "prompt_completion"}])
@pytest.mark.parametrize("rows", [TEXT, MESSAGES], ids=["text", "messages"])
def test_by_dataset_info(tmp_path, rows, entry):
    assert ours(tmp_path, rows, entry=entry).dataset[:] == ours(tmp_path, rows).dataset[:]


def test_columns_of_other_names(tmp_path):
    rows = [{"p": row["prompt"], "c": row["completion"]} for row in MESSAGES]
    entry = {"formatting": "prompt_completion", "columns": {"prompt": "p", "completion": "c"}}
    assert ours(tmp_path, rows, entry=entry).dataset[:] == ours(tmp_path, MESSAGES).dataset[:]


def test_messages_by_an_entry_that_only_names_the_file(tmp_path):
    rows = [{"messages": row["prompt"] + row["completion"]} for row in MESSAGES]
    encoded = ours(tmp_path, rows, entry={})
    assert labelled(encoded, tiny_tokenizer(), 1) == ["b<|im_end|>\n", "d<|im_end|>\n"]
    assert labelled(ours(tmp_path, [talk()], entry={}), tiny_tokenizer()) == ["1<|im_end|>\n", "2<|im_end|>\n"]


def test_only_answers_of_the_completion_are_targets(tmp_path):
    completion = [{"role": "assistant", "content": "1"}, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "2"}]
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": completion}
    assert labelled(ours(tmp_path, [row]), tiny_tokenizer()) == ["1<|im_end|>\n", "2<|im_end|>\n"]
    assert labelled(ours(tmp_path, [row], mask_history=True), tiny_tokenizer()) == ["2<|im_end|>\n"]
    encoded = ours(tmp_path, [MESSAGES[1]], train_on_prompt=True).dataset[0]
    assert encoded["labels"] == encoded["input_ids"]
    text = ours(tmp_path, TEXT, train_on_prompt=True).dataset[0]
    assert text["labels"] == text["input_ids"]


def test_empty_and_missing_completions(tmp_path):
    rows = [*TEXT, {"prompt": "x", "completion": ""}, {"prompt": "x", "completion": None}, {"prompt": None, "completion": "x"}]
    assert ours(tmp_path, rows).dropped == {"malformed": 3}
    empty = {"prompt": MESSAGES[0]["prompt"], "completion": []}
    assert ours(tmp_path, [*MESSAGES, empty, {**empty, "completion": [{"role": "assistant", "content": ""}]}]).dropped == {"malformed": 2}


def test_calls_and_tools_are_not_lost(tmp_path):
    row = {"prompt": MESSAGES[0]["prompt"], "completion": [{"role": "assistant", "content": None, "tool_calls": CALL}]}
    assert ours(tmp_path, [*MESSAGES, row]).dropped == {"the chat template does not write tool_calls": 1}
    with_tools = {**MESSAGES[0], "tools": json.dumps([CALL[0]])}
    assert ours(tmp_path, [*MESSAGES, with_tools]).dropped == {"the chat template does not write tools (of the row)": 1}
    assert ours(tmp_path, [*TEXT, {**TEXT[0], "tools": json.dumps([CALL[0]])}]).dropped == {"malformed": 1}


def test_text_and_messages_in_one_file(tmp_path):
    write_lines(tmp_path / "d.jsonl", [TEXT[0], MESSAGES[0]])
    assert problems_of(tmp_path, "d.jsonl") == ["d.jsonl:2: dataset: column 'prompt' is a list, not text"]
    write_lines(tmp_path / "d.jsonl", [MESSAGES[0], TEXT[0]])
    assert problems_of(tmp_path, "d.jsonl") == ["d.jsonl:2: dataset: column 'prompt' is text, not a list"]


def test_prompts_and_answers_of_a_preference_set_are_not_taken_for_one(tmp_path):
    write_lines(tmp_path / "d.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ConfigError, match="has no column 'instruction', 'output'"):
        find_datasets(["d.jsonl"], tmp_path, stage="sft")
