"""SIGTERM, as clusters send it before they take a machine away: save a checkpoint at the end of the step, and leave."""

from __future__ import annotations

import os
import signal
import threading
from functools import cached_property
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataflex.utils.distributed import rank, world_size
from dataflex.utils.logging import logger

EXIT_CODE = 128 + signal.SIGTERM


class SaveOnSigterm(TrainerCallback):
    """Ends training with a checkpoint and exit code 143 after SIGTERM, unless the program has a handler of its own.

    A step costs nothing until the signal is there. Several ranks get it in different steps and must stop after the same one: each says in
    the store through which the ranks found each other at the end of which step it has seen the signal. No rank can finish the step after
    the latest of these before all have spoken, since every step's gradients are summed over the ranks; so all stop after that step.
    """

    def __init__(self) -> None:
        self.asked = self._spoken = False
        self._saved_at = -1
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.asked = self._spoken = False
        main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked and self._all_stop_after(state.global_step):
            control.should_save = control.should_training_stop = True
            self._saved_at = state.global_step

    def _all_stop_after(self, step: int) -> bool:
        if world_size() == 1:
            return True
        if not self._spoken:
            self._spoken = True
            self._store.set(f"{rank()}", str(step))
        names = [f"{number}" for number in range(world_size())]
        return self._store.check(names) and step > max(int(self._store.get(name)) for name in names)

    @cached_property
    def _store(self) -> dist.Store:
        """Where the ranks leave word for each other, by the address under which they met."""
        server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return dist.PrefixStore("dataflex/sigterm", server)

    def release(self) -> None:
        """Give the signal back to whoever had it, also after training that ended with an error."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.release()
        if self._saved_at == state.global_step:
            if world_size() > 1:
                dist.barrier()  # torchrun kills a rank that still writes when another has left
            logger.warning(
                "SIGTERM: stopped after step %d, which checkpoint-%d in %s holds; resume_from_checkpoint: true goes on from there",
                state.global_step,
                state.global_step,
                args.output_dir,
            )
            raise SystemExit(EXIT_CODE)
        if self.asked:
            logger.warning("SIGTERM: training had ended by then; what is left to do is done")
