"""Values, names and files that no one means, each answered in words at once."""

import os
import re

import pytest
from workspace import make_workspace, run_cli, write_config, write_rows

LONG = "x" * 300
SELECT = {"train_type": "dynamic_select", "component_name": "loss", "update_step": 1, "update_times": -1}


@pytest.fixture
def folder(tmp_path):
    return make_workspace(tmp_path)


def refusal(*overrides: str) -> str:
    result = run_cli("validate", "config.yaml", *overrides)
    assert result.exit_code == 2, (result.stdout, result.exception)
    return result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bf16=!!bool maybe", "command line: bf16=!!bool maybe: is not a valid value: a value does not fit its tag"),
        ("learning_rate=!!float x", "is not a valid value: a value does not fit its tag (ValueError: could not convert string to float"),
        ("val_size=1e400", "val_size: inf is not valid: must be"),
        ("num_train_epochs=.inf", "num_train_epochs: inf is not valid"),
        ("num_train_epochs=.nan", "num_train_epochs: nan is not valid"),
        ("num_train_epochs=1e300", "num_train_epochs: 1e+300 is not valid: must be"),
        ("learning_rate=.inf", "learning_rate: inf is not valid"),
        ("max_samples=9999999999999999999999", "max_samples: 9999999999999999999999 is not valid: must be less than or equal to"),
        (f"train_step={'9' * 40}", f"train_step: {'9' * 40} is not valid: must be less than or equal to 1000000000000"),
        (f"seed={'9' * 40}", "seed: "),
        (f"train_step={'9' * 5000}", "is not a valid value"),
        (f"model_name_or_path={LONG}", "model_name_or_path: 'xxxx"),
        (f"template={LONG}.jinja", "is too long for a name of a file: 306 bytes; 255 are allowed"),
        (f"output_dir={LONG}", "is too long for a name of a file"),
        (f"dataset={LONG}.jsonl", "is too long for a name of a file"),
        (f"components_cfg_file={LONG}", "is too long for a name of a file"),
        ("output_dir=~nobody_here/x", "output_dir: '~nobody_here/x' already"),
        (f"run_name={'[' * 200}{']' * 200}", "is nested more than 50 levels deep"),
        ('output_dir="a\\0b"', "output_dir: holds a zero byte, which no name of a file can"),
        ("components_cfg_file=pipe", "components_cfg_file: is a pipe or a device, not a file or folder"),
        ("template=/dev/zero", "template: is a pipe or a device"),
        ("model_name_or_path=dangling", "model_name_or_path: "),
        ("components_cfg_file=dangling", "components_cfg_file: no file 'dangling'"),
        ("components_cfg_file=loop", "components_cfg_file: no file 'loop'"),
        ("components_cfg_file=data", "components_cfg_file: no file 'data'"),
        ("--hub_token=hf_SECRET", "command line: --hub_token=${oc.env:HUB_TOKEN}: is not an override"),
    ],
)
def test_overrides(folder, override, message):
    os.mkfifo("pipe")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    os.makedirs("~nobody_here/x/checkpoint-1")
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: sft\nbf16: !!bool maybe\n", "config.yaml:2: is not valid YAML: a value does not fit its tag (KeyError"),
        ("stage: sft\na: !!timestamp x\n", "config.yaml:2: is not valid YAML: a value does not fit its tag"),
        ("a: !!set {b}\n", "config.yaml:1: a: is not valid: Value 'set' is not a supported primitive type"),
        ("a: !mine b\n", "config.yaml:1: is not valid YAML: could not determine a constructor for the tag '!mine'"),
        ("null: 1\n", "config.yaml: is not valid: Incompatible key type 'NoneType'"),
        ("? [a]\n: 1\n", "is not valid YAML"),
        ("a: &x [*x]\n", "is not valid YAML"),
        ("a: " + "[" * 3000, "config.yaml: is nested more than 50 levels deep"),
        ("a: " + "{b: " * 60 + "}" * 60, "config.yaml: is nested more than 50 levels deep"),
        ("".join(f"k{n}: 1\n" for n in range(100_000)), "config.yaml: holds more than 10000 keys and values"),
        ("#" * 3_000_000, "config.yaml: cannot be read: it has more than 2,000,000 bytes"),
        ("a: ${b}\nb: ${a}\n", "a: "),
        ("".join(f"a{n}: ${{a{n + 1}}}${{a{n + 1}}}\n" for n in range(40)) + "a40: xxxx\n", "a0: grows to more than 1,000,000 characters"),
        ("".join(f"a{n}: {{x: '${{a{n + 1}}}', y: '${{a{n + 1}}}'}}\n" for n in range(40)) + "a40: xxxx\n", "a0.x: grows to more than 1,000,000"),
    ],
    ids=lambda text: re.sub(r"\W+", " ", text[:20]),
)
def test_files(folder, text, message):
    (folder / "config.yaml").write_text(text)
    assert message in refusal()


