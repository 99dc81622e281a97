"""Data files as tests write them, and what became of them. Test helpers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.backends.datasets.encode import Encoded
from dataflex.backends.datasets.find import find_datasets
from dataflex.backends.datasets.spec import DatasetSpec
from dataflex.errors import ConfigError

ALPACA = {"instruction": "Say hi", "input": "", "output": "hi"}
TALK = [("human", "one?"), ("gpt", "1"), ("human", "two?"), ("gpt", "2")]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_info(where: Path, /, **entries: Any) -> Path:
    path = where / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def talk(turns=TALK) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def spec_of(folder: Path, rows: list[Any], **entry: Any) -> DatasetSpec:
    """A spec for rows, through a file and `dataset_info.json`."""
    write_lines(folder / "d.jsonl", rows)
    write_info(folder, d={"file_name": "d.jsonl", **entry})
    return find_datasets(["d"], folder, stage="sft")[0]


def problems_of(folder: Path, *names: str, stage: Any = "sft", key: str = "dataset") -> list[str]:
    """Problems as text, with the folder's name taken out."""
    with pytest.raises(ConfigError) as caught:
        find_datasets(names, folder, stage=stage, key=key)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def labelled(encoded: Encoded, tokenizer, row: int = 0) -> list[str]:
    """The runs of labelled tokens as text."""
    runs: list[list[int]] = [[]]
    for label in encoded.dataset[row]["labels"]:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]
