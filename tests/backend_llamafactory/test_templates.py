"""The templates that the trl backend has under LLaMA-Factory's names write the same tokens, and label the same ones, as LLaMA-Factory's."""

import json

import pytest
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from transformers import AutoTokenizer

from dataflex.backends.datasets.encode import encode_sft
from dataflex.backends.datasets.find import find_datasets
from dataflex.backends.templates import BUILT_IN, fit_tokenizer
from dataflex.testing.tiny import tiny_model, tiny_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {
        "r": {"type": "number", "description": "radius"},
        "unit": {"type": "string", "enum": ["cm", "m"]},
        "more": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["r"],
}
TOOLS = [{"name": "area", "description": "Area of a circle", "parameters": PARAMETERS}, {"name": "stop", "parameters": {"properties": {}}}]
CALL = json.dumps({"name": "area", "arguments": {"r": 2, "unit": "é"}}, ensure_ascii=False)
CALLS = json.dumps([{"name": "area", "arguments": {"r": 2}}, {"name": "stop", "arguments": {}}])


def row(*turns, system="", tools=""):
    return {"conversations": [{"from": role, "value": said} for role, said in turns], "system": system, "tools": tools}


ROWS = [
    row(("human", "hi"), ("gpt", "yo")),
    row(("human", "one?"), ("gpt", "1\n"), ("human", "two?"), ("gpt", "2"), system="be kind"),
    row(("human", "area?"), ("function_call", CALL), ("observation", '{"area": 12.56}'), ("gpt", "12.56")),
    row(("human", "area?"), ("function_call", CALLS), ("observation", "12.56"), ("gpt", "12.56"), tools=json.dumps(TOOLS)),
    row(
        ("human", "area?"),
        ("function_call", f"<think>\nhm\n</think>\n\n{CALL}"),
        ("observation", "1"),
        ("gpt", "1"),
        system="s",
        tools=json.dumps(TOOLS),
    ),
]


@pytest.fixture
def model(tmp_path):
    """A base model: no chat template, and an eos token that ends no turn."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def theirs(model, folder, **keys):
    """input_ids and labels of each row as LLaMA-Factory trains on them."""
    settings = {"stage": "sft", "do_train": True, "model_name_or_path": model, "dataset": "d", "dataset_dir": str(folder), "cutoff_len": 2000}
    settings |= {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none", "overwrite_cache": True}
    model_args, data_args, training_args, _, _ = get_train_args(settings | keys)
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    data = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)["train_dataset"]
    return [(row["input_ids"], row["labels"]) for row in data]


def ours(model, folder, template, **options):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = BUILT_IN[template]
    fit_tokenizer(template, tokenizer)
    data = encode_sft(find_datasets(["d"], folder, stage="sft"), tokenizer, cutoff_len=2000, **options)
    assert data.dropped == {}
    return [(row["input_ids"], row["labels"]) for row in data.dataset]


@pytest.mark.parametrize("template", sorted(BUILT_IN))
@pytest.mark.parametrize("masking", [{}, {"mask_history": True}, {"train_on_prompt": True}], ids=str)
def test_the_same_tokens_and_labels(tmp_path, model, template, masking):
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json", "formatting": "sharegpt", "columns": columns}}))
    found = ours(model, tmp_path, template, **masking)
    assert found == theirs(model, tmp_path, template=template, **masking)
    assert len(found) == len(ROWS)


@pytest.mark.parametrize("template", sorted(BUILT_IN))
def test_openai_format(tmp_path, model, template):
    call = {"type": "function", "function": {"name": "area", "arguments": {"r": 2}}}
    messages = [
        {"role": "system", "content": "detailed thinking off"},  # what LLaMA-Factory adds to every system prompt of this format
        {"role": "user", "content": "area?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12.56", "tool_calls": None},
        {"role": "assistant", "content": "12.56", "tool_calls": None},
    ]
    (tmp_path / "d.json").write_text(json.dumps([{"messages": messages}] * 2))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool"}
    tags |= {"system_tag": "system", "function_tag": "function_call"}
    entry = {"file_name": "d.json", "formatting": "openai", "columns": {"messages": "messages"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    assert ours(model, tmp_path, template) == theirs(model, tmp_path, template=template)


def test_alpaca_format(tmp_path, model):
    rows = [
        {"instruction": "add", "input": "1 2", "output": "3", "system": "", "history": [["q", "a"]]},
        {"instruction": "x", "input": "", "output": "y", "system": "s", "history": []},
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json", "columns": columns}}))
    for template in BUILT_IN:
        assert ours(model, tmp_path, template) == theirs(model, tmp_path, template=template)
