"""What a run leaves in `output_dir`, the same for every backend."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from dataflex import __version__
from dataflex.configs.loading import METADATA_KEY, RunFile
from dataflex.configs.secrets import recorded, recorded_argument
from dataflex.core.row_numbers import RowNumbers
from dataflex.core.row_table import RowTable
from dataflex.utils.files import write_text_atomically
from dataflex.utils.printable import shell_word

LIBRARIES = ("torch", "transformers", "accelerate", "trl", "peft", "datasets")


def library_versions() -> dict[str, str]:
    """Versions of what decides a run's result."""
    versions = {"dataflex": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


# What DataFlex writes into `output_dir/dataflex`. Whatever else lies there is not ours to delete.
OWN_NAMES = (
    r"run\.yaml|events\.jsonl|rows\.parquet|finished\.json|doremi_weights\.json|doremi_proportions\.yaml",
    r"selections/(step_\d+\.npy|summary\.json|report\.html|report\.png)",
)
_OWN_FILE = re.compile(rf"({'|'.join(OWN_NAMES)})(\.tmp)?")
_NOT_OF_A_REPLAY = ("overwrite_output_dir", "resume_from_checkpoint")  # the first would delete the very run that is replayed
_RELATIVE_TO_THE_FILE = ("model_name_or_path", "dataset_dir", "template")


def recorded_settings(run: RunFile) -> dict[str, Any]:
    """What `dataflex/run.yaml` says of a run: settings that replay it from the folder in which it was started, without credentials."""
    settings = {**run.dataflex.model_dump(exclude_unset=True), **run.backend}
    found = {key: _found(value, run) if key in _RELATIVE_TO_THE_FILE else value for key, value in settings.items() if key not in _NOT_OF_A_REPLAY}
    return {key: recorded(key, run.content.written.get(key), value) for key, value in found.items()}


def _found(value: Any, run: RunFile) -> Any:
    """A path that is relative to the training file, so that another file can name it too."""
    here, there = (isinstance(value, str) and (base / value).exists() for base in (Path(), run.folder))
    return str(run.folder / value) if there and not here else value


def delete_earlier_run(folder: Path) -> None:
    """Delete the checkpoints and records of an earlier run in `folder`, and nothing that DataFlex or the Trainer did not write.

    A link is deleted itself, never what it leads to. The cache stays: its results are found by content, and a run that was killed in its
    first scoring pass goes on with it.
    """
    for path in folder.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdecimal() and (path.is_symlink() or path.is_dir()):
            _delete(path)
    own = folder / "dataflex"
    if own.is_symlink():
        return own.unlink()
    selections = own / "selections"
    inside = [] if selections.is_symlink() else list(selections.glob("*"))
    for path in [*own.glob("*"), *inside]:
        if _OWN_FILE.fullmatch(str(path.relative_to(own))) and not (path.is_dir() and not path.is_symlink()):
            path.unlink()
    if selections.is_symlink() or (selections.is_dir() and not any(selections.iterdir())):
        _delete(selections)
    return None


def _delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def start_output_dir(run: RunFile, output_dir: str, *, seed: int, overwrite: bool) -> None:
    """Write `dataflex/run.yaml`, which replays the run; with `overwrite` delete an earlier run's checkpoints and records first."""
    folder = Path(output_dir)
    if overwrite:
        delete_earlier_run(folder)
    metadata = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(map(recorded_argument, sys.argv)),
        "folder": str(Path.cwd()),
        "file": str(run.path),
        "seed": seed,
        "versions": library_versions(),
    }
    path = folder / "dataflex" / "run.yaml"
    command = f"cd {shell_word(str(Path.cwd()))} && dataflex-cli train {shell_word(str(path))} output_dir=..."
    text = yaml.safe_dump({**recorded_settings(run), METADATA_KEY: metadata}, sort_keys=False, allow_unicode=True)
    write_text_atomically(path, f"# Run it again with: {command}\n{text}")
    path.chmod(0o600)


def record_run(run: RunFile, *, seed: int, overwrite: bool) -> Any:
    """A callback that calls `start_output_dir` on the main process once data and model are known to be in order, before the first step."""
    from transformers import TrainerCallback

    class RecordRun(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                start_output_dir(run, str(args.output_dir), seed=seed, overwrite=overwrite)

    return RecordRun()


def record_rows(table: RowTable, numbers: RowNumbers) -> Any:
    """A callback that leaves `dataflex/rows.parquet` for a static run; DataFlex's own trainers write it themselves."""
    from transformers import TrainerCallback

    class RecordRows(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                table.write(str(args.output_dir), numbers)

    return RecordRows()


def finish(trainer: Any, result: Any, *, plot: bool) -> None:
    """Save model or adapter, tokenizer, trainer_state.json and all_results.json; evaluate if there is evaluation data."""
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if plot and trainer.is_world_process_zero():
        plot_loss(Path(trainer.args.output_dir))


def plot_loss(folder: Path) -> None:
    """Draw training_loss.png from trainer_state.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend()
    figure.savefig(folder / "training_loss.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