def test_thousands_of_unknown_keys(folder):
    with (folder / "config.yaml").open("a") as file:
        file.writelines(f"learning_rat_{number}: 1\n" for number in range(4000))
    lines = refusal().splitlines()
    assert len(lines) == 102 and lines[0] == "dataflex-cli: 4000 problems" and lines[-1] == "  and 3,900 more"
    assert "Did you mean 'learning_rate'?" in lines[1]


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "loop", "device"])
@pytest.mark.parametrize("name", ["config.yaml", "data/dataset_info.json", "data/rows.jsonl"])
def test_what_is_no_file(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "device": "/dev/zero"}[kind])
    assert refusal().startswith("dataflex-cli: ")


@pytest.mark.parametrize("text", ["selectors: {1: {}}\n", "weighters: {1: {}, loss: {params: {1: 2}}}\n", "1: 2\n"])
def test_keys_that_are_no_text(folder, text):
    (folder / "comp.yaml").write_text(text)
    assert "cannot be checked" not in refusal("components_cfg_file=comp.yaml")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% include 'x' %}", "cannot be rendered: TypeError: no loader for this environment specified; a template cannot load others"),
        ("{{ 1 / 0 }}", "template: cannot be rendered: ZeroDivisionError: division by zero"),
        ("{{ '(' * 3 }}" + "{{ " + "(" * 3000, "template: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template: cannot be rendered: RecursionError"),
        ("{{ 9 ** (9 ** 9) }}", "template: does not come to an end within 3 seconds for one short message, or takes too much memory"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
            "template: does not come to an end within 3 seconds for one short message, or takes too much memory",
        ),
        ("{{ 'x' * 10 ** 10 }}", "template: cannot be rendered: MemoryError"),
    ],
)
def test_templates(folder, template, message):
    (folder / "t.jinja").write_text(template)
    assert message in refusal("template=t.jinja")


def test_a_plan_of_millions_of_boundaries_takes_no_time(folder):
    write_config(folder, **SELECT)
    result = run_cli("validate", "config.yaml", "train_step=30000000")
    assert "29999999 selections, at steps 1, 2, 3, 4, ..., 29999998, 29999999" in result.stdout
    result = run_cli("validate", "config.yaml", "train_step=1000000000000", "update_times=3")
    assert "750000000000 selections, at steps 1, 2, 3, 5, ..., 999999999998, 999999999999; 250000000000 stages" in result.stdout


ESCAPES = "\x1b]0;pwned\x07\x1b[31mRED\nfake: line"


@pytest.mark.parametrize(
    "changes",
    [
        {"domain_column": "dom", **SELECT},
        {"domain_column": "dom", "train_type": "dynamic_mix", "component_name": "odm", "update_step": 1},
        {"domain_column": ESCAPES},
        {"run_name": ESCAPES, "dataset": "gone" + ESCAPES},
        {"output_dir": "a" + ESCAPES},
        {"component_name": ESCAPES},
        {"component_params": {"strategy": ESCAPES}},
        {ESCAPES: 1},
        {"template": ESCAPES},
    ],
)
def test_nothing_reaches_the_terminal_as_it_is(folder, changes):
    write_rows(folder / "data/rows.jsonl", [{"instruction": "a", "output": "b", "dom": dom} for dom in (ESCAPES, "b") * 6])
    write_config(folder, **changes)
    result = run_cli("validate", "config.yaml")
    assert (result.exit_code in (0, 2) and result.exception is None) or isinstance(result.exception, SystemExit)
    text = result.stdout + result.stderr
    assert "\x1b" not in text and "\x07" not in text
    assert not any(line.strip().startswith("fake") for line in text.splitlines())
