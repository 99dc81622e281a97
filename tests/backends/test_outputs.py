"""What a run leaves in `output_dir`, and what starting anew takes away."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dataflex.backends.outputs import delete_earlier_run, start_output_dir
from dataflex.configs.loading import load_run

OURS = [
    "checkpoint-3/model.safetensors",
    "checkpoint-12/dataflex/state.json",
    "dataflex/run.yaml",
    "dataflex/events.jsonl",
    "dataflex/doremi_weights.json",
    "dataflex/doremi_proportions.yaml",
    "dataflex/selections/step_3.npy",
    "dataflex/selections/summary.json",
    "dataflex/selections/report.html",
]
THEIRS = [
    "checkpoint-backup/f",
    "checkpoint-3-best/f",
    "checkpoint-notes.txt",
    "checkpoint-4",  # a file, not a folder
    "notes.md",
    "dataflex/notes.md",
    "dataflex/run.yaml.bak",
    "dataflex/mine/run.yaml",
    "dataflex/selections/step_3.csv",
    "dataflex/cache/losses/0.npy",
    "model.safetensors",
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def test_only_what_was_written_is_deleted(tmp_path):
    fill(tmp_path, OURS + THEIRS)
    delete_earlier_run(tmp_path)
    assert files(tmp_path) == sorted(THEIRS)
    assert not (tmp_path / "checkpoint-3").exists() and not (tmp_path / "checkpoint-12").exists()


def test_a_folder_that_is_empty_then_goes(tmp_path):
    fill(tmp_path, OURS)
    delete_earlier_run(tmp_path)
    assert files(tmp_path) == [] and not (tmp_path / "dataflex/selections").exists()


@pytest.mark.parametrize("link", ["dataflex", "checkpoint-3", "dataflex/selections", "dataflex/run.yaml", "dataflex/cache", "checkpoint-backup"])
def test_links_are_not_followed(tmp_path, link):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    fill(elsewhere, ["keep.txt", "run.yaml", "events.jsonl", "step_3.npy", "selections/step_1.npy"])
    before = files(elsewhere)
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(elsewhere / "run.yaml" if link.endswith(".yaml") else elsewhere)
    delete_earlier_run(out)
    assert files(elsewhere) == before
    assert (out / link).is_symlink() == (link in ("dataflex/cache", "checkpoint-backup"))


def test_links_inside_a_checkpoint_are_not_followed(tmp_path):
    fill(tmp_path, ["elsewhere/keep.txt", "out/checkpoint-3/config.json"])
    (tmp_path / "out/checkpoint-3/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out/checkpoint-5").symlink_to("nowhere")
    delete_earlier_run(tmp_path / "out")
    assert files(tmp_path) == ["elsewhere/keep.txt"] and list((tmp_path / "out").iterdir()) == []


def started(folder: Path, text: str, *overrides: str, out: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    start_output_dir(load_run(path, [*overrides]), out, seed=1, overwrite=False)
    return Path(out) / "dataflex/run.yaml"


def test_what_would_harm_a_replay_is_not_recorded(tmp_path):
    written = started(tmp_path, "overwrite_output_dir: true\nlearning_rate: 1\n", "resume_from_checkpoint=true", out=str(tmp_path / "out"))
    assert yaml.safe_load(written.read_text()).keys() == {"train_type", "learning_rate", "dataflex_run"}


@pytest.mark.parametrize("name", ["out", "a b", "a'b", 'a"b', "a\nb: 1", "a\x1b[31mb", "a#b", "a\u2028b", "a\x85b", "ä\u202e", "$HOME;ls", "a\\b\nc"])
def test_the_header_is_a_command_that_works(tmp_path, monkeypatch, name):
    """The file stays YAML, and the shell that is given the line finds the file."""
    monkeypatch.chdir(tmp_path)
    written = started(tmp_path, "output_dir: x\n", out=name)
    text = written.read_text()
    head, rest = text.split("\n", 1)
    assert rest.startswith("train_type: static\noutput_dir: x\n") and list(yaml.safe_load(text)) == ["train_type", "output_dir", "dataflex_run"]
    command = head.removeprefix("# Run it again with: ").removesuffix(" output_dir=...")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dataflex-cli").write_text('#!/bin/sh\ncat "$2"\n')
    (tmp_path / "bin/dataflex-cli").chmod(0o755)
    shown = subprocess.run(
        ["bash", "-c", command], cwd="/", env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert shown.stdout == text


def test_paths_beside_the_training_file_are_recorded_so_that_another_file_finds_them(tmp_path, monkeypatch):
    project = tmp_path / "project"
    fill(project, ["data/dataset_info.json", "model/config.json", "t.jinja"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    written = started(project, "dataset_dir: data\nmodel_name_or_path: model\ntemplate: t.jinja\ndataset: rows\n", out="out")
    settings = yaml.safe_load(written.read_text())
    assert [settings[key] for key in ("dataset_dir", "model_name_or_path", "template")] == [
        str(project / name) for name in ("data", "model", "t.jinja")
    ]
    assert settings["dataset"] == "rows" and json.dumps(settings)
