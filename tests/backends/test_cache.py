"""Tokenised rows on disk: found by content, made again when damaged, the same in one process and in several."""

import json
import logging

import numpy as np
import pytest
from data_files import write_info, write_lines

from dataflex.backends.datasets import cache, tokens
from dataflex.backends.datasets.encode import encode_sft, encode_text
from dataflex.backends.datasets.find import find_datasets
from dataflex.testing.tiny import tiny_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAFLEX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def specs(folder, rows):
    write_lines(folder / "d.jsonl", rows)
    write_info(folder, d={"file_name": "d.jsonl"})
    return find_datasets(["d"], folder, stage="sft")


def rows(number=20):
    return [{"instruction": f"q {k}", "input": "", "output": None if k % 7 == 3 else f"a {k}"} for k in range(number)]


def entries(folder):
    return sorted((folder / "cache" / "tokenised").glob("*.arrow"))


def test_the_same_content_is_tokenised_once(folder, monkeypatch):
    first = encode_sft(specs(folder, rows()), tiny_tokenizer(), cutoff_len=64)
    monkeypatch.setattr(tokens, "_write", None)  # nothing is made again
    (folder / "other").mkdir()
    again = encode_sft(specs(folder / "other", rows()), tiny_tokenizer(), cutoff_len=64)
    assert again.dataset[:] == first.dataset[:] and again.dropped == first.dropped


@pytest.mark.parametrize("changed", ["row", "cutoff_len", "template", "token", "max_samples"])
def test_whatever_decides_the_tokens_is_part_of_the_key(folder, changed):
    encode_sft(specs(folder, rows()), tiny_tokenizer(), cutoff_len=64)
    tokenizer, options, data = tiny_tokenizer(), {"cutoff_len": 64}, rows()
    if changed == "row":
        data[5]["output"] = "b"
    elif changed == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    elif changed == "token":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<q>"]})
    else:
        options[changed] = 50 if changed == "cutoff_len" else 10
    encode_sft(specs(folder, data), tokenizer, **options)
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "note", "gone"])
def test_a_damaged_entry_is_made_again(folder, damage, caplog):
    whole = encode_sft(specs(folder, rows()), tiny_tokenizer(), cutoff_len=64).dataset[:]
    (path,) = entries(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage in ("note", "gone"):
        path.with_suffix(".json").write_text("[]") if damage == "note" else path.unlink()
    else:
        path.write_bytes({"flip": data, "cut": data[:100], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, "dataflex"):
        assert encode_sft(specs(folder, rows()), tiny_tokenizer(), cutoff_len=64).dataset[:] == whole
    assert ("is damaged" in caplog.text) == (damage != "gone")


def test_several_processes_give_what_one_gives(folder, monkeypatch):
    alone = encode_sft(specs(folder, rows(2300)), tiny_tokenizer(), cutoff_len=64, num_proc=1)
    together = encode_sft(specs(folder, rows(2300)), tiny_tokenizer(), cutoff_len=64, num_proc=2, renew=True)
    assert together.dataset[:] == alone.dataset[:] and together.dropped == alone.dropped


def test_what_there_is_to_say_is_said_of_kept_rows_too(folder, caplog):
    from dataflex.utils.logging import warn_once

    silent = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    said = []
    for _ in range(2):
        warn_once.cache_clear()
        caplog.clear()
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template, tokenizer.eos_token = silent, None
        with caplog.at_level(logging.WARNING, "dataflex"):
            encode_sft(specs(folder, rows()), tokenizer, cutoff_len=64)
        said.append(caplog.text)
    assert "will not learn to stop" in said[0] and said[0].count("will not learn to stop") == said[1].count("will not learn to stop")


def test_a_folder_that_cannot_be_written_is_said_and_not_needed(folder, monkeypatch, caplog):
    (folder / "file").write_text("")
    monkeypatch.setenv("DATAFLEX_CACHE", str(folder / "file"))
    with caplog.at_level(logging.WARNING, "dataflex"):
        assert len(encode_sft(specs(folder, rows()), tiny_tokenizer(), cutoff_len=64).dataset) == 17
    assert "cannot be written" in caplog.text and "DATAFLEX_CACHE" in caplog.text


def test_packed_text_knows_its_documents(folder):
    write_lines(folder / "d.jsonl", [{"text": "x" * k} for k in (5, 30, 1, 0, 9, 70)])
    write_info(folder, d={"file_name": "d.jsonl", "columns": {"prompt": "text"}})
    encoded = encode_text(find_datasets(["d"], folder, stage="pt"), tiny_tokenizer(), cutoff_len=16, pack=True)
    assert encoded.dropped.get("fewer than 2 tokens") == 1
    lengths = np.array([6, 31, 2, 10, 71])
    owner = np.repeat([0, 1, 2, 4, 5], lengths)
    expected = [sorted(set(owner[start : start + 16].tolist())) for start in range(0, len(owner), 16)]
    assert encoded.dataset["dataflex_row"][:] == expected


def test_the_note_of_an_entry_holds_no_data(folder):
    encode_sft(specs(folder, rows()), tiny_tokenizer(), cutoff_len=64)
    assert set(json.loads(entries(folder)[0].with_suffix(".json").read_text())) == {"xxh3_128", "bytes", "notes"}
    assert cache.cache_folder() == folder / "cache" / "tokenised"
