"""A run with a credential: it is in none of the files, nor on the screen, and still at hand for what needs it."""

import pickle

import pytest
import torch
import yaml
from workspace import make_workspace, run_cli, write_config, write_rows

from dataflex.backends.trl import training_arguments
from dataflex.cli.plan import check_run


def holding(folder, text):
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("train_type", ["static", "dynamic_weight"])
def test_no_file_and_no_line_holds_it(tmp_path, monkeypatch, train_type):
    folder = make_workspace(tmp_path)
    monkeypatch.setenv("MYTOK", "hf_SECRET")
    monkeypatch.setattr("sys.argv", ["dataflex-cli", "train", "config.yaml", "push_to_hub_token=hf_LITERAL"])
    quiet = {"logging_steps": 1, "save_steps": 2, "disable_tqdm": True, "report_to": "tensorboard"}
    write_config(folder, train_type=train_type, hub_token="${oc.env:MYTOK}", **quiet)
    result = run_cli("train", "config.yaml")
    assert result.exit_code == 0, result.stderr
    assert holding(folder / "out", "SECRET") == [] and holding(folder / "out", "LITERAL") == []
    assert "SECRET" not in result.stdout + result.stderr
    settings = yaml.safe_load((folder / "out/dataflex/run.yaml").read_text())
    assert settings["hub_token"] == "${oc.env:MYTOK}"
    assert "push_to_hub_token=${oc.env:PUSH_TO_HUB_TOKEN}" in settings["dataflex_run"]["command"]
    saved = torch.load(folder / "out/training_args.bin", weights_only=False)
    assert saved.hub_token == "${oc.env:HUB_TOKEN}" and saved.learning_rate == 0.01


def test_it_is_still_at_hand(tmp_path):
    write_config(make_workspace(tmp_path), report_to="none")
    run, checked = check_run("config.yaml", ["hub_token=hf_SECRET"])
    args = training_arguments(checked.trainer_keys, checked.options, run)
    assert args.hub_token == "hf_SECRET" and f"{args.hub_token}" == "hf_SECRET"
    assert b"SECRET" not in pickle.dumps(args) and "SECRET" not in str(args)


@pytest.mark.parametrize("overrides", [("learning_rate=${hub_token}",), ("learning_rate=${oc.env:MYTOK}",), ("hub_token=${oc.env:MYTOK}", "x=1")])
@pytest.mark.parametrize("command", ["validate", "train"])
@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_no_message_holds_it(tmp_path, monkeypatch, overrides, command, debug):
    monkeypatch.setenv("MYTOK", "hf_SECRET")
    write_config(make_workspace(tmp_path), hub_token="${oc.env:MYTOK}")
    result = run_cli(command, "config.yaml", *overrides, *debug)
    assert result.exit_code == 2 and "SECRET" not in result.stdout + result.stderr


def test_nor_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("MYTOK", "uniform/hf_SECRET")
    (make_workspace(tmp_path) / "own.py").write_text(
        "import dataflex\n\n@dataflex.register_weighter('keyed')\nclass Keyed(dataflex.Weighter):\n"
        "    def __init__(self, api_key: str = '', place: str = '', **kwargs):\n        super().__init__(**kwargs)\n"
    )
    (tmp_path / "own.yaml").write_text("weighters:\n  keyed:\n    params: {api_key: hf_LITERAL, place: '${oc.env:MYTOK}'}\n")
    write_config(tmp_path, component_name="keyed", plugins=["own.py"], components_cfg_file="own.yaml")
    result = run_cli("validate", "config.yaml")
    assert result.exit_code == 0 and "SECRET" not in result.stdout and "LITERAL" not in result.stdout
    assert "keyed (api_key=${oc.env:API_KEY}, place=${oc.env:MYTOK})" in result.stdout


def test_log_lines(tmp_path, capsys):
    from dataflex.configs.secrets import remember
    from dataflex.utils.logging import logger, show_logs

    remember({"hub_token": "hf_SECRET"}, {"hub_token": "hf_SECRET"})
    show_logs()
    logger.warning("domain %s of %s", "\x1b[31mRED\nWARNING dataflex: fake", "hf_SECRET")
    assert capsys.readouterr().err == "WARNING dataflex: domain \\x1b[31mRED\\nWARNING dataflex: fake of ${oc.env:HUB_TOKEN}\n"


def test_plugins_are_run_unless_told_not_to(tmp_path):
    folder = make_workspace(tmp_path)
    (folder / "own.py").write_text(
        "import dataflex, pathlib\npathlib.Path('ran').touch()\n@dataflex.register_weighter('own')\nclass W(dataflex.Weighter): ...\n"
    )
    (folder / "own.yaml").write_text("weighters:\n  own:\n    params: {}\n  loss:\n    params: {}\n")
    write_config(folder, component_name="own", plugins=["own.py"], components_cfg_file="own.yaml")
    result = run_cli("validate", "config.yaml", "--no-plugins")
    assert result.exit_code == 0, result.stderr
    assert "dynamic_weight, own: not looked at, since plugins were not run" in result.stdout and not (folder / "ran").exists()
    assert (
        "component_params.rr: is not a parameter"
        in run_cli("validate", "config.yaml", "--no-plugins", "component_name=loss", "component_params.rr=1").stderr
    )
    assert not (folder / "ran").exists()
    assert run_cli("validate", "config.yaml").exit_code == 0 and (folder / "ran").exists()


def test_names_of_domains_in_what_doremi_writes(tmp_path):
    names = ["\x1b[31mRED", "b", "c\ninit_mixture_proportions: [1, 0, 0]\n#"]
    folder = make_workspace(tmp_path)
    write_rows(folder / "data/rows.jsonl", [{"instruction": "hello", "output": "yes you may", "dom": name} for name in names * 8])
    mix = {"train_type": "dynamic_mix", "component_name": "doremi", "component_params": {"reference_model": "model"}, "domain_column": "dom"}
    write_config(folder, **mix, update_step=2, update_times=-1, train_step=2, logging_steps=1, report_to="none", disable_tqdm=True)
    result = run_cli("train", "config.yaml")
    assert result.exit_code == 0, result.stderr
    text = (folder / "out/dataflex/doremi_proportions.yaml").read_text()
    assert len(yaml.safe_load(text)["init_mixture_proportions"]) == 3 and text.count("\n") == 3
    assert "\x1b" not in text + result.stdout + result.stderr
    assert "dataflex/loss/c\\ninit_mixture_proportions: [1, 0, 0]\\n#" in (folder / "out/trainer_state.json").read_text().replace("\\\\", "\\")
