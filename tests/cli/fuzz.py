"""Training files that nobody would write: a valid one with its components, data, descriptions and template, each changed at random.

The same seed gives the same files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from workspace import ROWS, SETTINGS, write_rows

from dataflex.backends.options import NOT_HONOURED, TrlOptions
from dataflex.configs.schema import DataflexConfig

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
COMPONENTS = (
    "selectors:\n  loss:\n    name: loss\n    params:\n      focus: medium\n      focus_weight: 5.0\nweighters:\n  loss:\n    params: {r: 0.5}\n"
)
TRAINER_KEYS = [
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "save_steps",
    "eval_steps",
    "logging_steps",
    "warmup_steps",
    "seed",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "save_strategy",
    "eval_strategy",
    "report_to",
    "run_name",
    "hub_token",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "accelerator_config",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "dataloader_num_workers",
    "ddp_timeout",
    "resume_from_checkpoint",
    "label_names",
    "optim_args",
    "neftune_noise_alpha",
    "metric_for_best_model",
    "load_best_model_at_end",
    "gradient_checkpointing",
    "save_total_limit",
    "torch_compile",
]
KEYS = [*DataflexConfig.model_fields, *TrlOptions.model_fields, *TRAINER_KEYS, *NOT_HONOURED, "overwrite_cache", "nonsense", "ключ", "a.b"]
KEYS = [key for key in KEYS if key != "backend"]

# As they stand in a YAML file.
VALUES = [
    *("", "null", "true", "false", "0", "-1", "1", "3", "7", "0.5", "1e-4", "1e400", "-1e400", ".inf", "-.inf", ".nan", "1e300", "0x10", "1_000"),
    *("9" * 20, "9" * 40, "-" + "9" * 40, "9" * 400, "9" * 5000, "30000000", "2147483648", "18446744073709551616", "1e18", "0.1e-400"),
    *("[]", "{}", "[1, 2]", "[0.5, 0.5]", "{a: 1}", "{1: {}}", "{null: 1}", "[[[]]]", "{a: {b: {c: [1, {d: 2}]}}}", "[a, 1, null, true]"),
    *("!!bool maybe", "!!float x", "!!int x", "!!timestamp x", "!!binary x", "!!set {a}", "!!python/object:os.system {}", "!mine x", "!!str [a]"),
    *("2020-01-01", "'x'", "''", "' '", "'a, b'", "','", "rows", "rows,held_out", "rows.jsonl", "loss", "random", "no", "steps", "epoch", "auto"),
    *(
        "${learning_rate}",
        "${nothing}",
        "${oc.env:HOME}",
        "${oc.env:NO_SUCH_VARIABLE}",
        "${",
        "${}",
        "${a.b.c}",
        "'${dataset}${dataset}'",
        "${oc.decode:x}",
    ),
    *(
        "'" + "x" * 300 + "'",
        "'" + "x/" * 3000 + "'",
        '"\\0"',
        '"a\\0b"',
        '"\\e[31mred"',
        '"\\n"',
        '"\\x85\\L"',
        "'~nobody/x'",
        "/dev/null",
        "/",
        ".",
        "..",
    ),
    *("pipe", "dangling", "folder", "loop", "bytes.bin", "t.jinja", "comp.yaml", "config.yaml", "data/rows.jsonl", "/dev/full", "'http://x y'"),
    *(
        "[" * 60 + "]" * 60,
        "[" * 2000,
        "{a: " * 300 + "}" * 300,
        "&a [*a]",
        "*a",
        "&x [*x, *x]",
        "|",
        "> text",
        "'\U0001f600'",
        "'\u202eabc'",
        "'\ufffe'",
    ),
]
TEMPLATES = [
    *(
        "",
        "{{",
        "{% if %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'x' }}",
        "{{ raise_exception('no') }}",
    ),
    *(
        "{{ nothing.at.all }}",
        "{{ messages[7]['role'] }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ range(10 ** 9) | list | length }}",
        "{{ 'x' * 10 ** 10 }}",
    ),
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "(" * 500,
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set x = namespace(v=messages) %}" + TEMPLATE,
    "\ufeff" + TEMPLATE,
    "{{ '\\x1b[31m' }}" + TEMPLATE,
]
JSON_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x" * 300,
    "a\0b",
    "\x1b[31m",
    "\ud800",
    [],
    {},
    [1],
    {"a": 1},
    "rows.jsonl",
]


def make_files(folder: Path, seed: int) -> list[str]:
    """Write the files of `seed` into `folder`, which holds a model; returns the overrides to give with them."""
    pick = random.Random(seed)
    _write_valid(folder, pick)
    overrides: list[str] = []
    chosen = pick.choices(range(len(CHANGES)), weights=WEIGHTS, k=pick.choice((1, 1, 2, 3)))
    for change in (CHANGES[number] for number in sorted(chosen)):
        change(folder, pick, overrides)
    return overrides


def _write_valid(folder: Path, pick: random.Random) -> None:
    shutil.rmtree(folder / "data", ignore_errors=True)
    for path in folder.iterdir():
        if path.name != "model":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / "data").mkdir()
    write_rows(folder / "data/rows.jsonl", ROWS)
    write_rows(folder / "data/held_out.jsonl", ROWS[:3])
    entries = {name: {"file_name": f"{name}.jsonl"} for name in ("rows", "held_out")}
    (folder / "data/dataset_info.json").write_text(json.dumps(entries))
    (folder / "comp.yaml").write_text(COMPONENTS)
    (folder / "t.jinja").write_text(TEMPLATE)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "bytes.bin").write_bytes(pick.randbytes(300))
    kinds: list[dict[str, Any]] = [
        {},
        {"train_type": "dynamic_select", "update_step": 2, "update_times": -1},
        {"train_type": "dynamic_select", "update_step": 1, "update_times": 2, "train_step": 0, "num_train_epochs": 2},
        {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 1, "dataset": "rows,held_out"},
        {"train_type": "static", "component_name": ..., "warmup_step": ...},
    ]
    extra = {"components_cfg_file": "comp.yaml"} if pick.random() < 0.4 else {}
    settings = {**SETTINGS, **extra, **pick.choice(kinds)} | ({"template": "t.jinja"} if pick.random() < 0.3 else {})
    if settings["train_type"] in ("static", "dynamic_mix"):
        settings.pop("components_cfg_file", None)
    settings = {key: value for key, value in settings.items() if value is not ...}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def _value_in_the_file(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    lines = (folder / "config.yaml").read_text(errors="replace").splitlines()
    key = pick.choice(KEYS)
    kept = [line for line in lines if not line.startswith(f"{key}:")]
    kept.insert(pick.randrange(len(kept) + 1), f"{key}: {pick.choice(VALUES)}")
    (folder / "config.yaml").write_text("\n".join(kept) + "\n", errors="replace")


def _override(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    odd = pick.choice(["", "=", "-x", "a", "=a", "a.b.c=1", "dataset.a=1", "component_params.r=x", "component_params.x.y=1", "[a]=1", "a[0]=1"])
    overrides.append(odd if pick.random() < 0.2 else f"{pick.choice(KEYS)}={pick.choice(VALUES)}".replace("\0", ""))


def _bytes_of(name: str) -> Callable[[Path, random.Random, list[str]], None]:
    """Change some bytes or lines of a file."""

    def change(folder: Path, pick: random.Random, overrides: list[str]) -> None:
        path = folder / name
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        for _ in range(pick.choice((1, 2, 5))):
            place, what = pick.randrange(len(data) + 1), pick.random()
            if what < 0.3:
                data[place:place] = pick.choice(
                    (b"\0", b"\xff", b"\x1b", b"\n", b"{", b"}", b"[", b"'", b'"', b"\t", b": ", b"- ", b"&a ", b"*a", b"#", b"%")
                )
            elif what < 0.6:
                del data[place : place + pick.choice((1, 3, 20))]
            else:
                start = pick.randrange(len(data) + 1)
                data[place:place] = data[start : start + pick.choice((1, 10, 100))]
        path.write_bytes(data)

    return change


def _components(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    lines = COMPONENTS.splitlines()
    number = pick.randrange(len(lines))
    key = lines[number].partition(":")[0]
    lines[number] = f"{key}: {pick.choice(VALUES)}" if pick.random() < 0.7 else pick.choice(["selectors: {1: {}}", "1: 2", "null: {}", "- a", "x"])
    (folder / "comp.yaml").write_text("\n".join(lines), errors="replace")
    overrides.append("components_cfg_file=comp.yaml")


def _description(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    entry: Any = {"file_name": "rows.jsonl"}
    options = ["file_name", "formatting", "columns", "tags", "num_samples", "ranking", "hf_hub_url", "split", "subset", "what"]
    for _ in range(pick.choice((1, 2))):
        entry[pick.choice(options)] = pick.choice([*JSON_VALUES, "sharegpt", "alpaca", {"prompt": "x"}, {"prompt": 1}, {"messages": "instruction"}])
    entry = pick.choice([entry, entry, entry, *JSON_VALUES])
    whole = pick.choice([{"rows": entry}, {"rows": entry, "": {}}, {"rows": entry}, entry])
    (folder / "data/dataset_info.json").write_text(json.dumps(whole))


def _rows(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    rows: list[Any] = [dict(row) for row in ROWS]
    for _ in range(pick.choice((1, 3))):
        row = pick.choice(rows)
        if isinstance(row, dict):
            row[pick.choice(["instruction", "input", "output", "system", "history", "x", "", "\x1b"])] = pick.choice(JSON_VALUES)
    if pick.random() < 0.3:
        rows[pick.randrange(len(rows))] = pick.choice(JSON_VALUES)
    write_rows(folder / "data/rows.jsonl", rows)


def _template(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    (folder / "t.jinja").write_text(pick.choice(TEMPLATES))
    overrides.append("template=t.jinja")


def _other_kind_of_file(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    path = folder / pick.choice(["config.yaml", "comp.yaml", "t.jinja", "data/rows.jsonl", "data/dataset_info.json", "out"])
    if path.is_dir():
        return
    path.unlink(missing_ok=True)
    kind = pick.choice(["folder", "pipe", "dangling", "loop", "nothing", "empty", "device"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("dangling", "loop"):
        path.symlink_to("nowhere" if kind == "dangling" else path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()


def _many_keys(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    number = pick.choice((300, 4000, 100_000))
    with (folder / "config.yaml").open("a") as file:
        file.write("".join(f"key_{k}: {k}\n" for k in range(number)))


def _endless_plan(folder: Path, pick: random.Random, overrides: list[str]) -> None:
    overrides += [f"{key}={pick.choice(('1', '3', '30000000', '1000000000000', '9' * 40))}" for key in ("train_step", "update_step", "update_times")]


CHANGES: list[Callable[[Path, random.Random, list[str]], None]] = [
    _value_in_the_file,
    _override,
    _bytes_of("config.yaml"),
    _bytes_of("comp.yaml"),
    _bytes_of("data/dataset_info.json"),
    _bytes_of("data/rows.jsonl"),
    _components,
    _description,
    _rows,
    _template,
    _many_keys,
    _endless_plan,
    _other_kind_of_file,  # the last: the others write files
]
WEIGHTS = [10, 10, 4, 1, 2, 2, 3, 4, 3, 2, 0.3, 1, 3]
