"""What a run leaves in `output_dir`, the same for every backend."""

from __future__ import annotations

import json
import platform
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
from dataflex.core.row_numbers import RowNumbers
from dataflex.core.row_table import RowTable
from dataflex.utils.files import write_text_atomically

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


def recorded_settings(run: RunFile) -> dict[str, Any]:
    """What `dataflex/run.yaml` says of a run."""
    return {**run.dataflex.model_dump(exclude_unset=True), **run.backend}


def start_output_dir(run: RunFile, output_dir: str, *, seed: int, overwrite: bool) -> None:
    """Write `dataflex/run.yaml`, which replays the run; with `overwrite` delete an earlier run's checkpoints and records first.

    The cache stays: its results are found by content, and a run that was killed in its first scoring pass goes on with it.
    """
    folder = Path(output_dir)
    if overwrite:
        for path in [*folder.glob("checkpoint-*"), *(path for path in (folder / "dataflex").glob("*") if path.name not in ("cache", "lock"))]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    metadata = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "file": str(run.path),
        "seed": seed,
        "versions": library_versions(),
    }
    text = yaml.safe_dump({**recorded_settings(run), METADATA_KEY: metadata}, sort_keys=False, allow_unicode=True)
    write_text_atomically(
        folder / "dataflex" / "run.yaml", f"# Run it again with: dataflex-cli train {folder}/dataflex/run.yaml output_dir=...\n{text}"
    )


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
