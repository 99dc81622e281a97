"""What a training file makes of chat data: the tokens that end answers, and where the data lies."""

import json
import logging
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import make_workspace, run_cli, write_config, write_rows

from dataflex.backends import load_backend
from dataflex.cli.plan import check_run, plan
from dataflex.testing.tiny import tiny_tokenizer
from dataflex.utils.logging import warn_once


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path)


@pytest.fixture
def base(folder):
    """A base model: no chat template, no marks of turns, and `</s>` as eos token."""
    path = folder / "model"
    text = json.dumps(json.loads(tiny_tokenizer(None).backend_tokenizer.to_str())).replace("<|im_start|>", "<a>").replace("<|im_end|>", "</s>")
    for file in path.glob("*token*"):
        file.unlink()
    (path / "chat_template.jinja").unlink(missing_ok=True)
    (path / "tokenizer.json").write_text(text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(path).chat_template is None
    return folder


def train(**changes):
    run, prepared = check_run(write_config(changes.pop("folder"), **changes))
    load_backend("trl").train(run, prepared)


@pytest.mark.parametrize("train_type", ["dynamic_weight", "static"])
def test_chatml_on_a_base_model(base, caplog, train_type):
    component = {"component_name": "loss"} if train_type == "dynamic_weight" else {"component_name": ..., "warmup_step": ...}
    with caplog.at_level(logging.INFO, logger="dataflex"):
        train(folder=base, template="chatml", train_type=train_type, **component)
    tokenizer, model = AutoTokenizer.from_pretrained(base / "out"), AutoModelForCausalLM.from_pretrained(base / "out")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.tokenize("<|im_end|>") == ["<|im_end|>"]
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id and model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 263
    assert "template chatml: the eos token is now <|im_end|>, which ends its answers; it was </s>" in caplog.text
    assert "new special tokens <|im_end|>, <|im_start|>" in caplog.text and "does not train them" not in caplog.text


def test_new_tokens_that_lora_does_not_train(base, caplog):
    train(folder=base, template="chatml", finetuning_type="lora", lora_rank=2)
    assert "the embeddings of new tokens are random and finetuning_type: lora does not train them; name them in additional_target" in caplog.text


def test_generation_stops_where_the_template_ends_answers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.eos_token = "<|endoftext|>"  # as Qwen's base models: the template ends turns with another token
    tokenizer.save_pretrained(folder / "model")
    generation = folder / "model/generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "eos_token_id": 2}))
    train(folder=folder)
    assert sorted(json.loads((folder / "out/generation_config.json").read_text())["eos_token_id"]) == [2, 4]


def test_plain_prompt_and_completion_need_no_template(base):
    write_rows(base / "data/rows.jsonl", [{"prompt": f"{number} is", "completion": f" number {number}"} for number in range(8)])
    train(folder=base)
    assert (base / "out/model.safetensors").is_file()
    write_rows(base / "data/held_out.jsonl", [{"instruction": "x", "output": "y"}])
    result = run_cli("validate", str(write_config(base, eval_dataset="held_out", output_dir="other")))
    assert result.exit_code == 2 and "the tokenizer has no chat template" in result.stderr


def test_the_plan_says_where_data_outside_lies(folder):
    shutil.copy(folder / "data/rows.jsonl", folder / "far.jsonl")
    (folder / "data/dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": str(folder / "far.jsonl")}, "near": {"file_name": "rows.jsonl"}})
    )
    lines = dict(plan(*check_run(write_config(folder, eval_dataset="near"))))
    assert lines["data"] == f"rows ({folder}/far.jsonl): 12 rows" and lines["evaluation data"] == "near: 12 rows"


def test_a_path_that_leads_out_of_the_data_folder(folder):
    shutil.copy(folder / "data/rows.jsonl", folder / "far.jsonl")
    (folder / "data/dataset_info.json").write_text(json.dumps({"rows": {"file_name": "../far.jsonl"}}))
    result = run_cli("validate", str(write_config(folder)))
    assert result.exit_code == 2 and "file_name '../far.jsonl' leads out of dataset_dir; write the absolute path" in result.stderr
    assert run_cli("validate", str(write_config(folder, allow_outside_dataset_dir=True))).exit_code == 0
    (folder / "data/dataset_info.json").unlink()
    result = run_cli("validate", str(write_config(folder, dataset="../far.jsonl")))
    assert result.exit_code == 2 and "config.yaml:4: dataset: '../far.jsonl' leads out of dataset_dir" in result.stderr


def test_a_template_that_teaches_no_end_is_reported_at_every_start(folder, caplog):
    (folder / "mine.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</end>{% endfor %}")
    for output_dir in ("one", "two"):
        warn_once.cache_clear()  # as a new process
        train(folder=folder, template="mine.jinja", output_dir=output_dir)
    assert caplog.text.count("ends answers with '</end>', which is no special token of the tokenizer: the model will not learn to stop") == 2
