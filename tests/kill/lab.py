"""Runs of the command line in forked processes: the libraries are imported once, so that a run that is killed costs about a second.

The parent never trains, since a process whose libraries have threads cannot be forked safely.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ALONE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
STEPS = 8
COMMON: dict[str, Any] = {
    "model_name_or_path": "model",
    "stage": "sft",
    "dataset": "letters,numbers",
    "dataset_dir": "data",
    "eval_dataset": "held_out",
    "eval_strategy": "epoch",  # an epoch ends with step 4, which is saved before its evaluation
    "cutoff_len": 64,
    "output_dir": "out",
    "overwrite_output_dir": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "disable_gradient_checkpointing": True,
    "report_to": "none",
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 2,
    "logging_steps": 3,
    "save_steps": 2,
    "save_total_limit": 2,
    "train_step": STEPS,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "weight": {"train_type": "dynamic_weight", "component_name": "loss", "component_params": {"scope": "ema", "r": 0.4}, "warmup_step": 1},
    "select": {"train_type": "dynamic_select", "component_name": "loss", "warmup_step": 2, "update_step": 3, "update_times": -1},
    "mix": {"train_type": "dynamic_mix", "component_name": "odm", "warmup_step": 2, "update_step": 2, "update_times": -1},
    "static": {"train_type": "static"},
}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "lora": {"finetuning_type": "lora", "lora_rank": 2, "lora_target": "all", "lora_dropout": 0.1},
}
_TIMES = ("runtime", "per_second", "seconds", "share_of_time", "flos")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def prepare(folder: Path) -> None:
    """Import all that a run needs, before anything else imports it. Caches go into `folder`."""
    os.environ.update(ALONE, HF_DATASETS_CACHE=str(folder / "datasets"))
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.utils import logging

    import dataflex.backends.outputs
    import dataflex.backends.trl
    import dataflex.cli.app
    import dataflex.cli.plan
    import dataflex.train.trainer.mix_trainer
    import dataflex.train.trainer.select_trainer
    import dataflex.train.trainer.weight_trainer  # noqa: F401

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make_folder(folder: Path) -> None:
    """A small model and three small data sets."""
    from dataflex.testing.tiny import tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    data = folder / "data"
    data.mkdir()
    for name, start, number in (("letters", 0, 4), ("numbers", 40, 4), ("held_out", 80, 3)):
        rows = [{"instruction": f"Say {k}", "input": "", "output": "ab" * (k % 7 + 1)} for k in range(start, start + number)]
        (data / f"{name}.json").write_text(json.dumps(rows))
    entries = {name: {"file_name": f"{name}.json"} for name in ("letters", "numbers", "held_out")}
    (data / "dataset_info.json").write_text(json.dumps(entries))


def config(folder: Path, family: str, tuning: str, **changes: Any) -> Path:
    """The training file of a family."""
    path = folder / f"{family}-{tuning}.yaml"
    path.write_text(yaml.safe_dump({**COMMON, **FAMILIES[family], **TUNINGS[tuning], **changes}, sort_keys=False))
    return path


class Outcome:
    """How a run ended: its exit code (negative: the signal that killed it), what it printed, and how long it took."""

    def __init__(self, code: int, log: str, seconds: float):
        self.code, self.log, self.seconds = code, log, seconds


def fork(action: Callable[[], Any], folder: Path, seconds: float | None = None) -> Outcome:
    """Run `action` in a forked process that works in `folder`; SIGKILL it after so many seconds."""
    log, begun = folder / "log", time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(action, folder, log)
    if seconds is not None:
        while time.monotonic() - begun < seconds:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return Outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.monotonic() - begun)


def _become(action: Callable[[], Any], folder: Path, log: Path) -> None:
    """What the forked process does; it never returns into the parent's code."""
    code = 1
    try:
        os.chdir(folder)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        action()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(*arguments: str) -> Callable[[], Any]:
    """`dataflex-cli` with these arguments."""

    def run() -> None:
        from dataflex.cli.app import app

        app(list(arguments))

    return run


def killed_at_write(action: Callable[[], Any], number: int | None, count: Path | None = None) -> Callable[[], Any]:
    """`action`, killed when it begins its `number`-th change below `out`: a file opened for writing, renamed or deleted, a folder made or
    deleted, or, half-written, a file of tensors.

    Args:
        count: where to write how many there are, if nothing is killed.
    """

    def run() -> None:
        seen = [0]
        _watch(seen, number)
        try:
            action()
        finally:
            if count is not None:
                count.write_text(str(seen[0]))

    return run


def _watch(seen: list[int], number: int | None) -> None:
    import safetensors.torch
    import torch
    from transformers import modeling_utils

    out = os.path.abspath("out")

    def due(path: Any) -> bool:
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(os.fspath(path)).startswith(out):
            return False
        seen[0] += 1
        return seen[0] == number

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (event == "open" and (arguments[2] or 0) & _WRITES)
        if changes and due(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def half(*arguments: Any, **options: Any) -> Any:
            path = arguments[place] if len(arguments) > place else options.get("filename")
            last = due(path)
            result = write(*arguments, **options)
            if last:
                os.truncate(path, os.path.getsize(path) // 2)  # as if it had been killed in the middle
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return half

    torch.save = torn(torch.save, 1)
    safetensors.torch.save_file = torn(safetensors.torch.save_file, 1)
    modeling_utils.safe_save_file = torn(modeling_utils.safe_save_file, 1)
    sys.addaudithook(audit)


def traces(out: Path) -> dict[str, Any]:
    """What a finished run leaves, without times: the model's bits, the log, the results, the decisions."""
    model = next(path for name in ("model.safetensors", "adapter_model.safetensors") if (path := out / name).is_file())
    state = json.loads((out / "trainer_state.json").read_text())
    events = out / "dataflex" / "events.jsonl"
    lines = events.read_text().splitlines() if events.is_file() else []
    selections = sorted((out / "dataflex" / "selections").glob("*.npy"))
    return {
        "model": hashlib.sha256(model.read_bytes()).hexdigest(),
        "log": [_timeless(entry) for entry in state["log_history"]],
        "step": state["global_step"],
        "results": _timeless(json.loads((out / "all_results.json").read_text())),
        "events": [_timeless(json.loads(line)) for line in lines],
        "selections": {path.name: np.load(path).tolist() for path in selections},
        "leftovers": sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.suffix == ".tmp" or path.name == "lock"),
    }


def _timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not any(word in key for word in _TIMES)}
