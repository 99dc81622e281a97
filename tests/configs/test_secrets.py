"""Credentials and values of the environment: known by their keys, kept out of whatever is written or shown."""

import copy
import pickle

import pytest
import yaml

from dataflex.backends.outputs import recorded_settings, start_output_dir
from dataflex.configs.loading import load_run
from dataflex.configs.secrets import Credential, forget, is_credential, protected, recorded_argument, redacted
from dataflex.configs.yaml_files import load_yaml
from dataflex.errors import ConfigError


@pytest.fixture(autouse=True)
def _nothing_known():
    forget()
    yield
    forget()


def run_of(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_run(path, overrides)


@pytest.mark.parametrize(
    "key", ["hub_token", "push_to_hub_token", "api_key", "apikey", "client_secret", "db_password", "passwd", "credentials", "a.b.TOKEN"]
)
def test_keys_that_hold_a_credential(key):
    assert is_credential(key, "hf_Abc") and not is_credential(key, None) and not is_credential(key, True) and not is_credential(key, "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "x"),
        ("tokenized_path", "x"),
        ("scoring_tokens", 4096),
        ("max_new_tokens", "12"),
        ("add_tokens", "<a>,<b>"),
        ("include_num_input_tokens_seen", "all"),
        ("eos_token", "</s>"),
        ("token", "<sep>"),
        ("token", 3),
        ("key", "instruction"),
        ("sort_key", "length"),
        ("token_column", "a1b2c3d4e5f6a7b8c9"),
        ("learning_rate", "1e-4"),
        ("loss_normalization", "token"),
    ],
)
def test_keys_that_hold_none(key, value):
    assert not is_credential(key, value)


def test_a_key_that_looks_random_is_one():
    assert is_credential("wandb_key", "0123456789abcdef0123") and is_credential("password", 123456)


def test_what_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("MYTOK", "hf_SECRET")
    monkeypatch.setenv("BASE", "/data/private")
    text = (
        "hub_token: ${oc.env:MYTOK}\npush_to_hub_token: hf_LITERAL\nrun_name: ${hub_token}-x\nlearning_rate: 1.0e-3\n"
        "model_name_or_path: ${oc.env:BASE}/model\noutput_dir: out\nlogging_dir: ${output_dir}/logs\nreport_to: ${oc.env:TRACKER,none}\n"
        "component_name: loss\ntrain_type: dynamic_weight\ncomponent_params: {api_key: abc, r: 0.5, names: [hf_LITERAL, b]}\n"
        "optim_args: '\\${kept}'\n"
    )
    settings = recorded_settings(run_of(tmp_path, text))
    assert "SECRET" not in str(settings) and "LITERAL" not in str(settings) and "private" not in str(settings)
    assert settings == {
        "hub_token": "${oc.env:MYTOK}",
        "push_to_hub_token": "${oc.env:PUSH_TO_HUB_TOKEN}",
        "run_name": "${hub_token}-x",
        "learning_rate": 1.0e-3,
        "model_name_or_path": "${oc.env:BASE}/model",
        "output_dir": "out",
        "logging_dir": "out/logs",
        "report_to": "${oc.env:TRACKER,none}",
        "component_name": "loss",
        "train_type": "dynamic_weight",
        "component_params": {"api_key": "${oc.env:API_KEY}", "r": 0.5, "names": ["${oc.env:PUSH_TO_HUB_TOKEN}", "b"]},
        "optim_args": "\\${kept}",
    }


def test_a_default_of_a_credential_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.delenv("MYTOK", raising=False)
    run = run_of(tmp_path, "hub_token: ${oc.env:MYTOK,hf_SECRET}\napi_secret: 'a-${oc.env:HOME}'\n")
    assert recorded_settings(run) == {"train_type": "static", "hub_token": "${oc.env:MYTOK}", "api_secret": "${oc.env:API_SECRET}"}


def test_replaying_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("HUB_TOKEN", raising=False)
    run = run_of(tmp_path, "output_dir: out\n", "hub_token=hf_SECRET")
    start_output_dir(run, str(tmp_path / "out"), seed=1, overwrite=False)
    written = tmp_path / "out/dataflex/run.yaml"
    assert "SECRET" not in written.read_text() and written.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match=r"hub_token: .*Environment variable 'HUB_TOKEN' not found"):
        load_run(written).raise_problems()
    monkeypatch.setenv("HUB_TOKEN", "hf_SECRET")
    assert load_run(written).backend["hub_token"] == "hf_SECRET"


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("hub_token=hf_SECRET", "hub_token=${oc.env:HUB_TOKEN}"),
        ("--hub_token=hf_SECRET", "--hub_token=${oc.env:HUB_TOKEN}"),
        ("component_params.api_key=hf_SECRET", "component_params.api_key=${oc.env:API_KEY}"),
        ("hub_token=${oc.env:MYTOK}", "hub_token=${oc.env:MYTOK}"),
        ("scoring_tokens=5", "scoring_tokens=5"),
        ("train", "train"),
    ],
)
def test_arguments_of_a_command(argument, shown):
    assert recorded_argument(argument) == shown


def test_the_recorded_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dataflex-cli", "train", "c.yaml", "hub_token=hf_SECRET", "run_name=a b"])
    start_output_dir(run_of(tmp_path, "output_dir: out\n", "hub_token=hf_SECRET"), str(tmp_path / "out"), seed=1, overwrite=False)
    text = (tmp_path / "out/dataflex/run.yaml").read_text()
    assert "SECRET" not in text
    assert yaml.safe_load(text)["dataflex_run"]["command"] == "dataflex-cli train c.yaml 'hub_token=${oc.env:HUB_TOKEN}' 'run_name=a b'"


def test_messages(tmp_path, monkeypatch):
    monkeypatch.setenv("MYTOK", "hf_SECRET")
    monkeypatch.setenv("PLACE", "/data/private")
    monkeypatch.setenv("SHORT", "abc")
    run = run_of(tmp_path, "hub_token: ${oc.env:MYTOK}\noutput_dir: ${oc.env:PLACE}/x\nlearning_rate: ${oc.env:SHORT}\n")
    assert redacted("'hf_SECRET' is not valid, Xhf_SECRETX") == "'${oc.env:MYTOK}' is not valid, X${oc.env:MYTOK}X"
    assert redacted(f"no folder '{run.backend['output_dir']}'; /data/privateer") == "no folder '${oc.env:PLACE}/x'; /data/privateer"
    assert redacted("'abc' is not valid; abcde") == "'${oc.env:SHORT}' is not valid; abcde"


def test_a_malformed_override_is_shown_without_its_credential(tmp_path):
    (tmp_path / "c.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        load_yaml(tmp_path / "c.yaml", overrides=["hub_token=[SECRET"])
    assert "SECRET" not in str(caught.value) and "hub_token=${oc.env:HUB_TOKEN}" in str(caught.value)


def test_a_credential_in_use_is_not_pickled():
    keys = protected({"hub_token": "hf_SECRET", "output_dir": "out"})
    token = keys["hub_token"]
    assert isinstance(token, Credential) and token == "hf_SECRET" and f"Bearer {token}" == "Bearer hf_SECRET"
    assert pickle.loads(pickle.dumps(keys)) == {"hub_token": "${oc.env:HUB_TOKEN}", "output_dir": "out"}
    assert b"SECRET" not in pickle.dumps(keys) and "SECRET" not in repr(keys)
    assert copy.deepcopy(keys)["hub_token"] == copy.copy(token) == "hf_SECRET"
