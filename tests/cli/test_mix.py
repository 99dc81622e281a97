"""Mixing from a YAML file: what is checked and printed, `domain_column`, DoReMi's three steps and RegMix."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from workspace import ROWS, make_workspace, run_cli, write_config, write_rows

QUIET = {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
MIX = {
    "dataset": "rows,held_out",
    "train_type": "dynamic_mix",
    "component_name": "odm",
    "update_step": 1,
    "update_times": -1,
    "warmup_step": 1,
    "train_step": 4,
    **QUIET,
}


@pytest.fixture
def folder(tmp_path):
    return make_workspace(tmp_path)


def lines(**changes):
    write_config(Path(), **{**MIX, **changes})
    result = run_cli("validate", "config.yaml")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def mixtures(out="out"):
    found = (Path(out) / "dataflex" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, found) if event["event"] == "mixture"]


def train(*overrides):
    result = run_cli("train", "config.yaml", *overrides)
    assert result.exit_code == 0, (result.stderr, result.exception)


def test_validate_prints_mixture_and_boundaries(folder):
    text = lines(init_mixture_proportions=[3, 1])
    assert "rows 0.75, held_out 0.25" in text
    assert "sum to 4; they are scaled to sum to 1" in text
    assert "3 decisions, at steps 1, 2, 3" in text
    assert "none: losses come from the training forward" in text


def test_validate_of_a_mixture_that_stays(folder):
    text = lines(component_name=..., update_step=..., static_mix=True, mixture_sample_rule="stratified", train_step=..., warmup_step=...)
    assert "by size of the domains" in text and "none: the mixture stays" in text
    assert "dynamic_mix, static" in text


def test_validate_in_a_process_of_its_own(folder):
    """Where nothing has loaded the mixers before."""
    write_config(folder, **{**MIX, "component_name": ..., "update_step": ..., "static_mix": True})
    done = subprocess.run([sys.executable, "-m", "dataflex.cli", "validate", "config.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dynamic_mix, static" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_mixture_proportions": [1, 2, 3]}, "init_mixture_proportions: has 3 numbers and there are 2 domains: rows, held_out"),
        ({"init_mixture_proportions": [0, 0]}, "init_mixture_proportions: must be numbers of at least 0 with one above 0"),
        ({"init_mixture_proportions": [1, -1]}, "init_mixture_proportions: must be numbers of at least 0 with one above 0"),
        ({"init_mixture_proportions": ["a", 1]}, "init_mixture_proportions"),
        ({"init_mixture_proportions": [1, 1], "mixture_sample_rule": "uniform"}, "has no effect with mixture_sample_rule: uniform"),
        ({"mixture_sample_rule": "stratifed"}, "Did you mean 'stratified'?"),
        ({"dataset": "rows"}, "dataset: is one data set, so there is nothing to mix: name several, or the column"),
        ({"dataset": "rows,held_out,rows"}, "dataset: names 'rows' more than once"),
        ({"dataset": "rows,rows", "train_type": "dynamic_weight", "component_name": "loss"}, "dataset: names 'rows' more than once"),
        ({"update_step": 0}, "update_step: must be at least 1 with train_type: dynamic_mix"),
        ({"component_name": ...}, "component_name: is required with train_type: dynamic_mix"),
        ({"component_name": "oddm"}, "mixers 'oddm' not found"),
        ({"component_name": "doremi"}, "reference_model: is required by DoremiMixer"),
        (
            {"component_name": "doremi", "component_params": {"reference_model": "nowhere"}},
            "reference_model: 'nowhere' is not valid",
        ),
        (
            {"component_name": "doremi", "component_params": {"reference_model": "data"}},
            "the folder holds no model: it needs config.json and weights",
        ),
        ({"packing": True}, "packing: cannot be combined with train_type: dynamic_mix: SFTTrainer packs rows of several domains together"),
        ({"domain_column": "topic"}, "domain_column: 'data/rows.jsonl' has no column 'topic' in its first row"),
    ],
)
def test_mistakes_are_found_before_training(folder, changes, message):
    write_config(folder, **{**MIX, **changes})
    result = run_cli("validate", "config.yaml")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_mixture_that_stays_uses_no_component(folder):
    write_config(folder, **{**MIX, "component_name": "doremi", "static_mix": True, "component_params": {"reference_model": "nowhere"}})
    result = run_cli("validate", "config.yaml")
    assert "component_name: doremi is not used: static_mix keeps the mixture" in result.stdout
    train()
    assert {event["component"] for event in mixtures()} == {"static"}
    assert not (folder / "out/dataflex/doremi_weights.json").exists()


def test_a_mixer_without_an_entry_is_told_what_it_lacks(folder):
    lines = [
        "import dataflex",
        "@dataflex.register_mixer('entryless')",
        "class Entryless(dataflex.Mixer):",
        "    def mix(self, *args, **kwargs): ...",
    ]
    (folder / "own.py").write_text("\n".join(lines))
    write_config(folder, **{**MIX, "component_name": "entryless"}, plugins=["own.py"])
    result = run_cli("validate", "config.yaml")
    assert "It is registered: give it an entry there, mixers: {entryless: {params: {}}}." in result.stderr


def test_a_run_mixes_data_sets(folder):
    write_config(folder, **MIX, init_mixture_proportions=[0.5, 0.5], eval_dataset="held_out")
    train()
    assert [sum(event["domains"].values()) for event in mixtures()] == [4, 4, 4, 4]
    assert set(mixtures()[0]["proportions"]) == {"rows", "held_out"}
    again = yaml.safe_load((folder / "out/dataflex/run.yaml").read_text())
    assert again["init_mixture_proportions"] == [0.5, 0.5]


def test_domains_from_a_column(folder):
    write_rows(folder / "data/rows.jsonl", [{**row, "topic": "ab"[k % 3 == 0]} for k, row in enumerate(ROWS)])
    write_config(folder, **{**MIX, "dataset": "rows"}, domain_column="topic")
    train()
    assert set(mixtures()[0]["proportions"]) == {"a", "b"}
    assert mixtures()[0]["domains"] == {"a": 2, "b": 2}


def test_a_column_with_one_value_is_nothing_to_mix(folder):
    write_rows(folder / "data/rows.jsonl", [{**row, "topic": "a"} for row in ROWS])
    write_config(folder, **{**MIX, "dataset": "rows"}, domain_column="topic")
    result = run_cli("train", "config.yaml")
    assert result.exit_code == 2
    assert "in the training data, and there is only a" in result.stderr


def test_a_row_without_a_domain_is_refused(folder):
    write_rows(folder / "data/rows.jsonl", [{**row, **({"topic": "a"} if k < 9 else {})} for k, row in enumerate(ROWS)])
    write_config(folder, **{**MIX, "dataset": "rows"}, domain_column="topic")
    for command in ("validate", "train"):
        result = run_cli(command, "config.yaml")
        assert result.exit_code == 2
        assert "domain_column: 'topic' is empty in 3 of 12 rows of 'rows'" in result.stderr


def test_proportions_must_fit_the_values_of_a_column(folder):
    write_rows(folder / "data/rows.jsonl", [{**row, "topic": "abc"[k % 3]} for k, row in enumerate(ROWS)])
    write_config(folder, **{**MIX, "dataset": "rows", "init_mixture_proportions": [1, 1]}, domain_column="topic")
    result = run_cli("validate", "config.yaml")
    assert result.exit_code == 2
    assert "init_mixture_proportions: has 2 numbers and there are 3 domains: a, b, c" in result.stderr
    write_config(folder, **{**MIX, "dataset": "rows", "init_mixture_proportions": [0.5, 0.3, 0.2]}, domain_column="topic")
    text = run_cli("validate", "config.yaml").stdout
    assert "a 4 rows, b 4 rows, c 4 rows" in text and "a 0.5, b 0.3, c 0.2" in text


@pytest.mark.slow
def test_doremi_runs_its_three_steps_and_goes_on_from_the_last_finished_one(folder, capfd):
    write_config(folder, **{**MIX, "component_name": "doremi", "train_step": 2, "component_params": {"eta": 2.0}})
    result = run_cli("doremi", "config.yaml")
    assert result.exit_code == 0, result.stderr
    weights = json.loads((folder / "out/proxy/dataflex/doremi_weights.json").read_text())
    assert weights["names"] == ["rows", "held_out"] and sum(weights["average_weights"]) == pytest.approx(1)
    final = mixtures("out/final")
    assert list(final[0]["proportions"].values()) == pytest.approx(weights["average_weights"])
    assert list(mixtures("out/reference")[0]["proportions"].values()) == [0.5, 0.5]
    before = (folder / "out/reference/all_results.json").stat().st_mtime_ns
    (folder / "out/final/all_results.json").unlink()
    again = run_cli("doremi", "config.yaml", "overwrite_output_dir=true")
    assert "reference: finished before" in again.stdout and again.exit_code == 0
    assert (folder / "out/reference/all_results.json").stat().st_mtime_ns == before
    assert (folder / "out/final/all_results.json").is_file()
    changed = run_cli("doremi", "config.yaml", "train_step=3", "seed=5")
    assert changed.exit_code == 2
    assert "train_step: is 3, but out/reference was trained with 2; name another output_dir" in changed.stderr
    assert "seed: is 5, but out/reference was trained without it" in changed.stderr


def test_doremi_needs_a_file_for_mixing(folder):
    result = run_cli("doremi", "config.yaml")
    assert result.exit_code == 2 and "train_type: must be dynamic_mix, not dynamic_weight" in result.stderr


def write_mixture(folder, proportions, unit="token"):
    event = {"step": 0, "event": "mixture", "unit": unit, "samples": 100, "proportions": proportions}
    (folder / "dataflex/events.jsonl").write_text(json.dumps(event) + "\n")


@pytest.fixture
def runs(tmp_path):
    """Finished runs whose loss is lowest at (0.7, 0.3)."""
    rng = np.random.default_rng(0)
    folders = []
    for number, share in enumerate(rng.uniform(0, 1, 24)):
        folder = tmp_path / f"run{number}"
        (folder / "dataflex").mkdir(parents=True)
        write_mixture(folder, {"a": share, "b": 1 - share} if number % 2 == 0 else {"b": 1 - share, "a": share})
        (folder / "all_results.json").write_text(json.dumps({"eval_loss": 2 + (share - 0.7) ** 2}))
        folders.append(str(folder))
    return folders


def test_regmix_finds_the_best_mixture(runs, tmp_path):
    result = run_cli("offline", "regmix", *runs, "--output", str(tmp_path / "found.json"))
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["proportions"]["a"] == pytest.approx(0.7, abs=0.03)
    assert found["spearman_held_out"] > 0.9 and found["runs"] == 24
    assert "mixture_unit: token\ninit_mixture_proportions: [0." in result.stdout and "wrote " in result.stdout


def test_regmix_names_what_is_wrong(runs, tmp_path):
    result = run_cli("offline", "regmix", *runs[:3], str(tmp_path / "nowhere"), "--metric", "eval_los")
    assert result.exit_code == 2
    assert "nowhere: is not a finished run with dynamic_mix" in result.stderr
    assert "eval_los: is not in all_results.json, which has eval_loss" in result.stderr
    write_mixture(Path(runs[1]), {"a": 1, "b": 1}, unit="sample")
    write_mixture(Path(runs[2]), {"a": 1, "c": 1})
    refused = run_cli("offline", "regmix", *runs[:3]).stderr
    assert "mixture_unit: is sample; that of the runs before it token" in refused and "mixes a, c; the runs before it a, b" in refused
    write_mixture(Path(runs[1]), {"a": 1, "b": 1})
    write_mixture(Path(runs[2]), {"a": 1, "b": 1})
    assert "needs at least 10 runs" in run_cli("offline", "regmix", *runs[:5]).stderr
    assert "--prior: has 3 numbers and there are 2 domains: a, b" in run_cli("offline", "regmix", *runs, "--prior", "1,1,1").stderr
