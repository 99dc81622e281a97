"""The way out that a message names works: what it says is done, and the file is then valid (or trains)."""

import json
import re
from pathlib import Path

import pytest
import yaml
from workspace import make_workspace, run_cli, write_config

QUIET = {"logging_steps": 1, "disable_tqdm": True, "report_to": "none"}
SELECT = {"train_type": "dynamic_select", "component_name": "random", "update_step": 1, "update_times": -1}


@pytest.fixture
def folder(tmp_path):
    return make_workspace(tmp_path)


def refusal(*overrides: str, command: str = "validate") -> str:
    result = run_cli(command, "config.yaml", *overrides)
    assert result.exit_code == 2, (result.stdout, result.exception)
    return result.stderr


def works(*arguments: str) -> str:
    result = run_cli(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


KILLED = ["run.yaml only", "half a checkpoint", "no checkpoint at all, results of an old one"]


def kill(folder: Path, how: str) -> None:
    (folder / "out/dataflex").mkdir(parents=True)
    (folder / "out/dataflex/run.yaml").touch()
    if how == "half a checkpoint":
        (folder / "out/checkpoint-2").mkdir()
        (folder / "out/checkpoint-2/config.json").write_text("{}")
    if how.startswith("no checkpoint"):
        (folder / "out/trainer_state.json").write_text("{}")


@pytest.mark.parametrize("changes", [SELECT, {}, {"train_type": "static"}], ids=["select", "weight", "static"])
@pytest.mark.parametrize("how", KILLED)
def test_killed_before_the_first_checkpoint(folder, how, changes):
    """With resume and without: neither message sends to the other."""
    kill(folder, how)
    write_config(folder, **changes)
    resumed, anew = refusal("resume_from_checkpoint=true"), refusal()
    assert "holds no checkpoint that can be resumed" in resumed and "has no checkpoint that can be resumed" in anew
    assert "resume_from_checkpoint: true" not in anew
    for message in (resumed, anew):
        assert "overwrite_output_dir: true" in message
    works("validate", "config.yaml", "overwrite_output_dir=true")
    works("validate", "config.yaml", "output_dir=another")


def test_an_empty_folder_to_resume_from(folder):
    assert refusal("resume_from_checkpoint=true").endswith("Leave the key out to start anew\n")
    works("validate", "config.yaml")


@pytest.mark.slow
def test_a_run_and_what_is_said_of_its_folder(folder):
    """Resume it, start anew, replay what was resumed, and go on although the settings differ."""
    write_config(folder, **QUIET, save_steps=1, max_steps=3)
    works("train", "config.yaml", "train_step=3")
    message = refusal()
    assert "Resume it with resume_from_checkpoint: true, start anew with overwrite_output_dir: true, or use another folder" in message
    works("validate", "config.yaml", "resume_from_checkpoint=true")
    works("validate", "config.yaml", "overwrite_output_dir=true")
    both = refusal("resume_from_checkpoint=true", "overwrite_output_dir=true")
    assert "use one of them" in both
    for name in ("checkpoint-2", "checkpoint-3"):
        for path in sorted((folder / "out" / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (folder / "out" / name).rmdir()
    works("train", "config.yaml", "resume_from_checkpoint=true", "overwrite_output_dir=false")
    head, settings = read_run(folder / "out")
    assert not {"resume_from_checkpoint", "overwrite_output_dir"} & settings.keys()
    works("train", "out/dataflex/run.yaml", "output_dir=again")
    assert losses(folder / "again") == losses(folder / "out") and "dataflex-cli train out/dataflex/run.yaml output_dir=..." in head
    works("train", "config.yaml", "overwrite_output_dir=true")
    assert "overwrite_output_dir" not in read_run(folder / "out")[1]
    assert refusal("output_dir=out") and "already holds a run" in run_cli("validate", "out/dataflex/run.yaml").stderr  # not deleted by a replay
    result = run_cli("train", "config.yaml", "resume_from_checkpoint=out/checkpoint-1", "weight_decay=0.5")
    assert result.exit_code == 2 and "Set allow_changed_resume: true" in result.stderr
    works("train", "config.yaml", "resume_from_checkpoint=out/checkpoint-1", "weight_decay=0.5", "allow_changed_resume=true")


def read_run(out: Path):
    text = (out / "dataflex/run.yaml").read_text()
    return text.split("\n")[0], yaml.safe_load(text)


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


# Mistakes, what their message says, and the overrides that do it.
WAYS_OUT = [
    ({"component_name": "los"}, "Did you mean 'loss'?", ["component_name=loss"]),
    ({"learning_rte": 1}, "`dataflex-cli reference` lists all keys", None),
    ({"component_name": ...}, "`dataflex-cli components` lists the algorithms", None),
    ({"update_step": 1}, "leave update_step out (on the command line: update_step=null)", ["update_step=null"]),
    ({"train_type": ...}, "Set train_type", ["train_type=dynamic_weight"]),
    ({"train_type": "static", "component_name": "loss"}, "component_name=null", ["component_name=null"]),
    ({"components_cfg_file": "my.yaml"}, "Leave the key out to use the packaged components", ["components_cfg_file=null"]),
    ({"component_name": "adapt"}, "set eval_dataset or val_size", ["val_size=0.25"]),
    ({"component_name": "adapt"}, "set eval_dataset or val_size", ["eval_dataset=held_out"]),
    ({"eval_strategy": "steps"}, "set eval_dataset or val_size", ["eval_dataset=held_out", "eval_steps=1"]),
    (
        {"early_stopping_steps": 2},
        "set eval_dataset or val_size, and eval_strategy: steps or epoch",
        ["eval_dataset=held_out", "eval_strategy=epoch", "save_strategy=epoch", "load_best_model_at_end=true"],
    ),
    ({"warmup_step": 5}, "Allowed: warmup_step <= train_step", ["warmup_step=3"]),
    ({"max_length": 100}, "is set from cutoff_len; set that instead", None),
    ({"template": "chatm"}, "Did you mean 'chatml'?", ["template=chatml"]),
    ({"template": "gone.jinja"}, "no file", ["template=alpaca"]),
    ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'?", ["lr_scheduler_type=cosine"]),
    ({"val_size": 1.5}, "write a share below 1 or a whole number of rows", ["val_size=2"]),
    ({"dataset": "rowss"}, "Did you mean 'rows'?", ["dataset=rows"]),
    ({**SELECT, "update_times": 0}, "must be at least 1, or -1 to decide until training ends", ["update_times=-1"]),
    ({**SELECT, "update_step": ...}, "must be at least 1", ["update_step=1"]),
    (
        {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 1},
        "name several, or the column that tells domains apart with domain_column",
        ["dataset=rows,held_out"],
    ),
    (
        {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 1},
        "name several, or the column that tells domains apart with domain_column",
        ["domain_column=instruction"],
    ),
]


@pytest.mark.parametrize(("changes", "said", "overrides"), WAYS_OUT, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_the_way_out(folder, changes, said, overrides):
    write_config(folder, **changes)
    assert said in refusal()
    if overrides is not None:
        works("validate", "config.yaml", *overrides)
    for command in re.findall(r"`dataflex-cli ([a-z]+)`", said):
        assert works(command)


# What `NOT_HONOURED` names instead of a key; keys that need a package which may not be there are only looked up.
INSTEAD = {
    "use_dft_loss": ["train_type=dynamic_weight", "component_name=dft"],
    "pure_bf16": ["dtype=bfloat16"],
    "torch_dtype": ["dtype=float32"],
    "attn_implementation": ["flash_attn=sdpa"],
    "use_galore": None,
    "enable_liger_kernel": None,
}


def test_keys_to_set_instead(folder):
    import dataclasses

    from trl import SFTConfig

    from dataflex.backends.options import NOT_HONOURED, TrlOptions
    from dataflex.configs.schema import DataflexConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)} | set(TrlOptions.model_fields) | set(DataflexConfig.model_fields)
    named = {key: re.search(r"\bset (\w+)", reason) for key, reason in NOT_HONOURED.items()}
    assert {key for key, found in named.items() if found} == set(INSTEAD)
    for key, overrides in INSTEAD.items():
        assert named[key][1] in known
        if overrides:
            write_config(folder)
            works("validate", "config.yaml", *overrides)


def test_a_model_without_tokenizer_or_weights(folder):
    from dataflex.testing.tiny import tiny_tokenizer

    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()
    message = refusal()
    assert "Save it there with tokenizer.save_pretrained('model')" in message
    tokenizer = tiny_tokenizer()
    exec(re.search(r"tokenizer\.save_pretrained\('.*?'\)", message)[0], {"tokenizer": tokenizer})
    works("validate", "config.yaml")
    (folder / "model/model.safetensors").unlink()
    assert "set train_from_scratch: true to start from random ones" in refusal()
    works("validate", "config.yaml", "train_from_scratch=true")


def test_a_variable_that_is_not_set(folder, monkeypatch):
    monkeypatch.delenv("HUB_TOKEN", raising=False)
    write_config(folder, hub_token="${HUB_TOKEN}")
    assert "Environment variables are written ${oc.env:NAME}" in refusal()
    write_config(folder, hub_token="${oc.env:HUB_TOKEN}")
    assert "Environment variable 'HUB_TOKEN' not found" in refusal()
    monkeypatch.setenv("HUB_TOKEN", "hf_SECRET")
    works("validate", "config.yaml")


def test_the_entry_that_a_component_lacks(folder):
    lines = ["import dataflex", "@dataflex.register_weighter('entryless')", "class W(dataflex.Weighter):", "    pass"]
    (folder / "own.py").write_text("\n".join(lines))
    write_config(folder, plugins=["own.py"], component_name="entryless")
    entry = re.search(r"give it an entry there, (.*?)\. Av", refusal())[1]
    (folder / "own.yaml").write_text(entry)
    works("validate", "config.yaml", "components_cfg_file=own.yaml")
