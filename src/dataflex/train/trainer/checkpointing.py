"""The mixin that keeps a run's checkpoints whole and resumes from them, in front of any `transformers.Trainer` subclass.

Every override calls `super()`. Beyond the host's own checkpoint it saves what the host forgets on resume, and a manifest of all files; it
locks `output_dir`, looks at every file before it resumes, and trains no step that is done already. `DynamicTrainer` adds the state of the
algorithm; a static run has this mixin alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from dataflex.core.lock import check_still_there, run_lock
from dataflex.core.manifest import Share, describe, files_of, write_manifest
from dataflex.core.state import checkpoint_flaws, checkpoint_number, is_verifiable, load_state, newest_complete_checkpoint, save_state
from dataflex.errors import ConfigError, Problem, ResumeError, TrainingError
from dataflex.train.trainer import course, hosts
from dataflex.train.trainer.finished import RunFinished, forget_finished, read_finished
from dataflex.train.trainer.preemption import SaveOnSigterm
from dataflex.train.trainer.run_state import RunState
from dataflex.utils.distributed import gather_objects, gather_rows, set_timeout, unconnected, waiting
from dataflex.utils.logging import logger


class CheckpointedTrainer(Trainer):
    """`CheckpointedTrainer.over(AnyTrainer)(...)`: the host's training, with checkpoints that are checked before they are resumed."""

    _dataflex: RunState

    needs_state: ClassVar[bool] = False
    """Whether a checkpoint without DataFlex's state is of no use."""

    @classmethod
    @cache
    def over(cls, base: type[Trainer]) -> Any:
        """This mixin in front of `base`, a `transformers.Trainer` subclass.

        Raises:
            ConfigError: `base` uses a name of DataFlex's for something else.
        """
        hosts.refuse_collisions(cls, base)
        return type(cls.__name__.removesuffix("Trainer") + base.__name__, (cls, base), {"__module__": __name__})

    def __init__(self, *args: Any, **kwargs: Any):
        self.__dict__.setdefault("_dataflex", RunState())
        super().__init__(*args, **kwargs)
        self._refuse_unconnected()
        set_timeout(self.args.ddp_timeout)
        self._dataflex.sigterm = SaveOnSigterm()
        self.add_callback(self._dataflex.sigterm)
        self.args.restore_callback_states_from_checkpoint = True  # such as the patience of early stopping

    def _refuse_unconnected(self) -> None:
        """A launcher's processes that do not know of each other would train copies into one folder."""
        apart = unconnected(self.accelerator.num_processes)
        if apart:
            raise ConfigError(Problem("", "use_cpu", apart))

    # ---------------------------------------------------------------- a run from its beginning to its end

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        run = self._dataflex
        self._refuse_unconnected()
        with self._output_dir_locked():
            run.resume = self._resolve_checkpoint(resume_from_checkpoint)
            run.resumed = self._read_state(run.resume) if run.resume else {}
            run.pending, run.changed, run.caught_up, run.last_step = run.resumed.get("pending", {}), {}, False, None
            run.callbacks = _stateful(self.callback_handler.callbacks, "args")
            if run.resume and run.leave_when_finished:
                self._leave_if_finished()
            if self.is_world_process_zero():
                forget_finished(str(self.args.output_dir))
            with self._as_one_run(), waiting("the gradients, or another exchange of the host's,"):
                result = super().train(str(run.resume) if run.resume else None, *args, **kwargs)
            check_still_there(str(self.args.output_dir))
            self._after_training()
        return result

    def _after_training(self) -> None:
        """What is left to write when training has ended; the folder is still locked."""

    @contextmanager
    def _output_dir_locked(self) -> Iterator[None]:
        """The main process keeps other runs out; all ranks fail with it."""
        with ExitStack() as stack:
            refusal = ""
            try:
                stack.enter_context(run_lock(str(self.args.output_dir), active=self.is_world_process_zero()))
            except TrainingError as error:
                refusal = str(error)
            refusals = [found for found in gather_objects(refusal) if found]
            if refusals:
                raise TrainingError(refusals[0])
            yield

    @contextmanager
    def _as_one_run(self) -> Iterator[None]:
        """A resumed run does not evaluate at its start: it has begun already."""
        wanted = self.args.eval_on_start
        self.args.eval_on_start = wanted and self._dataflex.resume is None
        try:
            yield
        finally:
            self.args.eval_on_start = wanted
            self._dataflex.sigterm.release()

    def _leave_if_finished(self) -> None:
        """Raise `RunFinished` if all that this run would leave is there, and its newest checkpoint is the one to go on from."""
        found, resume = read_finished(str(self.args.output_dir)), self._dataflex.resume
        if found is None or resume is None or max(found["checkpoints"].values(), default=0) != checkpoint_number(resume):
            return
        if found["settings"] == self._settings_for_resume(super().get_train_dataloader().dataset):
            raise RunFinished(f"{self.args.output_dir}: this run is finished (step {found['global_step']}), so there is nothing to do")

    # ---------------------------------------------------------------- which checkpoint

    def _resolve_checkpoint(self, requested: str | bool | None) -> Path | None:
        """The checkpoint to go on from, every file of it as it was written."""
        if not requested:
            return None
        shared: dict[str, Any] = {"with_state": self.needs_state, "share": self._share()}
        if requested is True:
            found, skipped = newest_complete_checkpoint(str(self.args.output_dir), agree=_agreed, **shared)
            for reason in skipped:
                logger.warning("not resuming from a newer checkpoint: %s", reason)
            if found is None:
                why = "".join(f"; {reason}" for reason in skipped)
                raise ResumeError(f"resume_from_checkpoint: true, but {self.args.output_dir} holds no checkpoint that can be resumed{why}")
        else:
            found = Path(requested)
            flaws = _agreed(checkpoint_flaws(found, named=True, **shared))
            if flaws:
                raise ResumeError("; ".join(flaws))
        if not is_verifiable(found):
            logger.warning("%s has no list of its files (another program or an older DataFlex wrote it): they seem complete, no more is known", found)
        return found

    def _share(self) -> Share:
        """Which files of a checkpoint this rank reads: every machine sees all of them, or only its own."""
        if self.args.save_on_each_node:
            return Share(self.args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return Share(self.args.process_index, self.args.world_size)

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        return load_state(checkpoint)[0] if self.needs_state or (checkpoint / "dataflex").exists() else {}

    # ---------------------------------------------------------------- settings that must be alike

    def _settings_for_resume(self, dataset: Any) -> dict[str, Any]:
        """What decides the course of training; a resume with others is another run."""
        return {"train_type": "static", **course.settings(self.args)}

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        self._dataflex.settings = self._settings_for_resume(loader.dataset)
        if self._dataflex.resume is not None and "settings" in self._dataflex.resumed:
            self._refuse_changed(self._dataflex.resume, self._dataflex.resumed["settings"])
        return loader

    def _refuse_changed(self, checkpoint: Path, before: dict[str, Any]) -> None:
        """Compare a checkpoint's settings with this run's; what is changed on purpose is applied, or refused where it would have no effect.

        Raises:
            ResumeError: it belongs to another run.
        """
        now = self._dataflex.settings
        changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
        if not changed:
            return
        said = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        if not self._may_change(changed):
            raise ResumeError(f"{checkpoint} belongs to another run: {said}. Set allow_changed_resume: true to resume all the same")
        kept = self._cannot_change(changed)
        if kept:
            raise ResumeError(
                f"{checkpoint} belongs to another run: {said}. In a resumed run {', '.join(kept)} would stay as it was. Put it back, or start a new "
                f"run from the weights: model_name_or_path: {checkpoint} (adapter_name_or_path with LoRA), and another output_dir"
            )
        self._dataflex.changed = changed
        logger.warning("%s belongs to another run: %s; going on with the new values", checkpoint, said)

    def _may_change(self, changed: dict[str, Any]) -> bool:
        """Whether the user wants another course; the host alone does not ask."""
        return True

    def _cannot_change(self, changed: dict[str, Any]) -> list[str]:
        """The names of `changed` whose old value would win."""
        return course.cannot_change(changed, sharded=self.is_deepspeed_enabled)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        fresh = course.hyperparameters(self.optimizer, self.lr_scheduler) if self._dataflex.changed else None
        super()._load_optimizer_and_scheduler(checkpoint)
        if fresh is not None and not self.is_deepspeed_enabled:
            course.apply(self.optimizer, self.lr_scheduler, fresh)

    def _load_callback_state(self) -> None:
        """Give stateful callbacks their state back. The host would make new ones, in another place and with the checkpoint's settings."""
        saved: Any = self.state.stateful_callbacks
        if self.args.restore_callback_states_from_checkpoint:
            _restore_callbacks(self.callback_handler.callbacks, saved, self._dataflex.resumed.get("callbacks", {}))
        present: Any = [callback for callback in [*self.callback_handler.callbacks, self.control] if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=present).stateful_callbacks

    # ---------------------------------------------------------------- going on where the run was

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        at_boundary = kwargs["epoch"] == kwargs["epochs_trained"] and not kwargs["steps_trained_in_current_epoch"]
        self._go_on(at_boundary, kwargs["trial"], kwargs["ignore_keys_for_eval"], kwargs["start_time"])
        if self._nothing_left() or (self._dataflex.caught_up and self.control.should_training_stop):
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _go_on(self, at_boundary: bool, trial: Any, ignore_keys: Any, start_time: float) -> None:
        """Give back what the host forgets on resume, only now that it has reset it; and end the epoch that the checkpoint was saved before.

        Args:
            at_boundary: whether the checkpoint's step is the last one of an epoch.
        """
        pending, self._dataflex.pending = self._dataflex.pending, None
        if pending is None or self._dataflex.resume is None:
            return
        if pending:
            hosts.restore_logging_state(self, pending["loss"], pending["last_logged"])
            hosts.restore_host_state(self, pending["host"])
        self._total_loss_scalar = pending.get("total", self._total_loss_scalar)
        self.model_wrapped.train(pending.get("training", True))  # some hosts log one thing or another by it
        last = self._dataflex.last_step = pending.get("last step")
        if self._nothing_left():
            logger.warning("%s is the end of training (step %d of %d): no step is left to do", self._dataflex.resume, *self._steps())
        if last is not None and not last["epoch ended"] and (at_boundary or self._nothing_left()):
            self._load_rng_state(str(self._dataflex.resume))
            self._dataflex.caught_up = True
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            norm, rate = last["grad_norm"], last["learning_rate"]
            self._maybe_log_save_evaluate(
                self._tr_loss, norm, self.model_wrapped, trial, self.state.epoch, ignore_keys, start_time, learning_rate=rate
            )

    def _nothing_left(self) -> bool:
        """Whether a resumed run has made its last step already."""
        resumed = self._dataflex.resume is not None and self.state.global_step == self._dataflex.resumed.get("global_step", self.state.global_step)
        stopped = any(
            isinstance(callback, EarlyStoppingCallback) and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        return resumed and (self.state.global_step >= self.state.max_steps or stopped)

    def _steps(self) -> tuple[int, int]:
        return self.state.global_step, self.state.max_steps

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self._dataflex.caught_up:  # otherwise the generators have moved on since
            super()._load_rng_state(checkpoint)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, ignore_keys_for_eval: Any, start_time: Any, learning_rate: Any = None
    ) -> None:
        last, step = self._dataflex.last_step, self.state.global_step
        ended = last is not None and last["step"] == step  # the host comes here after each step, and again at the end of an epoch
        self._dataflex.last_step = {"step": step, "epoch ended": ended, "grad_norm": grad_norm, "learning_rate": learning_rate}
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._go_on(True, trial, None, start_time)
        output = super()._finalize_training(trial, num_train_samples, start_time)
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        check_still_there(str(self.args.output_dir))
        if "train_loss" in logs and "total" in self._dataflex.resumed.get("pending", {}):
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)  # of the whole run, not of what was left of it
        super().log(logs, *args, **kwargs)

    # ---------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_still_there(str(self.args.output_dir))
        if self.args.save_only_model:
            return super()._save_checkpoint(model, trial)
        run_dir = self._get_output_dir(trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        state, tensors = self._state()
        if self.args.should_save:
            _remove(folder)  # what an earlier run left there would make a half-written checkpoint look whole
            save_state(folder, state, tensors)
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self._write_manifest(folder)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)
        return None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.args.save_total_limit = None  # the host deletes older checkpoints next, but this one is not whole before it has a manifest

    def _write_manifest(self, folder: Path) -> None:
        """List the files of a checkpoint once all ranks have written theirs. Each reads a share of them."""
        self.accelerator.wait_for_everyone()
        share = self._share()
        first = self.args.process_index - share.index if self.args.save_on_each_node else 0
        files = gather_objects(files_of(folder))[first]
        try:
            found: Any = describe(folder, share.of(files))
        except OSError as error:
            found = f"{folder} could not be completed: {error.filename}: {error.strerror}"
        parts = gather_objects(found)
        for part in parts:
            if isinstance(part, str):
                raise TrainingError(part)
        if self.args.should_save:
            write_manifest(
                folder, self.state.global_step, {name: entry for part in parts[first : first + share.size] for name, entry in part.items()}
            )

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Everything beyond the host's own checkpoint. All ranks must call: pending losses are gathered."""
        logged = hosts.logging_state(self)
        losses = gather_rows(torch.tensor([logged["loss"]], dtype=torch.float64))[:, 0].tolist()
        last = self._dataflex.last_step
        state = {
            "global_step": self.state.global_step,
            "settings": self._dataflex.settings,
            "callbacks": self._dataflex.callbacks,
            "pending": {
                "loss": losses,
                "total": float(self._total_loss_scalar),
                "last_logged": logged["last_logged"],
                "last step": last and {**last, **{name: _number(last[name]) for name in ("grad_norm", "learning_rate")}},
                "training": self.model_wrapped.training,
                "host": hosts.host_state(self),
            },
        }
        return state, {}


