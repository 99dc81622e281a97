"""The commands beside `train`: what they print, and that they write nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from workspace import listing, make_workspace, run_cli, write_config

import dataflex
from dataflex.core.registry import REGISTRY, settings_of, uses_eval_dataset

REPOSITORY = Path(__file__).parents[2]
LIGHT = """
import sys
from dataflex.cli.app import app
for arguments in (["--help"], ["version"], ["train", "--help"], ["validate", "--help"]):
    app(arguments, standalone_mode=False)
print("heavy:", sorted({"torch", "transformers", "trl", "datasets", "numpy"} & set(sys.modules)))
"""


def test_help_and_version_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout and f"dataflex {dataflex.__version__}\n" in done.stdout
    for command in ("train", "validate", "components", "version", "env", "reference"):
        assert f" {command} " in done.stdout


def test_without_arguments():
    result = run_cli()
    assert result.exit_code == 2 and " validate " in result.output


def test_an_unknown_command():
    result = run_cli("trian", "config.yaml")
    assert result.exit_code == 2 and "trian" in result.stderr and "Traceback" not in result.stderr


def test_components_lists_every_component_with_its_parameters():
    result = run_cli("components")
    assert result.exit_code == 0
    sections = {}
    for row in (line for line in result.stdout.splitlines() if line.startswith("│")):
        kind, name, *cells = [cell.strip() for cell in row.split("│")[1:-1]]
        current = (kind, name) if name else current  # noqa: F821
        sections.setdefault(current, []).append(cells)
    assert sorted(sections) == sorted((kind, name) for kind in ("weighter", "selector", "mixer") for name in REGISTRY.names(kind))
    for (kind, name), rows in sections.items():
        cls = REGISTRY.get(kind, name)
        assert [row[0].split(" = ")[0] for row in rows if row[0]] == list(settings_of(cls))
        assert rows[0][1] == ("evaluation data" if uses_eval_dataset(cls, {}) else "-")
    assert [row[0] for row in sections["weighter", "loss"]][:1] == ["strategy = linupper  (linupper | uniform | quadratic | extremes)"]


def test_components_of_a_plugin_and_of_another_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataflex import SampleWeighter, register_weighter\n\n\n@register_weighter('listed')\nclass Listed(SampleWeighter):\n"
        "    '''Listed [in brackets].'''\n    def __init__(self, names: list[str] = (), **kwargs):\n        pass\n"
        "    def sample_weights(self, losses, **kwargs):\n        return losses\n"
    )
    (tmp_path / "my.yaml").write_text("weighters:\n  loss:\n    params:\n      r: 0.125\n")
    try:
        result = run_cli("components", "--plugin", "mine.py", "--components-cfg-file", "my.yaml")
    finally:
        REGISTRY._classes["weighter"].pop("listed", None)
    assert "names = ()  (list[str])" in result.stdout and "Listed [in brackets]. (no entry in the components file)" in result.stdout
    assert "r = 0.125  (float > 0)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--components-cfg-file", "my.yaml"], "components_cfg_file: no file 'my.yaml'. Leave the key out to use the packaged components"),
        (
            ["--plugin", "no_such_module"],
            "command line: plugins: 'no_such_module' failed on import: ModuleNotFoundError: No module named 'no_such_module'",
        ),
    ],
)
def test_mistakes_with_components(arguments, message):
    result = run_cli("components", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"dataflex-cli: {message}\n")


def test_env_names_what_decides_a_result():
    lines = dict(line.split(": ", 1) for line in run_cli("env").stdout.splitlines())
    names = {"dataflex", "python", "torch", "transformers", "accelerate", "trl", "peft", "datasets", "platform", "cpu count", "gpus"}
    assert names == set(lines) and lines["dataflex"] == dataflex.__version__ and lines["gpus"] == "none"


def test_the_reference_page_is_up_to_date():
    printed, page = run_cli("reference").stdout, REPOSITORY / "docs" / "reference.md"
    for key in ("train_type", "cutoff_len", "quantization_bit", "do_train"):
        assert f"| `{key}` |" in printed
    assert not page.exists() or page.read_text(encoding="utf-8") == printed


def test_validate_prints_the_plan_and_writes_nothing(tmp_path, recwarn):
    make_workspace(tmp_path)
    write_config(tmp_path, eval_dataset="held_out", warmup_ratio=0.1, do_train=True, gradient_accumulation_steps=2)
    before = listing(tmp_path)
    result = run_cli("validate", "config.yaml", "component_params.scope=window")
    assert (result.exit_code, result.stderr, listing(tmp_path)) == (0, "", before)
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[-1] == "The file is valid. Nothing else was written."
    plan = dict(line.split("  ", 1) for line in lines[:-1])
    assert "kept for training in" in plan.pop("tokenised rows")
    assert {name: value.strip() for name, value in plan.items()} == {
        "model": "model, full, stage sft",
        "data": "rows: 12 rows",
        "evaluation data": "held_out: 3 rows",
        "samples per step": "8 (1 process)",
        "optimizer steps": "3, 2.0 passes over the data",
        "train type": "dynamic_weight, loss (strategy=linupper, delta=1.0, r=1.0, scope=window)",
        "warmup_step": "weights are 1 for the first 1 of 3 optimizer steps",
        "extra cost": "a forward pass without gradient over every optimizer step that has several micro-batches (scope: window)",
        "warmup_steps": "10% of the steps (learning rate; not the same as warmup_step)",
        "note": "do_train has no effect: train always trains",
    }
    assert [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_step": 0, "num_train_epochs": 2}, "optimizer steps   6, 2.0 passes over the data"),
        ({"train_step": 0, "max_steps": 5}, "optimizer steps   5, 1.7 passes over the data"),
        ({"train_step": 0, "num_train_epochs": 0.5}, "optimizer steps   2, 0.7 passes over the data"),
        ({"train_step": 0, "num_train_epochs": 2, "packing": True}, "optimizer steps   2, 2.7 passes over the data"),
        ({"train_step": 0, "num_train_epochs": 1, "warmup_step": 3}, "warning           warmup_step 3 leaves no step to weight"),
        ({"val_size": 4}, "evaluation data   4 rows of the above, held out"),
        ({"val_size": 0.25}, "data              rows: 9 rows to train on, of 12"),
        ({"train_type": "static"}, "train type        static: the backend's own training"),
        ({"component_name": "adapt", "eval_dataset": "held_out"}, "extra cost        "),
    ],
)
def test_what_the_plan_says(tmp_path, changes, expected):
    make_workspace(tmp_path)
    write_config(tmp_path, **changes)
    result = run_cli("validate", "config.yaml")
    assert result.exit_code == 0, result.stderr
    assert any(line.startswith(expected) for line in result.stdout.splitlines()), result.stdout


def test_the_plan_is_not_printed_for_a_bad_val_size(tmp_path):
    make_workspace(tmp_path)
    write_config(tmp_path, val_size=20)
    result = run_cli("validate", "config.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "dataflex-cli: config.yaml:15: val_size: 20 takes 20 of 12 rows; at least one must remain on either side\n"