def _agreed(flaws: list[str]) -> list[str]:
    """What any rank has found."""
    return sorted({flaw for found in gather_objects(flaws) for flaw in found})


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _stateful(callbacks: list[Any], part: str) -> dict[str, list[dict[str, Any]]]:
    """`args` or `attributes` of the stateful callbacks, by class name and in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(callback.state().get(part, {}))
    return found


def _restore_callbacks(callbacks: list[Any], saved: dict[str, Any], made_before: dict[str, list[dict[str, Any]]]) -> None:
    """Set what stateful callbacks had counted. What they are made with is this run's, unless it is state, too: it changed while it was the
    same at the start.

    Args:
        saved: the host's record of them by class name, whose last entries are the newest.
        made_before: their `args` when the interrupted run began.
    """
    for name, now in _stateful(callbacks, "args").items():
        entries = saved.get(name, [])
        entries = entries[-len(now) :] if isinstance(entries, list) else [entries]
        before = made_before.get(name, [])
        for number, (callback, entry) in enumerate(zip((c for c in callbacks if type(c).__name__ == name), entries, strict=False)):
            values = dict(entry.get("attributes", {}))
            if number < len(before) and before[number] == now[number]:
                values |= {key: value for key, value in entry.get("args", {}).items() if value != before[number].get(key)}
            for key, value in values.items():
                setattr(callback, key, value)
